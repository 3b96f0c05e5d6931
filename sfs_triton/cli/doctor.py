"""``sfs doctor``: what this machine can run, checked, and what a card would need for a model, predicted."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..cards import CARDS, QUANTIZATIONS, canvases_that_fit, step_seconds
from ..checkpoint import open_checkpoint
from ..decoding.caching import POLICIES
from ..engine import DTYPES, default_dtype, usable_device
from ..errors import CheckpointError, check_choice
from ..models import ModelSpec
from ..models.geometries import REAL
from ..self_check import machine, verdict
from ..self_check.check import Request
from ..self_check.choice import run_check
from ..self_check.steps import Sizes

PROMPT, RESPONSE, CAPACITY = 1100, 1024, 128  # of predictions
INTERPRETED = Sizes(rows=(16,), canvas=40, timed_canvas=24, warm_up=1, repeats=3)
PIN = 'sfs_triton.load(..., backend="torch", cuda_graphs=False), or --backend torch --no-cuda-graphs'


def doctor(
    model: Annotated[
        str | None, typer.Argument(help=f"'embedded', {', '.join(REAL)}, or a folder with config.json.")
    ] = None,
    card: Annotated[str | None, typer.Option(metavar="|".join(CARDS), help="Card to predict for.")] = None,
    device: Annotated[str | None, typer.Option(help="GPU to check. Default: the first.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES), help="Data type. Default: by device.")] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="|".join(QUANTIZATIONS), help="Weights. Default: none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check Triton kernels and CUDA graphs on this machine's card, and show what fits it. Exit code 1: a fault."""
    if card is not None:
        check_choice("--card", card, CARDS)
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    if quantization is not None:
        check_choice("--quantization", quantization, QUANTIZATIONS)
    where = usable_device(device)
    name = model or ("llada-8b" if where.type == "cuda" or card is not None else "embedded")
    spec = _spec_of(name)
    report = {
        "versions": machine.versions(),
        "cpu": machine.cpu(),
        "compiler": machine.compiler(),
        "environment": machine.environment(),
        "card": _card_facts(where),
        "model": {"name": name, "layers": spec.n_layers, "width": spec.d_model, "vocabulary": spec.vocab_size},
        "check": _check(spec, where, dtype, quantization),
        "predictions": _predictions(spec, where, card),
    }
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join(_lines(report)))
    if report["check"].get("fault"):
        raise typer.Exit(1)


def _spec_of(name: str) -> ModelSpec:
    """Return the spec of a model by name, or of a folder, of which no weights are read."""
    if name in REAL:
        return REAL[name]
    if name != "embedded" and not Path(name).is_dir():
        raise CheckpointError(f"{name!r} is neither a folder nor one of embedded, {', '.join(REAL)}")
    return open_checkpoint(name).spec


def _card_facts(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    return {**machine.card(device), "free": torch.cuda.mem_get_info(device)[0]}


def _check(spec: ModelSpec, device: torch.device, dtype: str | None, quantization: str | None) -> dict[str, Any]:
    """Run the check anew and store its verdict; return that, or why there is nothing to check."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if importlib.util.find_spec("triton") is None:
        return {"skipped": "the package triton is not installed: plain torch runs"}
    if device.type != "cuda" and not interpreted:
        return {"skipped": "no GPU: plain torch runs, and there is no kernel to check"}
    dtype = dtype or str(default_dtype(device)).removeprefix("torch.")
    sizes = Sizes() if device.type == "cuda" else INTERPRETED
    request = Request(spec, str(device), dtype, quantization, sizes, thorough=True)
    found = verdict.obtain(request, run_check, force=True)
    return {
        "interpreted": interpreted,
        "backend": found.backend,
        "cuda_graphs": found.cuda_graphs,
        "reason": found.reason,
        "fault": found.fault,
        "seconds": found.seconds,
        "operations": _by_operation(found.findings),
        "steps": [each for each in found.findings if each["record"] == "step"],
        "times": [each for each in found.findings if each["record"] == "times"],
        "remedy": PIN if found.fault else None,
    }


def _by_operation(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per operation: its first fault, or else its largest error beside the allowed one; the times of
    its longest call."""
    every: dict[str, list[dict[str, Any]]] = {}
    for each in findings:
        if each["record"] == "finding":
            every.setdefault(each["operation"], []).append(each)
    rows = []
    for _, found in sorted(every.items()):
        worst = max(found, key=lambda each: (each["fault"] is not None, each["error"] / (each["allowed"] or 1.0)))
        longest = max(found, key=lambda each: each["torch_microseconds"] or 0.0)
        times = {key: longest[key] for key in ("microseconds", "torch_microseconds")}
        row = {key: worst[key] for key in ("operation", "shape", "error", "allowed", "fault")}
        rows.append({**row, **times, "checks": len(found), "timed": longest["shape"]})
    return rows


def _predictions(spec: ModelSpec, device: torch.device, name: str | None) -> dict[str, Any] | None:
    """Predict steps on a card by name, and what fits it, or fits the card that is here."""
    if name is None and device.type != "cuda":
        return None
    there = None if name is None else CARDS[name]
    memory = torch.cuda.mem_get_info(device)[0] if there is None else there.memory
    length = min(PROMPT + RESPONSE, spec.max_length)
    rows = []
    for quantization in (None, *QUANTIZATIONS):
        fits = {cache: canvases_that_fit(memory, spec, quantization, POLICIES[cache](), length) for cache in POLICIES}
        row = {"weights": quantization or "bf16", "canvases": fits}
        if there is not None:
            few = step_seconds(there, spec, quantization, min(CAPACITY, length), length, CAPACITY // 2)
            row["region_ms"] = 1e3 * few
            row["full_ms"] = 1e3 * step_seconds(there, spec, quantization, length, length, min(RESPONSE, length))
        rows.append(row)
    return {"card": name, "source": there and there.source, "positions": length, "rows": rows}


def _lines(report: dict[str, Any]) -> Iterator[str]:
    versions, cpu, compiler = (report[name] for name in ("versions", "cpu", "compiler"))
    yield (
        f"sfs_triton {versions['sfs_triton']} (kernels {versions['kernels'][:8]}), torch {versions['torch']}, triton "
        f"{versions['triton'] or 'not installed'}, CUDA {versions['cuda'] or 'none'}"
    )
    yield f"CPU       {cpu['name']}: {cpu['instructions']}, {cpu['threads']} threads, {cpu['cores']} cores"
    headers = "Python.h is there" if compiler["python_headers"] else "Python.h is missing"
    yield f"compiler  {compiler['path'] or 'none: Triton needs gcc or clang'}; {headers}"
    yield f"card      {_card_line(report['card'], versions['driver'])}"
    model = report["model"]
    yield f"model     {model['name']}: {model['layers']} layers of {model['width']}, {model['vocabulary']:,} tokens"
    yield from (f"variable  {name}={value}" for name, value in report["environment"].items())
    yield ""
    yield from _check_lines(report["check"])
    if report["predictions"] is not None:
        yield ""
        yield from _prediction_lines(report["predictions"])


def _card_line(card: dict[str, Any] | None, driver: str | None) -> str:
    if card is None:
        return "none"
    return (
        f"{card['name']}, capability {card['capability']}, {card['multiprocessors']} multiprocessors, "
        f"{card['shared_memory'] // 1024} KiB of shared memory per block, {card['memory'] / 1e9:.1f} GB "
        f"({card['free'] / 1e9:.1f} free), driver {driver or 'unknown'}"
    )


def _check_lines(check: dict[str, Any]) -> Iterator[str]:
    if "skipped" in check:
        yield f"check     {check['skipped']}"
        return
    if check["interpreted"]:
        yield "Kernels are interpreted on the CPU (TRITON_INTERPRET): their times say nothing of a card."
    yield f"{'operation':<18}{'checks':>6}{'error':>10}{'allowed':>10}{'us':>13}{'torch us':>13}  verdict"
    for row in check["operations"]:
        pair = row["microseconds"], row["torch_microseconds"]
        times = "".join(f"{'-':>13}" if each is None else f"{each:>13,.1f}" for each in pair)
        said = f"FAULT at {row['shape']}: {row['fault']}" if row["fault"] is not None else "ok"
        yield f"{row['operation']:<18}{row['checks']:>6}{row['error']:>10.1e}{row['allowed']:>10.1e}{times}  {said}"
    for row in check["steps"]:
        said = "ok" if row["fault"] is None else f"FAULT: {row['fault']}"
        yield f"whole steps, cache {row['cache']}, launched and replayed twice: {said}"
    for row in check["times"]:
        yield (
            f"a step, cache {row['cache']}: {1e3 * row['triton']:.2f} ms by Triton in CUDA graphs, "
            f"{1e3 * row['torch']:.2f} ms by torch, eager; spread {row['spread']:.0%}"
        )
    yield f"check     {check['seconds']:.0f} s; {check['reason']}"
    yield f"default   backend={check['backend']!r}, cuda_graphs={check['cuda_graphs']!r}"
    if check["remedy"]:
        yield f"to pin    {check['remedy']}"


def _prediction_lines(found: dict[str, Any]) -> Iterator[str]:
    if found["card"] is not None:
        yield f"Predicted for {found['card']}, nothing measured: {found['source']}."
    yield f"Canvases of {found['positions']:,} positions that fit beside the weights, by cache policy:"
    names = list(found["rows"][0]["canvases"])
    timed = found["card"] is not None
    head = f"{f'{CAPACITY} positions':>16}{'whole canvas':>14}" if timed else ""
    yield f"{'weights':<10}{''.join(f'{name:>9}' for name in names)}{head}"
    for row in found["rows"]:
        cells = "".join(f"{row['canvases'][name]:>9,}" for name in names)
        times = f"{row['region_ms']:>13.2f} ms{row['full_ms']:>11.1f} ms" if timed else ""
        yield f"{row['weights']:<10}{cells}{times}"
