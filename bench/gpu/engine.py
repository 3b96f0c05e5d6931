"""The engine's steps at LLaDA-8B's sizes, with random weights: by each backend, of every policy, in the shapes
that graphs are captured for; launched one by one and replayed, beside the prediction of :mod:`bench.cost`. Then whole
generations: calls of the host, kernels and waits.

Every step starts from the same place, half of the response decided, so replays do the same work each time.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bench.cost.cost_model import CEILINGS
from bench.cost.step_count import Kind, kinds, steps_of
from sfs_triton import Engine
from sfs_triton.decoding.step_plan import Forward
from sfs_triton.models import Transformer

from . import clock, generation, parts, trace
from .environment import smi
from .model import Rig, prompt_ids, random_weights, sizes

BACKENDS = ("triton", "torch")
POLICIES = ("region", "none", "dual", "prefix", "refresh")  # what matters most comes first
PROFILED = ("region", "none")
DECISIONS = 10  # in a graph, since one takes microseconds
GEN_LENGTH = 32
NEW_PROMPTS = (203, 388, 611, 997)
PREDICTED = CEILINGS["h200"]


class Bench:
    """Weights are made once, and kept for both backends; of the rigs only the last."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, parts.device()
        self.spec, self.setting, self.dtype = sizes(toy)
        self._rig: tuple[tuple, Rig] | None = None
        clock.hold(self.device)

    @functools.cached_property
    def weights(self):
        return random_weights(self.spec, self.device, self.dtype)

    @functools.cache  # noqa: B019  one bench a process
    def model(self, backend: str) -> Transformer:
        return Transformer(self.spec, self.weights, backend)

    def rig(self, backend: str, policy: str) -> Rig:
        if self._rig is None or self._rig[0] != (backend, policy):
            self._rig = None  # its caches make room
            self._rig = (backend, policy), Rig(self.model(backend), self.setting, policy)
        return self._rig[1]

    # ------------------------------------------------------------------------------------------------------- one step

    def step(self, backend: str, policy: str, kind: Kind) -> dict[str, Any]:
        """A step of one kind, launched and replayed.

        Raises:
            Incomplete: it runs, but cannot be captured, or replays do something else. Tokens may differ: random weights
            make 126,464 of them nearly equal, and rounding can choose another.
        """
        rig = self.rig(backend, policy)
        shape = rig.shape(kind)
        first = next(iter(kinds(self.setting, policy)))
        rig.put(first)
        rig.run(rig.shape(first))  # caches hold what a model makes of a canvas, not zeros
        rig.put(kind)
        values = {
            **{"backend": backend, "policy": policy, "kind": kind.name},
            **{"shape": f"{shape.positions.value} {shape.size}", "positions": shape.size},
            **{"keys": shape.keys, "head_rows": shape.targets},
            **self.predicted(backend, policy, kind),
            **_launched(rig, shape),
        }
        launched = rig.outcome()
        try:
            replay = rig.capture(shape)
            values |= self._replayed(rig, replay, policy)
            replayed = rig.outcome()
            values["same_tokens"] = replayed["tokens"] == launched["tokens"]
            if replayed["control"] != launched["control"]:
                raise RuntimeError(f"a replay leaves sequences at {replayed['control']}, not at {launched['control']}")
            values |= self._machine(rig, shape, values["ms"])
        except RuntimeError as error:
            raise parts.Incomplete(values, error) from error
        return values

    def predicted(self, backend: str, policy: str, kind: Kind) -> dict[str, Any]:
        """Predict the step by the cost model, at the ceilings that the design assumes."""
        count = steps_of(self.setting, backend, policy).count(kind)
        return {
            "predicted_ms": 1e3 * PREDICTED.seconds(count),
            "predicted_kernels": count.total.launches,
            "predicted_bytes": count.total.bytes,
            "predicted_flops": count.total.flops,
        }

    def _replayed(self, rig: Rig, replay: Callable[[], None], policy: str) -> dict[str, Any]:
        samples = clock.seconds(replay, rig.device, before=rig.restore, budget=1.0)
        values: dict[str, Any] = clock.spread(samples)
        if policy in PROFILED:
            rig.restore()
            values["profile"] = trace.summary(trace.profiled(replay))
        rig.restore()
        replay()
        rig.wait()
        return values

    def _machine(self, rig: Rig, shape: Forward, ms: float) -> dict[str, Any]:
        """The step without its forward and its head: their results are there already."""
        batch, targets = len(rig.state.tokens), shape.targets
        hidden = torch.zeros((batch, max(targets, 1), self.spec.d_model), device=rig.device, dtype=self.dtype)
        token = torch.zeros(batch * targets, dtype=torch.int32, device=rig.device)
        score = torch.full((batch * targets,), 0.5, device=rig.device)
        model = rig.model
        ops = replace(model.ops, lm_head=lambda *_, **__: (token, score))
        with (
            mock.patch.object(model, "ops", ops),
            mock.patch.object(model, "forward", lambda *_, **__: hidden),
        ):
            rig.restore()
            replay = rig.capture(shape)
            taken = clock.spread(clock.seconds(replay, rig.device, before=rig.restore, budget=0.3), "machine_ms")
        return {**taken, "machine_share": taken["machine_ms"] / ms}

    # ------------------------------------------------------------------------------------------------------ other parts

    def decide(self, backend: str, policy: str) -> dict[str, Any]:
        """The decision alone."""
        rig = self.rig(backend, policy)
        rig.put(next(iter(kinds(self.setting, policy))))
        sampler, cache = rig.key.sampler, rig.key.cache
        rules = sampler.rules(cache.opening(self.spec.shifted), **cache.rules)
        ops = self.model(backend).ops
        function = ops.decide_cycle if sampler.by_stage else ops.decide_block

        def work() -> None:
            for _ in range(DECISIONS):
                function(rig.state, rules)

        replay = clock.graph_of(work, rig.device)
        taken = clock.spread(clock.seconds(replay, rig.device, before=rig.restore))
        return {"backend": backend, "policy": policy, "us": 1e3 * taken["ms"] / DECISIONS}

    def generate(self, backend: str, policy: str, execution: str) -> dict[str, Any]:
        """Profile a generation. With random weights its tokens mean nothing, and its number of steps little."""
        self._rig = None
        engine = generation.with_execution(Engine(self.model(backend)), execution)
        chosen = self.setting.policy(policy)
        length = 16 if self.toy else GEN_LENGTH
        about = {"backend": backend, "policy": policy, "execution": execution, "gen_length": length}
        prompts = [prompt_ids(self.spec, self.setting.prompt)]
        try:
            found = generation.profile(
                engine, prompts, gen_length=length, sampler=self.setting.sampler(chosen), cache=chosen
            )
        except parts.Incomplete as part:
            raise parts.Incomplete({**about, **part.values}, part.__cause__) from part
        return {**about, **found}

    def first_answers(self, backend: str, execution: str) -> dict[str, Any]:
        """Time the first answer to prompts of new lengths, and a second to each: what is made per shape shows here."""
        self._rig = None
        engine = generation.with_execution(Engine(self.model(backend)), execution)
        lengths = (20, 33, 41) if self.toy else NEW_PROMPTS
        first, again = [], []
        for length in lengths:
            prompt = prompt_ids(self.spec, length, seed=length)
            for taken in (first, again):
                began = time.perf_counter()
                done = engine.generate(prompt, gen_length=8 if self.toy else GEN_LENGTH)
                taken.append(1e3 * (time.perf_counter() - began) / done.nfe)
        # the first prompt also loads libraries and kernels
        return {
            **{"backend": backend, "execution": execution, "prompts": lengths},
            **{"first_ms_per_step": first, "again_ms_per_step": again},
            "first_over_again": max(a / b for a, b in list(zip(first, again, strict=True))[1:]),
        }


def _launched(rig: Rig, shape: Forward) -> dict[str, Any]:
    """Time a step of eager execution by the host's clock, from its launch to its output."""
    taken = []
    deadline = time.monotonic() + 1.0
    while len(taken) < 3 or len(taken) < 10 and time.monotonic() < deadline:
        rig.restore()
        if rig.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        rig.run(shape)
        taken.append(time.perf_counter() - began)
    return clock.spread(taken, "eager_ms")


def every_part() -> dict[str, parts.Part]:
    """Steps of ``region`` and ``none`` and their generations first."""
    toy = parts.is_toy()
    bench = Bench(toy)
    backends = ("torch",) if toy else BACKENDS
    found: dict[str, parts.Part] = {}
    for policies in (POLICIES[:2], POLICIES[2:]):
        for policy in policies:
            for backend in backends:
                for kind in reversed(kinds(bench.setting, policy)):
                    name = f"{backend}, {policy}, {kind.name}"
                    found[name] = functools.partial(bench.step, backend, policy, kind)
                if policy in ("region", "dual"):
                    found[f"{backend}, {policy}, decide"] = functools.partial(bench.decide, backend, policy)
        for policy in policies[:2]:
            for backend in backends:
                for execution in generation.EXECUTIONS:
                    name = f"generation, {backend}, {policy}, {execution}"
                    found[name] = functools.partial(bench.generate, backend, policy, execution)
        for backend, execution in (("torch", "eager"), ("triton", "cuda_graphs")):
            if backend in backends:
                name = f"first answers, {backend}, {execution}"
                found[name] = functools.partial(bench.first_answers, backend, execution)
        found["clocks" if "clocks" not in found else "clocks at the end"] = smi
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
