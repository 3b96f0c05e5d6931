"""The engine's steps at LLaDA-8B's sizes, with random weights: by each implementation, of every policy, in the shapes
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
from sfs_triton.decoding.caching import Shape
from sfs_triton.models import Transformer

from . import clock, generation, parts, trace
from .environment import smi
from .model import Rig, prompt_ids, random_weights, sizes

IMPLS = ("triton", "torch")
POLICIES = ("region", "none", "dual", "prefix", "refresh")  # what matters most comes first
PROFILED = ("region", "none")
DECISIONS = 10  # in a graph, since one takes microseconds
GEN_LENGTH = 32
PREDICTED = CEILINGS["h200"]


class Bench:
    """Weights are made once, and kept for both implementations; of the rigs only the last."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, parts.device()
        self.spec, self.setting, self.dtype = sizes(toy)
        self._rig: tuple[tuple, Rig] | None = None
        clock.hold(self.device)

    @functools.cached_property
    def weights(self):
        return random_weights(self.spec, self.device, self.dtype)

    @functools.cache  # noqa: B019  one bench a process
    def model(self, impl: str) -> Transformer:
        return Transformer(self.spec, self.weights, impl)

    def rig(self, impl: str, policy: str) -> Rig:
        if self._rig is None or self._rig[0] != (impl, policy):
            self._rig = None  # its caches make room
            self._rig = (impl, policy), Rig(self.model(impl), self.setting, policy)
        return self._rig[1]

    # ------------------------------------------------------------------------------------------------------- one step

    def step(self, impl: str, policy: str, kind: Kind) -> dict[str, Any]:
        """A step of one kind, launched and replayed.

        Raises:
            Incomplete: it runs, but cannot be captured, or replays do something else. Tokens may differ: random weights
            make 126,464 of them nearly equal, and rounding can choose another.
        """
        rig = self.rig(impl, policy)
        shape = rig.shape(kind)
        first = next(iter(kinds(self.setting, policy)))
        rig.put(first)
        rig.run(rig.shape(first))  # caches hold what a model makes of a canvas, not zeros
        rig.put(kind)
        values = {
            **{"impl": impl, "policy": policy, "kind": kind.name, "shape": f"{shape.kind} {shape.size}"},
            **{"rows": shape.size, "keys": shape.keys, "head_rows": shape.targets},
            **self.predicted(impl, policy, kind),
            **_launched(rig, shape),
        }
        launched = rig.outcome()
        try:
            replay = rig.capture(shape)
            values |= self._replayed(rig, replay, policy)
            replayed = rig.outcome()
            values["same_tokens"] = replayed["tokens"] == launched["tokens"]
            if replayed["control"] != launched["control"]:
                raise RuntimeError(f"a replay leaves rows at {replayed['control']}, not at {launched['control']}")
            values |= self._machine(rig, shape, values["ms"])
        except RuntimeError as error:
            raise parts.Incomplete(values, error) from error
        return values

    def predicted(self, impl: str, policy: str, kind: Kind) -> dict[str, Any]:
        """Predict the step by the cost model, at the ceilings that the design assumes."""
        count = steps_of(self.setting, impl, policy).count(kind)
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

    def _machine(self, rig: Rig, shape: Shape, ms: float) -> dict[str, Any]:
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

    def decide(self, impl: str, policy: str) -> dict[str, Any]:
        """The decision alone."""
        rig = self.rig(impl, policy)
        rig.put(next(iter(kinds(self.setting, policy))))
        rules = rig.sampler.rules(rig.policy.opening(self.spec.shifted), **rig.policy.rules)
        ops = self.model(impl).ops
        function = ops.decide_cycle if rig.step.by_stage else ops.decide_block

        def work() -> None:
            for _ in range(DECISIONS):
                function(rig.state, rules)

        replay = clock.graph_of(work, rig.device)
        taken = clock.spread(clock.seconds(replay, rig.device, before=rig.restore))
        return {"impl": impl, "policy": policy, "us": 1e3 * taken["ms"] / DECISIONS}

    def generate(self, impl: str, policy: str, loop: str) -> dict[str, Any]:
        """A generation by a loop. With random weights its tokens mean nothing, and its number of steps little."""
        self._rig = None
        engine = generation.with_loop(Engine(self.model(impl)), loop)
        chosen = self.setting.policy(policy)
        length = 16 if self.toy else GEN_LENGTH
        about = {"impl": impl, "policy": policy, "loop": loop, "gen_length": length}
        prompts = [prompt_ids(self.spec, self.setting.prompt)]
        try:
            found = generation.profile(
                engine, prompts, gen_length=length, sampler=self.setting.sampler(chosen), cache=chosen
            )
        except parts.Incomplete as part:
            raise parts.Incomplete({**about, **part.values}, part.__cause__) from part
        return {**about, **found}


def _launched(rig: Rig, shape: Shape) -> dict[str, Any]:
    """Time a step of the eager loop by the host's clock, from its start to its output."""
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
    impls = ("torch",) if toy else IMPLS
    found: dict[str, parts.Part] = {}
    for policies in (POLICIES[:2], POLICIES[2:]):
        for policy in policies:
            for impl in impls:
                for kind in reversed(kinds(bench.setting, policy)):
                    name = f"{impl}, {policy}, {kind.name}"
                    found[name] = functools.partial(bench.step, impl, policy, kind)
                if policy in ("region", "dual"):
                    found[f"{impl}, {policy}, decide"] = functools.partial(bench.decide, impl, policy)
        for policy in policies[:2]:
            for impl in impls:
                for loop in ("replay", "eager"):
                    name = f"generation, {impl}, {policy}, {loop}"
                    found[name] = functools.partial(bench.generate, impl, policy, loop)
        found["clocks" if "clocks" not in found else "clocks at the end"] = smi
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
