"""The suite for a GPU: its driver with steps that fail in every way, and its steps at toy sizes on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from bench.cost import step_count  # noqa: E402
from bench.gpu import __main__ as gpu_suite  # noqa: E402
from bench.gpu import (  # noqa: E402
    clock,
    engine,
    faults,
    generation,
    model,
    parts,
    record,
    smoke,
    supervise,
    targets,
    trace,
    warm_up,
)
from bench.gpu.steps import STEPS, Step, allotted, interpreted, missing  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def log(tmp_path: Path) -> record.Log:
    return record.Log(tmp_path / "run.jsonl", "this")


@pytest.fixture
def inside(log, monkeypatch):
    """Set this process up as a step's process."""
    values = {record.RECORD: str(log.path), record.RUN: log.run, record.STEP: "step", record.TOY: "1"}
    for name, value in (values | {record.DEADLINE: str(time.time() + 60)}).items():
        monkeypatch.setenv(name, value)
    return log


# --------------------------------------------------------------------------------------------------------- the record


def test_lines_are_read_back(log):
    log.write("a", "begun", "x")
    log.write("a", "ok", "x", ms=1.5, odd=float("nan"), many=(1, float("inf")), device=CPU, nested={1: {"y": None}})
    record.Log(log.path, "another").write("a", "failed", "x")
    with log.path.open("a") as file:
        file.write('{"run": "this", "step": "a", "status": "ok", "par')  # the machine went away here
    lines = log.lines()
    assert [line["status"] for line in lines] == ["begun", "ok"]
    wanted = {"ms": 1.5, "odd": None, "many": [1, None], "device": "cpu", "nested": {"1": {"y": None}}}
    assert {key: lines[1][key] for key in wanted} == wanted
    assert log.lines("b") == [] and record.read(log.path.with_name("none")) == []


def test_what_was_under_way(log):
    for part, *statuses in (("x", "begun", "ok"), ("y", "begun"), ("z", "begun", "failed"), (None, "begun")):
        for status in statuses:
            log.write("a", status, part)
    assert record.under_way(log.lines("a")) == ["y"]
    assert record.ended(log.lines("a")) == {"x": "ok", "z": "failed"}


def test_only_the_end_of_a_long_output_is_kept():
    assert record.tail("  short\n") == "short"
    assert record.tail("a" * 9000 + "end") == "..." + "a" * (record.TAIL - 3) + "end"


# -------------------------------------------------------------------------------------------------------------- parts


def test_parts_end_in_their_own_ways(inside):
    def skip():
        raise parts.Skip("not here")

    def half():
        raise parts.Incomplete({"found": 1}, ValueError("the rest"))

    done = {"fine": lambda: {"ms": 2.0}, "nothing": lambda: None, "skips": skip, "half": half, "fails": lambda: 1 / 0}
    assert parts.run(done) == 1
    ended = {line["part"]: line for line in inside.lines() if line["status"] != "begun"}
    assert [line["status"] for line in ended.values()] == ["ok", "ok", "skipped", "failed", "failed"]
    assert ended["fine"]["ms"] == 2.0 and ended["skips"]["reason"] == "not here" and ended["half"]["found"] == 1
    assert "the rest" in ended["half"]["error"] and "ZeroDivisionError" in ended["fails"]["error"]


def test_parts_are_done_once(inside):
    inside.write("step", "crashed", "first")
    seen = []
    assert parts.run({"first": lambda: seen.append(1), "second": lambda: seen.append(2)}) == 1
    assert seen == [2], "a part that took its process with it was tried again"


def test_parts_for_which_no_time_is_left(inside, monkeypatch):
    monkeypatch.setenv(record.DEADLINE, str(time.time() + parts.SPARE / 2))
    assert parts.run({"late": lambda: pytest.fail("it was begun")}) == 0
    assert [line["status"] for line in inside.lines()] == ["late"]


def test_a_part_that_leaves_the_gpu_unwell_is_the_last_of_its_process(inside, monkeypatch):
    monkeypatch.setattr(parts, "gpu_is_well", lambda: False)
    work = {"fails": lambda: 1 / 0, "next": lambda: None}
    assert parts.run(work) == record.AGAIN
    assert parts.run(work) == 1
    assert record.ended(inside.lines()) == {"fails": "failed", "next": "ok"}


# ---------------------------------------------------------------------------------------------------------- processes


def _run(tmp_path, code: str, limit: float = 20, stall: float = 20) -> supervise.Ended:
    return supervise.run(
        [sys.executable, "-c", code],
        limit=limit,
        stall=stall,
        output=tmp_path / "output.log",
        environment=os.environ,
        folder=tmp_path,
    )


def test_an_end(tmp_path):
    for code, status in (
        ("print('a')", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 11)", -11),
    ):
        ended = _run(tmp_path, code)
        assert (ended.how, ended.returncode) == ("exit", status)
        assert ended.output == ("a\n" if status == 0 else ""), "of an earlier process"


@pytest.mark.parametrize(("limit", "stall", "how"), [(0.7, 9, "limit"), (9, 0.7, "stall")])
def test_limits(tmp_path, limit, stall, how):
    """Limits also apply to child processes, and to a process that ignores SIGTERM."""
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    with mock.patch.object(supervise, "GRACE", 0.3):
        ended = _run(tmp_path, code, limit, stall)
    assert (ended.how, ended.returncode) == (how, -signal.SIGKILL) and ended.seconds < 8
    child = Path(f"/proc/{int(ended.output)}/stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z", "what it started goes on"


def test_signs_of_life(tmp_path):
    code = "import time\nfor i in range(8): print(i, flush=True); time.sleep(0.2)"
    assert _run(tmp_path, code, stall=1.2).how == "exit"


# ---------------------------------------------------------------------------------------------------------- the driver

HELLO = """
import os
from pathlib import Path
from bench.gpu.record import RECORD, RUN, Log
Log(Path(os.environ[RECORD]), os.environ[RUN]).write("environment", "ok", "machine", cuda=%s)
"""
PARTS = """
import os, sys, time
from bench.gpu import parts
def bad():
    %s
sys.exit(parts.run({"one": lambda: {"ms": 1}, "two": bad, "three": lambda: {"ms": 3}}))
"""


def _step(name: str, code: str, **changes) -> Step:
    given = Step(name, f"does {name}", (("-c", code),), least=5, most=20, stall=20)
    return replace(given, **changes)


def _suite(tmp_path, steps, *arguments, cuda=True) -> tuple[int, dict[tuple[str, str | None], dict]]:
    """The exit status, and the last line of each part."""
    first = _step("environment", HELLO % cuda)
    out = tmp_path / "record.jsonl"
    status = gpu_suite.main(["--out", str(out), *arguments], [first, *steps])
    return status, {(line["step"], line["part"]): line for line in record.read(out)}


def test_a_run_that_is_fine(tmp_path, capsys):
    status, lines = _suite(tmp_path, [_step("good", PARTS % "return {'ms': 2}")])
    assert status == 0 and lines["suite", None]["status"] == "ok"
    assert lines["good", None]["parts"] == {"ok": 3} and lines["good", "two"]["ms"] == 2
    told = capsys.readouterr().out
    assert "good         ok" in told and str(tmp_path / "record.jsonl") in told


WRONG = {  # and how the part ends
    "fails": ("raise ValueError('wrong')", "failed"),
    "aborts": ("os.abort()", "crashed"),
    "exits": ("os._exit(-9)", "crashed"),
    "hangs": ("time.sleep(60)", "hung"),
    "needs another process": ("parts.gpu_is_well = lambda: False; 1 / 0", "failed"),
}


@pytest.mark.slow
def test_what_comes_after_a_part_that_goes_wrong(tmp_path, monkeypatch):
    """is done all the same, in the same step and in the next."""
    monkeypatch.setattr(supervise, "GRACE", 0.3)
    steps = [_step(name, PARTS % code, most=60, stall=7) for name, (code, _) in WRONG.items()]
    status, lines = _suite(tmp_path, [*steps, _step("next", "pass")])
    assert status == 1 and lines["suite", None]["status"] == "failed"
    for name, (_, how) in WRONG.items():
        assert [lines[name, part]["status"] for part in ("one", "two", "three")] == ["ok", how, "ok"], name
        assert lines[name, None]["status"] == "failed" and lines[name, None]["limit"] == 60
        assert bool(lines[name, None]["notes"]) == (name != "fails"), "it was started again"
    assert lines["next", None]["status"] == "ok"


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import sys; print('so'); sys.exit(7)", "failed"),
        ("import os; os.abort()", "crashed"),
        ("import time; time.sleep(60)", "hung"),
        ("syntax error", "failed"),
    ],
)
def test_steps_that_say_nothing(tmp_path, monkeypatch, code, how):
    monkeypatch.setattr(supervise, "GRACE", 0.3)
    steps = [_step("bad", code, least=1, most=1.5 if how == "hung" else 20), _step("next", "pass")]
    status, lines = _suite(tmp_path, steps)
    assert status == 1 and lines["bad", None]["status"] == how and lines["next", None]["status"] == "ok"
    assert code != "import sys; print('so'); sys.exit(7)" or lines["bad", None]["output"] == "so"


def test_a_step_that_is_stopped_for_time_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", 0.3)
    slow = PARTS.replace("def bad", "parts.SPARE = 0\ndef bad") % "time.sleep(60)"
    status, lines = _suite(tmp_path, [_step("slow", slow, most=6)])
    assert status == 0 and lines["slow", None]["status"] == "late"
    assert [lines["slow", part]["status"] for part in ("one", "two")] == ["ok", "late"]


def test_without_a_gpu_steps_are_skipped_and_say_so(tmp_path, capsys):
    status, lines = _suite(tmp_path, [_step("good", "raise SystemExit(1)")], cuda=False)
    assert status == 0 and lines["good", None]["status"] == "skipped"
    assert lines["good", None]["reason"] == "no CUDA device" and "no CUDA device" in capsys.readouterr().out


def test_what_is_missing_is_skipped_and_said(tmp_path):
    step = _step("good", "raise SystemExit(1)", needs=("sys", "no_such_package"))
    assert missing(step) == ["no_such_package"]
    status, lines = _suite(tmp_path, [step])
    assert status == 0 and lines["good", None]["reason"] == "no_such_package not installed"


def test_the_time_is_over(tmp_path):
    status, lines = _suite(tmp_path, [_step("good", "pass", least=1000)], "--minutes", "0.2")
    assert status == 0 and lines["good", None]["status"] == "late"


def test_an_interruption_loses_nothing(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from bench.gpu import __main__ as gpu_suite
from bench.gpu.steps import Step
hello = Step("environment", "", (("-c", {HELLO % True!r}),), 5, 20)
slow = Step("slow", "", (("-c", {(PARTS % "time.sleep(60)")!r}),), 5, 50)
sys.exit(gpu_suite.main(["--out", "record.jsonl"], [hello, slow, slow]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    path, deadline = tmp_path / "record.jsonl", time.monotonic() + 60
    while not any(line["part"] == "two" for line in record.read(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    lines = {(line["step"], line["part"]): line for line in record.read(path)}
    assert process.returncode == 1 and "interrupted by SIGTERM" in told
    assert lines["slow", "one"]["status"] == "ok" and lines["slow", "two"]["status"] == "begun"
    assert lines["suite", None]["status"] == "failed"


def test_only_some_steps(tmp_path):
    steps = [_step("a", "pass"), _step("b", "pass")]
    status, lines = _suite(tmp_path, steps, "--only", "b")
    assert status == 0 and {step for step, _ in lines} == {"suite", "environment", "b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "smoke,nonsense"], "--only nonsense: steps are install, environment"),
        (["--minutes", "0"], "--minutes 0 is no time"),
        (["--out", "record.json"], "--out record.json does not end in .jsonl"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        gpu_suite.main(arguments)
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert gpu_suite.main(["--out", str(tmp_path / "file" / "record.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(capsys, monkeypatch):
    monkeypatch.setattr(supervise, "run", lambda *_, **__: pytest.fail("something was started"))
    assert gpu_suite.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()[1:-1]] == [step.name for step in STEPS]


def test_where_records_go(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "strftime", lambda form: "2027-01-02")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_suite.default_path("NVIDIA H200", "abc1234") == tmp_path / "2027-01-02-abc1234.jsonl"
    monkeypatch.delenv("OUT")
    path = gpu_suite.default_path("NVIDIA H200 NVL", "abc1234")
    assert path.relative_to(ROOT).as_posix() == "bench/results/nvidia-h200-nvl/2027-01-02-abc1234.jsonl"
    assert ROOT not in gpu_suite.default_path(None, "abc1234").parents


# ---------------------------------------------------------------------------------------------------------- the budget


def test_steps_fit_into_nine_minutes_and_none_goes_without():
    left = 540.0
    for index, step in enumerate(STEPS):
        seconds = allotted(step, STEPS[index + 1 :], left)
        assert step.least <= seconds <= step.most, step.name
        left -= seconds  # each takes all it may
    assert left >= 0


def test_time_that_is_left_over_goes_to_later_steps():
    first, second = _step("a", "", least=10, most=30), _step("b", "", least=10, most=100)
    assert allotted(first, [second], 60) == 30 and allotted(second, [], 55) == 55
    assert allotted(first, [second], 25) == 15, "what the second needs is kept for it"
    assert allotted(first, [second], 8) == 8, "the first comes first"
    assert allotted(first, [second], 4) == 0


def test_steps_are_those_that_were_asked_for():
    names = [step.name for step in STEPS]
    assert names == [
        *("install", "environment", "warm-up", "smoke", "sync", "engine", "baseline", "faults", "tests"),
        *("conformance", "throughput", "kernels"),
    ]
    install, *_ = STEPS
    command = " ".join(interpreted(install.commands[0], Path("x.jsonl")))
    assert command.startswith(sys.executable) and "pip install --no-build-isolation --no-deps" in command
    for step in STEPS:
        for command in step.commands:
            for part in interpreted(command, Path("out/x.jsonl")):
                file = ROOT / part.removeprefix("--ignore=")
                assert not part.endswith(".py") or file.is_file() or part.startswith("-"), part
    (kernels,) = next(step for step in STEPS if step.name == "kernels").commands
    timed = {part.removeprefix("bench/kernels/test_").removesuffix(".py") for part in kernels if part.endswith(".py")}
    assert timed == {path.stem.removeprefix("test_") for path in ROOT.glob("bench/kernels/test_*.py")}


# -------------------------------------------------------------------------------------------------- pytest, by lines


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "2"], marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_tests_are_lines(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='why not')\ndef test_not(): pass\n"
        "def test_done(): os.abort()\n"
        "def test_timed(benchmark):\n"
        "    benchmark.extra_info['p50_us'] = 3.5\n"
        "    benchmark.pedantic(lambda: None, rounds=1)\n"
    )
    log = record.Log(tmp_path / "run.jsonl", "this")
    log.write("tests", "crashed", "test_some.py::test_done")
    environment = {record.RECORD: str(log.path), record.RUN: "this", record.STEP: "tests"}
    environment |= {record.DEADLINE: str(time.time() + 60), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of which some take seconds
    outer = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    plugins = ["bench.gpu.pytest_lines", "no:cacheprovider", "pytest_benchmark.plugin"]
    plugins += ["xdist.plugin"] if workers else []
    options = [word for plugin in plugins for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", *options, "-q", *workers]
    done = subprocess.run(command, cwd=tmp_path, env=outer | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout
    ended = {line["part"].partition("::")[2]: line for line in log.lines() if line["status"] != "begun"}
    assert {name: line["status"] for name, line in ended.items()} == {
        **{"test_fine": "ok", "test_wrong": "failed", "test_not": "skipped", "test_timed": "ok", "test_done": "crashed"}
    }
    assert "assert 1 == 2" in ended["test_wrong"]["error"] and "why not" in ended["test_not"]["reason"]
    assert ended["test_timed"]["p50_us"] == 3.5
    assert len([line for line in log.lines() if line["status"] == "begun"]) == 4


# ---------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.slow
def test_every_step_runs_as_a_toy(tmp_path):
    """Covers all of the suite's own code that needs no CUDA."""
    out = tmp_path / "toy.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--toy", "--minutes", "9", "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = record.read(out)
    ended = {line["step"]: line for line in lines if line["part"] is None}
    ran = {name for name, line in ended.items() if line["status"] == "ok"}
    assert ran == {"suite", *(step.name for step in STEPS if step.toy)}
    assert "(<= 4.7 ms" not in done.stdout, "a toy was taken for a measurement"
    steps = {line["part"]: line for line in lines if line["step"] == "engine" and line["status"] == "ok"}
    rows = steps["torch, region, rows"]
    assert rows["shape"] == "plan 16" and rows["predicted_kernels"] > 1000 and rows["same_tokens"] is True
    counted = [line for line in lines if line["step"] == "sync" and line["status"] == "ok" and line["part"]]
    assert counted and all(line["decode"]["waits"] == {} for line in counted)


COMPILED = """
from bench.cost import step_count
from bench.gpu import warm_up

found, setting, every = warm_up.jobs_of(warm_up.ENGINE, False), step_count.Setting(), set()
for name in step_count.NAMES:
    steps = step_count.steps_of(setting, "triton", name)
    for kind in step_count.kinds(setting, name):
        every |= {kernel.name for kernel in steps.count(kind).kernels if "." in kernel.name}
warmed = {f"{module.rpartition('.')[2]}.{kernel.strip('_').removesuffix('_kernel')}" for module, kernel, *_ in found}
assert warmed == every, warmed ^ every
for variant, job in found.items():
    _, launch = warm_up.launches(job.source, False)[job.index]
    assert warm_up.variant(launch) == variant, job

launch = next(launch for _, launch in warm_up.launches("norm", False))
table, same = launch.arguments, warm_up.variant(launch)
fixed = next(p.name for p in launch.kernel.params if p.is_constexpr)
free = next(p.name for p in launch.kernel.params if p.do_not_specialize)
for name, value, alike in (
    ("x_ptr", table["x_ptr"].float(), False),
    ("x_ptr", table["x_ptr"].flatten()[1:], False),
    (fixed, 2 * table[fixed], False),
    ("num_warps", 2 * table["num_warps"], False),
    (free, table[free] + 1, True),
    ("x_ptr", table["x_ptr"].flatten()[16:], True),
):
    assert (warm_up.variant(launch._replace(arguments=table | {name: value})) == same) == alike, name
"""


@pytest.mark.slow
def test_every_launch_of_the_engine_is_warmed_up():
    """Every launch has a job that finds it again; launches that compile to different code are different jobs."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_jobs_come_in_order():
    names = ("publish:1", "attention:dream-7b", "lm_head:1")
    job = {name: warm_up.Job(name.partition(":")[0], 0, name) for name in names}
    ordered = warm_up.in_order([{(1,): job["publish:1"], (2,): job["attention:dream-7b"]}, {(3,): job["lm_head:1"]}])
    assert [each.name for each in ordered] == ["lm_head:1", "publish:1", "attention:dream-7b"]


SMALL_MODELS = """
from collections import Counter

import torch

from bench.gpu import warm_up

found = warm_up.launches(warm_up.SMALL, False)
models = Counter(name.rpartition(", ")[2] for name, _ in found)
assert len(models) == 5 and "embedded" in models, models
kernels = {launch.kernel.__name__ for _, launch in found}
assert {"_attention_kernel", "_lm_head_kernel", "_rms_norm_kernel"} <= kernels, kernels
dtypes = {launch.arguments["q_ptr"].dtype for _, launch in found if launch.kernel.__name__ == "_attention_kernel"}
assert dtypes == {torch.float32}, dtypes
assert not set(warm_up.jobs_of(warm_up.SMALL, False)) & set(warm_up.jobs_of("attention", False))
"""


@pytest.mark.slow
def test_the_small_models_are_warmed_up_in_their_own_dtype():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SMALL_MODELS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------- CUDA queries


def test_a_graph_is_captured_on_the_stream_that_it_was_warmed_up_on():
    """Capture uses the arguments of this torch, outside of inference mode, whose tensors captures must not leave."""
    modes, done = [], []
    with (
        mock.patch("torch.cuda.Stream", autospec=True) as stream,
        mock.patch("torch.cuda.CUDAGraph", autospec=True) as graph,
        mock.patch("torch.cuda.graph", autospec=True) as capture,
        mock.patch("torch.cuda.stream", autospec=True),
        mock.patch("torch.cuda.current_stream", autospec=True),
        mock.patch("torch.cuda.synchronize", autospec=True),
        torch.inference_mode(),
    ):
        capture.return_value.__enter__.side_effect = lambda: modes.append(torch.is_inference_mode_enabled())
        replay = clock.graph_of(lambda: done.append(torch.is_inference_mode_enabled()), torch.device("cuda"))
    assert done == [True, True] and modes == [False]
    assert capture.call_args.kwargs["stream"] is stream.return_value and replay == graph.return_value.replay


@pytest.mark.parametrize("trouble", ["capturing", "stream", "lost", None])
def test_whether_the_gpu_is_well(monkeypatch, trouble):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: trouble == "capturing")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0 if trouble == "stream" else 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lost if trouble == "lost" else lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    assert parts.gpu_is_well() == (trouble is None)


# -------------------------------------------------------------------------------------------------------------- traces


def _event(name: str, category: str, at: float, lasts: float = 1.0) -> dict:
    return {"name": name, "cat": category, "ts": at, "dur": lasts}


EVENTS = [
    _event("decode", "user_annotation", 10, 100),
    _event("decode", "gpu_user_annotation", 10, 100),
    _event("cudaStreamSynchronize", "cuda_runtime", 5),
    _event("cudaGraphLaunch", "cuda_runtime", 11),
    _event("cudaGraphLaunch", "cuda_runtime", 12),
    _event("nvjet_tst_128x8", "kernel", 13, 2000),
    _event("_rms_norm_kernel", "kernel", 14, 500),
    _event("_publish_kernel", "kernel", 15, 250),
    _event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 16),
    _event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 200),
    _event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 201),
    _event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 202),
]


def test_a_trace_is_counted_within_its_span():
    decode, whole = trace.summary(trace.within(EVENTS)), trace.summary(EVENTS)
    assert decode["calls"] == {"cudaGraphLaunch": 2} and decode["waits"] == {} and decode["kernels"] == 3
    assert decode["family_ms"] == {"products": 2.0, "elementwise": 0.5, "machine": 0.25} and decode["gpu_ms"] == 2.75
    assert decode["top"][0] == {"kernel": "nvjet_tst_128x8", "count": 1, "ms": 2.0}
    assert whole["waits"] == {"cudaStreamSynchronize": 1, "Memcpy HtoD": 1}, "a copy of pinned memory is no wait"
    assert whole["copies"] == {"Memcpy DtoD": 1, "Memcpy DtoH": 1, "Memcpy HtoD": 2}
    assert decode["span_ms"] == pytest.approx(2.0), "from the first begin to the last end"
    with pytest.raises(ValueError, match="0 spans 'other'"):
        trace.within(EVENTS, "other")


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("_lm_head_kernel", "head"),
        ("_attention_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...cutlass...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("_copy_kernel", "machine"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "elementwise"),
        ("void at::native::radixSortKVInPlace<...>", "sorts"),
        ("_silu_mul_kernel", "elementwise"),
    ],
)
def test_kernels_have_families(kernel, family):
    assert trace.family(kernel) == family


# ------------------------------------------------------------------------------------------------------ toys in detail


@pytest.fixture(scope="module")
def toy() -> engine.Bench:
    with mock.patch.dict(os.environ, {record.TOY: "1"}):
        return engine.Bench(True)


def test_steps_start_from_the_same_place(toy):
    """Steps end in the same state, replayed or not."""
    kind = next(kind for kind in step_count.kinds(toy.setting, "none") if kind.fast)
    rig = toy.rig("torch", "none")
    rig.put(kind)
    shape, before = rig.shape(kind), rig.outcome()
    rig.run(shape)
    after = rig.outcome()
    assert after != before
    rig.restore()
    assert rig.outcome() == before
    replay = rig.capture(shape)
    rig.restore()
    replay()
    rig.wait()
    assert rig.outcome() == after


def test_a_replay_that_does_something_else_is_told(toy, monkeypatch):
    def idle(runner, shape):
        runner.ring.publish()
        runner.ring.count_launch()
        return runner.ring.publish

    monkeypatch.setattr(model, "stand_in", idle)
    with pytest.raises(parts.Incomplete, match="a replay leaves sequences at") as caught:
        toy.step("torch", "none", next(iter(step_count.kinds(toy.setting, "none"))))
    assert caught.value.values["eager_ms"] > 0 and caught.value.values["predicted_kernels"] > 0


def test_a_capture_that_fails_leaves_what_was_measured(toy, monkeypatch):
    def refuse(runner, shape):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model, "stand_in", refuse)
    with pytest.raises(parts.Incomplete, match="not permitted") as caught:
        toy.step("torch", "none", next(iter(step_count.kinds(toy.setting, "none"))))
    assert "eager_ms" in caught.value.values and "ms" not in caught.value.values


def test_an_execution_that_falls_back_is_reported(embedded, monkeypatch):
    def refuse(runner, shape):
        raise RuntimeError("CUDA error: operation not permitted")

    monkeypatch.setattr(generation, "stand_in", refuse)
    engine_ = generation.with_execution(embedded, "cuda_graphs")
    with pytest.raises(
        parts.Incomplete,
        match="the execution failed: \\(torch, CUDA graphs\\) failed, going on with \\(torch, eager\\)",
    ) as caught:
        generation.profile(engine_, ["15,44"], gen_length=8)
    assert caught.value.values["nfe"] > 0


def test_a_wait_between_steps_is_a_failure(inside, monkeypatch):
    found = {"decode": {"waits": {"cudaStreamSynchronize": 3}}}
    monkeypatch.setattr(generation, "profile", lambda *_, **__: found)
    with pytest.raises(parts.Incomplete, match="waits between steps: {'cudaStreamSynchronize': 3}"):
        generation.count_waits("torch", "eager", "none")


# ------------------------------------------------------------------------------------------- faults, and the last page


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "ended with status -6 and found nothing: Aborted"),
        ('found: {"wrong": "noticed after 61.0 s", "seconds": 61.0}', "noticed after 61.0 s"),
        ('found: {"seconds": 0.4}\n', None),
    ],
)
def test_a_child_that_dies_or_finds_a_failure(output, message):
    if message is None:
        assert faults.verdict("device-fault", output, "", 0) == {"seconds": 0.4}
        return
    with pytest.raises((AssertionError, parts.Incomplete), match=message):
        faults.verdict("device-fault", output, "Aborted", -6)


@pytest.mark.parametrize("slow", [False, True])
def test_a_device_fault_must_be_noticed_soon(inside, monkeypatch, slow):
    ticks = iter([10.0, 10.0 + (61 if slow else 0.5)])
    monkeypatch.setattr(faults.time, "perf_counter", lambda: next(ticks))

    class Broken:
        def generate(self, prompts, on_step=None, **options):
            if on_step is None:
                return [SimpleNamespace(canvas=[])]
            on_step(None)

    def assert_async(condition):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(faults, "engine_of", lambda execution: Broken())
    monkeypatch.setattr(torch, "_assert_async", assert_async)
    found = faults.device_fault("eager")
    assert "device-side assert" in found["error"] and ("wrong" in found) == slow


def test_a_device_fault_that_nobody_notices(inside, monkeypatch):
    monkeypatch.setattr(faults, "engine_of", lambda execution: SimpleNamespace(generate=lambda *_, **__: []))
    assert faults.device_fault("eager") == {"wrong": "the generation ended as if nothing had happened"}


def test_a_mode_that_changes_results_is_reported(inside, monkeypatch):
    active = []

    @contextmanager
    def mode():
        active.append(1)
        yield
        active.clear()

    monkeypatch.setattr(faults, "engine_of", lambda execution: None)
    monkeypatch.setattr(faults, "_generate", lambda *_: [len(active)])
    with pytest.raises(parts.Incomplete, match="'inside': False, 'outside': True"):
        faults.modes("eager", mode)


def test_two_threads_of_which_one_gets_other_tokens(inside, monkeypatch):
    main = threading.current_thread()
    alone, together = {"region": [1], "none": [2]}, {"region": [1], "none": [3]}

    def generate(engine, cache):
        return (alone if threading.current_thread() is main else together)[cache]

    monkeypatch.setattr(faults, "engine_of", lambda execution: SimpleNamespace(execution=execution))
    monkeypatch.setattr(faults, "_generate", generate)
    with pytest.raises(parts.Incomplete, match="'none': False"):
        faults.two_captures()


def _recorded(path: Path, gpu: str) -> targets.Record:
    log = record.Log(path, "this")
    log.write("suite", "begun", gpu=gpu, toy=False)
    log.write("baseline", "ok", "ceilings", copy_gb_per_s=950.0)
    step = {"policy": "region", "kind": "list", "ms": 18.0, "backend": "triton", "positions": 128}
    log.write("engine", "ok", "triton, region, list", **step, machine_share=0.05)
    log.write("engine", "ok", "first answers", first_over_again=9.0, backend="torch", execution="eager")
    log.write("tests", "failed", "tests/a.py::b")
    return targets.Record(path, log.lines())


def test_the_last_page_has_a_verdict_for_every_target_and_record(tmp_path):
    told = targets.page(_recorded(tmp_path / "a.jsonl", "NVIDIA GeForce RTX 4090"))
    text = "\n".join(told)
    assert "step of 128 positions at 2,124 keys, bf16: 18.00 ms (triton, replayed) (<= 21.2 ms) met" in text
    assert "(<= 2% of it) MISSED by 2.50 x" in text and "(<= 1.5 x its time) MISSED by 6.00 x" in text
    assert "fused head, 16 rows: - (<= 1.15 x the time to stream its weights) not measured" in text
    assert "d3LLM-LLaDA in SGLang, H100: 545 tokens/s at 9.91 tokens per forward; 18.2 ms" in text
    assert text.count("ahead") == 3 and text.count("BEHIND") == 5 and "tests: tests/a.py::b" in text
    nothing = targets.page(targets.Record(tmp_path / "none.jsonl", []))
    assert len(nothing) > 20 and not any(line.endswith((" met", "ahead")) for line in nothing)


@pytest.mark.parametrize(("gpu", "most"), [("NVIDIA H200", 4.7), ("NVIDIA GeForce RTX 4090", 21.2)])
def test_the_target_of_a_step_is_that_of_the_card(tmp_path, gpu, most):
    assert targets.step_target(_recorded(tmp_path / "a.jsonl", gpu)) == most


def test_first_answers_are_timed_beside_second_ones(toy, monkeypatch):
    taken = iter([0.0, 8.0, 10.0, 11.0, 20.0, 26.0, 30.0, 32.0, 40.0, 41.0, 50.0, 51.0])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(taken))
    fake = SimpleNamespace(generate=lambda prompt, gen_length: SimpleNamespace(nfe=1))
    monkeypatch.setattr(generation, "with_execution", lambda *_: fake)
    found = toy.first_answers("torch", "eager")
    assert found["first_over_again"] == 3.0, "the first prompt of all does not count"


def test_a_host_ring_with_wrong_copies_is_reported(inside):
    zeros = torch.zeros(2, 22).numpy()
    ring = SimpleNamespace(count_launch=lambda: 1, read=lambda number, limit: {"control": zeros})
    with pytest.raises(AssertionError, match="copy 1 is not what was published"):
        smoke._published(ring, torch.ones(2, 22), lambda: None)


def test_samples_keep_to_their_budget():
    runs, befores = [], []
    taken = clock.seconds(lambda: runs.append(1), CPU, before=lambda: befores.append(1), samples=7)
    assert len(taken) == len(befores) == 7 and len(runs) == 8
    assert len(clock.seconds(lambda: time.sleep(0.02), CPU, budget=0.01)) == 3
    assert clock.spread([0.001, 0.002, 0.003], "x") == {
        **{"x_p20": pytest.approx(1.4), "x": pytest.approx(2.0), "x_p80": pytest.approx(2.6), "x_samples": 3}
    }


def test_random_weights_have_the_sizes_of_8b():
    spec, setting, dtype = model.sizes(False)
    assert (spec.n_layers, spec.d_model, spec.vocab_size, dtype) == (32, 4096, 126464, torch.bfloat16)
    assert setting.prompt + setting.response == 2124 and setting.capacity == 128
    with torch.device("meta"):
        count = sum(t.numel() for t in _all(model.random_weights(model.sizes(True)[0], CPU, torch.float32)))
    small = model.sizes(True)[0]
    layer = small.d_model * (2 + 4 * small.d_model + 3 * small.mlp)
    assert count == small.n_layers * layer + (2 * small.vocab_size + 1) * small.d_model
    same = [model.random_weights(small, CPU, torch.float32, seed) for seed in (1, 1, 2)]
    assert torch.equal(same[0].head, same[1].head) and not torch.equal(same[0].head, same[2].head)


def _all(weights) -> list[torch.Tensor]:
    layers = [getattr(layer, name) for layer in weights.layers for name in type(layer).__slots__]
    return [t for t in (*layers, weights.embedding, weights.norm, weights.head) if t is not None]


def test_records_are_json(tmp_path, log):
    log.write("a", "ok", "b", path=tmp_path, number=3)
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line)["path"] == str(tmp_path)
