"""``make bench-all``: its jobs, with small ones in their place."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from bench import all as bench_all
from bench.all import Job

TEST = """
def test_addition(benchmark):
    benchmark.extra_info["rows"] = 3
    assert benchmark(lambda: 1 + 1) == 2
"""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # where pytest-benchmark sees one, it times nothing
    (tmp_path / "test_one.py").write_text(TEST)
    mine = (
        Job("good", "write", ("-c", "import pathlib; pathlib.Path(r'{out}/mine.txt').write_text('here')")),
        Job("bad", "fail", ("-c", "raise SystemExit(3)")),
        Job("slow", "hang", ("-c", "import time; time.sleep(60)"), 0.5),
        Job("timed", "pytest", (*bench_all.PYTEST, str(tmp_path / "test_one.py"))),
    )
    monkeypatch.setattr(bench_all, "JOBS", mine)
    return mine


def test_a_job_that_fails_or_hangs_does_not_end_the_others(jobs, tmp_path, capfd):
    out = tmp_path / "deep" / "out"
    assert bench_all.main(["--out", str(out)]) == 1
    run = json.loads((out / "run.json").read_text())
    assert [(job["job"], job["status"]) for job in run["jobs"]] == [
        *(("good", 0), ("bad", 3), ("slow", None), ("timed", 0))
    ]
    assert run["machine"]["cpu"] and 0.4 < run["jobs"][2]["seconds"] < 30
    assert (out / "mine.txt").read_text() == "here"
    (line,) = json.loads((out / "timed.json").read_text())
    assert line["test"] == "test_addition" and line["rows"] == 3 and 0 < line["median_s"] < 1
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "run.json", "timed.json"], "no raw file"
    told = capfd.readouterr().out
    assert "failed with status 3" in told and "took too long" in told and f"wrote {out}" in told


def test_only_some(jobs, tmp_path, capsys):
    assert bench_all.main(["--only", "good", "--out", str(tmp_path / "out")]) == 0
    assert [job["job"] for job in json.loads((tmp_path / "out" / "run.json").read_text())["jobs"]] == ["good"]
    with pytest.raises(SystemExit):
        bench_all.main(["--only", "good,none", "--out", str(tmp_path / "other")])
    assert "--only none: jobs are good, bad" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_place_that_cannot_be_written(jobs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench_all.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "file" in capsys.readouterr().err


def test_the_folder_of_a_machine():
    assert bench_all.folder_name({"cpu": "AMD EPYC 7B13 (x)", "cores": 2}) == "amd-epyc-7b13-x-2-cores"


def test_the_real_jobs_name_files_that_exist():
    for job in bench_all.JOBS:
        module = job.command[1] if job.command[0] == "-m" else None
        paths = [part for part in job.command if part.startswith("bench/")]
        assert module == "pytest" or paths or importlib.util.find_spec(module)
        assert all((bench_all.ROOT / path).exists() for path in paths)
