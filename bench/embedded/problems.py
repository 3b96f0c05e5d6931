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

# The second edition, in training: kind, options and response positions by name. Its sets take the place of the above
# when its checkpoint takes the shipped one's.
SECOND_EDITION: dict[str, tuple[str, dict, int]] = {
    "records": ("records", {"rows": (3, 8), "columns": (1, 4)}, 256),
    "records-variable": ("records", {"rows": (3, 8), "columns": (1, 4), "variable": True}, 256),
    "ledger-check": ("ledger", {"check": True}, 272),
    "ledger": ("ledger", {}, 272),
    "fill-4": ("fill", {"size": 4}, 32),
    "fill-6": ("fill", {"size": 6, "blanks": (8, 20)}, 48),
}
LENGTH = 512  # prompt and response together


def second_edition(name: str, n: int, text: TextCodec, *, seed: int = 0) -> list[tasks.Problem]:
    """``n`` different held-out problems of a set of the second edition; records have answers of 60 tokens or more."""
    if name not in SECOND_EDITION:
        raise ValueError(f"name={name!r} is not one of {tuple(SECOND_EDITION)}")
    kind, options, gen_length = SECOND_EDITION[name]
    rng = random.Random(f"held-out-{seed}")
    chosen: dict[str, tasks.Problem] = {}
    while len(chosen) < n:
        problem = tasks.sample(kind, rng, held_out=True, **options)
        answer = len(text.encode(problem.answer))
        fits = len(text.encode(chat(problem.question))) + gen_length <= LENGTH
        if fits and (60 if kind == "records" else 1) <= answer < gen_length:
            chosen[problem.key] = problem
    return list(chosen.values())


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
