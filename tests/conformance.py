"""Check every recorded case of a golden directory: ``python tests/conformance.py DIR [--backend torch|triton]``.

Output tokens, the number of steps and, for SlowFast, the whole per-step trace must equal the recording exactly. Prints
one line per system, then ``N passed, M failed``; exits 1 on any failure. An unknown kind of case is a failure.
``--share N`` checks an Nth of the cases, in which every value of every setting occurs.

A correct result, by kind of record (``golden/README.md`` has the reasons):

* a stable record: its tokens, NFE and trace;
* a batch: ``batch1_rows``, the rows run one by one, since the references mix up the rows of a batch;
* a record of a newer sampler: its tokens, the step that committed each, what steps took back, and the number of
  forwards; with an early stop only up to the step that commits the first end-of-text, since here nothing after it is
  computed;
* a record of dInfer's loop: the same, and forwards are numbered as it numbers them, with the idle ones that it makes
  after a block is full. With an early stop also all of the block that holds the first end-of-text, decoded without one;
* a likelihood of a given answer: its value, and the masks drawn for it or the verdict on greedy decoding;
* an ``error`` record, which the reference cannot take: a finished canvas, or an error that names the argument;
* dLLM-Cache with a refresh ratio above 0 is numerically ill-posed (which rows are refreshed is decided by rounding),
  and where ``cache_mismatch`` is set the reference attended to keys twice: the canvas must be finished, at an NFE
  within the bounds of the sampler.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that a checkout needs no installation

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the models are tiny: for them, threads only cost time

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import sfs_triton  # noqa: E402
from bench.common.testing import brisk_interpreter  # noqa: E402
from sfs_triton import (  # noqa: E402
    KLASS,
    WINO,
    Credit,
    DelayedCache,
    EntropyBound,
    FixedSteps,
    Frame,
    Hierarchy,
    LocalLeap,
    MultiBlock,
    RefreshCache,
    Sampler,
    SlowFast,
    StepTrace,
    Threshold,
)
from sfs_triton.decoding.params import DecodingParams  # noqa: E402
from sfs_triton.ops.dispatch import check_backend  # noqa: E402
from sfs_triton.runner.likelihood import draw_masks  # noqa: E402

MARGIN = 1e-5  # traced decisions closer than this to a tie may fall either way under another order of summation
LIKELIHOOD = 2e-5  # relative change of a stable likelihood when the model runs in float64
MASKS_PER_FORWARD = 8  # dInfer's default: what it expects a forward to commit
ROUNDINGS = 64  # logits of a small model may differ by so many units of rounding of the largest; 4 to 20 were seen


@dataclass(frozen=True)
class Setup:
    """Settings of a recorded case's run."""

    system: str
    sampler: Sampler
    gen_length: int
    cache: object = "none"
    seed: int = 0
    eos_id: int | None = None  # the recording's end-of-text, where it matters
    other_ends: tuple[int, ...] = ()
    # of dInfer's loop:
    aligned: bool = False  # blocks start at multiples of their length, so the first may hold the prompt's end
    unroll: int = 1  # most forwards before the masks of a block are counted again
    ends_block: bool = False  # an end-of-text ends the response with its block


def _llada_slowfast(s: dict) -> Setup:
    sampler = SlowFast.preset(
        "llada-reference",
        block_length=s["block_length"],
        k_max=s["k_exploration_steps"],
        tau_min=s["cycle_len_confidence_threshold"],
        window=s["cycle_length_stability_window"],
        spread_limit=s["cycle_length_stability_std_dev_threshold"],
        tau_high=s["high_confidence_threshold"],
        tau_slow=s["high_confidence_threshold"],
        cfg_scale=s.get("cfg_scale", 0.0),
        max_cycles=s.get("max_sub_cycles_per_block", 256),
    )
    return Setup("llada-reference", sampler, s["gen_length"])


def _dream_slowfast(s: dict) -> Setup:
    sampler = SlowFast.preset(
        "dream-reference",
        k_max=s["n_cycle_discovery_steps"],
        tau_min=s["conf_threshold_cycle_len_pred"],
        window=s["stabilize_count"],
        spread_limit=s["cycle_len_variance_threshold"],
        tau_slow=s["high_conf_for_parallel_decode_discovery"],
        tau_high=s["high_conf_for_cycle_decode"],
        min_parallel=s["min_decode_in_cycle_fallback"],
        min_parallel_slow=s["min_tokens_for_parallel_decode_discovery"],
    )
    return Setup("dream-reference", sampler, s["max_new_tokens"])


def _llada_vanilla(s: dict) -> Setup:
    sampler = FixedSteps(steps=s["steps"], block_length=s["block_length"], cfg_scale=s.get("cfg_scale", 0.0))
    return Setup("llada", sampler, s["gen_length"])


def _dream_vanilla(s: dict) -> Setup:
    sampler = FixedSteps(steps=s["steps"], metric=s["alg"], eps=s["eps"])
    return Setup(f"dream-{s['alg']}", sampler, s["max_new_tokens"], seed=s.get("torch_seed", 0))


def _llada_fastdllm(s: dict) -> Setup:
    if s["threshold"] is None:
        sampler: Sampler = FixedSteps(steps=s["steps"], block_length=s["block_length"])
    else:
        sampler = Threshold(tau=s["threshold"], block_length=s["block_length"])
    return Setup(f"llada-{s['cache']}", sampler, s["gen_length"], s["cache"])


def _dream_fastdllm(s: dict) -> Setup:
    return Setup("dream-none", Threshold(tau=s["threshold"], block_length=None, steps=s["steps"]), s["max_new_tokens"])


def _dream_fastdllm_block(s: dict) -> Setup:
    if s["alg"] == "confidence_threshold":
        sampler: Sampler = Threshold(tau=s["threshold"], block_length=s["block_length"])
    else:
        sampler = FixedSteps(steps=s["steps"], metric=s["alg"], block_length=s["block_length"])
    return Setup(f"dream-{s['cache']}", sampler, s["max_new_tokens"], s["cache"])


def _with_refresh(inner: Callable[[dict], Setup]) -> Callable[[dict], Setup]:
    def setup(s: dict) -> Setup:
        plain = inner(s)
        policy = RefreshCache(
            prompt_interval=s["prompt_interval_steps"],
            response_interval=s["gen_interval_steps"],
            ratio=s["transfer_ratio"],
        )
        return Setup(plain.system, plain.sampler, plain.gen_length, policy)

    return setup


_METRICS = {"topk_margin": "margin"}


def _d2cache_confidence(s: dict) -> Setup | None:
    if "debias" in s:  # needs a table of how frequent each token is
        return None
    metric, stop = _METRICS.get(s.get("alg"), s.get("alg", "confidence")), s.get("stop_until_eos", False)
    tau = s.get("threshold")
    if metric == "entropy":
        tau = 0.0 if tau is None else -tau
    how = {"factor": s["factor"]} if "factor" in s else {"tau": 1e9 if tau is None else tau}
    sampler = Threshold(
        **how,
        metric=metric,
        sigma=s.get("sigma"),
        least=s["num_transfer_tokens"],
        block_length=s["block_length"],
        eos_stop=stop,
    )
    return Setup("d2cache-confidence", sampler, s["gen_length"], eos_id=s["eos_token_id"] if stop else None)


def _d2cache_entropy(s: dict) -> Setup:
    stop = s.get("stop_until_eos", False)
    sampler = EntropyBound(
        bound=s["gamma"],
        metric=_METRICS.get(s.get("alg"), s.get("alg", "confidence")),
        least=s["num_transfer_tokens"],
        sigma=s.get("sigma"),
        block_length=s["block_length"],
        eos_stop=stop,
    )
    return Setup("eb-sampler", sampler, s["gen_length"], eos_id=s["eos_token_id"] if stop else None)


def _localleap(s: dict) -> Setup:
    sampler = LocalLeap(
        tau=s["local_leap_anchor_threshold"],
        tau_near=s["local_leap_neighbor_threshold"],
        radius=s["local_leap_radius"],
        steps=s["num_denoising_steps"],
        block_length=s["block_length"],
    )
    return Setup("localleap", sampler, s["gen_length"])


def _dinfer(system: str, sampler: Sampler, s: dict) -> Setup:
    stops = "eos_id" in s
    loop = {"aligned": s.get("start_block_align", False), "unroll": s.get("maximum_unroll", 4), "ends_block": stops}
    return Setup(system, sampler.replace(eos_stop=stops), s["gen_length"], eos_id=s.get("eos_id"), **loop)


def _credit(s: dict) -> Setup:
    """CreditDecoding, and without credit dInfer's threshold."""
    sampler = Credit(
        tau=s["threshold"],
        weight=s.get("credit_alpha", 0.7) if s["decoder"] == "credit" else 0.0,
        decay=s.get("decay_beta", 0.8),
        power=s.get("boost_gamma", 0.2),
        block_length=s["block_length"],
    )
    return _dinfer(f"dinfer-{s['decoder']}", sampler, s)


def _wino(s: dict) -> Setup:
    tau, back = max(0.0, s["threshold"]), s["threshold_back"]  # no confidence is 0
    return Setup("wino", WINO(tau=tau, tau_back=back, block_length=s["block_length"]), s["gen_length"])


_TAKEN = {"all": "all", "max_conf": "confident", "min_kl": "calm"}


def _klass(s: dict) -> Setup | None:
    """KLASS, or one position per step.

    Two kinds are left out: by entropy it commits the least certain positions first, and with fewer steps than positions
    masks stay, or positions of other blocks are committed.
    """
    length = s.get("gen_length", s.get("max_new_tokens"))
    if s["alg"] == "entropy" or s["steps"] < length:
        return None
    if s["alg"] != "klass":
        metric = _METRICS.get(s["alg"], "confidence")
        return Setup("klass-one", Threshold(tau=1e9, metric=metric, block_length=s["block_length"]), length)
    sampler = KLASS(
        tau=s["conf_threshold"],
        divergence=s["kl_threshold"],
        history=s["kl_history_length"],
        take=_TAKEN[s["unmask_strategy"]],
        block_length=s.get("block_length"),
    )
    return Setup("klass", sampler, length)


def _hierarchy(s: dict) -> Setup:
    tau = 1e9 if s["threshold"] is None else s["threshold"]
    sampler = Hierarchy(tau=tau, tau_low=s["low_threshold"], block_length=s["block_length"])
    return _dinfer("hierarchy", sampler, s)


def _generate_hierarchy(s: dict) -> Setup | None:
    if s["decoding"] != "hierarchy_fast_v2":  # these raise
        return None
    if s["threshold"] is None:
        return Setup("hierarchy", FixedSteps(steps=s["steps"], block_length=s["block_length"]), s["gen_length"])
    return _hierarchy({**s, "maximum_unroll": 1})


def _multi_block(preset: str) -> Callable[[dict], Setup | None]:
    def setup(s: dict) -> Setup | None:
        rounded = preset == "d3llm-dream" and "cache_delay_iter" in s  # there the last block may be partial
        if s["decoded_token_threshold"] > 1 or s["max_new_tokens"] % s["block_size"] and not rounded:
            return None  # the reference's loop spins there until its limit of 10,000
        stop, sampler = s.get("early_stop", False), MultiBlock.preset(preset)
        sampler = sampler.replace(
            entropy=999 if s["threshold"] is None else s["threshold"],
            open_at=s["block_add_threshold"],
            block_length=s["block_size"],
            eos_stop=stop,
        )
        cache = "none"
        if "cache_delay_iter" in s:
            cache = DelayedCache(delay=s["cache_delay_iter"], refresh_every=s["refresh_interval"])
        return Setup(preset, sampler, s["max_new_tokens"], cache, eos_id=s["eos_token_id"] if stop else None)

    return setup


def _illada(s: dict) -> Setup:
    """iLLaDA's two functions; in that of variable length, steps are those of a block."""
    named = ("end_think_token_ids", "end_think_logit_boost", "end_think_boost_power")
    boost = {name: s[name] for name in named if name in s}
    if max(s.get("end_think_token_ids", [0])) >= 512:  # refused here; the reference switches the boost off
        boost = {}
    sampler = FixedSteps(steps=s["steps"], cfg_scale=s.get("cfg_scale", 0.0), **boost)
    if s.get("var", True):
        sampler = sampler.replace(block_length=None, grow=s["block_length"])
        return Setup("illada-variable", sampler, s["gen_length"], eos_id=s.get("stop_token_id", 511))
    return Setup("illada", sampler.replace(block_length=s["block_length"]), s["gen_length"])


def _single_block(s: dict) -> Setup:
    length = s.get("gen_length", s.get("max_new_tokens"))
    return Setup(
        "d3llm-single", Threshold(metric="entropy", tau=s["threshold"], block_length=s["block_length"]), length
    )


def _end_options(s: dict) -> Setup | None:
    """LLaDA's options: the first is for its end-of-text only, the other for its end of a turn as well."""
    if "remasking" in s:  # at random
        return None
    last, never = s.get("confidence_eos_eot_inf", False), s.get("logits_eos_inf", False)
    sampler = FixedSteps(steps=s["steps"], block_length=s["block_length"], cfg_scale=s.get("cfg_scale", 0.0))
    if last:
        sampler = sampler.replace(eos="last", eos_penalty=10_000.0 if never else 0.0)
    elif never:
        sampler = sampler.replace(eos="never")
    return Setup("end-options", sampler, s["gen_length"], eos_id=s["eos_id"], other_ends=(s["eot_id"],) if last else ())


# None for settings that this package does not have
NEWER: dict[str, Callable[[dict], Setup | None]] = {
    **dict.fromkeys(("d2confidence_llada", "d2confidence_dream"), _d2cache_confidence),
    **dict.fromkeys(("ebsampler_llada", "ebsampler_dream"), _d2cache_entropy),
    "localleap_dlmserve": _localleap,
    **dict.fromkeys(("dinfer_credit_llada", "dinfer_credit_dream"), _credit),
    **dict.fromkeys(("klass_llada", "klass_dream"), _klass),
    "wino_llada": _wino,
    **dict.fromkeys(("dinfer_threshold_llada", "dinfer_threshold_dream"), _credit),
    **dict.fromkeys(("dinfer_hierarchy_llada", "dinfer_hierarchy_dream"), _hierarchy),
    "dinfer_generate_hierarchy": _generate_hierarchy,
    **dict.fromkeys(("d3llm_llada", "d3llm_llada_cache"), _multi_block("d3llm-llada")),
    **dict.fromkeys(("d3llm_dream", "d3llm_dream_cache"), _multi_block("d3llm-dream")),
    **dict.fromkeys(("illada_var", "illada_generate"), _illada),
    # d2Cache's own KLASS and WINO differ from their authors'
    **dict.fromkeys(("d2klass_llada", "d2klass_dream", "d2wino_llada", "d2wino_dream"), lambda s: None),
    **dict.fromkeys(("d2klass_llada_unpatched", "d2klass_dream_unpatched"), lambda s: None),
    **dict.fromkeys(("d3llm_llada_single", "d3llm_dream_single"), _single_block),
    "generate_llada": _end_options,
}
METHODS: dict[str, Callable[[dict], Setup | None]] = {
    **NEWER,
    "slowfast_llada": _llada_slowfast,
    "slowfast_dream": _dream_slowfast,
    "vanilla_llada": _llada_vanilla,
    "vanilla_dream": _dream_vanilla,
    "fastdllm_llada": _llada_fastdllm,
    "fastdllm_dream": _dream_fastdllm,
    "fastdllm_dream_block": _dream_fastdllm_block,
    "slowfast_llada+dllm_cache": _with_refresh(_llada_slowfast),
    "slowfast_dream+dllm_cache": _with_refresh(_dream_slowfast),
    "slowfast_dream+dllm_cache(patched set_cache)": _with_refresh(_dream_slowfast),
    "vanilla_llada+dllm_cache": _with_refresh(_llada_vanilla),
    "vanilla_dream+dllm_cache": _with_refresh(_dream_vanilla),
}
LIKELIHOODS = ("get_log_likelihood", "illada_confidence")  # of given answers: nothing is decoded


def recorded_margin(case: dict) -> float:
    """Return the smallest recorded margin of a case; 1 where none was recorded."""
    return min((case.get("margin") or {"none": 1.0}).values())


def logits_tolerance(wanted: torch.Tensor, roundings: int = ROUNDINGS) -> float:
    """Return the change that another order of summation may cause in float32 logits of the size of ``wanted``."""
    return roundings * torch.finfo(torch.float32).eps * wanted.abs().max().item()


def trace_entry(step: StepTrace) -> list:
    """A step in the recordings' own form."""
    return [
        "S" if step.phase == "slow" else "F",
        step.block,
        step.cycle,
        step.k,
        step.forwarded,
        step.s,
        step.e_cand,
        step.history,
        step.spread,
        step.determined,
        step.e,
        step.committed,
    ]


def _same_entry(mine: list, recorded: list) -> bool:
    dev, wanted = mine[8], recorded[8]
    close = dev == wanted if dev is None or wanted is None else abs(dev - wanted) <= 1e-5 * max(1.0, abs(wanted))
    return close and mine[:8] == recorded[:8] and mine[9:] == recorded[9:]


def compare_trace(trace: list[StepTrace], recorded: list[list]) -> str | None:
    """The first difference, or None."""
    for index, (step, wanted) in enumerate(zip(trace, recorded, strict=False)):
        mine = trace_entry(step)
        if not _same_entry(mine, wanted):
            return f"trace step {index}: {mine} is not {wanted}"
    return None if len(trace) == len(recorded) else f"{len(trace)} steps in the trace, recorded {len(recorded)}"


def _check_single(engine: sfs_triton.Engine, case: dict, setup: Setup) -> str | None:
    traced = isinstance(setup.sampler, SlowFast) and "trace" in case
    done = engine.generate(
        case["prompt"],
        gen_length=setup.gen_length,
        sampler=setup.sampler,
        cache=setup.cache,
        seed=setup.seed,
        trace=traced,
    )
    for index, (row, wanted) in enumerate(zip(done, case["out"], strict=True)):
        if row.response != wanted:
            wrong = sum(a != b for a, b in zip(row.response, wanted, strict=True))
            return f"row {index}: {wrong} of {len(wanted)} tokens differ"
    if max(row.nfe for row in done) != case["nfe"]:
        return f"NFE {[row.nfe for row in done]}, recorded {case['nfe']}"
    return compare_trace(done[0].trace, case["trace"]) if traced else None


def _commits(tokens: list[int], steps: list[int], loose: Sequence[int]) -> set[tuple[int, int, int]]:
    """Return place, token and step of each commit. Tokens in ``loose`` score alike, and the reference takes them in the
    order of ``torch.topk``, which is that of no rule: their steps are in the order of places."""
    tied = iter(sorted(step for token, step in zip(tokens, steps, strict=True) if token in loose))
    pairs = enumerate(zip(tokens, steps, strict=True))
    return {(place, token, next(tied) if token in loose else step) for place, (token, step) in pairs}


def _changes(canvases: list[list[int]], mask_id: int) -> list[list[list[int]]]:
    """Return the places that each step filled, and those that it took back, from the canvases after each step."""
    found = []
    for pair in pairwise(canvases):
        filled = [place for place, (old, new) in enumerate(zip(*pair, strict=True)) if old == mask_id != new]
        taken = [place for place, (old, new) in enumerate(zip(*pair, strict=True)) if new == mask_id != old]
        found.append([filled, taken])
    return found


def _decode(
    engine: sfs_triton.Engine, case: dict, setup: Setup, on_step: Callable[[Frame], None] | None = None
) -> sfs_triton.Generation:
    """Generate. Aligned and partial blocks are those of a canvas to fill in, from a place that no front end gives."""
    (prompt,), sampler = case["prompt"], setup.sampler
    size = sampler.block_length or setup.gen_length
    if not setup.aligned and setup.gen_length % size == 0:
        how = {"gen_length": setup.gen_length, "sampler": sampler, "cache": setup.cache}
        return engine.generate(prompt, **how, on_step=on_step)
    start = len(prompt) - (len(prompt) % size if setup.aligned else 0)
    canvas = prompt + [engine.spec.mask_id] * setup.gen_length
    params = DecodingParams.parse(sampler, setup.cache, gen_length=size)
    sequence = engine.in_flight(params, canvas, start)
    with engine._run([sequence]) as run:
        while run.advance() is not None:
            pass
        return run.results()[0]


def _unrolled(steps: list[int], size: int, unroll: int) -> tuple[list[int], int]:
    """Return the forward of dInfer's loop that takes each position's step of ``steps``, and the count of its forwards.

    Before it counts the masks of a block again it makes a forward for each 8 of them, at least 1 and at most
    ``unroll``. Those that come after the block is full are idle: they commit nothing.
    """
    forward_of: dict[int, int] = {}
    count = 0
    for first in range(0, len(steps), size):
        block = steps[first : first + size]
        own, left = sorted(set(block)), len(block)
        while left:
            for _ in range(min(max(left // MASKS_PER_FORWARD, 1), unroll)):
                if own:
                    forward_of[own[0]] = count
                    left -= block.count(own.pop(0))
                count += 1
    return [forward_of[step] for step in steps], count


def _check_ended_block(engine: sfs_triton.Engine, case: dict, setup: Setup, place: int) -> str | None:
    """Check the response up to the end of the block that holds ``place``; dInfer looks for an end-of-text there."""
    size = setup.sampler.block_length
    stop = (place // size + 1) * size
    done = _decode(engine, case, dataclasses.replace(setup, sampler=setup.sampler.replace(eos_stop=False)))
    tokens, steps = (each[len(case["prompt"][0]) :][:stop] for each in (done.canvas, done.commit_step))
    if 1 + max(steps) != case["calls"]:
        return f"{1 + max(steps)} forwards up to the end of the block, recorded {case['calls']}"
    wrong = _commits(tokens, steps, ()) ^ _commits(case["out"][0][:stop], case["unmask_call"][0][:stop], ())
    return f"{len(wrong)} commits differ up to the end of the block" if wrong else None


def _check_steps(engine: sfs_triton.Engine, case: dict, setup: Setup) -> str | None:
    """Check tokens and the step that committed each of them."""
    if setup.eos_id is not None:
        model = copy.copy(engine.model)
        model.spec = dataclasses.replace(engine.spec, eos_id=setup.eos_id, other_ends=setup.other_ends)
        engine = sfs_triton.Engine(model)
    canvases = [[engine.spec.mask_id] * setup.gen_length]
    recorded = "steps" in case and not setup.sampler.eos_stop
    note = (lambda frame: canvases.append(frame.tokens[0][len(case["prompt"][0]) :])) if recorded else None
    done = _decode(engine, case, setup, note)
    if note and _changes(canvases, engine.spec.mask_id) != [(step + [[]])[:2] for step in case["steps"]]:
        return "steps fill or take back other positions"
    loose = engine.spec.end_ids if setup.sampler.eos == "last" else ()
    tokens, steps = (each[len(case["prompt"][0]) :] for each in (done.canvas, done.commit_step))
    forwards = done.nfe
    if setup.unroll > 1:
        steps, forwards = _unrolled(steps, setup.sampler.block_length, setup.unroll)
    mine = _commits(tokens, steps, loose)
    wanted = _commits(case["out"][0], case["unmask_call"][0], loose)
    ends = [(step, place) for place, token, step in wanted if token == setup.eos_id and step >= 0]
    if ends and setup.sampler.eos_stop:
        last, place = min(ends)
        mine, wanted = ({x for x in y if x[0] <= place and x[2] <= last} for y in (mine, wanted))
    elif forwards != case["calls"]:
        return f"{forwards} forwards, recorded {case['calls']}"
    if wrong := mine ^ wanted:
        return f"{len(wrong)} commits differ"
    if ends and setup.ends_block:
        return _check_ended_block(engine, case, setup, min(place for _, place in ends))
    return None


def _check_batch(engine: sfs_triton.Engine, case: dict, setup: Setup) -> str | None:
    done = engine.generate(case["prompt"], gen_length=setup.gen_length, sampler=setup.sampler, cache=setup.cache)
    for index, (row, alone) in enumerate(zip(done, case["batch1_rows"], strict=True)):
        if row.response != alone["out"]:
            return f"row {index} differs from the row run alone"
        if row.nfe != alone["nfe"]:
            return f"row {index}: NFE {row.nfe}, alone {alone['nfe']}"
    return None


def _check_finished(engine: sfs_triton.Engine, case: dict, setup: Setup) -> str | None:
    """Check a case without a correct recording: the canvas must be finished within the sampler's bounds."""
    done = engine.generate(case["prompt"], gen_length=setup.gen_length, sampler=setup.sampler, cache=setup.cache)
    for index, row in enumerate(done):
        if engine.spec.mask_id in row.response:
            return f"row {index} has masks left"
        if not 0 < row.nfe <= setup.sampler.step_cap(setup.gen_length):
            return f"row {index}: NFE {row.nfe}"
    return None


def check(engine: sfs_triton.Engine, case: dict, setup: Setup) -> str | None:
    """Run one case; return None if it is correct, else the difference."""
    ill_posed = isinstance(setup.cache, RefreshCache) and setup.cache.ratio > 0
    if len(case["prompt"]) > 1 and "batch1_rows" in case:
        return _check_batch(engine, case, setup)
    ill_posed |= case.get("ill_posed", False) or case.get("cache_mismatch", False)
    if "error" in case or ill_posed or not case.get("stable", False):
        return _check_finished(engine, case, setup)
    wrong = (_check_steps if case["method"] in NEWER else _check_single)(engine, case, setup)
    if wrong and recorded_margin(case) < MARGIN:
        return _check_finished(engine, case, setup)
    return wrong


def check_likelihood(engine: sfs_triton.Engine, case: dict) -> str | None:
    """Compare a recorded likelihood, and the masks that were drawn for it or the verdict on greedy decoding."""
    s, (prompt,), answer = case["settings"], case["prompt"], case["answer"]
    if case["method"] == "get_log_likelihood":
        how = {"mc_num": s["mc_num"], "mc_batch": s["batch_size"], "cfg_scale": s.get("cfg_scale", 0.0)}
        drawn = list(draw_masks(len(answer), s["mc_num"], s["batch_size"], s["torch_seed"]))
        recorded = [[p for p, bit in enumerate(row) if bit == "1"] for b in case["batches"] for row in b["masks"]]
        if drawn != recorded:
            return f"{sum(a != b for a, b in zip(drawn, recorded, strict=True))} sets of masks differ"
    else:
        how = {"method": "confidence", "cfg_scale": s.get("cfg", 0.0), "pad_eos": s.get("padd_eos", False)}
        how["check_greedy"] = True
    (found,) = engine.likelihood([(prompt, answer)], seed=s.get("torch_seed", 0), batch_size=16, **how)
    if not case["stable"]:
        return None
    if abs(found.value - case["value"]) > LIKELIHOOD * max(1.0, abs(case["value"])):
        return f"likelihood {found.value}, recorded {case['value']}"
    return None if found.greedy == case.get("greedy") else f"greedy is {found.greedy}"


def check_logits(engine: sfs_triton.Engine, path: Path) -> Iterator[str | None]:
    """Compare raw logits of each recorded input, to the rounding of values of their size."""
    recorded = load_file(path)
    for index in sorted({name.split(".")[0] for name in recorded}):
        logits = engine.model.logits(recorded[f"{index}.input_ids"].to(engine.model.device)).cpu()
        worst = (logits - recorded[f"{index}.logits"]).abs().max().item()
        yield (
            None
            if worst <= logits_tolerance(recorded[f"{index}.logits"])
            else f"{path.name} {index}: logits differ by {worst:.2e}"
        )


def values_of(case: dict) -> set[tuple]:
    """Return the method with each of its settings' values, and the kind of record."""
    kind = {"rows": len(case["prompt"]), "columns": len(case["prompt"][0]), "stable": case.get("stable")}
    kind["error"] = "error" in case
    return {(case["method"], name, json.dumps(value)) for name, value in (case["settings"] | kind).items()}


def share_of(cases: list[dict], share: int) -> list[dict]:
    """Return about one of ``share`` cases, the same in each run, in which every value of ``cases`` occurs."""
    values = [values_of(case) for case in cases]
    rest = random.Random(0).sample(range(len(cases)), len(cases))
    missing = set().union(*values)
    chosen: list[int] = []
    while rest and (missing or len(chosen) * share < len(cases)):
        best = max(rest, key=lambda index: len(values[index] & missing))  # the first of equals
        rest.remove(best)
        chosen.append(best)
        missing -= values[best]
    return [cases[index] for index in sorted(chosen)]


def run(
    folder: Path,
    choose: Callable[[list[dict]], list[dict]],
    backend: str,
    report: Callable[[str], None] = print,
    models: str = "*",
) -> tuple[int, int]:
    """Check the chosen cases of each file of ``folder`` by the operations of ``backend``.

    Returns:
        How many cases passed, and how many failed.
    """
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    passed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    left_out: Counter[str] = Counter()

    def note(system: str, name: str, wrong: str | None) -> None:
        total[system] += 1
        passed[system] += wrong is None
        if wrong is not None:
            report(f"FAIL {system} {name}: {wrong}")

    loaded = sorted((folder / "models").glob(models))
    engines = {path.name: sfs_triton.load(path, device, "float32", backend) for path in loaded}
    for path in sorted((folder / "logits").glob(f"{models}.safetensors")):
        for wrong in check_logits(engines[path.stem], path):
            note("logits/" + path.stem, path.name, wrong)
    for path in sorted((folder / "cases").glob(f"{models}.*.jsonl")):
        model, family = path.name.removesuffix(".jsonl").split(".", 1)
        for case in choose([json.loads(line) for line in path.read_text().splitlines()]):
            if case["method"] in LIKELIHOODS:
                note(family, case["id"], check_likelihood(engines[model], case))
                continue
            if case["method"] not in METHODS:
                note(f"{family}/unknown", case["id"], f"method={case['method']!r} is not known")
                continue
            setup = METHODS[case["method"]](case["settings"])
            if setup is None:
                left_out[family] += 1
                continue
            try:
                wrong = check(engines[model], case, setup)
            except sfs_triton.SfsError as error:
                refused = "error" in case and isinstance(error, sfs_triton.ArgumentError)
                wrong = None if refused else f"{type(error).__name__}: {error}"
            note(f"{family}/{setup.system}", case["id"], wrong)
    for system in sorted(total):
        report(f"{system} {passed[system]}/{total[system]}")
    for family, count in sorted(left_out.items()):
        report(f"{family}: {count} cases of settings that this package does not have")
    return sum(passed.values()), sum((total - passed).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--backend",
        default="torch",
        help="what implements the operations: torch (on the CPU) or triton (on a GPU; without one, in its interpreter)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="check only the first N cases of each file")
    parser.add_argument("--every", type=int, metavar="N", default=1, help="check only every Nth case of each file")
    parser.add_argument("--share", type=int, metavar="N", default=1, help="check an Nth with every setting's values")
    parser.add_argument("--model", metavar="NAME", default="*", help="check only this model's cases")
    arguments = parser.parse_args()
    try:
        check_backend(arguments.backend)
    except sfs_triton.ArgumentError as error:
        parser.error(str(error))
    for name in ("limit", "every", "share"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is not positive")
    if not (arguments.folder / "cases").is_dir():
        parser.error(f"{arguments.folder} has no folder 'cases'")
    if not list((arguments.folder / "models").glob(arguments.model)):
        parser.error(f"--model {arguments.model!r} is not a model of {arguments.folder}")
    if arguments.backend == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
    torch.set_num_threads(1)  # the recordings' own setting

    def choose(cases: list[dict]) -> list[dict]:
        return share_of(cases[: arguments.limit : arguments.every], arguments.share)

    with brisk_interpreter(overflow_checks=False) if arguments.backend == "triton" else nullcontext():
        passed, failed = run(arguments.folder, choose, arguments.backend, models=arguments.model)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
