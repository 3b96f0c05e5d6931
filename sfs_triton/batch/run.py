"""Answer a file of prompts: exactly one answer per prompt, even if the run is stopped and resumed.

An ``execute`` decodes the chunks: :func:`in_process` here, workers in :mod:`sfs_triton.integrations.ray`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..decoding.caching import CachePolicy, NoCache
from ..decoding.params import DecodingParams
from ..decoding.samplers import Sampler, SlowFast
from ..engine import Engine, load
from ..errors import ArgumentError, RowFault, require
from .files import BatchError, Parts, Row, Survey, file_format, read_rows

__all__ = ["BatchError", "BatchSettings", "Summary", "in_process", "run_batch"]

Finished = list[tuple[str, dict[str, Any]]]  # keys of rows, and their output
Execute = Callable[[Iterator[list[Row]]], Iterable[Finished]]


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Model and decoding parameters for a file of prompts.

    Args:
        model, device, dtype, impl, loop: as for :func:`sfs_triton.load`.
        sampler, cache, raw: as for ``Engine.generate``.
        gen_length: default of rows that set none.
        seed: the row on line n takes ``seed + n - 1`` unless it sets its own.
        batch: number of rows decoded together.
    """

    model: str = "embedded"
    sampler: Sampler = field(default_factory=SlowFast)
    cache: CachePolicy = field(default_factory=NoCache)
    gen_length: int = 128
    seed: int = 0
    raw: bool = False
    batch: int = 8
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    impl: str | None = None
    loop: str | None = None

    def __post_init__(self) -> None:
        for name in ("gen_length", "batch"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name}={value!r} is not a positive integer")
        require(isinstance(self.seed, int) and 0 <= self.seed < 2**62, f"seed={self.seed!r} is not in [0, 2**62)")
        _ = self.params  # built for its checks

    @property
    def params(self) -> DecodingParams:
        """Decoding parameters with the defaults of the first row."""
        return DecodingParams(sampler=self.sampler, cache=self.cache, gen_length=self.gen_length, seed=self.seed)

    def described(self) -> dict[str, Any]:
        """Return all settings that the answers depend on, ready for JSON."""
        return {
            "model": self.model,
            **self.params.to_dict(),
            "raw": self.raw,
            "dtype": self.dtype,
            "weights": self.weights,
        }

    def open_engine(self) -> Engine:
        """Load the engine of these settings.

        Raises:
            ArgumentError, CheckpointError: it cannot be loaded, or has no tokenizer.
        """
        engine = load(self.model, self.device, self.dtype, self.impl, self.loop, weights=self.weights)
        require(engine.text is not None, f"model={self.model!r} has no tokenizer.json, which a text prompt needs")
        room = engine.spec.max_length
        require(self.gen_length < room, f"gen_length={self.gen_length}: the model has only {room} positions")
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
            good.append((row, _encode(engine, settings, row)))
        except ArgumentError as error:
            results[row.line] = {"id": row.id, "error": str(error)}
    if good:
        results |= _generate(engine, settings, good)
    return [(row.key, results[row.line]) for row in rows]


def _encode(engine: Engine, settings: BatchSettings, row: Row) -> list[int]:
    """Return the token ids of a row's prompt, with the checks of ``Engine.generate``."""
    ids, length = engine.encode(row.prompt, settings.raw, row.line), row.gen_length or settings.gen_length
    engine.check_room(row.line, len(ids), length)
    mask = engine.spec.mask_id
    require(mask not in ids, f"prompt {row.line} holds the mask id {mask}")
    settings.sampler.check_length(length)
    return ids


def _generate(engine: Engine, settings: BatchSettings, good: list[tuple[Row, list[int]]]) -> dict[int, dict[str, Any]]:
    """Return the output of valid rows, by line."""
    lengths = [row.gen_length or settings.gen_length for row, _ in good]
    seeds = [settings.seed + row.line - 1 if row.seed is None else row.seed for row, _ in good]
    how = {"sampler": settings.sampler, "cache": settings.cache}
    why = ""
    try:
        made = dict(enumerate(engine.generate([ids for _, ids in good], gen_length=lengths, seed=seeds, **how)))
    except RowFault as fault:
        made, why = fault.finished, f"{type(fault).__name__}: {fault} (rows of its batch)"
    results = {}
    for index, (row, _) in enumerate(good):
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
            "gen_length": lengths[index],
            "seed": seeds[index],
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
