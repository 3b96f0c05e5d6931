"""Measure where one seed stops giving the same tokens: answers of the embedded model, compared with solo runs.

    python -m bench.server.determinism                 # writes a record below bench/results/
    python -m bench.server.determinism --prompts 4 --out determinism.json

Everything is decoded on the CPU. Each line compares one way of decoding with another, answer by answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import sfs_triton
from bench import ROOT
from bench.common.figures import machine
from bench.common.pages import replace_file
from sfs_triton import Engine, Generation, SlowFast
from sfs_triton.runner import Eager

from .loopback import environment, table_prompt

RECORDS = ROOT / "bench" / "results" / "amd-epyc-2-cores"
SETTINGS = {
    "greedy, no cache": (SlowFast(), "none"),
    "greedy, region": (SlowFast(), "region"),
    "temperature 0.8, no cache": (SlowFast(temperature=0.8), "none"),
    "temperature 0.8, region": (SlowFast(temperature=0.8), "region"),
}


class Decoded:
    """Answers of one model to all prompts with all settings, in one way."""

    def __init__(self, engine: Engine, prompts: Sequence[str]):
        self._engine, self._prompts = engine, prompts

    def alone(self, threads: int = 1) -> list[Generation]:
        return self._answers(1, threads)

    def together(self, threads: int = 1) -> list[Generation]:
        return self._answers(len(self._prompts), threads)

    def _answers(self, at_once: int, threads: int) -> list[Generation]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return [done for setting in SETTINGS.values() for done in self._with(*setting, at_once)]
        finally:
            torch.set_num_threads(before)

    def _with(self, sampler: SlowFast, cache: str, at_once: int) -> list[Generation]:
        found = []
        for first in range(0, len(self._prompts), at_once):
            some = list(self._prompts[first : first + at_once])
            seeds = list(range(first, first + len(some)))
            found += self._engine.generate(some, gen_length=64, sampler=sampler, cache=cache, seed=seeds)
        return found


def compare(name: str, found: Sequence[Generation], wanted: Sequence[Generation]) -> dict:
    """Count the answers that are equal token by token, and how many of these were decided at the same steps."""
    pairs = list(zip(found, wanted, strict=True))
    tokens = sum(one.canvas == other.canvas for one, other in pairs)
    steps = sum(one.canvas == other.canvas and one.commit_step == other.commit_step for one, other in pairs)
    print(f"{name:60} {tokens:4} of {len(pairs)} the same tokens, {steps} at the same steps", flush=True)
    return {"compared": name, "answers": len(pairs), "same_tokens": tokens, "same_steps": steps}


def padded(engine: Engine) -> Engine:
    """Build an engine of the same model whose steps have the padded shapes of captured graphs."""
    other = Engine(engine.model, engine.text)
    other._execution.current = Eager(exact=False)
    return other


def measure(prompts: Sequence[str]) -> list[dict]:
    engine = sfs_triton.load("embedded", "cpu", "float32")
    full = Decoded(engine, prompts)
    alone = full.alone()
    lines = [
        compare("float32, once more", full.alone(), alone),
        compare("float32, two threads", full.alone(threads=2), alone),
        compare("float32, all prompts in one batch", full.together(), alone),
        compare("float32, steps of padded shapes (as captured)", Decoded(padded(engine), prompts).alone(), alone),
    ]
    half = Decoded(sfs_triton.load("embedded", "cpu", "bfloat16"), prompts)
    low = half.alone()
    return [
        *lines,
        compare("bfloat16, once more", half.alone(), low),
        compare("bfloat16, two threads", half.alone(threads=2), low),
        compare("bfloat16, all prompts in one batch", half.together(), low),
        compare("bfloat16 instead of float32", low, alone),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RECORDS / f"{date.today().isoformat()}-determinism.json")
    options = parser.parse_args()
    if not 1 <= options.prompts <= 1000:
        parser.error(f"--prompts {options.prompts} is not from 1 to 1000")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    rng = random.Random(0)
    prompts = [table_prompt(rng) for _ in range(options.prompts)]
    where = {**machine(torch.device("cpu")), "commit": environment()["commit"]}
    about = {"date": date.today().isoformat(), "machine": where, "settings": list(SETTINGS)}
    record = {**about, "prompts": options.prompts, "gen_length": 64, "lines": measure(prompts)}
    replace_file(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
