"""Shapes of plans on a GPU: targets are rounded, and results stay."""

from __future__ import annotations

import pytest

from sfs_triton.scheduling import persistent_batch
from sfs_triton.scheduling.planner import StepPlanner
from tests.support.combinations import PROMPTS, SOME_PAIRS, assert_same


def planners(monkeypatch, multiple: int) -> list[StepPlanner]:
    """Let batches plan with this multiple of targets; return their planners."""
    made = []

    def make(*arguments):
        made.append(Noted(*arguments[:5], target_multiple=multiple))
        return made[-1]

    class Noted(StepPlanner):
        def next(self, *arguments):
            plan = super().next(*arguments)
            self.forwards = [*getattr(self, "forwards", ()), *(plan.forwards if plan else ())]
            return plan

    monkeypatch.setattr(persistent_batch, "StepPlanner", make)
    return made


@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
def test_rounded_targets_change_shapes_and_no_result(monkeypatch, engines, sampler, policy):
    options = {"gen_length": [24, 8, 32], "sampler": sampler, "cache": policy, "seed": 5}
    shapes, results = [], []
    for multiple in (1, 8):
        made = planners(monkeypatch, multiple)
        results.append(engines["llada-gqa"].generate(PROMPTS, **options))
        shapes.append([forward for planner in made for forward in planner.forwards])
    assert_same(*results)
    exact, rounded = shapes
    assert all(a._replace(targets=b.targets) == b for a, b in zip(exact, rounded, strict=True))
    assert all(a.targets <= b.targets < a.targets + 8 for a, b in zip(exact, rounded, strict=True))
    assert all(b.targets % 8 == 0 or b.targets in (a.targets, b.size) for a, b in zip(exact, rounded, strict=True))


@pytest.mark.parametrize(("device", "multiple"), [("cpu", 1), ("cuda", 32)])
def test_targets_are_rounded_on_a_gpu_only(monkeypatch, engines, device, multiple):
    given = []
    monkeypatch.setattr(persistent_batch, "StepPlanner", lambda *arguments: given.append(arguments[5]))

    class Model:
        def __init__(self):
            self.device = type("Device", (), {"type": device})

    class Execution:
        @staticmethod
        def is_exact(slots):
            return True

    batch = persistent_batch.PersistentBatch.__new__(persistent_batch.PersistentBatch)
    batch.model, batch.slots, batch.length = Model(), 1, 8
    batch.key = type("Key", (), {"sampler": None, "cache": None})
    batch._choice = type("Choice", (), {"current": Execution()})
    batch.bounds = persistent_batch.BatchBounds(8, 1, 1, 1, 1)
    batch._start_planner()
    assert given == [multiple]
