"""Generations compared with runs of the oracle in ``tests/reference``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from sfs_triton import WINO, Engine, Generation, Sampler, StepTrace, load
from sfs_triton.models import Transformer
from sfs_triton.ops.torch.philox import gumbel
from tests.reference import ReferenceRun, Step, decode, logits_of, wino
from tests.support.paths import GOLDEN


@cache
def engine_of(name: str, eos_id: int | None = None, backend: str = "torch") -> Engine:
    """Load a small trained model; ``eos_id`` is a token that its responses are full of."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = load(GOLDEN / "models" / name, device, "float32", backend).model
    spec = model.spec if eos_id is None else replace(model.spec, eos_id=eos_id)
    return Engine(Transformer(spec, model.weights, backend))


def reference(engine: Engine, canvas: list[int], start: int, sampler: Sampler, seed: int = 0) -> ReferenceRun:
    """Decode ``canvas`` from ``start`` on with the oracle, with the logits and the noise of ``engine``."""
    spec = engine.spec

    def noise(step: int, length: int) -> torch.Tensor:
        key = torch.tensor(seed)
        return gumbel(key, torch.arange(spec.vocab_size), torch.arange(length)[:, None], torch.tensor(step))

    logits_fn, drawn = logits_of(engine.model, canvas, sampler.cfg_scale), noise if sampler.temperature > 0 else None
    if isinstance(sampler, WINO):  # its shadow block needs more of a model than logits of a canvas
        return wino.decode(engine.model, logits_fn, canvas, start, sampler, spec.mask_id, spec.eos_id, drawn)
    return decode(logits_fn, canvas, start, sampler, spec.mask_id, spec.eos_id, drawn, seed)


def _same_spread(mine: float | None, other: float | None) -> bool:
    return mine == other or None not in (mine, other) and abs(mine - other) <= 1e-5 * max(1.0, abs(other))


def _difference(step: StepTrace, wanted: Step) -> str | None:
    """Describe how an engine's step differs from the oracle's; None if it does not."""
    phase = {"slow": "S", "fast": "F", "block": "B"}[step.phase]
    mine = Step(
        phase,
        step.block,
        step.cycle if phase != "B" else 0,
        step.k,
        step.forwarded,
        step.s,
        step.e_cand,
        step.history,
        step.spread,
        step.determined,
        step.e,
        sorted(step.committed),
    )
    wanted = wanted._replace(filled=sorted(wanted.filled))
    wrong = [name for name in Step._fields if name != "spread" and getattr(mine, name) != getattr(wanted, name)]
    if wrong or not _same_spread(mine.spread, wanted.spread):
        return f"{wrong or ['spread']}: {mine} is not {wanted}"
    return None


def compare(done: Generation, wanted: ReferenceRun) -> str | None:
    """Describe the first difference between a generation and the oracle's run; None if there is none."""
    for index, (step, other) in enumerate(zip(done.trace, wanted.trace, strict=False)):
        if wrong := _difference(step, other):
            return f"step {index}: {wrong}"
    if done.nfe != wanted.nfe or len(done.trace) != wanted.nfe:
        return f"NFE {done.nfe}, {len(done.trace)} steps traced, not {wanted.nfe}"
    return None if done.response == wanted.tokens else f"tokens {done.response} are not {wanted.tokens}"
