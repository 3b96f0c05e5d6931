"""Count a generation's host calls and copies, between its first step and its last and in total, to find waits.

The embedded model in float32, by every loop, with a sampler for each cache policy.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import sfs_triton
from sfs_triton import Engine, RefreshCache, SlowFast, Threshold
from sfs_triton.models import Transformer

from . import generation, parts

QUESTIONS = ["15,44,79,50", "3,1,2", "99,98,97,12,7"]
LENGTH = 32
SETTINGS = {
    "none": {"sampler": SlowFast(), "cache": "none"},
    "region": {"sampler": SlowFast(), "cache": "region"},
    "refresh": {"sampler": SlowFast(), "cache": RefreshCache(6, 3, 0.0)},
    "prefix": {"sampler": Threshold(block_length=16), "cache": "prefix"},
    "dual": {"sampler": Threshold(block_length=16), "cache": "dual"},
}


@functools.cache
def embedded() -> Engine:
    return sfs_triton.load("embedded", parts.device(), "float32")


def count(impl: str, loop: str, policy: str) -> dict[str, Any]:
    """Waits must be none between the steps, and one in all: for the result."""
    model = embedded().model
    engine = generation.with_loop(Engine(Transformer(model.spec, model.weights, impl), embedded().text), loop)
    values = generation.profile(engine, QUESTIONS, gen_length=LENGTH, **SETTINGS[policy])
    values = {"impl": impl, "loop": loop, "policy": policy, **values}
    if values["decode"]["waits"]:
        raise parts.Incomplete(values, AssertionError(f"waits between steps: {values['decode']['waits']}"))
    return values


def every_part() -> dict[str, parts.Part]:
    toy = parts.is_toy()
    impls = ("torch",) if toy else ("torch", "triton")
    return {
        f"{policy}, {impl}, {loop}": functools.partial(count, impl, loop, policy)
        for impl in impls
        for policy in list(SETTINGS)[: 2 if toy else None]
        for loop in ("replay", "eager")
    }


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
