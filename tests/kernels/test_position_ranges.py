"""Ranges of positions and keys: the kernel and its torch twin against a loop over sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards
from sfs_triton.kernels import position_ranges as kernel
from sfs_triton.kernels.control import COLUMN, CONTROL, FAST, SLOW
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.position_ranges import PositionRangesConfig, position_ranges_config
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = ("limit", "stage", "stage_step", "span_end", "block_start", "block_end", "done")


def as_state(control: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(control=control, **{name: control[:, index] for name, index in COLUMN.items()})


def make(guards: Guards, numbers: list[dict[str, int]]) -> SimpleNamespace:
    """Make a state with these control values per sequence; no others may matter."""
    control = guards.empty(len(numbers), len(CONTROL), dtype=torch.int64)
    for row, values in enumerate(numbers):
        for name, value in values.items():
            control[row, COLUMN[name]] = value
    return as_state(control)


def by_hand(numbers: dict[str, int], capacity: int | None, to_span_end: bool, block: str | None) -> tuple:
    """Compute positions, count and key range of one sequence, as the twin's docstring defines them."""
    n = SimpleNamespace(**numbers)
    if n.done:
        return [-1] * (capacity or 0), 0, [0, 0, 0, 0]
    first, stop, keys = 0, n.limit, n.limit
    if to_span_end and n.stage == FAST and n.stage_step > 0:
        stop = keys = min(n.span_end, n.limit)
    if block is not None and n.stage_step > 0:
        first = n.block_start
        if block == "own":
            stop = min(n.block_end, n.limit)
    rows = list(range(first, stop))
    if capacity is not None:
        rows = rows[:capacity]
    return rows + [-1] * ((capacity or 0) - len(rows)), len(rows), [0, keys, 0, 0]


def assert_position_ranges(numbers: list[dict[str, int]], capacity: int | None, **how) -> None:
    guards = Guards(DEVICE)
    state = make(guards, numbers)
    before = state.control.clone()
    wanted = [by_hand(values, capacity, **how) for values in numbers]
    for ops in (torch_impl, triton_impl):
        rows = None if capacity is None else guards.empty(len(numbers), capacity, dtype=torch.int32)
        count = guards.empty(len(numbers), dtype=torch.int32)
        key_range = guards.empty(len(numbers), 4, dtype=torch.int32)
        ops.position_ranges(state, rows, count, key_range, **how)
        assert count.tolist() == [count for _, count, _ in wanted]
        assert key_range.tolist() == [keys for *_, keys in wanted]
        assert rows is None or rows.tolist() == [rows for rows, *_ in wanted]
    assert torch.equal(state.control, before)
    guards.check()


@st.composite
def rows_of_numbers(draw) -> dict[str, int]:
    limit = draw(st.integers(0, 50))
    start, end = sorted(draw(st.tuples(st.integers(0, 60), st.integers(0, 60))))
    stage = draw(st.sampled_from([SLOW, FAST]))
    known = st.integers(0, 60)
    return {
        "limit": limit,
        "stage": stage,
        "stage_step": draw(st.integers(0, 2)),
        "span_end": draw(known if stage == FAST else known | st.just(-1)),
        "block_start": start,
        "block_end": end,
        "done": draw(st.sampled_from([0, 0, 0, 1])),
    }


@pytest.mark.parametrize("block", [None, "rest", "own"])
@pytest.mark.parametrize("to_span_end", [False, True], ids=["all", "span"])
@settings(max_examples=15, deadline=None)
@given(
    numbers=st.lists(rows_of_numbers(), max_size=4),
    capacity=st.none() | st.integers(1, 80),
)
def test_equals_its_twin_and_a_loop(numbers, capacity, to_span_end, block):
    assert_position_ranges(numbers, capacity, to_span_end=to_span_end, block=block)


NUMBERS_OF_A_STEP = {
    **{"limit": 2100, "stage": FAST, "stage_step": 2, "span_end": 900},
    **{"block_start": 700, "block_end": 1900, "done": 0},
}


@pytest.mark.parametrize(("capacity", "size"), [(1200, 512), (2048, 1024), (4000, None)])
def test_lists_of_several_programs(monkeypatch, capacity, size):
    if size:
        monkeypatch.setattr(kernel, "position_ranges_config", lambda capacity: PositionRangesConfig(size, 1))
    numbers = [NUMBERS_OF_A_STEP, NUMBERS_OF_A_STEP | {"done": 1}, NUMBERS_OF_A_STEP | {"stage_step": 0}]
    for block in (None, "rest", "own"):
        assert_position_ranges(numbers, capacity, to_span_end=False, block=block)


def test_a_row_that_is_done_reads_nothing_of_its_span():
    """Its span may be unknown, which is -1."""
    numbers = NUMBERS_OF_A_STEP | {"span_end": -1, "done": 1}
    assert_position_ranges([numbers], 8, to_span_end=True, block="own")


def test_configuration_and_grid():
    assert [position_ranges_config(n) for n in (0, 1, 32, 1024, 4096)] == [
        PositionRangesConfig(*sizes) for sizes in ((16, 1), (16, 1), (32, 1), (1024, 8), (1024, 8))
    ]
    control = torch.empty((3, len(CONTROL)), dtype=torch.int64, device="meta")
    rows, count, key_range = (
        torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((3, 2500), (3,), (3, 4))
    )
    for listed, grid in ((rows, (3, 3)), (None, (3, 1))):
        with recording() as recorded:
            kernel.position_ranges(control, listed, count, key_range, to_span_end=True, block=None)
        assert [launch.grid for launch in recorded] == [grid]


def test_the_twin_needs_no_data():
    state = as_state(torch.empty((3, len(CONTROL)), dtype=torch.int64, device="meta"))
    rows, count, key_range = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((3, 25), (3,), (3, 4)))
    for listed in (rows, None):
        torch_impl.position_ranges(state, listed, count, key_range, to_span_end=True, block="own")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"control": torch.zeros((2, 3), dtype=torch.int64)}, r"control has shape \[2, 3\]"),
        ({"control": torch.zeros((2, len(CONTROL)), dtype=torch.int32)}, "control has dtype int32"),
        ({"rows": torch.zeros((2, 4), dtype=torch.int64)}, "rows has dtype int64"),
        ({"rows": torch.zeros((3, 4), dtype=torch.int32)}, r"rows has shape \[3, 4\]"),
        ({"rows": torch.zeros((2, 0), dtype=torch.int32)}, "rows has room for 0"),
        ({"rows": torch.zeros((2, 8), dtype=torch.int32)[:, ::2]}, "rows has strides"),
        ({"count": torch.zeros(3, dtype=torch.int32)}, r"count has shape \[3\]"),
        ({"count": torch.zeros(2, dtype=torch.int32, device="meta")}, "count is on device 'meta'"),
        ({"key_range": torch.zeros((2, 2), dtype=torch.int32)}, r"key_range has shape \[2, 2\]"),
        ({"block": "all"}, "block='all'"),
    ],
)
def test_arguments_are_checked(changes, named):
    sizes = {"rows": (2, 4), "count": (2,), "key_range": (2, 4)}
    given_ = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in sizes.items()}
    control = {"control": torch.zeros((2, len(CONTROL)), dtype=torch.int64)}
    how = {**control, **given_, "to_span_end": True, "block": None, **changes}
    device = torch.device(DEVICE)
    how = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in how.items()
    }
    with pytest.raises(ValueError, match=named):
        kernel.position_ranges(**how)
