"""Decode states in the middle of a generation, for the benchmarks of the step machines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfs_triton.decoding.samplers import FixedSteps, Sampler
from sfs_triton.kernels.control import COLUMN, SAMPLING_COLUMN, SLOW
from sfs_triton.runner.state import DecodeState


def decode_state(
    sampler: Sampler,
    *,
    batch: int,
    prompt: int,
    response: int,
    device: torch.device,
    trace: bool = False,
    other_ends: Sequence[int] = (),
) -> DecodeState:
    """Make a state whose sequences have half of their response decided, at random positions, and scores everywhere."""
    generator = torch.Generator().manual_seed(0)
    mask_id, eos_id = 1, 2
    state = DecodeState.allocate(
        [[0] * prompt + [mask_id] * response] * batch,
        [prompt] * batch,
        mask_id=mask_id,
        eos_id=eos_id,
        window=getattr(sampler, "window", 1),
        block_length=sampler.block_length,
        seeds=[0] * batch,
        caps=[2**31] * batch,
        sampling=sampler.sampling_values(),
        device=torch.device("cpu"),
        trace=trace,
        other_ends=other_ends,
    )
    shape = state.masked.shape
    decided = state.masked & (torch.rand(shape, generator=generator) < 0.5)
    state.masked.logical_and_(~decided)
    state.commit_step.masked_fill_(decided, 0)
    state.token.copy_(torch.randint(3, 1000, shape, generator=generator))
    state.score.copy_(torch.rand(shape, generator=generator))
    state.dirty.copy_(decided & (torch.rand(shape, generator=generator) < 0.05))
    state.forwarded.copy_(torch.randint(-1, 30, shape, generator=generator))
    state.control[:, COLUMN["step"]] = 30
    state.control[:, COLUMN["stage"]] = SLOW
    state.control[:, COLUMN["block_steps"]] = 64
    state.candidate.copy_(state.masked)
    if sampler.draw().entropy:
        state.choice_entropy = torch.rand(state.choice_score.shape, generator=generator)
    if isinstance(sampler, FixedSteps):
        state.shares = torch.full((batch, 64), 0.05)
        state.uniform = torch.rand((batch, 64 * response), generator=generator)
    names = [name for name in DecodeState.__slots__ if isinstance(getattr(state, name, None), torch.Tensor)]
    for name in names:
        if name not in {*COLUMN, *SAMPLING_COLUMN}:
            setattr(state, name, getattr(state, name).to(device))
    if trace:
        state.events = {name: value.to(device) for name, value in state.events.items()}
    state.__post_init__()
    return state
