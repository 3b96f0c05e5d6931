"""Decode state: every tensor of a generation, allocated once at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..kernels.control import COLUMN, CONTROL, SAMPLING, Progress


def send(there: torch.Tensor, values: list | torch.Tensor) -> None:
    """Copy host numbers to a tensor without waiting for the device."""
    here = torch.as_tensor(values, dtype=there.dtype, device="cpu")
    there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)


@dataclass(slots=True)
class DecodeState:
    """Canvases of ``L`` positions in ``B`` slots, and the progress of each. Sequences may differ in every length."""

    tokens: torch.Tensor  # int64 [B, L]; undecided positions hold the mask id
    masked: torch.Tensor  # bool [B, L]
    given: torch.Tensor  # bool [B, L]: not to be decided
    candidate: torch.Tensor  # bool [B, L]: candidates of the step
    choice_token: torch.Tensor  # int64 [B L + 1]: token chosen by the last forward, at candidates; one spare element
    choice_score: torch.Tensor  # float32 [B L + 1]: the score of that choice
    choice_entropy: torch.Tensor  # float32 [B L + 1]: the entropy there; no element if the sampler needs none
    commit_step: torch.Tensor  # int64 [B, L]: step that filled a position, -1 never or given
    fill: torch.Tensor  # bool [B, L]: positions committed by the last step
    dirty: torch.Tensor  # bool [B, L]: committed since it was last forwarded
    forwarded: torch.Tensor  # int64 [B, L]: step at which a row list last held the position, -1 never
    position: torch.Tensor  # int64 [L]
    history: torch.Tensor  # int64 [B, W]: candidate horizons, counted from the block's start
    history_slot: torch.Tensor  # int64 [W]
    spread: torch.Tensor  # float64 [B]: variance of the history at this step, NaN if not estimated
    seed: torch.Tensor  # int64 [B]
    uniform: torch.Tensor  # float32 [B, n]: stream of uniform numbers per sequence, if the sampler reads one
    shares: torch.Tensor  # float32 [B, n]: schedule per sequence, if the sampler has one
    control: torch.Tensor  # int64 [B, len(CONTROL)]
    sampling: torch.Tensor  # float32 [B, len(SAMPLING)]: sampler parameters per sequence
    other_ends: torch.Tensor  # int64 [n]: tokens that end a sequence as ``eos_id`` does
    length: int
    mask_id: int
    eos_id: int
    events: dict[str, torch.Tensor] | None  # inputs of the last decision; None without a trace
    token: torch.Tensor = field(init=False)  # int64 [B, L]: the choices by position
    score: torch.Tensor = field(init=False)  # float32 [B, L]
    entropy: torch.Tensor = field(init=False)  # float32 [B, L] or [0]
    start: torch.Tensor = field(init=False)
    end: torch.Tensor = field(init=False)
    limit: torch.Tensor = field(init=False)
    block: torch.Tensor = field(init=False)
    block_start: torch.Tensor = field(init=False)
    block_end: torch.Tensor = field(init=False)
    span_start: torch.Tensor = field(init=False)
    span_end: torch.Tensor = field(init=False)
    stage: torch.Tensor = field(init=False)
    stage_step: torch.Tensor = field(init=False)
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
    temperature: torch.Tensor = field(init=False)
    top_p: torch.Tensor = field(init=False)
    tau_min: torch.Tensor = field(init=False)
    tau_slow: torch.Tensor = field(init=False)
    tau: torch.Tensor = field(init=False)
    tau_low: torch.Tensor = field(init=False)
    bound: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        for index, name in enumerate(CONTROL):
            setattr(self, name, self.control[:, index])
        for index, name in enumerate(SAMPLING):
            setattr(self, name, self.sampling[:, index])
        self.token = self.choice_token[:-1].view(self.tokens.shape)
        self.score = self.choice_score[:-1].view(self.tokens.shape)
        entropies = self.choice_entropy
        self.entropy = entropies[:-1].view(self.tokens.shape) if len(entropies) else entropies

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
        sampling: Mapping[str, float],
        device: torch.device,
        trace: bool,
        other_ends: Sequence[int] = (),
        entropy: bool = False,
    ) -> DecodeState:
        """Return a state of canvases ``rows`` (token ids; undecided ones are ``mask_id``), decoded from ``starts`` on.

        ``caps`` are step limits per sequence; one that needs more ends with a fault. ``sampling`` are the per-sequence
        parameters of the sampler.
        """
        shape = {"batch": len(rows), "length": max(map(len, rows)), "window": window}
        how = {"mask_id": mask_id, "eos_id": eos_id, "other_ends": other_ends, "device": device, "trace": trace}
        state = cls.blank(**shape, **how, entropy=entropy)
        for slot, (row, start, seed, cap) in enumerate(zip(rows, starts, seeds, caps, strict=True)):
            state.put(slot, row, start, block_length=block_length, seed=seed, cap=cap, sampling=sampling)
        return state

    @classmethod
    def blank(
        cls,
        *,
        batch: int,
        length: int,
        window: int,
        mask_id: int,
        eos_id: int,
        device: torch.device,
        trace: bool,
        entropy: bool = False,
        other_ends: Sequence[int] = (),
    ) -> DecodeState:
        """Allocate tensors for ``batch`` canvases of ``length``. Slots are free until :meth:`put` fills them."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def canvas(dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return zeros(batch, length, dtype=dtype)

        control, history = zeros(batch, len(CONTROL)), zeros(batch, window)
        control[:, COLUMN["done"]] = 1
        spread = zeros(batch, dtype=torch.float64)
        events = None
        if trace:
            events = {
                "control": torch.zeros_like(control),
                "history": torch.zeros_like(history),
                "spread": torch.zeros_like(spread),
                "score": canvas(torch.float32),
                "candidate": canvas(torch.bool),
            }
        return cls(
            tokens=canvas(),
            masked=canvas(torch.bool),
            given=canvas(torch.bool),
            candidate=canvas(torch.bool),
            choice_token=zeros(batch * length + 1),
            choice_score=zeros(batch * length + 1, dtype=torch.float32),
            choice_entropy=zeros(batch * length + 1 if entropy else 0, dtype=torch.float32),
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
            sampling=torch.ones((batch, len(SAMPLING)), dtype=torch.float32, device=device),
            other_ends=torch.tensor(other_ends, dtype=torch.int64, device=device),
            length=length,
            mask_id=mask_id,
            eos_id=eos_id,
            events=events,
        )

    @torch.inference_mode()
    def put(
        self,
        slot: int,
        row: list[int],
        start: int,
        *,
        block_length: int | None,
        seed: int,
        cap: int,
        sampling: Mapping[str, float],
        block_steps: int = 0,
        open_blocks: int = 1,
    ) -> Progress:
        """Put a canvas into a slot whose sequence is done, in stream order; return its progress.

        ``cap`` is its step limit, ``sampling`` are its sampler's parameters, ``block_steps`` is the number of steps
        that a schedule gives to each block, and ``open_blocks`` how many blocks are open at its first step.
        """
        end, masks = len(row), [p for p in range(start, len(row)) if row[p] == self.mask_id]
        size = max(1, end - start if block_length is None else block_length)
        block = (masks[0] - start) // size if masks else 0  # the first that holds a mask
        begin = start + block * size
        values = {
            **{"start": start, "end": end, "limit": end},
            **{"block": block, "block_start": begin, "block_end": min(begin + size * open_blocks, end)},
            **{"span_start": begin, "span_end": -1, "estimate": -1, "block_steps": block_steps},
            "cap": min(cap, 2**31 - 1),  # kernels count in 32 bits
            **{"masks_left": len(masks), "done": int(not masks)},
        }
        progress = Progress(*(values.get(column, 0) for column in CONTROL))
        send(self.tokens[slot], row + [self.eos_id] * (self.length - end))
        masked = self.masked[slot]
        torch.eq(self.tokens[slot], self.mask_id, out=masked)
        masked[:start] = False
        masked[end:] = False
        torch.logical_not(masked, out=self.given[slot])
        self.seed[slot : slot + 1].fill_(seed)
        send(self.sampling[slot], [sampling.get(name, math.inf) for name in SAMPLING])
        fresh = {"commit_step": -1, "forwarded": -1, "spread": float("nan")}
        for name in ("candidate", "token", "score", "fill", "dirty", "history", *fresh):
            getattr(self, name)[slot : slot + 1].fill_(fresh.get(name, 0))
        send(self.control[slot], list(progress))  # last: this marks the slot as running
        return progress

    def record_event(self, control: torch.Tensor, history: torch.Tensor) -> None:
        """Record the inputs of this decision: ``control`` and ``history`` as they are before the commit."""
        values = {"control": control, "history": history, "spread": self.spread, "score": self.score}
        for name, value in {**values, "candidate": self.candidate}.items():
            self.events[name].copy_(value)
