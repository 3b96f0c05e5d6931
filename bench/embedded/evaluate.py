"""Accuracy of a checkpoint on held-out problems: ``python -m bench.embedded.evaluate CHECKPOINT [--limit 500]``.

Prints one JSON line per task: correct answers with a 95% interval, steps, and tokens per step. ``--second-edition``
takes that edition's sets instead of those of the shipped checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time

import sfs_triton
from bench.common.figures import wilson_interval
from bench.embedded import problems, tasks

SAMPLERS = {
    "vanilla": sfs_triton.FixedSteps(),
    "one-step": sfs_triton.FixedSteps(steps=1),
    "semi-autoregressive": sfs_triton.FixedSteps(block_length=32),
    "threshold": sfs_triton.Threshold(block_length=32),
    "slowfast": sfs_triton.SlowFast(),
}


def evaluate(
    engine: sfs_triton.Engine,
    kind: str,
    limit: int,
    sampler: sfs_triton.Sampler,
    gen_length: int = 128,
    batch: int = 8,
    seed: int = 0,
    second_edition: bool = False,
) -> dict:
    """Decode ``limit`` held-out problems of ``kind``; counts, interval and cost as a dictionary.

    A set of the second edition brings its own ``gen_length``.
    """
    if second_edition:
        chosen, gen_length = (
            problems.second_edition(kind, limit, engine.text, seed=seed),
            problems.SECOND_EDITION[kind][2],
        )
    else:
        chosen = problems.held_out(kind, limit, engine.text, seed=seed, gen_length=gen_length)
    correct = tokens = steps = 0
    began = time.perf_counter()
    for at in range(0, len(chosen), batch):
        part = chosen[at : at + batch]
        for problem, done in zip(
            part, engine.generate([p.question for p in part], gen_length=gen_length, sampler=sampler), strict=True
        ):
            correct += tasks.correct(problem, done.text)
            tokens += len(done.tokens)
            steps += done.nfe
    low, high = wilson_interval(correct, len(chosen))
    return {
        "task": kind,
        "n": len(chosen),
        "correct": correct,
        "accuracy": correct / len(chosen),
        "interval": [round(low, 4), round(high, 4)],
        "nfe": steps / len(chosen),
        "tpf": tokens / steps,
        "answer_tokens": tokens / len(chosen),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="embedded")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--tasks", help="separated by commas; default: all")
    parser.add_argument("--second-edition", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="vanilla")
    arguments = parser.parse_args()
    engine = sfs_triton.load(arguments.checkpoint, dtype=arguments.dtype)
    second = arguments.second_edition
    names = (
        arguments.tasks.split(",") if arguments.tasks else problems.SECOND_EDITION if second else problems.DIFFICULTY
    )
    for kind in names:
        result = evaluate(engine, kind, arguments.limit, SAMPLERS[arguments.sampler], second_edition=second)
        print(json.dumps({"sampler": arguments.sampler, "dtype": arguments.dtype, **result}), flush=True)


if __name__ == "__main__":
    main()
