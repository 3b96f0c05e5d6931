"""A disk that fills up while results are written: no part of a new file stays, and an older one is as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from bench import all as bench_all  # noqa: E402
from bench import throughput  # noqa: E402
from bench.common import chart, pages  # noqa: E402
from bench.quality import measured  # noqa: E402
from bench.server import soak  # noqa: E402
from sfs_triton import ArgumentError  # noqa: E402
from sfs_triton.chat.commands import save  # noqa: E402
from sfs_triton.view import plot, record  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

LARGE = 5000  # bytes of what is written, at least
ROOM = 1000  # bytes that there is room for


@contextmanager
def little_room(size: int = ROOM) -> Iterator[None]:
    """Files grow no further than this: the system refuses the rest of a write, as it does where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _figure() -> Figure:
    figure = Figure()
    figure.subplots().plot(range(99))
    return figure


def _animation() -> record.Animation:
    engine = SimpleNamespace(text=SimpleNamespace(piece=str), spec=SimpleNamespace(end_ids=(), mask_id=0))
    return record.Animation(engine, [record.Recording("t", 99, [list(range(1, 100))], [[0] * 99])])


def _condensed(path: Path) -> None:
    """Write the condensed results of a job, as ``make bench-all`` does; the raw file is complete."""
    raw = path.with_name("raw.json")
    test = {"name": "t" * LARGE, "stats": {"median": 1.0}, "extra_info": {}}
    with little_room(resource.RLIM_INFINITY):
        raw.write_text(json.dumps({"benchmarks": [test]}))
    bench_all.condense(raw, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a record of a benchmark": lambda path: throughput.write_json({"rows": ["r" * LARGE]}, path),
    "a record that grows": lambda path: measured.keep({"lines": []}, {"line": "l" * LARGE}, path),
    "a record of a soak": lambda path: pages.replace_file(path, soak.as_text({"log": "x" * LARGE})),
    "what bench-all keeps": _condensed,
    "a chart": lambda path: chart.save(_figure(), path),
    "a picture (sfs plot)": lambda path: plot.save(_figure(), path),
    "an animated picture (--record)": lambda path: _animation().save(path),
    "a conversation (/save)": lambda path: save(SimpleNamespace(messages=[{"content": "a" * LARGE}]), str(path)),
}


@pytest.mark.parametrize("older", [None, "what was there"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_half_written_stays(tmp_path, name, older):
    path = tmp_path / "result.png"
    if older is not None:
        path.write_text(older)
    with pytest.raises((OSError, ArgumentError)) as caught, little_room():
        WRITERS[name](path)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    left = {file.name for file in tmp_path.iterdir()} - {"raw.json"}  # which is there for another try
    assert left == (set() if older is None else {path.name})
    assert older is None or path.read_text() == older
    WRITERS[name](path)
    assert path.stat().st_size > ROOM


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_json_for_a_full_disk_is_an_error(embedded):
    """``sfs generate --json``: one line on stderr, and an exit code that scripts see."""
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "sfs_triton.cli", "generate", "--json", "--gen-length", "4", "15,44"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: stdout cannot be written: No space left on device"


EVALUATION = """
import resource, sys
import lm_eval.tasks._index as index  # and look for no tasks of lm-eval's own, which are thousands
own = index.TaskIndex._iter_yaml_files
index.TaskIndex._iter_yaml_files = staticmethod(lambda root: [] if root.name == "tasks" and "lm_eval" in root.parts
                                                else own(root))
from lm_eval.loggers import EvaluationTracker
save = EvaluationTracker.save_results_aggregated

def saved(*given, **named):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    save(*given, **named)

EvaluationTracker.save_results_aggregated = saved
from sfs_triton.cli.evaluate import main
main()
"""


@pytest.mark.slow
def test_scores_that_cannot_be_written_are_an_error(tmp_path):
    """lm-eval itself logs that it could not save them, and leaves the partial file."""
    pytest.importorskip("lm_eval")
    tasks = str(ROOT / "bench" / "eval" / "tasks")
    options = ["--model", "sfs_triton", "--model_args", "pretrained=embedded,dtype=float32", "--tasks", "sfs_records"]
    options += ["--include_path", tasks, "--apply_chat_template", "--limit", "1", "--output_path", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", EVALUATION, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    wanted = f"error: output_path={str(tmp_path)!r}: the results could not be written; is the disk full?"
    assert done.stderr.splitlines()[-1] == wanted
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
