"""The loop as one graph with conditional nodes: what an iteration costs, and what nodes the engine's steps consist of.

``tests/test_device_while.py`` has the probes that show whether such graphs run at all; they come first.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from bench.step_count import kinds
from sfs_triton.loops import device_while
from sfs_triton.models import Transformer

from . import clock, parts
from .model import TOY_SETTING, Rig, random_weights, sizes

ITERATIONS = (100, 1100)


def supported() -> dict[str, Any]:
    support = device_while.supported()
    if not support.loop:
        raise parts.Skip(support.reason)
    return support._asdict()


def overhead(branches: bool, switch: bool) -> dict[str, Any]:
    """Microseconds an iteration of a WHILE whose body counts, with or without two bodies to choose from."""
    if switch and not device_while.supported().switch:
        raise parts.Skip(device_while.supported().reason)
    supported()
    count, done, flag, limit = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(4))

    def body() -> None:
        count.add_(1)
        done.copy_(count >= limit)
        flag.copy_(count % 3 == 0)

    step, other = device_while._captured(body), device_while._captured(body)
    more = {"refresh": other, "refresh_flag": flag, "switch": switch} if branches else {}
    loop = device_while.build(step, done=done, **more)
    taken = {}
    for iterations in ITERATIONS:
        limit.fill_(iterations)

        def restart() -> None:
            count.zero_()
            done.zero_()
            flag.zero_()

        taken[iterations] = clock.spread(clock.seconds(loop.launch, torch.device("cuda"), before=restart))["ms"]
        if count.item() != iterations:
            raise AssertionError(f"{count.item()} iterations, not {iterations}")
    alone = clock.spread(clock.seconds(step.replay, torch.device("cuda")))["ms"]
    loop.close()
    few, many = ITERATIONS
    each = 1e3 * (taken[many] - taken[few]) / (many - few)
    return {"us_per_iteration": each, "us_of_the_body": 1e3 * alone, **{f"ms_{n}": ms for n, ms in taken.items()}}


def audit(impl: str, policy: str) -> dict[str, Any]:
    """The nodes of a captured step of a small model, which are those of a large one but for their number."""
    supported()
    spec, _, dtype = sizes(True)
    device = parts.device()
    rig = Rig(Transformer(spec, random_weights(spec, device, dtype), impl), TOY_SETTING, policy)
    found = {}
    for kind in kinds(TOY_SETTING, policy):
        rig.put(kind)
        graph = rig.capture(rig.shape(kind)).graph
        found[kind.name] = device_while.audit(graph, name=kind.name)
    return found


def every_part() -> dict[str, parts.Part]:
    found: dict[str, parts.Part] = {"supported": supported}
    clock.hold(parts.device())
    for policy in ("region", "none"):
        for impl in ("torch", "triton"):
            found[f"nodes, {impl}, {policy}"] = functools.partial(audit, impl, policy)
    found["while"] = functools.partial(overhead, False, False)
    found["while, if"] = functools.partial(overhead, True, False)
    found["while, switch"] = functools.partial(overhead, True, True)
    return found


if __name__ == "__main__":
    sys.exit(parts.run(every_part()))
