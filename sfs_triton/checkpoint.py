"""Checkpoints: find the folder or file of a name, and read all of it but the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, check_integer, first_line, require
from .files import read_json
from .gguf_file import read_header
from .models import ModelSpec, read_spec
from .models.gguf import config_of
from .models.packed import read_packing
from .models.spec import check_in_vocabulary, token_ids
from .text.codec import TextCodec

TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # written by chat templates, and by models that were trained on them
EMBEDDED = Path(__file__).parent / "embedded"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@.*)?")  # a name, or owner and name; a revision may hold more slashes
FETCHED = ("*.json", "*.jinja", "*.safetensors", "merges.txt")  # of a hub repository: never code, never pickles


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Spec and text codec of a checkpoint, and where its weights are."""

    path: Path
    spec: ModelSpec
    text: TextCodec | None
    adapter: Path | None = None
    stored: str | None = None  # format that its matrices are in, as ``load(quantization=)`` names it


def open_checkpoint(
    path_or_hub_id: str | Path,
    *,
    mask_token_id: int | None = None,
    max_length: int | None = None,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Read the configuration and the tokenizer of a checkpoint folder, hub id or GGUF file.

    Args:
        path_or_hub_id: as for :func:`sfs_triton.load`.
        mask_token_id: takes precedence over the checkpoint's own.
        max_length: limit of prompt and response, at most the one of ``config.json``.
        adapter: folder or hub id of a LoRA adapter.

    Raises:
        ArgumentError: names the argument and its value.
        CheckpointError: names the file and key at fault.
    """
    path = find("path_or_hub_id", path_or_hub_id)
    if path.is_file():
        file = read_header(path)
        config, text = config_of(file), TextCodec.from_gguf(path, file.get)
    else:
        _check_kind(path, adapter)
        config, text = read_json(path / "config.json"), TextCodec.from_folder(path)
        require_object(path / "config.json", config)
    try:
        spec = _spec(path, config, text, mask_token_id)
    except CheckpointError as error:
        if not path.is_file():
            raise
        raise type(error)(f"{path}: {str(error).replace('config.json', 'its metadata')}") from None
    merged = None if adapter is None else find("adapter", adapter)
    if merged is not None and merged.is_file():
        raise CheckpointError(f"adapter={str(adapter)!r} is a GGUF file, not a folder as PEFT saves adapters")
    packing = read_packing(config)
    return Checkpoint(path, _shortened(spec, max_length), text, merged, None if packing is None else packing.form)


def find(name: str, path_or_hub_id: str | Path) -> Path:
    """Return the folder or GGUF file of a checkpoint, fetched if it is a hub id; errors name the argument ``name``."""
    named = isinstance(path_or_hub_id, (str, Path)) and str(path_or_hub_id) not in ("", ".")
    require(named, f"{name}={path_or_hub_id!r} is neither a folder nor a hub id")
    folder = EMBEDDED if str(path_or_hub_id) == "embedded" else Path(path_or_hub_id)
    if folder.is_dir() or folder.suffix == ".gguf" and folder.is_file():
        return folder
    given = str(path_or_hub_id)
    if folder.exists():
        raise CheckpointError(f"{name}={given!r} is a file, not a folder" + ", nor a .gguf" * (name != "adapter"))
    if isinstance(path_or_hub_id, Path) or folder.suffix == ".gguf" or not _HUB_ID.fullmatch(given):
        raise CheckpointError(f"{given!r} is a path, and does not exist")
    return _download(name, given)


def _check_kind(path: Path, merged: str | Path | None) -> None:
    """Refuse folders that hold something else than one checkpoint, and say what to do with it."""
    adapter, config = (path / "adapter_config.json").is_file(), (path / "config.json").is_file()
    if adapter and not (config and merged is not None):
        what = f"load({str(path)!r}, adapter={str(path)!r}) merges it" if config else "load(base, adapter=) takes it"
        raise CheckpointError(f"{path} holds an adapter (adapter_config.json): {what}")
    if config:
        return
    files = sorted(file.name for file in path.iterdir())
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        raise CheckpointError(f"{path} has no config.json, but GGUF files: give the path of one, as {path / ggufs[0]}")
    raise CheckpointError(f"{path} has no config.json" + ("" if files else ": the folder is empty"))


def _download(argument: str, hub_id: str) -> Path:
    """Download a hub repository: JSON, text and safetensors files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, at, revision = hub_id.partition("@")
    require(bool(revision) == bool(at), f"{argument}={hub_id!r} names no revision after its @")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub client raises many kinds, network errors included
        why = first_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            why = f"its cache has no copy, and the hub cannot be asked: {first_line(error.__cause__ or error)}"
        raise CheckpointError(
            f"{hub_id!r} is not a local folder, and could not be fetched as a hub id: {why}"
        ) from None


def require_object(path: Path, value: Any) -> None:
    """Raise CheckpointError unless a JSON file holds an object."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")


def _spec(path: Path, config: Mapping[str, Any], text: TextCodec | None, mask_token_id: int | None) -> ModelSpec:
    """Read the spec of a folder, with the ends of ``generation_config.json``, or of a file."""
    if mask_token_id is not None:
        check_integer("mask_token_id", mask_token_id, 0)
        config = {**config, "mask_token_id": mask_token_id}
    file = path / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    require_object(file, settings)
    return spec_of(config, text, f"{file}: eos_token_id", settings.get("eos_token_id"))


def spec_of(config: Mapping[str, Any], text: TextCodec | None, name: str, more_ends: Any) -> ModelSpec:
    """Read the spec of a configuration and a tokenizer, which names the mask token where the configuration does not,
    and ends of turns. ``more_ends``: one or more tokens that end a response, or None; errors call them ``name``."""
    config, ends = dict(config), token_ids(name, more_ends)
    if config.get("mask_token_id") is None and text is not None:
        config["mask_token_id"] = text.mask_id()
    if config.get("eos_token_id") is None:
        config["eos_token_id"] = ends or (None if text is None else text.end_id())
    spec = read_spec(config)
    check_in_vocabulary(name, ends, spec.vocab_size)
    if spec.mask_id in ends:
        raise CheckpointError(f"{name}={spec.mask_id} is the mask token")
    turns = [] if text is None else [token for token in text.written_ids(TURN_ENDS) if token < spec.vocab_size]
    others = dict.fromkeys((*spec.other_ends, *ends, *turns))
    return replace(spec, other_ends=tuple(token for token in others if token != spec.eos_id))


def _shortened(spec: ModelSpec, max_length: int | None) -> ModelSpec:
    if max_length is None:
        return spec
    check_integer("max_length", max_length, 1, spec.max_length)
    return replace(spec, max_length=max_length)
