"""Answer a file of prompts: exactly one answer per prompt, even if the run is stopped and resumed.

An ``execute`` decodes the chunks: :func:`in_process` here, workers in :mod:`sfs_triton.integrations.ray`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..decoding.params import DecodingParams
from ..engine import Engine, load
from ..errors import ArgumentError, SequenceFault, check_integer, require
from .files import BatchError, Parts, Row, Survey, file_format, read_rows

__all__ = ["BatchError", "BatchSettings", "Summary", "in_process", "run_batch"]

Finished = list[tuple[str, dict[str, Any]]]  # keys of rows, and their output
Execute = Callable[[Iterator[list[Row]]], Iterable[Finished]]


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Model and decoding parameters for a file of prompts.

    Args:
        model, device, dtype, quantization, backend, cuda_graphs, mask_token_id, max_length, adapter: as
            for :func:`sfs_triton.load`.
        params: decoding parameters of rows that set none of their own. The row on line n takes ``seed + n - 1``.
        apply_chat_template: as for ``Engine.generate``.
        batch: number of rows decoded together.
    """

    model: str = "embedded"
    params: DecodingParams = field(default_factory=DecodingParams)
    apply_chat_template: bool = True
    batch: int = 8
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    backend: str | None = None
    cuda_graphs: bool | None = None
    mask_token_id: int | None = None
    max_length: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_integer("batch", self.batch)
        require(isinstance(self.params, DecodingParams), f"params={self.params!r} is not a DecodingParams")
        require(self.params.seed < 2**62, f"seed={self.params.seed!r} is not in [0, 2**62)")

    def described(self) -> dict[str, Any]:
        """Return all settings that the answers depend on, ready for JSON."""
        return {
            "model": self.model,
            **self.params.to_dict(),
            "apply_chat_template": self.apply_chat_template,
            "dtype": self.dtype,
            "quantization": self.quantization,
            **{name: value for name, value in self._source().items() if value is not None},
        }

    def _source(self) -> dict[str, Any]:
        return {"mask_token_id": self.mask_token_id, "max_length": self.max_length, "adapter": self.adapter}

    def open_engine(self) -> Engine:
        """Load the engine of these settings.

        Raises:
            ArgumentError, CheckpointError: it cannot be loaded, or has no tokenizer.
        """
        how = {"quantization": self.quantization, **self._source()}
        engine = load(self.model, self.device, self.dtype, self.backend, self.cuda_graphs, **how)
        engine.codec(f"model={self.model!r}: a text prompt")
        room = engine.spec.max_length
        length = self.params.gen_length
        require(length < room, f"gen_length={length}: the model has only {room} positions")
        return engine


@dataclass(frozen=True)
class Summary:
    """Counts of a run. ``kept`` rows were finished by earlier runs; ``errors`` rows have no answer."""

    rows: int
    errors: int
    kept: int
    seconds: float


def run_batch(
    source: str | Path,
    out: str | Path,
    settings: BatchSettings | None = None,
    execute: Execute | None = None,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Answer every row of ``source`` in ``out``, in the same order; both are ``.jsonl`` or ``.parquet``.

    Finished rows are kept in ``OUT.parts``. A run that was stopped, in whatever way, resumes from there when it is
    started again with the same settings; rows whose content has changed since are answered again.

    Args:
        settings: default: the embedded model with the paper's sampler.
        execute: maps chunks of rows to their output, in any order; default: one after another in this process.
        overwrite: start anew, and replace an existing ``out`` at the end.
        on_progress: called with the numbers of finished and of all rows, whenever rows have been stored.

    Raises:
        ArgumentError: names the argument, or the fault of the file.
        BatchError: the run failed, for example because the disk is full.
        SfsError: as ``load`` and ``Engine.generate``, except for faults of single rows.
    """
    began = time.monotonic()
    settings = settings or BatchSettings()
    source, out = _check_paths(source, out)
    survey = Survey.of(source)
    with Parts(out, settings.described(), overwrite) as parts:
        kept = sum(row.error is None and row in parts for row in read_rows(source))
        done = kept + survey.errors
        missing = (row for row in read_rows(source) if row.error is None and row not in parts)
        for finished in (execute or in_process(settings))(_chunks(missing, settings.batch)):
            parts.add(finished)
            done += len(finished)
            if on_progress is not None:
                on_progress(done, survey.rows)
        errors = 0

        def results() -> Iterator[dict[str, Any]]:
            nonlocal errors
            for row in read_rows(source):
                result = {"id": row.id, "error": row.error} if row.error is not None else parts.get(row)
                errors += "error" in result
                yield result

        parts.finish(results(), text_ids=survey.text_ids)
    return Summary(survey.rows, errors, kept, time.monotonic() - began)


def in_process(settings: BatchSettings, engine: Engine | None = None) -> Execute:
    """Return an ``execute`` for this process: chunks in order, with ``engine`` or one loaded by the first chunk."""

    def execute(chunks: Iterator[list[Row]]) -> Iterator[Finished]:
        mine = engine
        for rows in chunks:
            mine = mine or settings.open_engine()
            yield answer(mine, settings, rows)

    return execute


def answer(engine: Engine, settings: BatchSettings, rows: Sequence[Row]) -> Finished:
    """Decode rows together. A row that cannot be decoded gets an ``error`` and does not affect the others.

    Raises:
        SfsError: a failure that no single row causes (memory, time).
    """
    results, good = {}, []
    for row in rows:
        try:
            params = settings.params
            seed = params.seed + row.line - 1 if row.seed is None else row.seed
            params = replace(params, gen_length=row.gen_length or params.gen_length, seed=seed)
            good.append((row, _encode(engine, settings, row, params.gen_length), params))
        except ArgumentError as error:
            results[row.line] = {"id": row.id, "error": str(error)}
    if good:
        results |= _generate(engine, good)
    return [(row.key, results[row.line]) for row in rows]


def _encode(engine: Engine, settings: BatchSettings, row: Row, length: int) -> list[int]:
    """Return the token ids of a row's prompt, with the checks of ``Engine.generate``."""
    name = f"prompt {row.line}"
    ids = engine.encode(row.prompt, settings.apply_chat_template, name)
    engine.check_length(name, len(ids), length)
    engine.check_no_mask(name, ids)
    return ids


def _generate(engine: Engine, good: list[tuple[Row, list[int], DecodingParams]]) -> dict[int, dict[str, Any]]:
    """Return the output of valid rows, by line."""
    why = ""
    try:
        made = dict(enumerate(engine.generate([ids for _, ids, _ in good], [params for *_, params in good])))
    except SequenceFault as fault:
        made, why = fault.finished, f"{type(fault).__name__}: {fault} (rows of its batch)"
    results = {}
    for index, (row, _, params) in enumerate(good):
        if index not in made:
            results[row.line] = {"id": row.id, "error": why}
            continue
        results[row.line] = {
            "id": row.id,
            "text": made[index].text,
            "prompt_tokens": made[index].prompt_length,
            "response_tokens": len(made[index].tokens),
            "nfe": made[index].nfe,
            "tokens_per_forward": made[index].tokens_per_forward,
            "gen_length": params.gen_length,
            "seed": params.seed,
        }
    return results


def _check_paths(source: str | Path, out: str | Path) -> tuple[Path, Path]:
    source, out = Path(source), Path(out)
    require(source.is_file(), f"source={str(source)!r} is {'a folder' if source.is_dir() else 'no file'}")
    require(not out.is_dir(), f"out={str(out)!r} is a folder")
    require(out.parent.is_dir(), f"out={str(out)!r}: there is no folder {str(out.parent)!r}")
    file_format("source", source)
    file_format("out", out)
    same = out.exists() and os.path.samefile(source, out)
    require(not same, f"out={str(out)!r} is the same file as source")
    return source, out


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
