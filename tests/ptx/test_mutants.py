"""Faults put into the PTX of the package's own kernels, one at a time: what then lacks an order is found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from sfs_triton.kernels.attention import AttentionConfig, attention
from sfs_triton.kernels.confidence import ConfidenceConfig, confidence
from tests.ptx.machine import EndedEarly, Kernel, Machine
from tests.ptx.program import assemble


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """The kind of each fault, and the text with it."""
    for found in re.finditer(r"\.acq_rel\b|bar\.sync\s+0;|(?:cp\.async|wgmma)\.wait_group\D*(\d+);", ptx):
        old = found[0]
        if old == ".acq_rel":
            changes = [("order of an atomic", weaker) for weaker in (".relaxed", ".acquire", ".release")]
        elif old.startswith("bar"):
            changes = [("barrier", "")]
        else:
            changes = [("wait", re.sub(r"\d+;", f"{int(found[1]) + 1};", old))]
        for kind, new in changes:
            yield kind, ptx[: found.start()] + new + ptx[found.end() :]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def many_chunks() -> torch.Tensor:
    return confidence(random(2, 1000), config=ConfidenceConfig(128, 4))[1]


def many_splits() -> torch.Tensor:
    q, k, v = (random(1, rows, 2, 16).half() for rows in (5, 70, 70))
    return attention(q, k, v, config=AttentionConfig(16, 16, 3, 4, 2))


@pytest.mark.parametrize("call", [many_chunks, many_splits])
def test_every_weaker_order_is_found(request, monkeypatch, call: Callable[[], torch.Tensor]):
    """And of barriers and waits most: Triton leaves some that others make redundant."""
    machine: Machine = request.config.pluginmanager.getplugin("ptx-execution").machine
    compile_, texts = machine.compile, []

    def compiled(function, grid, arguments) -> Kernel:
        texts.append(function.warmup(grid=grid, **arguments).asm["ptx"])
        return compile_(function, grid, arguments)

    monkeypatch.setattr(machine, "compile", compiled)
    wanted = call()
    assert not machine.findings and len(texts) == 1
    tried, found = Counter(), Counter()
    for kind, text in mutants(texts[0]):

        def mutated(function, grid, arguments, text=text) -> Kernel:
            original = compile_(function, grid, arguments)
            return Kernel(original.name, assemble(text), original.types, original.shared_bytes)

        monkeypatch.setattr(machine, "compile", mutated)
        tried[kind] += 1
        try:
            same = torch.equal(call(), wanted)
        except EndedEarly:
            same = False
        found[kind] += bool(machine.findings) or not same
        machine.findings.clear()
    assert found["order of an atomic"] == tried["order of an atomic"] > 0
    assert found["barrier"] >= tried["barrier"] // 2 > 0 and found["wait"] >= tried["wait"] // 2, (tried, found)
