"""The condition of a graph's conditional node: one tiny launch an iteration. Timed without a graph to set it in."""

from __future__ import annotations

from functools import partial

import torch

from sfs_triton.kernels.conditional import NO_HANDLE, set_condition, set_condition_cost
from sfs_triton.kernels.control import COLUMN, CONTROL

from .case import Case
from .harness import benchmark_of


def set_condition_twin(
    flags: torch.Tensor, *, when: bool, handle: torch.Tensor | None = None, value: torch.Tensor | None = None
) -> None:
    """The condition in plain torch, which can set no handle."""
    if value is not None:
        value.copy_((flags != 0).all() == when)


def _build(device: torch.device, *, batch: int, when: bool, n_set: int, handle: bool) -> dict:
    """One flag of its own, or the column of a control matrix that says which rows are done."""
    columns = len(CONTROL) if batch > 1 else 1
    flags = torch.zeros((batch, columns), dtype=torch.int64, device=device)[:, COLUMN["done"] % columns]
    flags[:n_set] = 1
    value = torch.full((1,), -7, dtype=torch.int32, device=device)
    handles = {"handle": torch.full((1,), NO_HANDLE, device=device)} if handle else {}
    return {"flags": flags, "when": when, "value": value, **handles}


def cases(toy: bool = False) -> list[Case]:
    """Toys have no handle: Triton's interpreter cannot call what sets it."""
    return [
        Case(
            name=f"{'toy-' if toy else ''}{'all' if when else 'any-left'}-{n_set}of{batch}",
            kernel=set_condition,
            twin=set_condition_twin,
            build=partial(_build, batch=batch, when=when, n_set=n_set, handle=not toy),
            cost=set_condition_cost(batch),
        )
        for batch in ((1, 3) if toy else (1, 16))
        for n_set in sorted({0, batch - 1, batch})
        for when in (False, True)
    ]


test_conditional = benchmark_of(cases)
