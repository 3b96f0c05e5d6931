"""Write the embedded model into the exact shapes of a large one, with the function that it has.

    python -m bench.shapes.inflate --geometry llada-8b OUT     a checkpoint that sfs_triton.load(OUT) reads
    engine = inflate(sfs_triton.load("embedded", "cpu", "float32"), "llada-8b")     in a GPU's memory, without a file

The large model computes what the small one does, so a benchmark at its size has a trained model's slow and fast stages,
and answers that can be checked. :mod:`.inflation` defines the mapping, and says why ``dream-7b`` is left out:
:func:`dense` has its shapes with random weights, for times alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, Engine, OutOfDeviceMemory
from sfs_triton.checkpoint import EMBEDDED
from sfs_triton.engine import DTYPES
from sfs_triton.models import ModelSpec, Transformer
from sfs_triton.models.reading import INDEX_FILE
from sfs_triton.ops.dispatch import operations
from sfs_triton.runner import check_cuda_graphs

from .geometry import GEOMETRIES, assemble, geometry_spec, layout, parameters, randomise
from .inflation import Plan

SHARD_BYTES = 2 * 10**9
README = """The embedded model of sfs_triton (Apache-2.0) in the shapes of a large model, for measurements.

It knows what the embedded model knows and nothing more; most of its weights are random and have no effect.
"""


# ------------------------------------------------------------------------------------------------------------ in memory


def inflate(
    source: Engine,
    geometry: str | ModelSpec,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    *,
    backend: str | None = None,
    cuda_graphs: bool | None = None,
) -> Engine:
    """Build an engine of the given shapes that computes the function of ``source``, in ``device``'s memory.

    Args:
        source: the embedded model, as :func:`sfs_triton.load` gives it.
        geometry: a name of :data:`GEOMETRIES`, or a spec.
        device, dtype, backend, cuda_graphs: as :func:`sfs_triton.load` has them.
        seed: of the random weights.

    Raises:
        ArgumentError: the model does not fit the geometry; says why, with both numbers.
        OutOfDeviceMemory: its weights do not fit the memory that is free.
    """
    spec = geometry_spec(geometry, source.spec)
    device, dtype = _where(device, dtype, backend, cuda_graphs)
    plan = Plan(source, spec, dtype, seed)
    _check_memory(spec, device, dtype)
    weights = assemble(spec, plan.fill, device, dtype)
    return Engine(Transformer(spec, weights, backend), source.text, cuda_graphs)


def dense(
    source: Engine,
    geometry: str | ModelSpec,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    *,
    backend: str | None = None,
    cuda_graphs: bool | None = None,
) -> Engine:
    """Build an engine as :func:`inflate` does, for any geometry, but with random weights throughout."""
    spec = geometry_spec(geometry, source.spec)
    device, dtype = _where(device, dtype, backend, cuda_graphs)
    _check_memory(spec, device, dtype)
    weights = assemble(spec, functools.partial(randomise, seed=seed), device, dtype)
    return Engine(Transformer(spec, weights, backend), source.text, cuda_graphs)


def _where(
    device: str | torch.device | None, dtype: str | torch.dtype | None, backend: str | None, cuda_graphs: bool | None
) -> tuple[torch.device, torch.dtype]:
    """The defaults of ``load``, and its refusals before gigabytes are made."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    operations(backend, device)
    check_cuda_graphs(cuda_graphs, device)
    dtype = DTYPES.get(dtype, dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype={dtype!r} is not one of {tuple(DTYPES)}")
    return device, dtype


def _check_memory(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse weights that do not fit: a host's kernel would end the process, or others, without a word."""
    needed = parameters(spec) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if device.type != "meta" and free is not None and needed > free:
        raise OutOfDeviceMemory(
            f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {str(device)!r} has "
            f"{free / 1e9:.1f} GB free"
        )


def free_memory() -> int | None:
    """Bytes of the host's memory that programs can still have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


# ------------------------------------------------------------------------------------------------------------- as files


def config_dict(spec: ModelSpec, dtype: torch.dtype) -> dict:
    """The ``config.json`` that reads as ``spec``, with the keys of its family."""
    common = {
        "vocab_size": spec.vocab_size,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "mask_token_id": spec.mask_id,
        "eos_token_id": list(spec.end_ids) if spec.other_ends else spec.eos_id,
        "pad_token_id": spec.pad_id,
        "bos_token_id": spec.bos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.family == "llada":
        return json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8")) | {
            "d_model": spec.d_model,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "n_layers": spec.n_layers,
            "mlp_hidden_size": spec.mlp,
            "embedding_size": spec.vocab_size,
            "max_sequence_length": spec.max_length,
            "weight_tying": spec.tied_head,
            **common,
        }
    return {
        "model_type": spec.family,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "num_hidden_layers": spec.n_layers,
        "intermediate_size": spec.mlp,
        "max_position_embeddings": spec.max_length,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied_head,
        **common,
    }


def shards(spec: ModelSpec, dtype: torch.dtype, most: int = SHARD_BYTES) -> list[list[tuple[str, int | None]]]:
    """The parts that go into each file, of at most ``most`` bytes unless a single tensor is larger."""
    files: list[list[tuple[str, int | None]]] = []
    room = 0
    for place, (_, shape) in layout(spec).items():
        size = math.prod(shape) * dtype.itemsize
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(place)
        room -= size
    return files


def write(
    out: Path, geometry: str | ModelSpec = "llada-8b", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Plan:
    """Write the embedded model in the given shapes as a checkpoint folder: all of it, or nothing.

    Raises:
        ArgumentError: the model does not fit the geometry, or the folder is not empty.
        CheckpointError: it does not fit the disk, or cannot be written.
    """
    source = sfs_triton.load("embedded", "cpu", "float32")
    spec = geometry_spec(geometry, source.spec)
    out = Path(out).resolve()
    partial = Path(f"{out}.partial")
    try:
        _check_place(out, partial, parameters(spec) * dtype.itemsize)
        plan = Plan(source, spec, dtype, seed)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    try:
        _write_files(plan, partial)
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return plan


def _check_place(out: Path, partial: Path, size: int) -> None:
    if os.path.ismount(out) or out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArgumentError(f"OUT={str(out)!r} is not a new or empty folder")
    if partial.exists():
        raise ArgumentError(f"{str(partial)!r} exists: another run writes it, or was killed and left it; remove it")
    if not out.parent.is_dir():
        raise ArgumentError(f"OUT={str(out)!r}: {str(out.parent)!r} is not a folder")
    free = shutil.disk_usage(out.parent).free
    if size + 2**24 > free:  # and a little for the tokenizer and the file system
        raise CheckpointError(f"{out} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left")


def _write_files(plan: Plan, folder: Path) -> None:
    spec, dtype, places = plan.big, plan.dtype, layout(plan.big)
    files, weight_map = shards(spec, dtype), {}
    for number, parts in enumerate(files, 1):
        tensors = {}
        for place in parts:
            name, shape = places[place]
            tensors[name] = torch.empty(shape, dtype=dtype)
            plan.fill(tensors[name], *place)
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": parameters(spec) * dtype.itemsize}, "weight_map": weight_map}
    tokenizer = json.loads((EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name, content in (
        (INDEX_FILE, index),
        ("config.json", config_dict(spec, dtype)),
        ("tokenizer_config.json", tokenizer | {"model_max_length": spec.max_length}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(EMBEDDED / "tokenizer.json", folder / "tokenizer.json")
    (folder / "README.md").write_text(README, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is empty or not there yet")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="llada-8b")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args(argv)
    try:
        plan = write(arguments.out, arguments.geometry, DTYPES[arguments.dtype], arguments.seed)
    except sfs_triton.SfsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = parameters(plan.big)
    print(
        f"{arguments.geometry}: {count / 1e9:.2f} G weights, {plan.zeros / count:.1%} of them zero, "
        f"{count * plan.dtype.itemsize / 1e9:.2f} GB in {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
