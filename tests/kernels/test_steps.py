"""The step machines and their row lists against their torch twins, on random states."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards
from sfs_triton import EntropyBound, FixedSteps, Hierarchy, LocalLeap, MultiBlock, SlowFast, Threshold
from sfs_triton.decoding.samplers import PRESETS, Sampler
from sfs_triton.kernels import cycle, list_positions, mark_candidates, select
from sfs_triton.kernels.commit import ScanConfig, scan_config
from sfs_triton.kernels.control import COLUMN, FAST, SAMPLING, SLOW
from sfs_triton.kernels.rules import BlockRules, CycleRules
from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops import triton_backend as triton_impl
from sfs_triton.runner.state import DecodeState

MASK, EOS, VOCAB = 99, 98, 100
PAPER = SlowFast()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCORES = (0.05, 0.1, 0.3, 0.3, 0.5, 0.8, 0.85, 0.9, 0.9, 0.99, 1.0, 0.0, -0.0)  # ties, and thresholds met exactly
BLOCK_SIZES = st.sampled_from([None, 16])  # the second takes several turns
SCRATCH = ("fill", "position", "history_slot")  # not part of what a step means

CYCLES = {
    **{name: preset.rules() for name, preset in PRESETS.items()},
    "blocks": SlowFast.preset("llada-reference", block_length=8, max_cycles=3, eos_stop=True).rules(),
    "odd limit": SlowFast(spread="std", spread_limit=0.3, window=3, k_max=5).rules(),
    "even": SlowFast(spread="unbiased", rounding="even", inclusive=True, window=3, eos_stop=True).rules(),
    "one value": SlowFast(spread="unbiased", window=1, slow_end="filled", block_length=8).rules(),
    "shared": SlowFast(share_stable=True, min_parallel=2, spread_limit=50).rules(),
    "no end as horizon": SlowFast(strict=False, eos_horizon=False, block_length=16).rules(),
    "partial": SlowFast(slow_end="fixed", k_max=3).rules(partial=True),
    "look ahead": SlowFast(strict=False, block_length=16, max_cycles=3).rules(look_ahead=4),
    "region": SlowFast(
        strict=False, share_stable=True, eos_horizon=False, eos_stop=True, spread_limit=20, window=3
    ).rules(look_ahead=5, partial=True, span_cap=6),
}
BLOCKS = {
    "threshold": Threshold(block_length=8).rules(),
    "threshold, one block": Threshold(block_length=None, eos_stop=True).rules("first"),
    "threshold, least": Threshold(block_length=8, least=3).rules(),
    "leap": LocalLeap(block_length=16, radius=2).rules(),
    "leap, counts": LocalLeap(block_length=None, radius=1, steps=6).rules(),
    "partial leap": LocalLeap(block_length=8, radius=0).rules(partial=True),
    "bound": EntropyBound(block_length=None).rules(),
    "partial bound, least": EntropyBound(block_length=8, least=2, eos_stop=True).rules(partial=True),
    "runs": Hierarchy(block_length=None).rules(),
    "partial runs": Hierarchy(block_length=8, eos_stop=True).rules(partial=True),
    "open": MultiBlock(block_length=4, open_at=0.5).rules(),
    "open, strict": MultiBlock.preset("d3llm-dream", block_length=8, open_at=0, eos_stop=True).rules(),
    "partial open": MultiBlock(block_length=8, open_at=1).rules(partial=True),
    "delayed": MultiBlock(block_length=4).rules(delay=2, refresh_every=3),
    "delayed, at once": MultiBlock(block_length=4, eos_stop=True).rules(delay=0, refresh_every=None),
    "paced": Threshold(block_length=None, steps=5).rules(),
    "paced blocks": Threshold(block_length=8, steps=3).rules("repeat"),
    "even": FixedSteps(steps=6, block_length=8).rules(),
    "even, first": FixedSteps(steps=6, block_length=8).rules("first"),
    "even, stop": FixedSteps(steps=6, eos_stop=True).rules("repeat"),
    "timesteps": FixedSteps(steps=6, metric="maskgit_plus").rules(),
    "random": FixedSteps(steps=6, metric="origin").rules(),
    "random, first": FixedSteps(steps=6, metric="origin", block_length=8).rules("first"),
    "partial threshold": Threshold(block_length=8, eos_stop=True).rules(partial=True),
    "partial paced": Threshold(block_length=None, steps=5).rules(partial=True),
    "partial even, first": FixedSteps(steps=6, block_length=8).rules("first", partial=True),
    "partial timesteps": FixedSteps(steps=6, metric="maskgit_plus").rules(partial=True),
    "partial random": FixedSteps(steps=6, metric="origin", block_length=8).rules(partial=True),
}


def random_state(rng: random.Random, rules: CycleRules | BlockRules, batch: int, length: int) -> DecodeState:
    """A state somewhere in the middle of a generation: all that is consistent, and little else, is likely."""
    window = getattr(rules, "window", 1)
    rows, starts = [], []
    for _ in range(batch):
        size = rng.randint(2, length)
        start = rng.randint(0, size - 1)
        share = rng.random()
        rows.append([MASK if p >= start and rng.random() < share else rng.randrange(90) for p in range(size)])
        starts.append(start)
    rows[0] += [MASK] * (length - len(rows[0]))
    state = DecodeState.allocate(
        rows, starts, mask_id=MASK, eos_id=EOS, window=window, block_length=rules.block_length,
        seeds=[0] * batch, caps=[1000] * batch, sampling=PAPER.sampling_values(),
        device=torch.device("cpu"), trace=True,
    )  # fmt: skip
    state.sampling.copy_(
        torch.tensor([[rng.choice([*SCORES, *[math.inf] * 4]) for _ in SAMPLING] for _ in range(batch)])
    )
    for row in range(batch):
        where = {name: state.control[row, index] for name, index in COLUMN.items()}
        put = lambda name, value, where=where: where[name].fill_(value)  # noqa: E731
        begin, stop = where["block_start"].item(), where["block_end"].item()
        put("step", rng.randint(0, 40))
        put("cap", where["step"].item() + rng.choice([1, 2, 500, 500, 500]))
        put("block_steps", rng.randint(1, 7))
        most = rules.k_max if isinstance(rules, CycleRules) else where["block_steps"].item()
        put("stage_step", rng.randint(0, most - 1))
        put("cycle", rng.randint(0, 3))
        if rules.eos_stop and rng.random() < 0.2:
            put("limit", rng.randint(starts[row] + 1, len(rows[row])))
            beyond = state.masked[row] & (state.position >= where["limit"])
            state.tokens[row, beyond] = EOS
            state.masked[row, beyond] = False
        if rng.random() < 0.15:
            put("done", 1)
        for place in range(starts[row], len(rows[row])):
            given = place >= where["limit"] and state.tokens[row, place] != EOS
            if not state.masked[row, place] and not given and rng.random() < 0.7:
                state.commit_step[row, place] = rng.randint(0, where["step"].item())
        if isinstance(rules, BlockRules):
            put("quota", rng.randint(0, stop - begin))
            if rules.select == "open":
                put("block_end", min(begin + rules.block_length * rng.randint(1, 3), where["end"].item()))
            if rules.delay is not None:
                finished = (begin - starts[row]) // rules.block_length
                cached = rng.randint(0, finished)
                put("block_start", starts[row] + rng.randint(0, cached) * rules.block_length)
                put("span_start", starts[row] + cached * rules.block_length)
                put("quota", rng.randint(0, rules.delay) if cached < finished else 0)
            continue
        put("span_start", rng.randint(begin, stop - 1))
        put("stage", rng.choice([SLOW, FAST]))
        fast = where["stage"].item() == FAST
        if fast or rng.random() < 0.5:
            put("span_end", rng.randint(where["span_start"].item() + 1, stop))
        put("determined", int(fast or rng.random() < 0.3))
        put("n_history", rng.randint(0, min(where["stage_step"].item() + (rules.look_ahead > 0), 3)))
        for slot in range(min(where["n_history"].item(), window)):
            state.history[row, slot] = rng.randint(1, stop - begin)
    state.masks_left.copy_(state.masked.sum(1))
    state.dirty.copy_(torch.tensor([[rng.random() < 0.1 for _ in range(length)] for _ in range(batch)]))
    ages = [[rng.randint(-1, max(0, step - 1)) for _ in range(length)] for step in state.step.tolist()]
    state.forwarded.copy_(torch.tensor(ages))
    state.shares = torch.tensor([[rng.random() for _ in range(7)] for _ in range(batch)])
    state.uniform = torch.tensor([[rng.random() for _ in range(2 * length)] for _ in range(batch)])
    state.other_ends = torch.tensor(rng.choice([[], [3], [3, 7]]), dtype=torch.int64)
    if getattr(rules, "select", None) == "bound":
        entropies = [rng.choice(SCORES) for _ in range(batch * length + 1)]
        state = dataclasses.replace(state, choice_entropy=torch.tensor(entropies))
    return state


def mark_and_score(rng: random.Random, state: DecodeState, rules: CycleRules | BlockRules, faults: bool) -> None:
    """Fill in random model outputs; leave out some of the positions that a position list may omit."""
    batch, length = state.masked.shape
    torch_impl.mark_candidates(state, by_stage=isinstance(rules, CycleRules), span_cap=getattr(rules, "span_cap", None))
    ahead = getattr(rules, "look_ahead", 0)
    room = torch.ones_like(state.masked)
    if rules.partial or ahead:
        shares = [rng.choice([0.0, 0.7, 1.0]) for _ in range(batch)]
        room = torch.tensor([[rng.random() < share for _ in range(length)] for share in shares])
    if rules.partial:
        state.candidate.logical_and_(room)
    token = [[rng.choice([EOS, *range(20)]) for _ in range(length)] for _ in range(batch)]
    state.token.copy_(torch.tensor(token))
    state.score.copy_(torch.tensor([[rng.choice(SCORES) for _ in range(length)] for _ in range(batch)]))
    if ahead:
        stop = state.span_end[:, None] + ahead
        beyond = (state.position >= state.span_end[:, None]) & (state.position < stop) & state.masked
        seen = state.candidate | (beyond & room & (state.stage == FAST)[:, None])
        state.score.masked_fill_(~seen, -math.inf)
    if faults and rng.random() < 0.3:
        state.score[rng.randrange(batch), rng.randrange(length)] = math.nan


@contextmanager
def block_size(size: int | None) -> Iterator[None]:
    """Force the scans of all step kernels into pieces of ``size`` positions."""
    with ExitStack() as stack:
        for module in (cycle, select, mark_candidates, list_positions) if size else ():
            stack.enter_context(mock.patch.object(module, "scan_config", lambda length: ScanConfig(size, 1)))
        yield


def copied(state: DecodeState, guards: Guards | None = None) -> DecodeState:
    """Copy a state to the tests' device, its tensors between guard bands if there are any."""
    place = guards.copy if guards else lambda x: x.to(DEVICE, copy=True)
    given = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.init}
    tensors = {name: place(value) for name, value in given.items() if isinstance(value, torch.Tensor)}
    events = {name: place(value) for name, value in state.events.items()}
    return dataclasses.replace(state, **{**tensors, "events": events})


def assert_same(kernel: DecodeState, twin: DecodeState) -> None:
    done = twin.done.bool()
    for field in dataclasses.fields(twin):
        mine, wanted = getattr(kernel, field.name), getattr(twin, field.name)
        if not field.init or field.name in SCRATCH or not isinstance(wanted, torch.Tensor):
            continue
        mine = mine.cpu()
        if field.name == "control":  # a row that is done has no use for its quota
            for name, column in COLUMN.items():
                keep = ~done if name == "quota" else torch.ones_like(done)
                assert mine[keep, column].tolist() == wanted[keep, column].tolist(), name
        else:
            assert torch.equal(mine.nan_to_num(7.5), wanted.nan_to_num(7.5)), field.name
    decided = (twin.events["control"][:, COLUMN["done"]] == 0) & (twin.fault <= 0)  # others record nothing of use
    for name in ("control", "history"):
        ours, theirs = kernel.events[name].cpu()[decided], twin.events[name][decided]
        if name == "control":
            ours[:, COLUMN["quota"]] = theirs[:, COLUMN["quota"]]  # which the event of a block may or may not have
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("rules", "op"),
    [pytest.param(rules, "decide_cycle", id=f"cycle-{name}") for name, rules in CYCLES.items()]
    + [pytest.param(rules, "decide_block", id=f"block-{name}") for name, rules in BLOCKS.items()],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 3), length=st.integers(2, 40), block=BLOCK_SIZES)
def test_machines_equal_their_twins(rules, op, seed, batch, length, block):
    rng, guards = random.Random(seed), Guards(DEVICE)
    state = random_state(rng, rules, batch, length)
    mark_and_score(rng, state, rules, faults=True)
    mine, twin = copied(state, guards), state
    with block_size(block):
        getattr(triton_impl, op)(mine, rules)
    getattr(torch_impl, op)(twin, rules)
    assert_same(mine, twin)
    guards.check()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    length=st.integers(2, 40),
    capacity=st.integers(1, 48),
    by_stage=st.booleans(),
    span_cap=st.none() | st.integers(1, 12),
    look_ahead=st.integers(0, 5),
    shift=st.integers(0, 1),
    stale=st.booleans(),
    block=BLOCK_SIZES,
)
def test_row_lists_equal_their_twin(seed, batch, length, capacity, by_stage, span_cap, look_ahead, shift, stale, block):
    rng, guards = random.Random(seed), Guards(DEVICE)
    state = random_state(rng, CYCLES["blocks"] if by_stage else BLOCKS["even"], batch, length)
    mine, twin = copied(state, guards), state
    how = {"by_stage": by_stage, "span_cap": span_cap, "look_ahead": look_ahead, "shift": shift, "stale": stale}
    lists = [guards.empty(batch, capacity, dtype=torch.int32) for _ in range(2)]
    lists.append(guards.empty(batch, dtype=torch.int32))
    wanted = [x.cpu().clone() for x in lists]
    with block_size(block):
        triton_impl.list_positions(mine, *lists, **how)
    torch_impl.list_positions(twin, *wanted, **how)
    for name, ours, theirs in zip(("rows", "target", "count"), lists, wanted, strict=True):
        assert ours.tolist() == theirs.tolist(), name
    assert_same(mine, twin)
    triton_impl.mark_candidates(mine, by_stage=by_stage, span_cap=span_cap)
    torch_impl.mark_candidates(twin, by_stage=by_stage, span_cap=span_cap)
    assert_same(mine, twin)
    guards.check()


@pytest.mark.parametrize(("batch", "length"), [(1, 8192), (3, 2000), (256 if DEVICE.type == "cuda" else 20, 6)])
def test_large_canvases(batch, length):
    rng = random.Random(batch)
    for rules, op in ((CYCLES["blocks"], "decide_cycle"), (BLOCKS["paced"], "decide_block")):
        state = random_state(rng, rules, batch, length)
        mark_and_score(rng, state, rules, faults=False)
        mine, twin = copied(state), state
        getattr(triton_impl, op)(mine, rules)
        getattr(torch_impl, op)(twin, rules)
        assert_same(mine, twin)
    lists = [torch.zeros((batch, 128), dtype=torch.int32) for _ in range(2)] + [torch.zeros(batch, dtype=torch.int32)]
    ours = [x.to(DEVICE, copy=True) for x in lists]
    triton_impl.list_positions(mine, *ours, by_stage=False, look_ahead=7, shift=1)
    torch_impl.list_positions(twin, *lists, by_stage=False, look_ahead=7, shift=1)
    assert all(a.tolist() == b.tolist() for a, b in zip(ours, lists, strict=True))
    assert_same(mine, twin)


@pytest.mark.parametrize("huge", [2**31 - 1, 2**40])
def test_numbers_beyond_any_canvas_do_not_wrap(huge):
    rng = random.Random(0)
    for base, change, op in (
        (CYCLES["blocks"], {"block_length": huge}, "decide_cycle"),
        (BLOCKS["even"], {"block_length": huge}, "decide_block"),
        (BLOCKS["paced"], {"paced_steps": huge}, "decide_block"),
        (BLOCKS["delayed"], {"delay": huge, "refresh_every": huge}, "decide_block"),
    ):
        rules = dataclasses.replace(base, **change)
        for _ in range(3):
            state = random_state(rng, rules, 3, 20)
            mark_and_score(rng, state, rules, faults=False)
            mine, twin = copied(state), state
            getattr(triton_impl, op)(mine, rules)
            getattr(torch_impl, op)(twin, rules)
            assert_same(mine, twin)
    for how in ({"span_cap": huge}, {"span_cap": 2, "look_ahead": huge}):
        state = random_state(rng, CYCLES["paper"], 8, 20)
        wanted = [torch.zeros(shape, dtype=torch.int32) for shape in ((8, 20), (8, 20), (8,))]
        ours = [x.to(DEVICE, copy=True) for x in wanted]
        for ops, canvas, lists in ((triton_impl, copied(state), ours), (torch_impl, state, wanted)):
            ops.list_positions(canvas, *lists, by_stage=True, **how)
        assert all(a.tolist() == b.tolist() for a, b in zip(ours, wanted, strict=True))


def test_scans_take_several_values_a_thread_and_never_more_than_1024_positions():
    configs = [scan_config(length) for length in (1, 64, 300, 8192)]
    assert configs == [ScanConfig(*sizes) for sizes in ((16, 1), (64, 1), (512, 4), (1024, 8))]


def test_a_row_at_its_cap_ends_with_a_fault():
    for rules, op in ((CYCLES["paper"], "decide_cycle"), (BLOCKS["even"], "decide_block")):
        for ops in (triton_impl, torch_impl):
            state = DecodeState.allocate(
                [[1] + [MASK] * 30], [1], mask_id=MASK, eos_id=EOS, window=2, block_length=rules.block_length,
                seeds=[0], caps=[1], sampling=PAPER.sampling_values(), device=DEVICE, trace=False,
            )  # fmt: skip
            state.block_steps.fill_(6)
            ops.mark_candidates(state, by_stage=isinstance(rules, CycleRules))
            getattr(ops, op)(state, rules)
            assert (state.done.item(), state.fault.item(), state.step.item()) == (1, -1, 1)


IMPLEMENTATIONS = pytest.mark.parametrize("ops", [torch_impl, triton_impl], ids=["twin", "kernel"])


def _fast_row(score: dict[int, float], rules: CycleRules, sampler: Sampler = PAPER, **control: int) -> DecodeState:
    """Make twelve positions of which the last ten are decoded, about to decide the last one of the span ``[2, 5)``.

    The model's token at a position is that position.
    """
    rows = [[1, 1, 7, 7] + [MASK] * 8]
    state = DecodeState.allocate(
        rows, [2], mask_id=MASK, eos_id=EOS, window=2, block_length=rules.block_length,
        seeds=[0], caps=[100], sampling=sampler.sampling_values(), device=DEVICE, trace=True,
    )  # fmt: skip
    where = {"stage": FAST, "span_start": 2, "span_end": 5, "determined": 1, "n_history": 2, "step": 3, "stage_step": 1}
    where |= control
    for name, value in where.items():
        state.control[0, COLUMN[name]] = value
    state.history.fill_(3)
    state.token.copy_(state.position[None])
    state.score.fill_(-math.inf)
    for place, value in score.items():
        state.score[0, place] = value
    torch_impl.mark_candidates(state, by_stage=True)
    return state


AHEAD = {4: 0.9, 5: 0.2, 6: 0.05, 7: 0.4, 8: 0.1}


def test_a_slow_step_without_an_end_looks_at_nothing_ahead(guards):
    """A span's end is -1 while it is not known. That is one before the tensors of the first row."""
    rules = SlowFast().rules(look_ahead=4)
    state = copied(_fast_row(AHEAD, rules, stage=SLOW, span_end=-1, determined=0, n_history=0, stage_step=0), guards)
    triton_impl.decide_cycle(state, rules)
    assert (state.stage.item(), state.span_end.item(), state.n_history.item()) == (SLOW, -1, 1)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rules", "score", "entry"),
    [
        pytest.param({}, AHEAD, 6, id="one past position 7, from the block's start at 2"),
        pytest.param({"strict": False}, AHEAD, 7, id="a threshold that is reached"),
        pytest.param({}, AHEAD | {7: -math.inf}, 4, id="no room in the list"),
        pytest.param({}, AHEAD | {7: math.nan}, 4, id="nan"),
        pytest.param({}, AHEAD | {9: 0.9}, 6, id="beyond the look-ahead"),
        pytest.param({}, {4: 0.9, 6: 0.05}, None, id="no candidate"),
        pytest.param({"look_ahead": 0}, AHEAD, None, id="no look-ahead"),
        pytest.param({"look_ahead": 1}, AHEAD, 4, id="one position"),
        pytest.param({"look_ahead": 2**40}, AHEAD, 6, id="more than there are"),
        pytest.param({"block_length": 5}, AHEAD, 4, id="the block ends at 7"),
    ],
)
def test_a_look_ahead_starts_the_next_history(ops, rules, score, entry):
    rules = dataclasses.replace(SlowFast().rules(look_ahead=4), **rules)
    state = _fast_row(score, rules)
    ops.decide_cycle(state, rules)
    assert (state.stage.item(), state.span_start.item(), state.span_end.item(), state.cycle.item()) == (SLOW, 5, -1, 1)
    assert state.n_history.item() == (entry is not None)
    assert state.history.tolist() == [[entry or 0, 0]]
    assert (state.done.item(), state.masked.sum().item()) == (0, 7)
    if entry == 6:  # the next step needs no more than to find the same
        state.score.copy_(torch.tensor([[0.0] * 5 + [0.2, 0.05, 0.4, 0, 0, 0, 0]]))
        ops.mark_candidates(state, by_stage=True)
        ops.decide_cycle(state, rules)
        assert (state.determined.item(), state.span_end.item(), state.history.tolist()) == (1, 8, [[6, 6]])


@IMPLEMENTATIONS
def test_a_look_ahead_need_not_see_end_of_text(ops):
    rules = SlowFast(eos_horizon=False).rules(look_ahead=4)
    state = _fast_row(AHEAD, rules)
    state.token[0, 7] = EOS
    ops.decide_cycle(state, rules)
    assert (state.n_history.item(), state.history.tolist()) == (1, [[4, 0]])


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rules", "control", "score"),
    [
        pytest.param(SlowFast(block_length=3), {}, AHEAD, id="next block"),
        pytest.param(SlowFast(block_length=5, max_cycles=1), {}, AHEAD, id="no cycle left in this block"),
        pytest.param(SlowFast(max_cycles=1), {}, AHEAD, id="no cycle left"),
        pytest.param(SlowFast(), {"cap": 4}, AHEAD, id="no step left"),
        pytest.param(SlowFast(eos_stop=True), {"limit": 5}, {4: 0.9}, id="no position left"),
        pytest.param(SlowFast(k_max=1), {"stage": SLOW, "stage_step": 0, "determined": 0}, AHEAD, id="slow"),
    ],
)
def test_a_look_ahead_is_for_the_next_cycle_of_the_block(ops, rules, control, score):
    rules = rules.rules(look_ahead=4)
    state = _fast_row(score, rules, **control)
    if "limit" in control:
        state.masked[0, 5:] = False
    if control.get("stage") == SLOW:
        state.candidate[0, 5:] = False
    ops.decide_cycle(state, rules)
    assert state.cycle.item() == 1 or state.block.item() == 1 or state.done.item() == 1
    assert (state.n_history.item(), state.history.tolist()) == (0, [[0, 0]])


@IMPLEMENTATIONS
def test_a_look_ahead_waits_for_the_end_of_the_cycle(ops):
    rules = SlowFast().rules(look_ahead=4)
    state = _fast_row(AHEAD, rules, span_end=6)
    ops.decide_cycle(state, rules)
    assert (state.stage.item(), state.stage_step.item(), state.n_history.item()) == (FAST, 2, 2)
    assert state.history.tolist() == [[3, 3]]


WAITING = {
    "slow": (
        "decide_cycle",
        SlowFast(),
        {"stage": SLOW, "determined": 0, "span_end": -1, "n_history": 1, "stage_step": 7},
    ),
    "fast": ("decide_cycle", SlowFast(), {}),
    "fixed": ("decide_cycle", SlowFast.preset("llada-reference", eos_stop=True), {"stage": SLOW, "stage_step": 5}),
    "zeros": ("decide_cycle", SlowFast.preset("dream-reference", eos_stop=True), {"stage": SLOW, "determined": 0}),
    "threshold": ("decide_block", Threshold(block_length=None, tau=0.5), {}),
    "paced": ("decide_block", Threshold(block_length=5, tau=0.5, steps=3), {"quota": 2}),
    "even": ("decide_block", FixedSteps(steps=2, eos_stop=True), {"quota": 3, "stage_step": 0}),
    "timesteps": ("decide_block", FixedSteps(steps=2, metric="entropy"), {"stage_step": 1}),
    "random": ("decide_block", FixedSteps(steps=2, metric="origin"), {"quota": 3, "stage_step": 1}),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize(("op", "sampler", "control"), WAITING.values(), ids=WAITING)
def test_a_row_waits_for_its_row_list(ops, op, sampler, control):
    """Nothing that it could decide was forwarded: the step counts, and that is all."""
    ahead = {"look_ahead": 4} if isinstance(sampler, SlowFast) and not sampler.zero_history else {}
    rules = sampler.rules(partial=True, **ahead)
    state = _fast_row(AHEAD, rules, sampler, **control)
    state.control[0, COLUMN["block_steps"]] = 2
    state.shares = torch.full((1, 2), 0.5, device=DEVICE)
    state.uniform = torch.zeros((1, 20), device=DEVICE)
    state.candidate.fill_(False)
    before = copied(state)
    getattr(ops, op)(state, rules)
    assert (state.step.item(), state.done.item(), state.fault.item()) == (4, 0, 0)
    state.control[0, COLUMN["step"]] = 3
    for field in dataclasses.fields(state):
        mine, wanted = getattr(state, field.name), getattr(before, field.name)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(mine.nan_to_num(7.5), wanted.nan_to_num(7.5)), field.name

    state.control[0, COLUMN["cap"]] = 4
    getattr(ops, op)(state, rules)
    assert (state.step.item(), state.done.item(), state.fault.item()) == (4, 1, -4)


@IMPLEMENTATIONS
def test_a_row_does_not_wait_where_there_is_nothing_to_decide(ops):
    """A slow stage that has decided everything but has steps to go; one whose window holds given positions only."""
    rules = SlowFast.preset("llada-reference", block_length=5).rules(partial=True)
    state = _fast_row({}, rules, stage=SLOW, span_start=3, determined=0)
    state.masked[0, 3:7] = False
    state.candidate.fill_(False)
    ops.decide_cycle(state, rules)
    assert (state.stage_step.item(), state.n_history.item()) == (2, 3)

    for span_cap, k in ((1, 2), (2, 2), (3, 1), (None, 1)):
        rules = SlowFast().rules(partial=True, span_cap=span_cap)
        state = _fast_row({}, rules, stage=SLOW, determined=0)
        state.candidate.fill_(False)
        ops.decide_cycle(state, rules)
        assert state.stage_step.item() == k, span_cap


@IMPLEMENTATIONS
def test_a_row_that_has_something_listed_goes_on_with_it(ops):
    rules = SlowFast().rules(partial=True)
    state = _fast_row({4: 0.9, 5: 0.9}, rules, span_end=6)
    state.candidate[0, 5] = False
    ops.decide_cycle(state, rules)
    assert (state.stage_step.item(), state.masked[0, 4:6].tolist()) == (2, [False, True])


@IMPLEMENTATIONS
def test_a_stable_step_fills_its_span(ops):
    """Its horizon is 4 again, from which on the end-of-text at 8 does not count: what is over 0.85 in ``[2, 6)`` and
    the best position, 8, are filled."""
    rules = SlowFast(eos_horizon=False, share_stable=True).rules()
    state = _fast_row(
        {4: 0.86, 5: 0.9, 6: 0.05, 7: 0.1, 8: 0.95}, rules, stage=SLOW, span_end=-1, determined=0, n_history=1
    )
    state.history.copy_(torch.tensor([[4, 0]]))
    state.token[0, 8] = EOS
    ops.decide_cycle(state, rules)
    assert (state.stage.item(), state.span_start.item(), state.cycle.item(), state.n_history.item()) == (SLOW, 6, 1, 0)
    assert state.masked[0, 4:].tolist() == [False, False, True, True, False, True, True, True]


@settings(max_examples=15 if DEVICE.type == "cuda" else 4, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 8), span_cap=st.sampled_from([None, 1, 4]))
def test_generations_by_row_lists_end(seed, capacity, span_cap):
    """Whatever fits the list, and with given positions anywhere; the kernels take the same steps."""
    rng = random.Random(seed)
    sampler = [
        SlowFast(tau_high=0.6, share_stable=True, eos_horizon=False, block_length=rng.choice([None, 8])),
        SlowFast(tau_high=0.6, slow_end="fixed", k_max=3, eos_stop=True),
        Threshold(tau=0.6, block_length=8),
    ][seed % 3]
    by_stage = isinstance(sampler, SlowFast)
    span_cap = span_cap if by_stage else None
    shift, ahead = rng.randint(0, 1), rng.choice([0, 4])
    length = rng.randint(3, 12)
    rows = [[1, 1] + [MASK if rng.random() < share else 1 for _ in range(length)] for share in (1.0, 0.5)]
    twin = DecodeState.allocate(
        rows, [2, 2], mask_id=MASK, eos_id=EOS, window=2, block_length=sampler.block_length,
        seeds=[0] * 2, caps=[sampler.step_cap(length) + length] * 2, sampling=sampler.sampling_values(),
        device=torch.device("cpu"), trace=True,
    )  # fmt: skip
    rules = sampler.rules(look_ahead=ahead, partial=True, span_cap=span_cap)
    decide = "decide_cycle" if by_stage else "decide_block"
    how = {"by_stage": by_stage, "span_cap": span_cap, "look_ahead": ahead, "shift": shift}
    states = {torch_impl: twin, triton_impl: copied(twin)}
    while not twin.done.all():
        token = torch.tensor([[rng.choice([EOS, *range(20)]) for _ in row] for row in rows])
        score = torch.tensor([[rng.choice(SCORES) for _ in row] for row in rows])
        for ops, state in states.items():
            sizes, place = ((2, capacity), (2, capacity), 2), state.tokens.device
            lists = [torch.empty(size, dtype=torch.int32, device=place) for size in sizes]
            ops.list_positions(state, *lists, **how)
            seen = (state.position == lists[1][..., None]).any(1)
            state.token.copy_(token)
            state.score.copy_(score).masked_fill_(~seen, -math.inf)
            getattr(ops, decide)(state, rules)
        assert_same(states[triton_impl], twin)
    assert twin.fault.tolist() == [0, 0] and not twin.masked.any()


@pytest.mark.sampled(2)
@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("rules", "op"),
    [pytest.param(CYCLES[name], "decide_cycle", id=f"cycle-{name}") for name in ("paper", "shared", "region")]
    + [
        *{
            rules.select: pytest.param(rules, "decide_block", id=f"block-{name}") for name, rules in BLOCKS.items()
        }.values()
    ],
)
def test_nan_ends_its_own_row_only(ops, rules, op):
    state = DecodeState.allocate(
        [[1] + [MASK] * 15] * 3, [1] * 3, mask_id=MASK, eos_id=EOS, window=getattr(rules, "window", 1),
        block_length=rules.block_length, seeds=[0] * 3, caps=[100] * 3, sampling=PAPER.sampling_values(),
        device=DEVICE, trace=True, entropy=getattr(rules, "select", None) == "bound",
    )  # fmt: skip
    state.control[:, COLUMN["step"]] = 5
    state.control[:, COLUMN["block_steps"]] = 3
    state.score.copy_(torch.rand((3, 16), generator=torch.Generator().manual_seed(0)))
    state.shares, state.uniform = torch.full((3, 3), 0.5, device=DEVICE), torch.rand((3, 50), device=DEVICE)
    torch_impl.mark_candidates(state, by_stage=op == "decide_cycle", span_cap=getattr(rules, "span_cap", None))
    before, clean = copied(state), copied(state)
    getattr(ops, op)(clean, rules)
    state.score[1, 4] = math.nan
    getattr(ops, op)(state, rules)
    assert state.fault.tolist() == [0, 6, 0] and state.done[1] == 1
    for name in ("tokens", "masked", "commit_step", "dirty", "history", "control"):
        after, untouched, wanted = getattr(state, name), getattr(before, name), getattr(clean, name)
        assert torch.equal(after[[0, 2]], wanted[[0, 2]]), name
        kept = torch.ones_like(after[1], dtype=torch.bool)
        if name == "control":  # a row that is done has no use for its quota
            kept[[COLUMN["done"], COLUMN["fault"], COLUMN["quota"]]] = False
        assert torch.equal(after[1][kept], untouched[1][kept]), name
    assert clean.fault.tolist() == [0, 0, 0] and (clean.commit_step[1] >= 0).any()


def _state() -> DecodeState:
    rng = random.Random(0)
    state = random_state(rng, CYCLES["paper"], 2, 12)
    mark_and_score(rng, state, CYCLES["paper"], faults=False)
    return copied(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token": torch.int32}, "token has dtype int32, not int64"),
        ({"score": torch.float16}, "score has dtype float16, not float32"),
        ({"masked": "narrow"}, r"masked has shape \[2, 11\]"),
        ({"tokens": "strided"}, "tokens has strides"),
        ({"candidate": "meta"}, "candidate is on device 'meta'"),
        ({"history": "narrow"}, r"history has shape \[2, 1\]"),
        ({"sampling": torch.float64}, "sampling has dtype float64, not float32"),
        ({"sampling": "narrow"}, rf"sampling has shape \[2, {len(SAMPLING) - 1}\]"),
    ],
)
def test_states_are_checked(change, named):
    (name, how), state = next(iter(change.items())), _state()
    value = getattr(state, name)
    spoiled = {
        "narrow": lambda: value[:, :-1].contiguous(),
        "strided": lambda: torch.stack((value, value), -1)[..., 0],
        "meta": lambda: value.to("meta"),
    }.get(how, lambda: value.to(how))()
    setattr(state, name, spoiled)
    with pytest.raises(ValueError, match=named):
        triton_impl.decide_cycle(state, CYCLES["paper"])


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"spread": "range"}, "spread='range'"),
        ({"spread": "std"}, "spread='std'"),
        ({"slow_end": "never"}, "slow_end='never'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"k_max": 0}, "k_max=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"span_cap": 0}, "span_cap=0"),
        ({"look_ahead": -1}, "look_ahead=-1"),
        ({"look_ahead": 1, "zero_history": True}, "look_ahead=1 does not go with zero_history"),
        ({"share_stable": True, "slow_end": "fixed"}, "share_stable does not go with slow_end='fixed'"),
    ],
)
def test_cycle_rules_are_checked(rules, named):
    with pytest.raises(ValueError, match=named):
        triton_impl.decide_cycle(_state(), dataclasses.replace(CYCLES["paper"], **rules))


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"select": "odd"}, "select='odd'"),
        ({"opening": "last"}, "opening='last'"),
        ({"paced_steps": 4}, "paced_steps=4 does not go with select='even'"),
        ({"delay": 2}, "delay=2 does not go with select='even'"),
        ({"select": "threshold", "paced_steps": 0}, "paced_steps=0"),
        ({"block_length": -1}, "block_length=-1"),
    ],
)
def test_block_rules_are_checked(rules, named):
    with pytest.raises(ValueError, match=named):
        triton_impl.decide_block(_state(), dataclasses.replace(BLOCKS["even"], **rules))


def test_empty_schedules_and_streams_are_refused():
    state = _state()
    with pytest.raises(ValueError, match="entropy has shape"):
        triton_impl.decide_block(state, BLOCKS["bound"])
    state.shares = state.shares[:, :0].contiguous()
    with pytest.raises(ValueError, match="shares is empty"):
        triton_impl.decide_block(state, BLOCKS["timesteps"])
    state = _state()
    state.uniform = state.uniform[:, :0].contiguous()
    with pytest.raises(ValueError, match="uniform is empty"):
        triton_impl.decide_block(state, BLOCKS["random"])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"span_cap": 0}, "span_cap=0"),
        ({"look_ahead": -1}, "look_ahead=-1"),
        ({"shift": 2}, "shift=2"),
        ({"rows": (2, 0)}, "rows has no room"),
        ({"target": (2, 3)}, r"target has shape \[2, 3\]"),
        ({"count": (3,)}, r"count has shape \[3\]"),
    ],
)
def test_row_lists_are_checked(how, named):
    shapes = {"rows": (2, 4), "target": how.get("rows", (2, 4)), "count": (2,)}
    lists = {
        name: torch.zeros(how.get(name, shape), dtype=torch.int32, device=DEVICE) for name, shape in shapes.items()
    }
    options = {name: value for name, value in how.items() if name not in lists}
    with pytest.raises(ValueError, match=named):
        triton_impl.list_positions(_state(), **lists, by_stage=True, **options)
