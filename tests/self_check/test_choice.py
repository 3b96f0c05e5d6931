"""The choice of back end and execution: the check's process, the verdict file, the engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import sfs_triton
from sfs_triton import engine as engines
from sfs_triton.distributed import ALONE
from sfs_triton.errors import ArgumentError
from sfs_triton.kernels.errors import KernelError
from sfs_triton.models import Transformer
from sfs_triton.self_check import choice, machine, verdict
from sfs_triton.self_check.choice import Choice, choose, run_check
from sfs_triton.self_check.verdict import Verdict
from tests.support.check_request import REQUEST

CPU = torch.device("cpu")
GOOD = Verdict("triton", True, "it passed", seconds=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(verdict, "_THIS_PROCESS", {})
    return tmp_path / "sfs_triton" / "checks"


class Runs:
    """A check that returns what it is given, and counts its runs."""

    def __init__(self, found: Verdict = GOOD):
        self.found, self.count = found, 0

    def __call__(self, request) -> Verdict:
        self.count += 1
        return self.found


# ----------------------------------------------------------------------------------------------------------- a process


def child(code: str) -> tuple[str, ...]:
    """Return a command that says what it does and then runs ``code``; it starts faster than one with torch."""
    start = (
        "import json, os, signal, sys, time; print(json.dumps({'record': 'start', 'doing': 'attention'}), flush=True)"
    )
    return (sys.executable, "-c", f"{start}; {code}")


def records(*found: dict) -> tuple[str, ...]:
    return child(f"[print(json.dumps(each)) for each in {list(found)!r}]")


TIMES = {"record": "times", "cache": "none", "torch": 1.0, "triton": 0.5, "spread": 0.01}
END = {"record": "end"}


@pytest.mark.parametrize(
    ("command", "said", "lasting"),
    [
        (child("os._exit(3)"), "ended with status 3: no message, during attention", True),
        (child("os.kill(os.getpid(), signal.SIGSEGV)"), "died of SIGSEGV", True),
        (child("sys.stdout.write('{'); sys.stdout.flush(); os._exit(1)"), "ended with status 1", True),
        (child("sys.exit('CUDA error: an illegal memory access')"), "CUDA error: an illegal memory access", True),
        (child("pass"), "ended early, during attention", True),
        (records({"record": "error", "error": "OutOfMemoryError: full", "memory": True}), "OutOfMemoryError", False),
        (records({"record": "error", "error": "CUDA error", "memory": False}), "CUDA error", True),
        (("/nowhere/python",), "could not be started", False),
    ],
)
def test_a_check_that_does_not_end_by_itself_is_a_fault(command, said, lasting):
    found = run_check(REQUEST, command)
    assert (found.backend, found.cuda_graphs, found.fault, found.lasting) == ("torch", False, True, lasting)
    assert said in found.reason


def test_a_check_that_hangs_is_stopped():
    found = run_check(REQUEST, child("time.sleep(600)"), limit=3.0)
    assert found.fault and found.lasting and "no sign of life for 3 s" in found.reason and "attention" in found.reason
    assert found.seconds < 60


def test_a_check_that_takes_long_may_be_made_again(monkeypatch):
    """Compiling takes its time on a loaded machine; the next check finds the compiled kernels."""
    monkeypatch.setattr(choice, "LONGEST", 2.0)
    alive = "[(print('{}', flush=True), time.sleep(0.1)) for _ in range(600)]"
    found = run_check(REQUEST, child(alive.replace("{}", json.dumps({"record": "start", "doing": "linear"}))))
    assert (found.backend, found.fault, found.lasting) == ("torch", True, False) and "more than 2 s" in found.reason


FINDING = {"record": "finding", "operation": "attention", "shape": "q float16[1, 64]", "fault": "error 1e-1"}


@pytest.mark.parametrize(
    ("found", "backend", "said", "lasting"),
    [
        ([TIMES, END], "triton", "0.50 of the time", True),
        ([{**TIMES, "triton": 0.96}, END], "torch", "less than 5% is gained", True),
        ([{**TIMES, "triton": 3.0}, END], "torch", "3.00 of the time", True),
        ([{**TIMES, "spread": 0.2}, END], "triton", "0.50 of the time", False),
        ([TIMES, {**TIMES, "cache": "region", "triton": 1.5}, END], "torch", "1.00 of the time", True),
        ([FINDING], "torch", "attention at q float16[1, 64]: error 1e-1", True),
        (
            [{"record": "step", "cache": "region", "fault": "two replays differ"}],
            "torch",
            "'region': two replays",
            True,
        ),
    ],
)
def test_conclusion_from_records(found, backend, said, lasting):
    result = run_check(REQUEST, records(*found))
    assert (result.backend, result.cuda_graphs) == (backend, backend == "triton")
    assert said in result.reason and result.lasting == lasting
    assert result.findings == [each for each in found if each is not END]


def test_the_process_of_a_real_check():
    """The whole path, once: request, child with torch and kernels, records, conclusion."""
    found = run_check(REQUEST, (sys.executable, "-m", "tests.support.slow_or_fast", "0.5", "0.01"))
    assert (found.backend, found.cuda_graphs, found.fault) == ("triton", True, False), found.reason
    assert [each["record"] for each in found.findings] == ["step", "step", "times", "times"]


# -------------------------------------------------------------------------------------------------------- verdict file


def test_a_verdict_is_made_once(cache):
    runs = Runs()
    first, second = (verdict.obtain(REQUEST, runs) for _ in range(2))
    assert first == second == GOOD and runs.count == 1
    (path,) = cache.glob("*.json")
    stored = json.loads(path.read_text())
    assert stored["key"] == verdict.key_of(REQUEST) and stored["key"]["geometry"]["d_model"] == REQUEST.spec.d_model
    assert not list(cache.glob("*.trying"))
    verdict.obtain(REQUEST, runs, force=True)
    assert runs.count == 2


def test_a_kernel_that_fails_in_use_is_not_chosen_again(cache, embedded, monkeypatch, caplog):
    """From the stored verdict of a card, by way of the generation in which the kernel fails, to the next start."""
    runs = Runs(replace(GOOD, findings=[{"operation": "attention"}]))
    monkeypatch.setattr(choice, "run_check", runs)
    first = make_choice()
    assert (first.backend, first.cuda_graphs) == ("triton", True)
    model = Transformer(embedded.spec, embedded.model.weights)
    model.backend, by_torch = "triton", model.ops

    def attention(*_, **__):
        raise KernelError("kernel attention does not run: OutOfResources\nof shared memory")

    model.ops = replace(by_torch, attention=attention)
    engine = sfs_triton.Engine(model, pinned=False, distrust=first.distrust)
    assert engine.generate([1, 2, 3], gen_length=8).masks_left == 0
    caplog.clear()
    second = make_choice()
    assert (second.backend, second.cuda_graphs, second.distrust, runs.count) == ("torch", False, None, 1)
    assert "failed in use: kernel attention does not run: OutOfResources; SFS_TRITON_CHECK=force" in second.reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (stored,) = (json.loads(path.read_text())["verdict"] for path in cache.glob("*.json"))
    assert stored["fault"] and stored["findings"] == runs.found.findings
    monkeypatch.setenv(choice.VARIABLE, "force")
    assert make_choice().backend == "triton" and runs.count == 2


def test_a_failure_in_use_of_what_no_file_holds(cache):
    """The verdict was for this process only; and then nothing can be stored."""
    assert verdict.obtain(REQUEST, Runs(replace(GOOD, lasting=False))).backend == "triton"
    verdict.distrust(REQUEST, "it broke")
    assert "failed in use: it broke" in verdict.obtain(REQUEST, Runs()).reason
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    verdict.distrust(REQUEST, "it broke again")
    assert "failed in use: it broke again" in verdict.obtain(REQUEST, Runs()).reason


def test_a_change_of_anything_in_the_key_makes_a_new_verdict(monkeypatch):
    runs = Runs()
    verdict.obtain(REQUEST, runs)
    versions = {**machine.versions(), "driver": "another"}
    for change in (
        lambda: replace(REQUEST, dtype="float16"),
        lambda: replace(REQUEST, spec=replace(REQUEST.spec, mlp=64)),
        lambda: replace(REQUEST, spec=replace(REQUEST.spec, max_length=16)),
        lambda: monkeypatch.setattr(machine, "versions", lambda: versions) or REQUEST,
        lambda: monkeypatch.setattr(machine, "card", lambda device: {"name": "another"}) or REQUEST,
        lambda: monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8") or REQUEST,
        lambda: monkeypatch.setenv("CC", "/usr/bin/another-cc") or REQUEST,
    ):
        count, request = runs.count, change()
        verdict.obtain(request, runs)
        assert runs.count == count + 1
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    verdict.obtain(request, runs)
    assert runs.count == count + 1, "where compiled kernels are kept changes nothing"
    verdict.obtain(replace(request, spec=replace(request.spec, max_length=4096)), runs)
    assert runs.count == count + 1, "nor does a limit that no canvas of the check reaches"


SPOILED = {
    "empty": lambda stored: "",
    "cut": lambda stored: stored[:-40],
    "binary": lambda stored: "\0\1\2",
    "other format": lambda stored: stored.replace('"format": 1', '"format": 2'),
    "foreign key": lambda stored: stored.replace('"dtype": "float32"', '"dtype": "float16"'),
    "a list": lambda stored: "[1, 2]",
    "a mix of the pairs": lambda stored: stored.replace('"backend": "triton"', '"backend": "torch"'),
    "no backend": lambda stored: stored.replace('"backend": "triton"', '"backend": "/bin/sh"'),
    "wrong type": lambda stored: stored.replace('"fault": false', '"fault": "no"'),
    "unknown field": lambda stored: stored.replace('"fault": false', '"fault": false, "more": 1'),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_file_is_ignored_and_made_anew(cache, spoil):
    runs = Runs()
    verdict.obtain(REQUEST, runs)
    (path,) = cache.glob("*.json")
    stored = path.read_text()
    path.write_text(spoil(stored))
    assert path.read_text() != stored
    assert verdict.obtain(REQUEST, runs) == GOOD and runs.count == 2
    assert path.read_text() == stored


def test_a_folder_that_cannot_be_written_to(cache, caplog):
    """The verdict is kept for this process, with one line in the log."""
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file")
    runs = Runs()
    with caplog.at_level("INFO", "sfs_triton"):
        assert verdict.obtain(REQUEST, runs) == verdict.obtain(REQUEST, runs) == GOOD
    assert runs.count == 1 and len(caplog.records) == 1 and "cannot be stored" in caplog.text


@pytest.mark.parametrize("full", ["whole_file", "write"])
def test_a_disk_that_is_full(cache, monkeypatch, full):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdict, full, no_space)
    runs = Runs()
    assert verdict.obtain(REQUEST, runs) == verdict.obtain(REQUEST, runs) == GOOD
    assert runs.count == 1 and not list(cache.glob("*.json"))


def test_a_verdict_that_may_change_is_not_stored(cache):
    runs = Runs(replace(GOOD, lasting=False))
    verdict.obtain(REQUEST, runs)
    verdict.obtain(REQUEST, runs)
    assert runs.count == 1 and not list(cache.glob("*.json"))


def test_one_process_checks_at_a_time(cache, monkeypatch):
    """Another gets the verdict when it is there, or goes on with torch this time."""
    monkeypatch.setattr(verdict, "LOCK_WAIT", 0.2)
    verdict.obtain(REQUEST, Runs())
    (path,) = cache.glob("*.json")
    lock, runs = FileLock(path.with_suffix(".lock")), Runs()
    stored = path.read_text()
    path.unlink()
    with lock:
        found = verdict.obtain(REQUEST, runs)
    assert (found.backend, found.fault, runs.count) == ("torch", False, 0) and "another process" in found.reason

    monkeypatch.setattr(verdict, "LOCK_WAIT", 30.0)
    lock.acquire()
    results: list[Verdict] = []
    waiting = threading.Thread(target=lambda: results.append(verdict.obtain(REQUEST, runs)))
    waiting.start()
    path.write_text(stored)
    lock.release()
    waiting.join(30)
    assert results == [GOOD] and runs.count == 0


def test_a_check_that_took_the_machine_down_is_not_tried_again(cache):
    runs = Runs()
    verdict.obtain(REQUEST, runs)
    (path,) = cache.glob("*.json")
    path.unlink()
    mark = path.with_suffix(".trying")
    mark.write_text("process 1, 2026-01-01\n")
    found = verdict.obtain(REQUEST, runs)
    assert found.fault and found.backend == "torch" and "process 1" in found.reason and runs.count == 1
    assert mark.exists() and not path.exists()
    assert verdict.obtain(replace(REQUEST, dtype="float16"), runs) == GOOD, "another key has another mark"
    assert verdict.obtain(REQUEST, runs, force=True) == GOOD and path.exists() and not mark.exists()


def test_a_check_that_is_interrupted_leaves_no_mark(cache):
    def interrupted(request):
        assert len(list(cache.glob("*.trying"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verdict.obtain(REQUEST, interrupted)
    assert not list(cache.glob("*.trying"))


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def obtained(monkeypatch):
    """Stand in for the check; return the requests and modes it is asked for."""
    asked: list[tuple] = []

    def obtain(request, run, force):
        asked.append((request, force))
        return obtain.found

    obtain.found = GOOD
    obtain.asked = asked
    monkeypatch.setattr(verdict, "obtain", obtain)
    return obtain


def make_choice(group=ALONE) -> Choice:
    return choose(REQUEST.spec, CPU, torch.float32, None, group)


def test_the_verdict_is_the_choice(obtained, caplog):
    with caplog.at_level("INFO", "sfs_triton"):
        assert make_choice()[:3] == ("triton", True, "it passed")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    ((request, force),) = obtained.asked
    assert (request.spec, request.device, request.dtype, force) == (REQUEST.spec, "cpu", "float32", False)


def test_a_fault_is_one_warning_with_what_is_used_now(obtained, caplog):
    obtained.found = Verdict.torch("the check found a fault: attention at q[1, 64]: error 1e-1", fault=True)
    with caplog.at_level("INFO", "sfs_triton"):
        assert make_choice()[:2] == ("torch", False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for word in ("backend='torch'", "cuda_graphs=False", "attention", "q[1, 64]", "1e-1"):
        assert word in record.getMessage()


@pytest.mark.parametrize(("mode", "asked"), [("0", []), ("1", [False]), ("force", [True])])
def test_modes(obtained, monkeypatch, mode, asked):
    monkeypatch.setenv(choice.VARIABLE, mode)
    found = make_choice()
    assert [force for _, force in obtained.asked] == asked
    assert found.backend == ("torch" if mode == "0" else "triton")


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "yes")
    with pytest.raises(ArgumentError, match="SFS_TRITON_CHECK='yes'"):
        make_choice()


def test_without_triton_there_is_no_check(obtained, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert make_choice()[:2] == ("torch", False) and not obtained.asked


def test_interpreted_kernels_are_no_default_on_a_gpu(obtained, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = choose(REQUEST.spec, torch.device("cuda"), torch.float32, None, ALONE)
    assert found.backend == "torch" and "TRITON_INTERPRET" in found.reason and not obtained.asked


def test_ranks_agree_without_a_check(obtained):
    class Two(type(ALONE)):
        size = 2

    assert make_choice(Two())[:2] == ("torch", False) and not obtained.asked


# ---------------------------------------------------------------------------------------------------------- the engine


def test_a_cpu_needs_no_choice(monkeypatch):
    monkeypatch.setattr(engines, "choose", None)
    described = sfs_triton.load("embedded", "cpu").describe()
    assert described == {
        **{"device": "cpu", "dtype": "float32", "quantization": None, "backend": "torch", "execution": "eager"},
        **{"reason": engines.ASKED, "fallback": None, "fault": None},
    }


class Loaded(Exception):
    """Weights would be read now."""


@pytest.mark.parametrize(
    ("asked", "made"),
    [({}, True), ({"backend": "torch"}, False), ({"cuda_graphs": False}, False), ({"cuda_graphs": True}, False)],
)
def test_load_chooses_before_it_reads_weights(monkeypatch, asked, made):
    chosen: list[tuple] = []

    def choose(*arguments):
        chosen.append(arguments)
        return Choice("triton", True, "because")

    def read(*_, **__):
        raise Loaded

    monkeypatch.setattr(engines, "usable_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(engines, "check_kernels", lambda device: None)
    monkeypatch.setattr(engines, "choose", choose)
    monkeypatch.setattr(engines, "load_weights", read)
    with pytest.raises(Loaded):
        sfs_triton.load("embedded", "cuda", "bfloat16", **asked)
    assert bool(chosen) == made
    if made:
        ((spec, device, dtype, quantization, group),) = chosen
        assert (device.type, dtype, quantization, group.size) == ("cuda", torch.bfloat16, None, 1)


def test_the_choice_reaches_the_engine(monkeypatch):
    monkeypatch.setattr(engines, "usable_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(engines, "choose", lambda *_: Choice("triton", True, "because"))
    monkeypatch.setattr(engines, "load_weights", lambda *_, **__: "weights")
    monkeypatch.setattr(engines, "Transformer", lambda spec, weights, backend, group: (weights, backend))
    monkeypatch.setattr(engines, "Engine", lambda model, text, cuda_graphs, **rest: (model, cuda_graphs, rest))
    group = type(ALONE)()
    found = engines._load("embedded", None, "bfloat16", None, None, None, group)
    assert found == (("weights", "triton"), True, {"pinned": False, "reason": "because", "distrust": None})


def test_facts_of_the_machine():
    versions = machine.versions()
    assert versions["torch"] == torch.__version__ and len(versions["kernels"]) == 64
    assert machine.cpu()["threads"] == torch.get_num_threads() and machine.cpu_name()
    assert all(not name.endswith(("_DIR", "_PATH")) for name in machine.environment())
    assert os.environ.get("TRITON_INTERPRET") == machine.environment().get("TRITON_INTERPRET")
