"""Files of a batch run: prompts, finished rows, and the output, which is written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from ..errors import ArgumentError, MissingDependencyError, SfsError, check_integer, require
from ..files import whole_file
from ..text.codec import check_unicode

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COLUMNS = ("id", "prompt", "messages", "gen_length", "seed")  # all others are ignored
ANSWER = {  # columns of a finished row beside its id, and their Parquet types
    "text": "string",
    "prompt_tokens": "int64",
    "response_tokens": "int64",
    "nfe": "int64",
    "tokens_per_forward": "float64",
    "gen_length": "int64",
    "seed": "int64",
}
_FORMAT = 1  # version of the folder of finished rows
_ROWS = 1024  # Parquet rows held in memory
_EXACT = 2**53  # whole floats below it are exact


class BatchError(SfsError):
    """A batch run failed. Finished rows are kept; running it again resumes from them."""


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Row:
    """One row of the input. ``line`` counts from 1 and is the default id; ``error`` is set for invalid rows."""

    line: int
    id: str | int
    prompt: str | list[dict[str, str]] | None = None
    gen_length: int | None = None
    seed: int | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        """Digest of the row's content, on which its answer depends beside the settings of the run."""
        seed = ["line", self.line] if self.seed is None else self.seed
        content = json.dumps([self.id, self.prompt, self.gen_length, seed])
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def file_format(name: str, path: Path) -> str:
    """Return ``"jsonl"`` or ``"parquet"``, by the suffix."""
    known = SUFFIXES.get(path.suffix.lower())
    require(known is not None, f"{name}={str(path)!r} does not end in one of {', '.join(SUFFIXES)}")
    if known == "parquet":
        _pyarrow()
    return known


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL or Parquet file. An invalid row has an ``error``.

    Raises:
        ArgumentError: the file cannot be read, or a column has a wrong type; names file and column.
    """
    read = _read_parquet if file_format("source", path) == "parquet" else _read_jsonl
    try:
        yield from read(path)
    except OSError as error:
        raise ArgumentError(f"source={str(path)!r} cannot be read: {error.strerror or error}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                values = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield Row(line, line, error=f"line {line} is not JSON: {error}")
                continue
            if isinstance(values, Mapping):
                yield _row(line, values)
            else:
                yield Row(line, line, error=f"line {line} holds a {type(values).__name__}, not an object")


def _read_parquet(path: Path) -> Iterator[Row]:
    arrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            present = _check_columns(path, file.schema_arrow)
            line = 0
            for rows in file.iter_batches(batch_size=_ROWS, columns=present):
                for values in rows.to_pylist():
                    line += 1
                    yield _row(line, values)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise ArgumentError(f"source={str(path)!r} is not a readable Parquet file: {error}") from None


def _check_columns(path: Path, schema: Any) -> list[str]:
    """Return the columns to read; refuse those of a wrong type."""
    arrow, _ = _pyarrow()
    types, found = arrow.types, {}
    for name in COLUMNS:
        if (places := schema.get_all_field_indices(name)) and len(places) > 1:
            raise ArgumentError(f"source={str(path)!r} has {len(places)} columns named {name!r}")
        if places:
            found[name] = schema.field(places[0]).type
    there = ", ".join(schema.names) or "none"
    require(
        "prompt" in found or "messages" in found,
        f"source={str(path)!r} has no column 'prompt' or 'messages'; its columns are {there}",
    )

    def text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def turns(kind: Any) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind)
        return lists and types.is_struct(kind.value_type)

    def number(kind: Any) -> bool:
        return types.is_integer(kind) or types.is_floating(kind)  # pandas stores integers with missing values as floats

    fits = {"id": lambda kind: text(kind) or types.is_integer(kind), "prompt": text, "messages": turns}
    for name, kind in found.items():
        fine = types.is_null(kind) or fits.get(name, number)(kind)
        require(fine, f"source={str(path)!r}: column {name!r} holds {kind}, which it cannot")
    return list(found)


def _row(line: int, values: Mapping[str, Any]) -> Row:
    name: str | int = line
    try:
        name = _id(line, values.get("id"))
        prompt = _prompt(line, values.get("prompt"), values.get("messages"))
        length = _whole(line, "gen_length", values.get("gen_length"), 1)
        seed = _whole(line, "seed", values.get("seed"), 0)
    except ArgumentError as error:
        return Row(line, name, error=str(error))
    return Row(line, name, prompt, length, seed)


def _id(line: int, value: Any) -> str | int:
    if value is None:
        return line
    if isinstance(value, str):
        require(value != "", f"line {line}: id is empty")
        check_unicode(f"line {line}: id", value)
    else:
        check_integer(f"line {line}: id", value, -(2**63), 2**63 - 1)
    return value


def _prompt(line: int, prompt: Any, messages: Any) -> str | list[dict[str, str]]:
    require(prompt is not None or messages is not None, f"line {line} has neither 'prompt' nor 'messages'")
    require(prompt is None or messages is None, f"line {line} has both 'prompt' and 'messages'")
    if messages is None:
        require(isinstance(prompt, str), f"line {line}: prompt is a {type(prompt).__name__}, not text")
        require(prompt != "", f"line {line}: prompt is empty")
        check_unicode(f"line {line}: prompt", prompt)
        return prompt
    require(isinstance(messages, list) and bool(messages), f"line {line}: messages is no list of messages")
    turns = []
    for turn in messages:
        fine = isinstance(turn, Mapping) and all(isinstance(turn.get(part), str) for part in ("role", "content"))
        require(fine, f"line {line}: message {turn!r} is not an object with a text 'role' and a text 'content'")
        turns.append({part: turn[part] for part in ("role", "content")})
        check_unicode(f"line {line}: messages", turn["role"] + turn["content"])
    return turns


def _whole(line: int, name: str, value: Any, least: int) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        value = int(value)
    if value is not None:
        check_integer(f"line {line}: {name}", value, least, 2**63 - 1)
    return value


@dataclass
class Survey:
    """Counts and types from a first pass over the whole input."""

    rows: int = 0
    text_ids: bool = False  # True if any id is text
    errors: int = 0

    @classmethod
    def of(cls, source: Path) -> Survey:
        """Read all rows once.

        Raises:
            ArgumentError: two rows have the same id, or no row can be answered; names the lines.
        """
        found, lines, first = cls(), {}, None
        for row in read_rows(source):
            other = lines.setdefault(str(row.id), row.line)
            hint = "; a row without an id has its line number as one" if str(row.line) == str(row.id) else ""
            twice = f"source={str(source)!r}: lines {other} and {row.line} have the same id {row.id!r}{hint}"
            require(other == row.line, twice)
            first = first or row.error
            found.rows += 1
            found.errors += row.error is not None
            found.text_ids |= isinstance(row.id, str)
        none = f"source={str(source)!r}: none of its {found.rows} rows can be answered; the first: {first}"
        require(found.rows == 0 or found.errors < found.rows, none)
        return found


# ------------------------------------------------------------------------------------------------------- finished rows


@dataclass
class _Place:
    key: str
    part: Path
    offset: int


@dataclass
class Parts:
    """The finished rows of a run, as files in a folder beside its output, locked by one process at a time.

    Each part is a file of ``{"key": ..., "row": {...}}`` lines, written atomically. ``run.json`` records the settings
    of the run.
    """

    out: Path
    settings: Mapping[str, Any]
    overwrite: bool = False
    _places: dict[str, _Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.out.with_name(self.out.name + ".parts")
        self._lock = FileLock(self.folder / "lock", timeout=0)

    def __enter__(self) -> Parts:
        started = (self.folder / "run.json").exists()
        require(
            self.overwrite or started or not self.out.exists(),
            f"out={str(self.out)!r} exists already; remove it, or overwrite it (--overwrite)",
        )
        fresh = not self.folder.exists()
        with self._refusing_to_write():
            self.folder.mkdir(exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise ArgumentError(f"out={str(self.out)!r} is being written by another run") from None
        try:
            with self._refusing_to_write():
                self._open()
        except BaseException:
            self._lock.release()
            if fresh:
                self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
        if not self._places:  # nothing to resume from
            self._remove()

    def _remove(self) -> None:
        """Remove the folder after its lock is released, unless it holds other files or another run starts."""
        with suppress(OSError):
            for name in ("run.json", "lock"):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def _open(self) -> None:
        note = self.folder / "run.json"
        for path in self.folder.iterdir():
            ours = path.name in ("lock", "run.json") or path.match("part-*.jsonl") or path.suffix == ".partial"
            require(ours, f"{str(self.folder)!r} is needed for finished rows, but holds {path.name!r}")
        for path in self.folder.glob("*.partial"):  # left by a killed process
            path.unlink()
        parts = sorted(self.folder.glob("part-*.jsonl"))
        if self.overwrite:
            for path in parts:
                path.unlink()
            parts = []
        for path in parts:
            self._read(path)
        if self._places:
            self._check_settings(note)
        with whole_file(note, self.folder) as file:
            file.write(json.dumps({"format": _FORMAT, "settings": self.settings}, indent=1).encode())

    def _read(self, part: Path) -> None:
        """Index the rows of a part. A damaged part is removed, and its rows are answered again."""
        places, offset = {}, 0
        try:
            with open(part, "rb") as file:
                for data in file:
                    entry = json.loads(data)
                    places[str(entry["row"]["id"])] = _Place(entry["key"], part, offset)
                    offset += len(data)
        except (ValueError, KeyError, TypeError):
            part.unlink()
        else:
            self._places |= places

    def _check_settings(self, note: Path) -> None:
        advice = "give the settings it was started with, or start anew (--overwrite)"
        try:
            started = json.loads(note.read_bytes())
            version, before = started["format"], dict(started["settings"])
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{str(note)!r} is damaged; start anew (--overwrite)") from None
        require(version == _FORMAT, f"{str(self.folder)!r} is of another version of this package; {advice}")
        now = json.loads(json.dumps(self.settings))
        for name in {**before, **now}:  # what is not set may be absent
            then, given = before.get(name), now.get(name)
            require(then == given, f"{str(self.folder)!r} was started with {name}={then!r}, not {given!r}; {advice}")

    def __contains__(self, row: Row) -> bool:
        place = self._places.get(str(row.id))
        return place is not None and place.key == row.key

    def add(self, finished: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Store rows and their keys, all of them or none.

        Raises:
            BatchError: they could not be written; none is stored.
        """
        name = hashlib.sha256("".join(key for key, _ in finished).encode()).hexdigest()[:24]
        part, offset, places = self.folder / f"part-{name}.jsonl", 0, {}
        with self._refusing_to_write(), whole_file(part, self.folder) as file:
            for key, row in finished:
                data = _line({"key": key, "row": row})
                file.write(data)
                places[str(row["id"])] = _Place(key, part, offset)
                offset += len(data)
        self._places |= places

    def get(self, row: Row) -> dict[str, Any]:
        """Return the stored output of a row.

        Raises:
            BatchError: there is none: the input has changed since the run started.
        """
        if row not in self:
            raise BatchError(f"line {row.line} has no answer: the input changed during the run; run it again")
        place = self._places[str(row.id)]
        with open(place.part, "rb") as file:
            file.seek(place.offset)
            return json.loads(file.readline())["row"]

    def finish(self, results: Iterable[dict[str, Any]], *, text_ids: bool) -> None:
        """Write the output, and remove the stored parts.

        Raises:
            BatchError: the output could not be written; all finished rows are kept.
        """
        write = _write_parquet if file_format("out", self.out) == "parquet" else _write_jsonl
        with self._refusing_to_write():
            with whole_file(self.out, self.folder) as file:
                write(file, results, text_ids)
            (self.folder / "run.json").unlink()  # first: without it the other files are not resumed
            for path in self.folder.glob("part-*.jsonl"):
                path.unlink()
        self._places = {}

    @contextmanager
    def _refusing_to_write(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {len(self._places)} finished rows are kept: run it again to go on" if self._places else ""
            where = error.filename or self.folder
            reason = error.strerror or error
            raise BatchError(f"out={str(self.out)!r}: {str(where)!r} cannot be written: {reason}{kept}") from None


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _write_jsonl(file: IO[bytes], results: Iterable[dict[str, Any]], text_ids: bool) -> None:
    for result in results:
        file.write(_line(result))


def _write_parquet(file: IO[bytes], results: Iterable[dict[str, Any]], text_ids: bool) -> None:
    arrow, parquet = _pyarrow()
    kinds = {"id": "string" if text_ids else "int64", **ANSWER, "error": "string"}
    schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in kinds.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for result in results:
            rows.append(result | {"id": str(result["id"])} if text_ids else result)
            if len(rows) == _ROWS:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(f'Parquet files need {error.name}: pip install "sfs_triton[ray]"') from None
    return pyarrow, pyarrow.parquet
