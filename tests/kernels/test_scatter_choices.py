"""Choices put at their positions: the kernel and its torch twin against a loop over entries."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards
from sfs_triton import SlowFast
from sfs_triton.kernels import scatter_choices as kernel
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.scatter_choices import ScatterChoicesConfig, scatter_choices_config
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl
from sfs_triton.runner.state import DecodeState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(guards: Guards, batch: int, length: int) -> DecodeState:
    """A state whose choices are poison between guard bands."""
    state = DecodeState.allocate(
        [[0] * length] * batch, [0] * batch, mask_id=1, eos_id=2, window=1, block_length=None,
        seeds=[0] * batch, caps=[1] * batch, sampling=SlowFast().sampling_values(), device=DEVICE, trace=False,
    )  # fmt: skip
    size = batch * length + 1
    return dataclasses.replace(
        state, choice_token=guards.empty(size, dtype=torch.int64), choice_score=guards.empty(size)
    )


def random_list(rng: random.Random, n_canvas: int, length: int, batch: int, listed: int, mode: str) -> dict:
    """Make a list of ``batch`` rows whose live slots have different positions, and choices for all or some slots."""
    target = [rng.sample(range(length), min(listed, length)) for _ in range(batch)]
    target = [[place if rng.random() < 0.7 else -1 for place in row] + [-1] * (listed - len(row)) for row in target]
    which = None
    if "which" in mode:
        which = [slot if rng.random() < 0.8 else -1 for slot in rng.sample(range(batch * listed), batch * listed)]
        which = which[: rng.randint(0, len(which))]
    n = batch * listed if which is None else len(which)
    return {
        "token": [rng.randrange(150_000) for _ in range(n)],
        "score": [rng.choice([0.25, 1.0, -3.5, float("nan"), rng.random()]) for _ in range(n)],
        "target": target,
        "which": which,
        "row": rng.sample(range(n_canvas), batch) if "row" in mode else None,
    }


def tensors(guards: Guards, lists: dict, listed: int) -> dict[str, torch.Tensor | None]:
    dtypes = {"score": torch.float32, "row": torch.int64}
    given_ = {
        name: None if value is None else torch.tensor(value, dtype=dtypes.get(name, torch.int32))
        for name, value in lists.items()
    }
    given_["target"] = given_["target"].view(len(lists["target"]), listed)
    return {name: None if value is None else guards.copy(value) for name, value in given_.items()}


def by_hand(token: torch.Tensor, score: torch.Tensor, lists: dict, listed: int) -> None:
    """Fill ``token`` and ``score [B, L]`` as the twin's docstring says."""
    for entry, choice in enumerate(lists["token"]):
        slot = entry if lists["which"] is None else lists["which"][entry]
        if slot < 0 or lists["target"][slot // listed][slot % listed] < 0:
            continue
        batch_row = slot // listed
        row = batch_row if lists["row"] is None else lists["row"][batch_row]
        place = lists["target"][batch_row][slot % listed]
        token[row, place], score[row, place] = choice, lists["score"][entry]


def assert_scatter_choices(seed: int, n_canvas: int, length: int, batch: int, listed: int, mode: str) -> None:
    guards = Guards(DEVICE)
    lists = random_list(random.Random(seed), n_canvas, length, batch, listed, mode)
    inputs = tensors(guards, lists, listed)
    before = {name: None if value is None else value.clone() for name, value in inputs.items()}
    state = make(guards, n_canvas, length)
    wanted = state.token.cpu().clone(), state.score.cpu().clone()
    by_hand(*wanted, lists, listed)
    for ops in (triton_impl, torch_impl):
        mine = make(guards, n_canvas, length)
        spare = mine.choice_token[-1].item()
        ops.scatter_choices(mine, **inputs)
        assert mine.token.tolist() == wanted[0].tolist()
        assert torch.equal(mine.score.cpu().view(torch.int32), wanted[1].view(torch.int32))  # NaN and all
        if ops is triton_impl:
            assert mine.choice_token[-1] == spare and mine.choice_score[-1].isnan()
    for name, value in inputs.items():
        assert value is None or torch.equal(value.nan_to_num(7.5), before[name].nan_to_num(7.5)), name
    guards.check()


@pytest.mark.parametrize("mode", ["slots", "which", "row", "which and row"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_canvas=st.integers(1, 4),
    length=st.integers(1, 30),
    batch=st.integers(0, 4),
    listed=st.integers(0, 40),
)
def test_equals_its_twin_and_a_loop(mode, seed, n_canvas, length, batch, listed):
    assert_scatter_choices(seed, n_canvas, length, min(batch, n_canvas), listed, mode)


@pytest.mark.parametrize("mode", ["slots", "which and row"])
@pytest.mark.parametrize("size", [32, 1024, None])
def test_entries_of_several_programs(monkeypatch, mode, size):
    if size:
        monkeypatch.setattr(kernel, "scatter_choices_config", lambda n: ScatterChoicesConfig(size, 1))
    assert_scatter_choices(0, 5, 700, 4, 300, mode)


def test_an_idle_entry_reads_no_slot():
    """The value before the list would be a position."""
    guards = Guards(DEVICE)
    lines = torch.tensor([[3, 3, 3], [4, 5, -1]], dtype=torch.int32, device=DEVICE)
    which = torch.tensor([-1, 1], dtype=torch.int32, device=DEVICE)
    token, score = torch.tensor([7, 8], dtype=torch.int32, device=DEVICE), torch.ones(2, device=DEVICE)
    for ops in (triton_impl, torch_impl):
        state = make(guards, 1, 9)
        before = state.token.clone()
        ops.scatter_choices(state, token, score, lines[1:], which=which)
        assert (state.token != before).nonzero().tolist() == [[0, 5]] and state.token[0, 5] == 8
    guards.check()


def test_configuration():
    assert [scatter_choices_config(n) for n in (1, 32, 128, 2048)] == [
        ScatterChoicesConfig(*sizes) for sizes in ((32, 1), (32, 1), (128, 2), (512, 8))
    ]
    target, token = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((16, 128), (2048,)))
    score = torch.empty(2048, device="meta")
    canvas = torch.empty((16, 900), dtype=torch.int64, device="meta"), torch.empty((16, 900), device="meta")
    with recording() as recorded:
        kernel.scatter_choices(token, score, target, *canvas)
    assert [launch.grid for launch in recorded] == [(4,)]


def test_the_row_may_be_int32():
    guards = Guards(DEVICE)
    lists = random_list(random.Random(1), 4, 20, 3, 6, "row")
    inputs = tensors(guards, lists, 6)
    for ops in (triton_impl, torch_impl):
        one, other = make(guards, 4, 20), make(guards, 4, 20)
        ops.scatter_choices(one, **inputs)
        ops.scatter_choices(other, **{**inputs, "row": inputs["row"].int()})
        assert one.token.tolist() == other.token.tolist()


def test_the_twin_needs_no_data():
    state = make(Guards(DEVICE), 2, 9)
    state = dataclasses.replace(
        state, choice_token=state.choice_token.to("meta"), choice_score=state.choice_score.to("meta")
    )
    token, target = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((6,), (2, 3)))
    score, row = torch.empty(6, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    torch_impl.scatter_choices(state, token, score, target)
    torch_impl.scatter_choices(state, token[:4], score[:4], target, which=token[:4], row=row)


def test_values_are_checked_in_debug_mode(monkeypatch):
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    guards = Guards(DEVICE)
    state = make(guards, 2, 9)
    inputs = tensors(guards, random_list(random.Random(1), 2, 9, 2, 3, "which and row"), 3)
    triton_impl.scatter_choices(state, **inputs)
    for name, value, message in (
        ("target", 9, r"target holds values in \[.*9\], not in \[-1, 9\)"),
        ("target", -2, "target holds values"),
        ("which", 6, r"which holds values in \[.*6\], not in \[-1, 6\)"),
        ("row", 2, r"row holds values in \[.*2\], not in \[0, 2\)"),
    ):
        spoiled = inputs[name].clone()
        spoiled.view(-1)[0] = value
        with pytest.raises(ValueError, match=message):
            triton_impl.scatter_choices(state, **{**inputs, name: spoiled})


def test_refuses_what_it_cannot_take(device):
    token = torch.zeros(6, dtype=torch.int32, device=device)
    score, row = torch.zeros(6, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    target = torch.zeros((2, 3), dtype=torch.int32, device=device)
    canvas = {
        "canvas_token": torch.zeros((2, 9), dtype=torch.int64, device=device),
        "canvas_score": torch.zeros((2, 9), device=device),
    }
    fine = {"token": token, "score": score, "target": target, **canvas}
    kernel.scatter_choices(**fine, row=row)
    for message, changes in {
        r"token has shape \[5\]": {"token": token[:5]},
        "token has dtype int64": {"token": token.long()},
        "score has dtype float16": {"score": score.half()},
        r"score has shape \[5\]": {"score": score[:5]},
        "target has dtype int64": {"target": target.long()},
        "target has strides": {"target": target.T.contiguous().T},
        "target has 3 rows, the canvas 2": {
            "target": torch.zeros((3, 2), dtype=torch.int32, device=device),
            "row": None,
        },
        "canvas_token has dtype int32": {"canvas_token": canvas["canvas_token"].int()},
        r"canvas_score has shape \[2, 8\]": {"canvas_score": torch.zeros((2, 8), device=device)},
        "canvas_score is on device 'meta'": {"canvas_score": canvas["canvas_score"].to("meta")},
        "token has 7 entries for 6 slots": {
            "token": torch.zeros(7, dtype=torch.int32, device=device),
            "score": torch.zeros(7, device=device),
            "which": torch.zeros(7, dtype=torch.int32, device=device),
        },
        "which has dtype int64": {"which": token.long()},
        r"which has shape \[5\]": {"which": token[:5]},
        r"row has shape \[3\]": {"row": torch.zeros(3, dtype=torch.int64, device=device)},
        "row has dtype float32": {"row": row.float()},
    }.items():
        with pytest.raises(ValueError, match=message):
            kernel.scatter_choices(**{**fine, **changes})
