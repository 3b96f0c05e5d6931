"""Files of prompts, answered in this process: output, refusals, and resumption after a stop."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, FixedSteps, SlowFast
from sfs_triton.batch.files import ANSWER, Parts, Row
from sfs_triton.batch.run import BatchError, BatchSettings, answer, in_process, run_batch
from sfs_triton.decoding.params import DecodingParams
from sfs_triton.models import Transformer

SHORT = BatchSettings(params=DecodingParams(gen_length=16), batch=3, device="cpu")


def changed(**changes) -> BatchSettings:
    """Return SHORT with some settings or decoding parameters changed."""
    params = {name: changes.pop(name) for name in ("sampler", "cache", "gen_length", "seed") if name in changes}
    return replace(SHORT, params=replace(SHORT.params, **params), **changes)


TEMPLATED = [{"role": "user", "content": "15,44,79,50"}]


def prompts(count: int) -> list[dict]:
    return [{"prompt": f"{i + 11},44,{i * 3 + 20},50"} for i in range(count)]


def write(path: Path, rows: list) -> Path:
    """Write JSON lines; bytes are written as a raw line."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


@pytest.fixture
def run(embedded):
    """``run_batch`` with an engine that is loaded once for all tests."""

    def run(source: Path, out: Path, settings: BatchSettings = SHORT, execute=None, **options):
        return run_batch(source, out, settings, execute or in_process(settings, embedded), **options)

    return run


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "in.jsonl", prompts(8))


# --------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_are_those_of_the_engine(source, tmp_path, embedded, batch, run):
    settings = changed(batch=batch, sampler=SlowFast(temperature=0.8), seed=5, cache=sfs_triton.RegionCache())
    done = run(source, tmp_path / "out.jsonl", settings)
    texts = [row["prompt"] for row in prompts(8)]
    wanted = embedded.generate(texts, gen_length=16, seed=5, sampler=settings.params.sampler, cache="region")
    rows = read(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == [w.text for w in wanted]
    assert [row["id"] for row in rows] == list(range(1, 9)) and [row["seed"] for row in rows] == list(range(5, 13))
    assert [(r["nfe"], r["prompt_tokens"], r["response_tokens"], r["tokens_per_forward"]) for r in rows] == [
        (w.nfe, w.prompt_length, len(w.tokens), w.tokens_per_forward) for w in wanted
    ]
    assert (done.rows, done.errors, done.kept) == (8, 0, 0)
    assert left(tmp_path) == {"in.jsonl", "out.jsonl"}


def test_a_row_brings_its_own_id_messages_length_and_seed(tmp_path, embedded, run):
    rows = [
        {"id": "ä", "messages": TEMPLATED, "gen_length": 24, "seed": 7, "note": "left alone"},
        {"id": -4, "prompt": "15,44,79,50", "messages": None, "gen_length": 8.0},
    ]
    sampler = SlowFast(temperature=1.0)
    run(write(tmp_path / "in.ndjson", rows), tmp_path / "out.jsonl", changed(sampler=sampler))
    first, second = read(tmp_path / "out.jsonl")
    wanted = embedded.generate(TEMPLATED, gen_length=24, seed=7, sampler=sampler)
    assert (first["id"], first["text"], first["gen_length"], first["seed"]) == ("ä", wanted.text, 24, 7)
    wanted = embedded.generate("15,44,79,50", gen_length=8, seed=1, sampler=sampler)
    assert (second["id"], second["text"], second["gen_length"], second["seed"]) == (-4, wanted.text, 8, 1)
    run(tmp_path / "in.ndjson", tmp_path / "raw.jsonl", changed(apply_chat_template=False))
    raw = embedded.generate("15,44,79,50", gen_length=8, seed=1, apply_chat_template=False)
    assert read(tmp_path / "raw.jsonl")[1]["prompt_tokens"] == raw.prompt_length < second["prompt_tokens"]


@pytest.mark.parametrize("ids", [[10, 11, 12, 13], ["a", "b", None, "d"]], ids=["numbers", "text"])
def test_parquet_in_and_out(tmp_path, ids, run):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "id": ids,
        "prompt": ["15,44,79,50", None, "12,44,20,50", None],
        "messages": [None, TEMPLATED, None, None],
        "seed": [None, 4.0, 2.0, None],  # as pandas writes integers some of which lack
    }
    parquet.write_table(arrow.table(columns), tmp_path / "in.parquet")
    done = run(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (done.rows, done.errors) == (4, 1)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["id", *ANSWER, "error"]
    assert table.schema.field("id").type == (arrow.int64() if ids[0] == 10 else arrow.string())
    found = table.to_pylist()
    assert [row["id"] for row in found] == (ids if ids[0] == 10 else ["a", "b", "3", "d"])
    assert found[0]["text"] == found[1]["text"] != found[2]["text"] and [row["seed"] for row in found] == [
        0,
        4,
        2,
        None,
    ]
    assert found[3]["text"] is None and "neither 'prompt' nor 'messages'" in found[3]["error"]
    lines = [{n: columns[n][i] for n in columns} for i in range(4)]
    run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    for row, same in zip(read(tmp_path / "out.jsonl"), found, strict=True):
        assert {**row, "id": str(row["id"])} == {k: v for k, v in same.items() if v is not None} | {
            "id": str(same["id"])
        }


def test_no_rows(tmp_path, run):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert run(write(tmp_path / "in.jsonl", []), tmp_path / "out.parquet").rows == 0
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0
    parquet.write_table(arrow.table({"prompt": arrow.array([], arrow.string())}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "out.jsonl").rows == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# ------------------------------------------------------------------------------------------------------------- bad rows

BAD = [
    (b"{oops", "is not JSON"),
    (b'{"prompt": "\xff"}', "is not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "is not JSON"),
    (b'["prompt"]', "holds a list, not an object"),
    ({"id": "lonely"}, "has neither 'prompt' nor 'messages'"),
    ({"prompt": "1", "messages": TEMPLATED}, "has both"),
    ({"prompt": 5}, "prompt is a int, not text"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
    ({"id": "\ud800", "prompt": "1"}, "id is not valid Unicode"),
    ({"id": 7.5, "prompt": "1"}, "id=7.5 is not an integer from -9223372036854775808 to"),
    ({"id": 2**70, "prompt": "1"}, "is not an integer from -9223372036854775808 to"),
    ({"messages": []}, "messages is no list of messages"),
    ({"messages": [{"role": "user"}]}, "is not an object with a text 'role'"),
    ({"prompt": "1", "gen_length": 0}, "gen_length=0 is not an integer from 1 to"),
    ({"prompt": "1", "seed": "x"}, "seed='x' is not an integer from 0 to"),
    ({"prompt": "1", "seed": 2**63}, "seed=9223372036854775808 is not an integer from 0 to 9223372036854775807"),
    ({"prompt": "1,2," * 500}, "the model allows 512"),
    ({"prompt": "1", "gen_length": 512}, "the model allows 512"),
    ({"prompt": "<|mask|>"}, "holds the mask token (id"),
]


def test_bad_rows_get_an_error_and_stop_nothing(tmp_path, embedded, run):
    mask = next(t for t in embedded.text.tokenizer.get_added_tokens_decoder().values() if "mask" in t.content).content
    bad = [(row if row != {"prompt": "<|mask|>"} else {"prompt": mask}, why) for row, why in BAD]
    mixed = [part for row, _ in bad for part in (row, b"", {"prompt": "15,44,79,50"})]
    done = run(write(tmp_path / "in.jsonl", mixed), tmp_path / "out.jsonl", changed(batch=8))
    assert (done.rows, done.errors) == (2 * len(bad), len(bad))
    rows = read(tmp_path / "out.jsonl")
    wanted = embedded.generate("15,44,79,50", gen_length=16).text
    for index, (row, why) in enumerate(bad):
        refused, answered = rows[2 * index : 2 * index + 2]
        line = 3 * index + 1
        own = isinstance(row, dict) and row.get("id") == "lonely"
        assert refused["id"] == ("lonely" if own else line) and set(refused) == {"id", "error"}
        assert why in refused["error"] and f"{line}" in refused["error"]
        assert (answered["id"], answered["text"]) == (line + 2, wanted)


def test_a_row_with_nan_alone_gets_an_error(embedded):
    ids = embedded.encode("15,44,79,50", False, 0)
    odd = next(t for t in embedded.encode("Ann", False, 0) if t not in ids)
    embedding = embedded.model.weights.embedding.clone()
    embedding[odd] = torch.nan
    broken = sfs_triton.Engine(
        Transformer(embedded.spec, replace(embedded.model.weights, embedding=embedding)), embedded.text
    )
    rows = [Row(1, 1, "15,44,79,50"), Row(2, 2, "Ann"), Row(3, 3, "15,44,79,50")]
    (_, first), (_, second), (_, third) = answer(broken, SHORT, rows)
    assert "NaN" in second["error"] and set(second) == {"id", "error"}
    assert first["text"] == third["text"] == embedded.generate("15,44,79,50", gen_length=16).text


# -------------------------------------------------------------------------------------------- refusals before the start


def never(chunks):
    pytest.fail("something was started")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.jsonl", None, "is no file"),
        ("in.txt", b"{}", "does not end in one of .jsonl, .ndjson, .parquet"),
        ("in.jsonl", b"\x00\x01\n\x02", "none of its 2 rows can be answered; the first: line 1 is not JSON"),
        ("in.jsonl", b'{"text": "1"}', "line 1 has neither 'prompt' nor 'messages'"),
        ("in.jsonl", b'{"id": 1, "prompt": "1"}\n{"id": "1", "prompt": "2"}', "lines 1 and 2 have the same id '1'"),
        ("in.jsonl", b'{"id": 2, "prompt": "1"}\n{"prompt": "2"}', "a row without an id has its line number"),
        ("in.parquet", b"PAR1 not at all", "is not a readable Parquet file"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, words, run):
    if name == "in.parquet":
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = left(tmp_path)
    with pytest.raises(ArgumentError) as refused:
        run(tmp_path / name, tmp_path / "out.jsonl", execute=never)
    assert words in str(refused.value) and str(tmp_path / name) in str(refused.value)
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["1"]}, "has no column 'prompt' or 'messages'; its columns are text"),
        ({"prompt": [1.5]}, "column 'prompt' holds double"),
        ({"prompt": ["1"], "id": [1.5]}, "column 'id' holds double"),
        ({"prompt": ["1"], "seed": ["1"]}, "column 'seed' holds string"),
        ({"messages": ["1"]}, "column 'messages' holds string"),
    ],
)
def test_columns_that_are_refused(tmp_path, columns, words, run):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), tmp_path / "in.parquet")
    with pytest.raises(ArgumentError) as refused:
        run(tmp_path / "in.parquet", tmp_path / "out.jsonl", execute=never)
    assert words in str(refused.value) and left(tmp_path) == {"in.parquet"}


def test_a_parquet_file_that_breaks_off_is_refused(tmp_path, run):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(arrow.table({"prompt": [f"{i}" for i in range(9000)]}), path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(ArgumentError, match=r"in\.parquet"):
        run(path, tmp_path / "out.jsonl", execute=never)


def test_outputs_that_are_refused(source, tmp_path, run):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "there.jsonl").write_text("precious")
    (tmp_path / "odd.jsonl.parts").mkdir()
    (tmp_path / "odd.jsonl.parts" / "thesis.txt").write_text("precious")
    for out, words in [
        ("out.csv", "does not end in"),
        ("folder.jsonl", "is a folder"),
        ("no/where.jsonl", "there is no folder"),
        ("there.jsonl", "exists already"),
        ("odd.jsonl", "holds 'thesis.txt'"),
        ("in.jsonl", "is the same file as source"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            run(source, tmp_path / out, execute=never)
    with pytest.raises(ArgumentError, match="thesis"):
        run(source, tmp_path / "odd.jsonl", execute=never, overwrite=True)
    assert (tmp_path / "odd.jsonl.parts" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch=0"),
        ({"gen_length": -1}, "gen_length=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"cache": sfs_triton.DualCache()}, "cache='dual'"),
    ],
)
def test_settings_that_are_refused(change, words):
    with pytest.raises(ArgumentError, match=words):
        changed(**change)


def test_a_model_that_cannot_be_had_leaves_nothing_in_the_way(source, tmp_path, golden):
    out = tmp_path / "out.jsonl"
    with pytest.raises(CheckpointError):
        run_batch(source, out, changed(model=str(tmp_path / "none")))
    with pytest.raises(ArgumentError, match="model=.* needs a tokenizer"):
        run_batch(source, out, changed(model=str(golden / "models" / "llada-mha")))
    with pytest.raises(ArgumentError, match="only 512 positions"):
        run_batch(source, out, changed(gen_length=512))
    assert not out.exists() and not out.with_name("out.jsonl.parts").exists()
    assert run_batch(source, out, SHORT).rows == 8


# ----------------------------------------------------------------------------------------------------- stopped, gone on


class Stopping:
    """Engine that answers so many chunks and then fails; it records the lines it answered."""

    def __init__(self, engine: sfs_triton.Engine, chunks: int = 10**9, settings: BatchSettings = SHORT):
        self.answers, self.chunks, self.lines = in_process(settings, engine), chunks, []

    def __call__(self, chunks):
        for number, finished in enumerate(self.answers(self.noted(chunks))):
            if number == self.chunks:
                raise RuntimeError("stopped")
            yield finished

    def noted(self, chunks):
        for rows in chunks:
            self.lines.append([row.line for row in rows])
            yield rows


@pytest.fixture
def whole(source, tmp_path, run) -> bytes:
    run(source, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def stop_after(engine: sfs_triton.Engine, source: Path, out: Path, chunks: int) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run_batch(source, out, SHORT, Stopping(engine, chunks))
    assert not out.exists()


def test_a_run_goes_on_where_it_stopped(source, tmp_path, whole, run, embedded):
    out, told = tmp_path / "out.jsonl", []
    stop_after(embedded, source, out, 1)
    (tmp_path / "out.jsonl.parts" / "part-torn.jsonl.partial").write_text('{"key": ')  # of a process that was killed
    again = Stopping(embedded)
    done = run(source, out, execute=again, on_progress=lambda *at: told.append(at))
    assert again.lines == [[4, 5, 6], [7, 8]] and told == [(6, 8), (8, 8)]
    assert (done.rows, done.kept) == (8, 3) and out.read_bytes() == whole
    assert left(tmp_path) == {"in.jsonl", "whole.jsonl", "out.jsonl"}


def test_a_damaged_part_is_answered_again(source, tmp_path, whole, run, embedded):
    out = tmp_path / "out.jsonl"
    stop_after(embedded, source, out, 2)
    part = sorted((tmp_path / "out.jsonl.parts").glob("part-*.jsonl"))[0]
    part.write_bytes(part.read_bytes()[:-30])
    again = Stopping(embedded)
    assert run(source, out, execute=again).kept == 3
    assert sum(map(len, again.lines)) == 5 and out.read_bytes() == whole


def test_rows_that_changed_are_answered_again_and_new_ones_for_the_first_time(source, tmp_path, run, embedded):
    out = tmp_path / "out.jsonl"
    stop_after(embedded, source, out, 2)
    changed = prompts(9)
    changed[1]["prompt"] = "12,44,20,50"
    write(source, changed)
    again = Stopping(embedded)
    assert run(source, out, execute=again).kept == 5 and again.lines == [[2, 7, 8], [9]]
    run(source, tmp_path / "anew.jsonl")
    assert out.read_bytes() == (tmp_path / "anew.jsonl").read_bytes()


def test_other_settings_are_refused_another_batch_is_not(source, tmp_path, whole, run, embedded):
    out = tmp_path / "out.jsonl"
    stop_after(embedded, source, out, 1)
    for change, words in [
        ({"gen_length": 8}, "was started with gen_length=16, not 8"),
        ({"seed": 1}, "was started with seed=0, not 1"),
        ({"sampler": FixedSteps()}, "was started with sampler="),
        ({"model": "other"}, "was started with model='embedded', not 'other'"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            run(source, out, changed(**change), never)
    assert run(source, out, changed(batch=2)).kept == 3 and out.read_bytes() == whole


@pytest.mark.parametrize("name, value", [("max_length", 256), ("mask_token_id", 3), ("adapter", "lora")])
def test_a_setting_that_is_no_longer_given_is_refused(tmp_path, name, value):
    """The answers of a model with it and without it would be mixed."""
    settings = replace(SHORT, **{name: value})
    with Parts(tmp_path / "out.jsonl", settings.described()) as parts:
        parts.add([("key", {"id": 1})])
    refusal = pytest.raises(ArgumentError, match=f"was started with {name}={value!r}, not None")
    with refusal, Parts(tmp_path / "out.jsonl", SHORT.described()):
        pass


def test_overwriting(source, tmp_path, whole, run, embedded):
    out = tmp_path / "out.jsonl"
    stop_after(embedded, source, out, 1)
    other = changed(gen_length=8)
    assert run(source, out, other, overwrite=True).kept == 0
    assert read(out)[0]["gen_length"] == 8
    before = out.read_bytes()
    with pytest.raises(RuntimeError, match="stopped"):
        run(source, out, execute=Stopping(embedded, 1), overwrite=True)
    assert out.read_bytes() == before  # until there is a whole new one
    assert run(source, out).kept == 3 and out.read_bytes() == whole


def test_one_run_at_a_time(source, tmp_path, run, embedded):
    def meanwhile(chunks):
        with pytest.raises(ArgumentError, match="is being written by another run"):
            run(source, tmp_path / "out.jsonl", execute=never)
        yield from in_process(SHORT, embedded)(chunks)

    assert run(source, tmp_path / "out.jsonl", execute=meanwhile).rows == 8


def test_an_input_that_changes_meanwhile_is_noticed(source, tmp_path, run, embedded):
    def meanwhile(chunks):
        yield from in_process(SHORT, embedded)(chunks)
        write(source, prompts(9))

    with pytest.raises(BatchError, match="line 9 has no answer: the input changed"):
        run(source, tmp_path / "out.jsonl", execute=meanwhile)
    assert run(source, tmp_path / "out.jsonl").kept == 8


def test_a_killed_process_loses_nothing_that_it_finished(tmp_path, run, embedded):
    source = write(tmp_path / "in.jsonl", prompts(12))
    options = ["--batch", "1", "--gen-length", "64", "--sampler", "vanilla", "--device", "cpu"]
    command = [sys.executable, "-m", "sfs_triton.cli", "batch", str(source), str(tmp_path / "out.jsonl"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    parts, deadline = tmp_path / "out.jsonl.parts", time.monotonic() + 100
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while len(list(parts.glob("part-*.jsonl"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGKILL, said
    kept = len(list(parts.glob("part-*.jsonl")))
    assert 2 <= kept < 12 and not (tmp_path / "out.jsonl").exists()
    settings = changed(gen_length=64, batch=1, sampler=FixedSteps())
    again = Stopping(embedded, settings=settings)
    assert run(source, tmp_path / "out.jsonl", settings, again).kept == kept == 12 - len(again.lines)
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(1, 13))


# ------------------------------------------------------------------------------------------------------------ disk full


def check_full(caught, tmp_path: Path, kept: int, reason: int) -> None:
    said = str(caught.value)
    assert os.strerror(reason) in said and str(tmp_path / "out.jsonl") in said
    assert (f"{kept} finished rows are kept: run it again to go on" in said) == bool(kept)
    assert not (tmp_path / "out.jsonl").exists()
    folder = tmp_path / "out.jsonl.parts"
    assert folder.exists() == bool(kept)
    parts = list(folder.iterdir()) if kept else []
    assert all(path.name in ("lock", "run.json") or path.name.startswith("part-") for path in parts)
    assert not list(tmp_path.glob("**/*.partial"))
    assert sum(len(read(path)) for path in parts if path.name.startswith("part-")) == kept


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (3, 0), (5, 3), (9, 8)])
def test_a_full_disk(source, tmp_path, whole, run, monkeypatch, call, kept):
    """The system may report it only when a file is synced: run.json, a part, or the output. Folders are, too."""
    calls, fsync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(BatchError) as caught:
        patch.setattr(os, "fsync", full)
        run(source, tmp_path / "out.jsonl")
    check_full(caught, tmp_path, kept, errno.ENOSPC)
    assert run(source, tmp_path / "out.jsonl").kept == kept
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("limit", "kept"), [(300, 0), (700, 8)], ids=["a part", "the output"])
def test_a_file_that_can_grow_no_further(source, tmp_path, whole, limit, kept, run, embedded):
    """The system's own limit of a file's size: writes fail in the middle."""
    settings = changed(batch=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(BatchError) as caught:
            run(source, tmp_path / "out.jsonl", settings, limited(in_process(settings, embedded), limit, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_full(caught, tmp_path, kept, errno.EFBIG)
    assert run(source, tmp_path / "out.jsonl", settings).kept == kept
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def limited(inner, limit: int, hard: int):
    def execute(chunks):
        for finished in inner(chunks):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            yield finished

    return execute


# ----------------------------------------------------------------------------------------------------- the command line


def test_command_line(source, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from sfs_triton.cli import main as cli

    def sfs(*options: str):
        arguments = ["batch", str(source), str(tmp_path / "out.jsonl"), "--gen-length", "16", "--device", "cpu"]
        return CliRunner().invoke(cli.app, [*arguments, *options])

    write(source, [*prompts(3), b"oops"])
    result = sfs("--batch", "3", "--temperature", "0.5", "--seed", "3", "--cache", "region")
    assert result.exit_code == 0 and result.stdout == ""
    assert f"wrote {tmp_path / 'out.jsonl'}: 4 rows, 1 with an error, in " in result.stderr
    first = read(tmp_path / "out.jsonl")
    for options, words in [
        ((), "exists already"),
        (("--workers", "-1"), "--workers -1"),
        (("--overwrite", "--batch", "0"), "batch=0"),
        (("--overwrite", "--tau", "0.5"), "--tau does not apply"),
    ]:
        refused = sfs(*options)
        assert refused.exit_code == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
    assert sfs("--overwrite", "--temperature", "0.5", "--seed", "3", "--cache", "region").exit_code == 0
    assert read(tmp_path / "out.jsonl") == first


@pytest.mark.parametrize(("chunks", "said"), [(0, "no row was finished"), (1, "finished rows are in ")])
def test_ctrl_c_says_what_is_kept(source, tmp_path, monkeypatch, chunks, said):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from sfs_triton.batch import run as batch
    from sfs_triton.cli import main as cli

    calls, answered = [], batch.answer

    def interrupted(*given):
        calls.append(given)
        if len(calls) > chunks:
            raise KeyboardInterrupt
        return answered(*given)

    monkeypatch.setattr(batch, "answer", interrupted)
    out = tmp_path / "out.jsonl"
    options = ["--gen-length", "16", "--device", "cpu", "--batch", "3"]
    result = CliRunner().invoke(cli.app, ["batch", str(source), str(out), *options])
    assert result.exit_code != 0 and f"stopped; {said}" in result.stderr
    assert out.with_name("out.jsonl.parts").exists() == bool(chunks) and not out.exists()
