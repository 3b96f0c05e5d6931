"""Count a generation's host calls and copies, between its first step and its last and in total, to find waits.

The embedded model in float32, by every execution, with a sampler for each cache policy.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import sfs_triton
from sfs_triton import Engine, RefreshCache, SlowFast, Threshold
from sfs_triton.models import Transformer
from sfs_triton.ops.dispatch import BACKENDS

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
    return sfs_triton.load("embedded", parts.device(), "float32", "torch")


def count(backend: str, execution: str, policy: str) -> dict[str, Any]:
    """Count the waits: none is allowed between the steps, and one in all, for the result."""
    model = embedded().model
    engine = generation.with_execution(
        Engine(Transformer(model.spec, model.weights, backend), embedded().text), execution
    )
    values = generation.profile(engine, QUESTIONS, gen_length=LENGTH, **SETTINGS[policy])
    values = {"backend": backend, "execution": execution, "policy": policy, **values}
    if values["decode"]["waits"]:
        raise parts.Incomplete(values, AssertionError(f"waits between steps: {values['decode']['waits']}"))
    return values


def every_part() -> dict[str, parts.Part]:
    toy = parts.is_toy()
    backends = ("torch",) if toy else BACKENDS
    return {
        f"{policy}, {backend}, {execution}": functools.partial(count, backend, execution, policy)
        for backend in backends
        for policy in list(SETTINGS)[: 2 if toy else None]
        for execution in generation.EXECUTIONS
    }


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
