"""Time a step of an eighth of LLaDA-8B on a CPU, in float32 and with int8 weights and inputs, in turns.

    python -m bench.cost.int8_step --threads 1

Weights are random: 4 of 32 layers, and an eighth of the vocabulary. It takes 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.common.figures import machine
from bench.shapes import geometry
from sfs_triton.models import Transformer
from sfs_triton.models.cache import Scope
from sfs_triton.models.geometries import REAL
from sfs_triton.models.weights import Weights
from sfs_triton.ops.dispatch import Draw, Matrix, Quantised, check_int8, quantize

STEPS = ((128, 32), (256, 32), (256, 256), (512, 32))  # positions, and those that are decided
EIGHTH = replace(REAL["llada-8b"], n_layers=4, vocab_size=15808, mask_id=15807, eos_id=1, pad_id=1)


def changed(weights: Weights, change: Callable[[torch.Tensor], Matrix]) -> Weights:
    """Return weights with all matrices but the embedding changed."""
    names = ("qkv", "out", "gate_up", "down")
    layers = (replace(layer, **{name: change(getattr(layer, name)) for name in names}) for layer in weights.layers)
    return replace(weights, layers=tuple(layers), head=change(weights.head))


def models() -> dict[str, Transformer]:
    """Return the two models; matrices in float32 are as loading places them on a CPU."""

    def fill(out: torch.Tensor, part: str, layer: int | None) -> None:
        geometry.randomise(out, part, layer, 0)

    plain = geometry.assemble(EIGHTH, fill, torch.device("cpu"), torch.float32)
    small = changed(plain, lambda matrix: Quantised(*quantize(matrix, "int8")))
    return {
        "float32": Transformer(EIGHTH, changed(plain, lambda matrix: matrix.t().contiguous().t())),
        "int8": Transformer(EIGHTH, small),
    }


@torch.inference_mode()
def step(model: Transformer, positions: int, decided: int) -> None:
    tokens = torch.arange(positions)[None] + 6
    select = torch.arange(positions - decided, positions)[None]
    hidden = model.forward(tokens, Scope(0, positions, positions), None, select)
    model.choose(hidden.flatten(0, 1), Draw())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="with one, processor time is measured, else wall time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the record of the table")
    arguments = parser.parse_args(argv)
    for name in ("threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not positive")
    check_int8(torch.device("cpu"), None)
    torch.set_num_threads(arguments.threads)
    clock, made = time.process_time if arguments.threads == 1 else time.perf_counter, models()
    record = {"machine": machine(torch.device("cpu")), "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"), "rows": []}
    print("| positions | decided | float32 ms | int8 ms | |\n|---|---|---|---|---|")
    for positions, decided in STEPS:
        least = dict.fromkeys(made, math.inf)
        for _ in range(arguments.rounds):
            for name, model in made.items():
                began = clock()
                step(model, positions, decided)
                least[name] = min(least[name], clock() - began)
        plain, small = (1e3 * seconds for seconds in least.values())
        print(f"| {positions} | {decided} | {plain:,.0f} | {small:,.0f} | {plain / small:.1f}x |", flush=True)
        record["rows"].append({"positions": positions, "decided": decided, "float32_ms": plain, "int8_ms": small})
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
