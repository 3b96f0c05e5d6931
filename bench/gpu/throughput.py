"""Generations at LLaDA-8B's sizes, of every sampler, cache policy, implementation and loop, in turn.

With ``bench/inflate.py`` the model is the embedded one in those sizes, so that tokens per forward and answers are real,
if a small model's. Without it weights are random: then milliseconds a step mean something, and tokens nothing. Vanilla
decoding is timed over a few steps of the baseline's plain PyTorch, and marked as extrapolated.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
from typing import Any

import torch

import sfs_triton
from bench.baselines.plain import PlainModel, _look
from bench.embedded import problems, tasks
from sfs_triton import Engine, SlowFast, Threshold
from sfs_triton.models import Transformer

from . import generation, parts
from .model import prompt_ids, random_weights, sizes

PROBLEMS, RESPONSE = 3, 128
VANILLA_STEPS = 8
ROWS = {
    "slowfast region": (SlowFast(), "region"),
    "slowfast none": (SlowFast(), "none"),
    "threshold dual": (Threshold(), "dual"),
    "threshold region": (Threshold(), "region"),
    "slowfast refresh": (SlowFast(), "refresh"),
    "threshold prefix": (Threshold(), "prefix"),
    "threshold none": (Threshold(), "none"),
}


class Bench:
    """The model, inflated or of random weights, and what it is asked."""

    def __init__(self, toy: bool):
        self.toy, self.device = toy, parts.device()
        self.spec, self.setting, self.dtype = sizes(toy)

    @functools.cached_property
    def model(self) -> tuple[Engine, str]:
        """An engine, and what its weights are. Whatever is wrong with inflation is no reason to measure nothing."""
        reason = "bench/inflate.py is not there"
        if importlib.util.find_spec("bench.inflate"):
            try:
                return self._inflated(), "the embedded model, inflated"
            except Exception as error:
                reason = f"inflating failed: {type(error).__name__}: {error}"[:300]
        weights = random_weights(self.spec, self.device, self.dtype)
        return Engine(Transformer(self.spec, weights, "torch")), f"random, tokens mean nothing; {reason}"

    def _inflated(self) -> Engine:
        from bench import inflate

        source = sfs_triton.load("embedded", "cpu", "float32")
        return inflate.inflate(source, "toy-512" if self.toy else "llada-8b", self.device, self.dtype, impl="torch")

    @functools.cached_property
    def work(self) -> list[tuple[Any, tasks.Problem | None]]:
        """Prompts, with the answers that are known."""
        engine, _ = self.model
        if engine.text is None:
            return [(prompt_ids(engine.spec, self.setting.prompt, seed), None) for seed in range(PROBLEMS)]
        chosen = problems.held_out(
            "records", 1 if self.toy else PROBLEMS, engine.text, seed=0, gen_length=RESPONSE, max_length=2 * RESPONSE
        )
        return [(problem.question, problem) for problem in chosen]

    def build(self) -> dict[str, Any]:
        began = time.perf_counter()
        engine, weights = self.model
        values = {"weights": weights, "parameters": _count(engine), "seconds": round(time.perf_counter() - began, 2)}
        if self.device.type == "cuda":
            values["memory_bytes"] = torch.cuda.memory_allocated()
        return {**values, "prompts": [_length(engine, prompt) for prompt, _ in self.work], "response": RESPONSE}

    def vanilla(self) -> dict[str, Any]:
        """One token a step: a few steps of the plain baseline, and what all of them would take."""
        engine, weights = self.model
        plain = PlainModel(engine.model)
        plain.cos, plain.sin = (x.to(self.device, self.dtype) for x in (plain.cos, plain.sin))
        length = _length(engine, self.work[0][0]) + RESPONSE
        canvas = torch.full((length,), engine.spec.mask_id, device=self.device)
        taken = []
        with torch.inference_mode():
            for _ in range(1 + VANILLA_STEPS):
                began = time.perf_counter()
                confidence, token = _look(plain, canvas, length)
                best = int(confidence.argmax())  # as the official script does: the host reads
                canvas[best] = token[best]
                taken.append(time.perf_counter() - began)
        step = statistics.median(taken[1:])
        values = {"weights": weights, "canvas": length, "ms_per_step": 1e3 * step, "nfe": RESPONSE}
        return {**values, "extrapolated": True, "tokens_per_second": 1 / step}

    def row(self, name: str, impl: str, loop: str) -> dict[str, Any]:
        """All problems by one sampler, after a warm-up."""
        sampler, cache = ROWS[name]
        base, weights = self.model
        model = Transformer(base.spec, base.model.weights, impl)
        engine = generation.with_loop(Engine(model, base.text), loop)
        options = {"gen_length": RESPONSE, "sampler": sampler, "cache": cache}
        done, seconds = [], []
        with generation.warnings() as told:
            for prompt, _ in (self.work[0], *self.work):
                began = time.perf_counter()
                done.append(engine.generate(prompt, **options))
                seconds.append(time.perf_counter() - began)
        done, seconds = done[1:], seconds[1:]
        known = [(p, row) for (_, p), row in zip(self.work, done, strict=True) if p is not None]
        tokens = sum(len(row.tokens) for row in done)
        values = {
            **{"row": name, "impl": impl, "loop": loop, "weights": weights, "response": RESPONSE},
            "nfe": statistics.mean(row.nfe for row in done),
            "full_forwards": statistics.mean(row.full_forwards for row in done),
            "rows_forwarded": statistics.mean(row.rows_forwarded for row in done),
            "ms_per_step": 1e3 * statistics.median(s / row.nfe for s, row in zip(seconds, done, strict=True)),
            "tpf": tokens / sum(row.nfe for row in done) if known else None,
            "tokens_per_second": tokens / sum(seconds) if known else None,
            "correct": sum(tasks.correct(p, row.text or "") for p, row in known) if known else None,
            "problems": len(done),
        }
        if told:
            raise parts.Incomplete(values, RuntimeError(f"the loop failed: {'; '.join(told)}"))
        return values


def _count(engine: Engine) -> int:
    weights = engine.model.weights
    layers = sum(t.numel() for layer in weights.layers for t in _tensors(layer))
    return layers + sum(t.numel() for t in (weights.embedding, weights.norm, weights.head))


def _tensors(layer) -> list[torch.Tensor]:
    found = (getattr(layer, name) for name in type(layer).__slots__)
    return [t for t in found if t is not None]


def _length(engine: Engine, prompt: Any) -> int:
    return len(prompt) if not isinstance(prompt, str) else len(engine._encode(prompt, False, 0))


def every_part() -> dict[str, parts.Part]:
    toy = parts.is_toy()
    bench = Bench(toy)
    found: dict[str, parts.Part] = {"model": bench.build, "vanilla": bench.vanilla}
    combinations = [
        (impl, loop) for loop in ("replay", "eager") for impl in (("torch",) if toy else ("triton", "torch"))
    ]
    for name in list(ROWS)[: 2 if toy else None]:
        for impl, loop in combinations:
            found[f"{name}, {impl}, {loop}"] = functools.partial(bench.row, name, impl, loop)
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
