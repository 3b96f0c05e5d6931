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
    inside: torch.Tensor  # bool [B, L]: where the step looks
    token: torch.Tensor  # int64 [B, L]: what the last forward chose, where it was looked at
    score: torch.Tensor  # float32 [B, L]: the score of that choice
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
    events: list[dict] | None  # a record a step, when a trace was asked for
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
    done: torch.Tensor = field(init=False)
    fault: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        for index, name in enumerate(CONTROL):
            setattr(self, name, self.control[:, index])

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
        length = max(len(row) for row in rows)
        tokens = torch.full((len(rows), length), eos_id, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        batch = len(rows)
        begin, end = torch.tensor(starts), torch.tensor([len(row) for row in rows])
        masked = (tokens == mask_id) & (torch.arange(length) >= begin[:, None])
        control = torch.zeros((batch, len(CONTROL)), dtype=torch.int64)
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
        return cls(
            tokens=tokens.to(device),
            masked=masked.to(device),
            inside=torch.zeros_like(masked, device=device),
            token=torch.zeros((batch, length), dtype=torch.int64, device=device),
            score=torch.zeros((batch, length), dtype=torch.float32, device=device),
            commit_step=torch.full((batch, length), -1, dtype=torch.int64, device=device),
            fill=torch.zeros_like(masked, device=device),
            dirty=torch.zeros_like(masked, device=device),
            forwarded=torch.full((batch, length), -1, dtype=torch.int64, device=device),
            position=torch.arange(length, device=device),
            history=torch.zeros((batch, window), dtype=torch.int64, device=device),
            history_slot=torch.arange(window, device=device),
            spread=torch.full((batch,), float("nan"), dtype=torch.float64, device=device),
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
            uniform=torch.zeros((batch, 0), device=device),
            shares=torch.zeros((batch, 0), device=device),
            control=control.to(device),
            length=length,
            mask_id=mask_id,
            eos_id=eos_id,
            events=[] if trace else None,
        )

    def record_event(self, control: torch.Tensor, history: torch.Tensor) -> None:
        """Keep what this step decided: ``control`` and ``history`` as they were before it was committed."""
        self.events.append(
            {
                "control": control,
                "history": history,
                "spread": self.spread.clone(),
                "score": self.score.clone(),
                "inside": self.inside.clone(),
            }
        )
