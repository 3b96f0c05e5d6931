"""Generations with noise that must repeat themselves, in this process and in others."""

from __future__ import annotations

from collections.abc import Sequence

from sfs_triton import Engine, FixedSteps, Generation, RegionCache, SlowFast, Threshold

SUMS = "15,44,79,50"
TABLE = "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45\n3,Kim,77\n4,Leo,12"
STORY = "Ann has 12 apples. Ann buys 7 more apples. Then Ann loses 4 apples. How many apples does Ann have?"
PROMPTS = [SUMS, TABLE, STORY]
WAYS = {
    "noise": (SlowFast(temperature=0.9), "none"),
    "noise-region": (SlowFast(temperature=0.9, top_p=0.95), RegionCache(capacity=64)),
    "noise-blocks": (Threshold(block_length=16, temperature=0.7), "dual"),
    "random-positions": (FixedSteps(steps=16, metric="origin", temperature=0.5), "none"),
    "guided": (FixedSteps(steps=12, cfg_scale=0.5, temperature=0.5), "refresh"),
}


def results(done: list[Generation]) -> list[list[int]]:
    """Return the values that must be equal: tokens, and the step at which each was decided."""
    return [part for each in done for part in (each.canvas, each.commit_step, each.forward_lengths)]


def all_ways(engine: Engine, names: Sequence[str] = tuple(WAYS)) -> dict[str, list[list[int]]]:
    """Generate from all prompts in each way, and return what must repeat by way."""
    options = {"gen_length": 32, "seed": [3, 4, 5]}
    ways = ((name, *WAYS[name]) for name in names)
    return {name: results(engine.generate(PROMPTS, sampler=s, cache=c, **options)) for name, s, c in ways}
