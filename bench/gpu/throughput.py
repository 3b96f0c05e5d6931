"""Generations at LLaDA-8B's sizes: every row of the main benchmark, one problem at a time, round robin.

With :mod:`bench.shapes.inflate` the model is the embedded one in those sizes, so that tokens per forward and answers
are real, if a small model's. Without it weights are random: then milliseconds per step are meaningful, tokens are not.
Whether they differ between the two, since the one's activations are mostly zeros, is measured as well.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import torch

import sfs_triton
from bench.common import rows
from bench.common.tally import Done, Tally
from bench.cost.step_count import kinds
from bench.cost.visits import Bench as Visits
from bench.quality.work import Question, Work, read_work
from bench.shapes import geometry, inflate
from sfs_triton import Engine
from sfs_triton.models import ModelSpec, Transformer

from . import clock, generation, parts
from .model import Rig, prompt_ids, random_weights, sizes

PROBLEMS, RESPONSE = 3, 128
SAMPLED_STEPS = 16  # of vanilla decoding
ORDER = ("slowfast", "threshold", "vanilla", "autoregressive")


class Bench:
    """The model, inflated or with random weights, and its prompts."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, parts.device()
        self.spec, self.setting, self.dtype = sizes(toy)
        self._like: dict[int, Done] = {}  # how a row has decoded a problem
        clock.hold(self.device)

    @functools.cached_property
    def model(self) -> tuple[Engine, str]:
        """Return an engine and a description of its weights. If inflation fails, fall back to random weights."""
        try:
            small = sfs_triton.load("embedded", "cpu", "float32")
            geometry = "toy-512" if self.toy else "llada-8b"
            return inflate.inflate(
                small, geometry, self.device, self.dtype, backend="torch"
            ), "the embedded model, inflated"
        except Exception as error:
            reason = f"inflating failed: {type(error).__name__}: {error}"[:300]
        weights = random_weights(self.spec, self.device, self.dtype)
        return Engine(Transformer(self.spec, weights, "torch")), f"random, tokens mean nothing; {reason}"

    @functools.cached_property
    def work(self) -> Work:
        """Prompts, with the answers that are known."""
        engine, _ = self.model
        n = 1 if self.toy else PROBLEMS
        if engine.text is None:
            return Work("random", [Question(prompt_ids(engine.spec, self.setting.prompt, seed)) for seed in range(n)])
        return read_work(engine, "records", limit=n, seed=0, gen_length=RESPONSE)

    @functools.cached_property
    def visits(self) -> Visits:
        engine, _ = self.model

        def build(backend: str | None, execution: str | None) -> Engine:
            model = Transformer(engine.spec, engine.model.weights, backend)
            return generation.with_execution(Engine(model, engine.text), execution)

        return Visits(engine, RESPONSE, sampled_steps=SAMPLED_STEPS, build=build)

    def build(self) -> dict[str, Any]:
        began = time.perf_counter()
        engine, weights = self.model
        values = {"weights": weights, "parameters": geometry.parameters(engine.spec)}
        values["seconds"] = round(time.perf_counter() - began, 2)
        if self.device.type == "cuda":
            values["memory_bytes"] = torch.cuda.memory_allocated()
        return {**values, "prompts": [len(question.prompt) for question in self.work.questions], "response": RESPONSE}

    def visit(self, row: rows.Row, number: int) -> dict[str, Any]:
        """Decode a problem by a row."""
        question, visits = self.work.questions[number], self.visits
        tally = Tally(row, 1, visits.extrapolates(row))
        visit = visits.visit(row, [question.prompt], self._like.get(number))
        if not tally.extrapolated:
            self._like[number] = visit.done[0]
        tally.add(visit, [] if tally.extrapolated else [question.right(visit.done[0].text)])
        _, weights = self.model
        return {"row": row.name, "problem": number, "weights": weights, **tally.summary(None)}

    def zeros(self) -> dict[str, Any]:
        """Time the same steps with the model's weights and with dense random ones, in milliseconds."""
        engine, weights = self.model
        if engine.text is None:
            raise parts.Skip(weights)
        values: dict[str, Any] = {}
        dense = random_weights(engine.spec, self.device, self.dtype)
        for name, its in (("inflated", engine.model.weights), ("dense", dense)):
            values |= {f"{name}, {kind}": ms for kind, ms in self._steps(engine.spec, its).items()}
        for kind in ("list", "full"):
            values[f"dense_over_inflated_{kind}"] = values[f"dense, {kind}"] / values[f"inflated, {kind}"]
        return values

    def _steps(self, spec: ModelSpec, weights: sfs_triton.models.Weights) -> dict[str, float]:
        rig, taken = Rig(Transformer(spec, weights, "torch"), self.setting, "region"), {}
        for kind in kinds(self.setting, "region"):
            rig.put(kind)
            replay = rig.capture(rig.shape(kind))
            taken[kind.name] = clock.spread(clock.seconds(replay, rig.device, before=rig.restore, budget=0.5))["ms"]
        return taken


def every_part() -> dict[str, parts.Part]:
    """Order the parts: the most important first, and every row's first problem before any row's second."""
    toy = parts.is_toy()
    bench = Bench(toy)
    mine = [row for row in rows.every_row(RESPONSE) if row.sampler in ORDER]
    mine = [row for row in mine if row.who != rows.OURS or row.sampler != "vanilla"]
    mine = sorted(mine, key=lambda row: ORDER.index(row.sampler))
    if toy:
        mine = [row for row in mine if row.cache in ("none", "region") and row.sampler != "threshold"]
    found: dict[str, parts.Part] = {"model": bench.build}
    for number in range(1 if toy else PROBLEMS):
        for row in rows.spread_out(mine, ("torch",) if toy else ("triton", "torch"), generation.EXECUTIONS):
            found[f"{row.name}, problem {number}"] = functools.partial(bench.visit, row, number)
        if number == 0:
            found["zeros"] = bench.zeros
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
