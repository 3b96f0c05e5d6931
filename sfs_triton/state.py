"""Every tensor of a generation, allocated once at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .kernels.control import COLUMN, CONTROL


@dataclass(slots=True)
class DecodeState:
    """The canvas of ``B`` rows and ``L`` positions, and where each row stands. Rows may differ in every length."""

    tokens: torch.Tensor  # int64 [B, L]; undecided positions hold the mask id
    masked: torch.Tensor  # bool [B, L]
    given: torch.Tensor  # bool [B, L]: not to be decided
    inside: torch.Tensor  # bool [B, L]: where the step looks
    choice_token: torch.Tensor  # int64 [B L + 1]: what the last forward chose, where it was looked at; one to spare
    choice_score: torch.Tensor  # float32 [B L + 1]: the score of that choice
    commit_step: torch.Tensor  # int64 [B, L]: step that filled a position, -1 never or given
    fill: torch.Tensor  # bool [B, L]: what the last step committed
    dirty: torch.Tensor  # bool [B, L]: committed since it was last forwarded
    forwarded: torch.Tensor  # int64 [B, L]: step at which a row list last held the position, -1 never
    position: torch.Tensor  # int64 [L]
    history: torch.Tensor  # int64 [B, W]: candidate horizons, counted from the block's start
    history_slot: torch.Tensor  # int64 [W]
    spread: torch.Tensor  # float64 [B]: of the history at this step, NaN if not estimated
    seed: torch.Tensor  # int64 [B]
    uniform: torch.Tensor  # float32 [B, n]: a row's stream of uniform numbers, where a sampler reads one
    shares: torch.Tensor  # float32 [B, n]: a row's schedule, where a sampler has one
    control: torch.Tensor  # int64 [B, len(CONTROL)]
    length: int
    mask_id: int
    eos_id: int
    events: dict[str, torch.Tensor] | None  # what the last step decided on, when a trace was asked for
    token: torch.Tensor = field(init=False)  # int64 [B, L]: the choices by position
    score: torch.Tensor = field(init=False)  # float32 [B, L]
    start: torch.Tensor = field(init=False)
    end: torch.Tensor = field(init=False)
    limit: torch.Tensor = field(init=False)
    block: torch.Tensor = field(init=False)
    block_start: torch.Tensor = field(init=False)
    block_end: torch.Tensor = field(init=False)
    s: torch.Tensor = field(init=False)
    e: torch.Tensor = field(init=False)
    phase: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    cycle: torch.Tensor = field(init=False)
    determined: torch.Tensor = field(init=False)
    n_history: torch.Tensor = field(init=False)
    estimate: torch.Tensor = field(init=False)
    block_steps: torch.Tensor = field(init=False)
    quota: torch.Tensor = field(init=False)
    step: torch.Tensor = field(init=False)
    cap: torch.Tensor = field(init=False)
    masks_left: torch.Tensor = field(init=False)
    listed: torch.Tensor = field(init=False)
    done: torch.Tensor = field(init=False)
    fault: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        for index, name in enumerate(CONTROL):
            setattr(self, name, self.control[:, index])
        self.token = self.choice_token[:-1].view(self.tokens.shape)
        self.score = self.choice_score[:-1].view(self.tokens.shape)

    @classmethod
    def allocate(
        cls,
        rows: list[list[int]],
        starts: list[int],
        *,
        mask_id: int,
        eos_id: int,
        window: int,
        block_length: int | None,
        seeds: list[int],
        caps: list[int],
        device: torch.device,
        trace: bool,
    ) -> DecodeState:
        """State for canvases ``rows`` (token ids, undecided positions hold ``mask_id``), decoded from ``starts`` on.

        ``caps`` are the most steps that each row can need; one that needs more ends with a fault.
        """
        shape = {"batch": len(rows), "length": max(map(len, rows)), "window": window}
        state = cls.blank(**shape, mask_id=mask_id, eos_id=eos_id, device=device, trace=trace)
        state.begin(rows, starts, block_length=block_length, seeds=seeds, caps=caps)
        return state

    @classmethod
    def blank(
        cls, *, batch: int, length: int, window: int, mask_id: int, eos_id: int, device: torch.device, trace: bool
    ) -> DecodeState:
        """Tensors for ``batch`` canvases of ``length``, all zero until :meth:`begin` puts some there."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def canvas(dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return zeros(batch, length, dtype=dtype)

        control, history = zeros(batch, len(CONTROL)), zeros(batch, window)
        spread = zeros(batch, dtype=torch.float64)
        events = None
        if trace:
            events = {
                "control": torch.zeros_like(control),
                "history": torch.zeros_like(history),
                "spread": torch.zeros_like(spread),
                "score": canvas(torch.float32),
                "inside": canvas(torch.bool),
            }
        return cls(
            tokens=canvas(),
            masked=canvas(torch.bool),
            given=canvas(torch.bool),
            inside=canvas(torch.bool),
            choice_token=zeros(batch * length + 1),
            choice_score=zeros(batch * length + 1, dtype=torch.float32),
            commit_step=canvas(),
            fill=canvas(torch.bool),
            dirty=canvas(torch.bool),
            forwarded=canvas(),
            position=torch.arange(length, device=device),
            history=history,
            history_slot=torch.arange(window, device=device),
            spread=spread,
            seed=zeros(batch),
            uniform=torch.zeros((batch, 0), device=device),
            shares=torch.zeros((batch, 0), device=device),
            control=control,
            length=length,
            mask_id=mask_id,
            eos_id=eos_id,
            events=events,
        )

    def begin(
        self, rows: list[list[int]], starts: list[int], *, block_length: int | None, seeds: list[int], caps: list[int]
    ) -> None:
        """Put canvases into tensors that are there already; arguments as for :meth:`allocate`."""
        tokens = torch.full(self.tokens.shape, self.eos_id, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        begin, end = torch.tensor(starts), torch.tensor([len(row) for row in rows])
        place = torch.arange(self.length)
        masked = (tokens == self.mask_id) & (place >= begin[:, None]) & (place < end[:, None])
        control = torch.zeros(self.control.shape, dtype=torch.int64)
        size = (end - begin if block_length is None else torch.full_like(end, block_length)).clamp(min=1)
        index = torch.where(masked.any(1), (masked.int().argmax(1) - begin) // size, 0)  # the first block with a mask
        block = begin + index * size
        values = {
            "start": begin,
            "end": end,
            "limit": end,
            "block": index,
            "block_start": block,
            "block_end": torch.minimum(block + size, end),
            "s": block,
            "e": -1,
            "estimate": -1,
            "cap": torch.tensor([min(cap, 2**31 - 1) for cap in caps]),  # kernels count in 32 bits
            "masks_left": masked.sum(1),
            "done": (~masked.any(1)).long(),
        }
        for name, value in values.items():
            control[:, COLUMN[name]] = value
        given = {"tokens": tokens, "masked": masked, "given": ~masked, "control": control, "seed": torch.tensor(seeds)}
        for name, value in given.items():
            getattr(self, name).copy_(value)
        blank = {"commit_step": -1, "forwarded": -1, "spread": float("nan")}
        for name in ("inside", "choice_token", "choice_score", "fill", "dirty", "history", *blank):
            getattr(self, name).fill_(blank.get(name, 0))

    def record_event(self, control: torch.Tensor, history: torch.Tensor) -> None:
        """Keep what this step decides on: ``control`` and ``history`` are those before anything is committed."""
        values = {"control": control, "history": history, "spread": self.spread, "score": self.score}
        for name, value in {**values, "inside": self.inside}.items():
            self.events[name].copy_(value)
