"""The oracle equals the recordings of the reference implementations, and the paper on examples done by hand."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import sfs_triton
from sfs_triton.decoding.samplers import FixedSteps, SlowFast, Threshold
from tests.conformance import MARGIN, METHODS, recorded_margin
from tests.reference import Step, decode, logits_of, look
from tests.reference.blocks import even_counts, time_shares
from tests.reference.confidence import keep_top_k, keep_top_p
from tests.reference.slowfast import Row, choose, mean_of, slow_stage, spread_of
from tests.support.paths import GOLDEN

PER_SETTING = 2
MASK, EOS = 9, 8  # of the hand-made examples


@cache
def engine_of(name: str) -> sfs_triton.Engine:
    return sfs_triton.load(GOLDEN / "models" / name, device="cpu", dtype="float32")


def recorded(family: str) -> list:
    """Pick a few stable single sequences of every setting of every model.

    All are marked slow but one of each setting, which is of one model and the next in turn.
    """
    found: dict[str, list] = {}
    seen = Counter()
    for path in sorted((GOLDEN / "cases").glob(f"*.{family}.jsonl")):
        model = path.name.split(".")[0]
        for case in map(json.loads, path.read_text().splitlines()):
            key = (model, json.dumps(case["settings"], sort_keys=True))
            cached = case["settings"].get("cache", "none") != "none"
            near_tie = recorded_margin(case) < MARGIN
            if "error" in case or cached or near_tie or not case["stable"] or len(case["prompt"]) > 1:
                continue
            seen[key] += 1
            if seen[key] <= PER_SETTING:
                found.setdefault(key[1], []).append((model, case))
    return [
        pytest.param(model, case, id=case["id"], marks=() if at == turn % len(cases) else pytest.mark.slow)
        for turn, cases in enumerate(found.values())
        for at, (model, case) in enumerate(cases)
    ]


def same_step(mine: Step, wanted: list) -> bool:
    spread, other = mine.spread, wanted[8]
    close = spread == other or None not in (spread, other) and abs(spread - other) <= 1e-5 * max(1.0, other)
    return close and mine[:8] == tuple(wanted[:8]) and mine[9:] == tuple(wanted[9:])


def filled_at(trace: list[Step], length: int) -> list[int]:
    """Map each position of the response to the step that filled it."""
    found = {position: index for index, step in enumerate(trace) for position in step.filled}
    return [found.get(position, -1) for position in range(length)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("model", "case"), recorded("slowfast") + recorded("vanilla") + recorded("fastdllm"))
def test_equals_the_recordings(model: str, case: dict):
    setup = METHODS[case["method"]](case["settings"])
    network, prompt = engine_of(model).model, case["prompt"][0]
    canvas = prompt + [network.spec.mask_id] * setup.gen_length
    logits_fn = logits_of(network, canvas, setup.sampler.cfg_scale)
    run = decode(
        logits_fn, canvas, len(prompt), setup.sampler, network.spec.mask_id, network.spec.eos_id, seed=setup.seed
    )
    assert run.tokens == case["out"][0]
    assert run.nfe == case["nfe"]
    for mine, wanted in zip(run.trace, case.get("trace", run.trace), strict=True):
        assert "trace" not in case or same_step(mine, wanted), f"{mine} is not {wanted}"
    if "unmask_call" in case:
        branches = 2 if setup.sampler.cfg_scale else 1  # counted in forwards
        calls = [call // branches for call in case["unmask_call"][0]]
        assert filled_at(run.trace, setup.gen_length) == calls


def recorded_steps(model: str) -> list:
    entries = json.loads((GOLDEN / "steps" / f"{model}.json").read_text())
    return [pytest.param(model, entry, id=f"{model}/{entry['step']}") for entry in entries]


@pytest.mark.parametrize(("model", "entry"), recorded_steps("llada-mha") + recorded_steps("dream-gqa"))
def test_equals_the_recorded_single_steps(model: str, entry: dict):
    """Token, confidence, horizon and choice of one step, from the recorded logits and masks alone."""
    tensors, index, wanted = load_file(GOLDEN / "steps" / f"{model}.safetensors"), entry["step"], entry["trace"]
    logits, masked = tensors[f"{index}.logits"], tensors[f"{index}.mask"].tolist()
    found = look(logits)
    assert found.tokens == tensors[f"{index}.token"].tolist()
    torch.testing.assert_close(torch.tensor(found.scores), tensors[f"{index}.conf"].float(), rtol=1e-5, atol=1e-6)

    method = "slowfast_llada" if model.startswith("llada") else "slowfast_dream"
    sampler = METHODS[method](entry["settings"]).sampler.replace(k_max=1)
    s, e = wanted[5], wanted[10]
    if wanted[0] == "S":
        canvas = [MASK if is_masked else 0 for is_masked in masked]
        row = Row(lambda ids: logits[: len(ids)], canvas, 0, MASK, EOS, eos_stop=False)
        slow_stage(row, sampler, 0, 0, 0, len(canvas), s)
        assert row.trace[0].filled == wanted[11]
        assert wanted[6] in (None, row.trace[0].estimate)
    else:
        scores = {p: found.scores[p] for p in range(s, e) if masked[p]}
        assert choose(scores, sampler.tau_high, sampler.min_parallel, sampler.strict) == wanted[11]


def sure(*confidences: float):
    """A model whose most likely token at position ``i`` is ``i % 8``, with the given confidence, for any input."""
    rows = []
    for position, confidence in enumerate(confidences):
        probability = torch.full((10,), (1 - confidence) / 9)
        probability[position % 8] = confidence
        rows.append(probability.log())
    table = torch.stack(rows)
    return lambda ids: table[: len(ids)]


def test_the_paper_by_hand():
    """One given position and seven masks. The furthest confidence over 0.3 is at 5, in two steps running: stable."""
    model = sure(0.5, 0.6, 0.95, 0.9, 0.4, 0.7, 0.2, 0.15)
    run = decode(model, [3] + [MASK] * 7, 1, SlowFast(tau_min=0.3), MASK, EOS)
    assert run.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert run.trace == [
        Step("S", 0, 0, 0, 7, 0, 5, [5], None, False, None, [1]),
        Step("S", 0, 0, 1, 7, 0, 5, [5, 5], 0.0, True, 5, [2]),
        Step("F", 0, 0, 0, 7, 0, None, None, None, True, 5, [4]),
        Step("F", 0, 0, 1, 5, 0, None, None, None, True, 5, [0]),
        Step("F", 0, 0, 2, 5, 0, None, None, None, True, 5, [3]),
        Step("S", 0, 1, 0, 7, 5, 6, [6], None, False, None, [5]),
        Step("S", 0, 1, 1, 7, 5, 6, [6, 6], 0.0, True, 6, [6]),
    ]


def test_the_fast_stage_takes_all_over_the_threshold():
    model = sure(0.99, 0.99, 0.9, 0.2, 0.9, 0.87, 0.3)
    run = decode(model, [MASK] * 7, 0, SlowFast(), MASK, EOS)
    assert [step.filled for step in run.trace] == [[0], [1], [2, 4, 5], [6], [3]]
    assert [step.phase for step in run.trace] == ["S", "S", "F", "F", "F"]


def steps_of(run) -> list[tuple]:
    return [(step.phase, step.cycle, step.k, step.estimate, step.filled) for step in run.trace]


def test_a_stable_step_fills_as_the_fast_stage_would():
    """The second step is stable and leaves nothing of its span, so there is no fast stage."""
    model = sure(0.9, 0.95, 0.88, 0.2, 0.15)
    run = decode(model, [MASK] * 5, 0, SlowFast(tau_min=0.3, share_stable=True), MASK, EOS)
    assert steps_of(run) == [
        ("S", 0, 0, 3, [1]),
        ("S", 0, 1, 3, [0, 2]),
        ("S", 1, 0, 4, [3]),
        ("S", 1, 1, 4, [4]),
    ]


def test_a_stable_step_at_the_last_chance_fills_too_and_a_mean_does_not():
    model = sure(0.5, 0.95, 0.9, 0.88, 0.7)
    settings = {"tau_min": 0.3, "k_max": 2, "share_stable": True}
    assert steps_of(decode(model, [MASK] * 5, 0, SlowFast(**settings), MASK, EOS))[:2] == [
        ("S", 0, 0, 5, [1]),
        ("S", 0, 1, 5, [2, 3]),
    ]
    never = SlowFast(**settings, spread_limit=0.0)  # no spread is below 0: the slow stage ends with the mean
    assert steps_of(decode(model, [MASK] * 5, 0, never, MASK, EOS))[:3] == [
        ("S", 0, 0, 5, [1]),
        ("S", 0, 1, 5, [2]),
        ("F", 0, 0, None, [3]),
    ]


def test_end_of_text_need_not_extend_the_horizon():
    """Position 7 says end-of-text (7 here) with confidence: no horizon ends there, but it can be filled."""
    model, canvas = sure(0.5, 0.6, 0.95, 0.9, 0.88, 0.7, 0.2, 0.94), [3] + [MASK] * 7
    run = decode(model, canvas, 1, SlowFast(tau_min=0.3), MASK, 7)
    assert steps_of(run)[0] == ("S", 0, 0, 7, [1])
    run = decode(model, canvas, 1, SlowFast(tau_min=0.3, eos_horizon=False), MASK, 7)
    assert steps_of(run) == [
        ("S", 0, 0, 5, [1]),
        ("S", 0, 1, 5, [6]),
        ("F", 0, 0, None, [2, 3]),
        ("F", 0, 1, None, [4]),
        ("F", 0, 2, None, [0]),
        ("S", 1, 0, 6, [5]),
    ]
    both = SlowFast(tau_min=0.3, eos_horizon=False, share_stable=True)
    assert steps_of(decode(model, canvas, 1, both, MASK, 7))[:3] == [
        ("S", 0, 0, 5, [1]),
        ("S", 0, 1, 5, [2, 3, 6]),
        ("F", 0, 0, None, [4]),
    ]
    stopped = decode(model, canvas, 1, both.replace(eos_stop=True), MASK, 7)  # at the last position: nothing follows
    assert steps_of(stopped) == steps_of(decode(model, canvas, 1, both, MASK, 7))


def test_a_stable_step_counts_its_span_alone():
    """The best position, 3, is beyond the span; in it one reaches the threshold. The best of the span is no resort."""
    model, settings = sure(0.9, 0.95, 0.4, 0.93), {"tau_min": 0.3, "eos_horizon": False, "share_stable": True}
    for min_parallel, filled in ((1, [0, 3]), (2, [3])):
        sampler = SlowFast(min_parallel=min_parallel, **settings)
        second = decode(model, [MASK] * 4, 0, sampler, MASK, 3).trace[1]
        assert (second.e, second.determined, second.filled) == (3, True, filled)


def test_what_the_slow_fill_takes_counts_for_the_shared_one():
    sampler = SlowFast(tau_min=0.3, share_stable=True, min_parallel=2)
    run = decode(sure(0.9, 0.95, 0.88, 0.4), [MASK] * 4, 0, sampler, MASK, EOS)
    assert [step.filled for step in run.trace] == [[1], [0, 2], [3]]


def test_thresholds_are_exceeded_or_reached():
    scores = {0: 0.5, 1: 0.25}
    assert choose(scores, 0.25, 1, strict=True) == [0]
    assert choose(scores, 0.25, 1, strict=False) == [0, 1]
    assert choose(scores, 0.25, 3, strict=False) == [0]
    assert choose(scores, None, 1, strict=False) == [0]
    assert choose({4: 0.5, 2: 0.5}, 0.9, 1, strict=False) == [2]
    assert choose({}, 0.9, 1, strict=False) == []


def test_end_of_text_ends_a_row():
    """It is committed at position 2 and takes position 5, decided before it, and all masks behind it with itself."""
    model = sure(0.3, 0.2, 0.8, 0.3, 0.3, 0.9, 0.3)

    def logits_fn(ids: list[int]) -> torch.Tensor:
        logits = model(ids).clone()
        logits[2:3, [2, EOS]] = logits[2:3, [EOS, 2]]
        return logits

    run = decode(logits_fn, [MASK] * 7, 0, SlowFast(eos_stop=True), MASK, EOS)
    assert run.tokens == [0, 1] + [EOS] * 5
    assert [step.filled for step in run.trace] == [[5], [2], [0], [1]]
    assert [step.forwarded for step in run.trace] == [7, 7, 3, 3]


def test_a_block_can_be_left_with_masks():
    run = decode(sure(*[0.2] * 8), [MASK] * 8, 0, SlowFast(tau_min=0.5, block_length=4, max_cycles=1), MASK, EOS)
    assert run.tokens.count(MASK) == 4
    assert [step.block for step in run.trace] == [0, 0, 1, 1]


def test_threshold_and_schedules_by_hand():
    model = sure(0.5, 0.95, 0.9, 0.6)
    canvas = [MASK] * 4
    filled = [s.filled for s in decode(model, canvas, 0, Threshold(block_length=2), MASK, EOS).trace]
    assert filled == [[1], [0], [2], [3]]
    assert [s.filled for s in decode(model, canvas, 0, Threshold(tau=0.9, block_length=None), MASK, EOS).trace] == [
        [1, 2],
        [3],
        [0],
    ]
    assert [s.filled for s in decode(model, canvas, 0, FixedSteps(steps=2), MASK, EOS).trace] == [[1, 2], [0, 3]]
    assert even_counts(7, 3) == [3, 2, 2]
    assert time_shares(4, 1e-3)[0] == pytest.approx(0.24975)


def test_spread_and_mean():
    assert [spread_of([2, 4], kind) for kind in ("variance", "std", "unbiased")] == [1.0, 1.0, 2.0]
    assert spread_of([7], "unbiased") == 0.0
    assert [mean_of([2, 5], rounding) for rounding in ("floor", "even")] == [3, 4]
    assert [mean_of([4, 5], rounding) for rounding in ("floor", "even")] == [4, 4]
    assert [mean_of([0, 1], rounding) for rounding in ("floor", "even")] == [0, 1]


def test_limits_of_what_can_be_drawn():
    logits = torch.tensor([0.4, 0.1, 0.4, 0.1]).log()
    never = float("-inf")
    assert [x > never for x in keep_top_k(logits, 1).tolist()] == [True, False, True, False]  # ties stay together
    assert [x > never for x in keep_top_p(logits, 0.3).tolist()] == [True, False, False, False]
    assert [x > never for x in keep_top_p(logits, 0.5).tolist()] == [True, False, True, False]
    assert [x > never for x in keep_top_p(logits, 0.85).tolist()] == [True, True, True, False]


def test_scores():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    expected = {"confidence": 0.5, "margin": 0.2, "entropy": -1.0296530}
    for metric, value in expected.items():
        found = look(logits, metric)
        assert found.tokens == [0]
        assert found.scores[0] == pytest.approx(value, abs=1e-6)
    sharper = look(logits, temperature=0.5, tempered=True, noise=torch.zeros(1, 3))
    assert sharper.scores[0] == pytest.approx(0.25 / 0.38, abs=1e-6)
    pushed = look(logits, temperature=2.0, noise=torch.tensor([[0.0, 0.0, 5.0]]))
    assert pushed.tokens == [2]
    assert pushed.scores[0] == pytest.approx(0.2, abs=1e-6)
