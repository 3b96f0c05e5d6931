"""Held-out problem sets, at the difficulty the shipped model was trained for."""

from __future__ import annotations

import random

from sfs_triton.text.codec import TextCodec

from . import tasks
from .vocabulary import chat

# What a problem of each kind is drawn with, and the fewest answer tokens: the measure stays, the task is made easier.
DIFFICULTY: dict[str, dict] = {
    "records": {"rows": (4, 12), "fields": "wn"},
    "words": {},
    "countdown": {},
}
SHORTEST_ANSWER = {"records": 60, "words": 1, "countdown": 1}


def held_out(
    kind: str, n: int, text: TextCodec, *, seed: int = 0, gen_length: int = 128, max_length: int = 256
) -> list[tasks.Problem]:
    """``n`` different problems of ``kind`` from the test part whose answer and end-of-text fit into ``gen_length``.

    ``countdown`` takes the third-party test set, in its order, and after its end generated problems.
    """
    if kind not in DIFFICULTY:
        raise ValueError(f"kind={kind!r} is not one of {tuple(DIFFICULTY)}")
    rng = random.Random(f"held-out-{seed}")
    given = iter(tasks.third_party_countdown() if kind == "countdown" else ())
    chosen: dict[str, tasks.Problem] = {}
    for _ in range(1000 * n):
        problem = next(given, None) or tasks.sample(kind, rng, held_out=True, **DIFFICULTY[kind])
        answer = len(text.encode(problem.answer))
        fits = len(text.encode(chat(problem.question))) + gen_length <= max_length
        if SHORTEST_ANSWER[kind] <= answer < gen_length and fits:
            chosen[problem.key] = problem
        if len(chosen) == n:
            return list(chosen.values())
    raise ValueError(f"n={n}, gen_length={gen_length}: only {len(chosen)} problems of kind {kind!r} fit")
