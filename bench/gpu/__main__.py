"""Run every GPU benchmark within a time budget, in one command (for short GPU loans).

    python -m bench.gpu                              nine minutes; the record goes under bench/results/, or to $OUT
    python -m bench.gpu --minutes 5 --only environment,warm-up,smoke,engine
    python -m bench.gpu --dry-run                    the steps, with the time limit of each

Every step is a process of its own with a limit, in a group of its own: one that fails, hangs or takes its context with
it is a line in the record, and the next goes on. Lines are written at once (:mod:`bench.gpu.record`), so that an
interrupted run loses nothing. The exit status is 1 if a step failed. Without a GPU steps that need one are skipped,
with a line that says so; ``--toy`` then shows that steps run, at sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.gpu import record, supervise
from bench.gpu.steps import ENVIRONMENT, STEPS, Step, allotted, interpreted, missing
from bench.gpu.targets import RESULTS, Record, page

NO_TESTS = 5  # pytest's exit status where none is left
RESTARTS = 6
LEAST = 4.0  # seconds with which a step is started again


class Interrupted(Exception):
    """Somebody wants the run to end."""


class Run:
    """One run of the suite: its record, its clock, its steps."""

    def __init__(self, log: record.Log, seconds: float, toy: bool):
        self.log, self.toy = log, toy
        self._end = time.monotonic() + seconds
        self._output = log.path.with_suffix(".log")

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def take(self, steps: Sequence[Step]) -> None:
        """All steps, one after another."""
        cuda = True
        for index, step in enumerate(steps):
            seconds = allotted(step, steps[index + 1 :], self.left)
            reason = self._not_now(step, cuda, seconds)
            if reason:
                self.log.write(step.name, "late" if seconds == 0 else "skipped", reason=reason)
                print(f"{step.name}: {reason}", flush=True)
                continue
            print(f"{step.name}: {step.does}, at most {seconds:.0f} s of the {self.left:.0f} s left", flush=True)
            self.step(step, seconds)
            if step.name == ENVIRONMENT:
                machine = [line for line in self.log.lines(ENVIRONMENT) if line["part"] == "machine"]
                cuda = any(line.get("cuda") for line in machine)

    def _not_now(self, step: Step, cuda: bool, seconds: float) -> str | None:
        if step.name == "install" and not self.toy and not gpu_name():
            return "nvidia-smi shows no GPU"
        if not cuda and not self.toy:
            return "no CUDA device"
        if self.toy and not step.toy:
            return "there is nothing of it that a CPU can show"
        if absent := missing(step):
            return f"{', '.join(absent)} not installed"
        return "no time is left" if seconds == 0 else None

    def step(self, step: Step, seconds: float) -> None:
        """Start a step, restart it for its remaining parts if it died, and write its ending."""
        began, deadline, notes = time.monotonic(), time.monotonic() + seconds, []
        status, returncode, output = "ok", None, ""
        for command in step.commands:
            ended = self._command(step, command, deadline, notes)
            status = _worse(status, self._verdict(step, ended))
            returncode = ended.returncode if ended.returncode else returncode
            output = output if status == "ok" else record.tail(ended.output)
        lines = record.ended(self.log.lines(step.name))
        if any(how in record.BAD for how in lines.values()):
            status = _worse(status, "failed")
        self.log.write(
            step.name,
            status,
            seconds=round(time.monotonic() - began, 1),
            limit=round(seconds, 1),
            parts=dict(Counter(lines.values())),
            returncode=returncode,
            notes=notes,
            **({} if status == "ok" else {"output": output}),
        )
        print(f"{step.name}: {status}, {time.monotonic() - began:.1f} s, {_counted(lines)}", flush=True)

    def _command(self, step: Step, command: Sequence[str], deadline: float, notes: list[str]) -> supervise.Ended:
        """Run a command until it has nothing left to do, or its time is over."""
        for attempt in range(1 + RESTARTS):
            limit = max(0.1, deadline - time.monotonic())
            ended = supervise.run(
                interpreted(command, self.log.path),
                limit=limit,
                stall=step.stall,
                output=self._output,
                environment=self._environment(step, time.time() + limit),
                folder=ROOT,
                life=lambda: self.log.path.stat().st_size,
            )
            victims = record.under_way(self.log.lines(step.name))
            if ended.how == "exit" and ended.returncode is not None and 0 <= ended.returncode < record.AGAIN:
                break
            for part in victims:
                how = {"exit": "crashed", "stall": "hung", "limit": "late"}[ended.how]
                self.log.write(step.name, how, part, returncode=ended.returncode, error=record.tail(ended.output))
            notes.append(_end(ended))
            if ended.how == "limit" or not step.resumes or not (victims or ended.returncode == record.AGAIN):
                break
            if deadline - time.monotonic() < LEAST or ended.returncode is None:
                break
            print(f"{step.name}: {notes[-1]}; starting attempt {attempt + 2}", flush=True)
        return ended

    def _verdict(self, step: Step, ended: supervise.Ended) -> str:
        if ended.how == "limit":
            return "hung" if not step.resumes or not record.ended(self.log.lines(step.name)) else "late"
        if ended.how == "stall" or ended.returncode is None:
            return "hung"
        if ended.returncode in (0, record.AGAIN, NO_TESTS):
            return "ok"
        return "crashed" if ended.returncode < 0 else "failed"

    def _environment(self, step: Step, deadline: float) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {
            record.RECORD: str(self.log.path),
            record.RUN: self.log.run,
            record.STEP: step.name,
            record.DEADLINE: f"{deadline:.2f}",
            record.TOY: str(int(self.toy)),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        if self.toy:
            environment["TRITON_INTERPRET"] = "1"
        return environment


def _worse(one: str, other: str) -> str:
    order = ("ok", "late", "failed", "crashed", "hung")
    return max(one, other, key=order.index)


def _end(ended: supervise.Ended) -> str:
    if ended.how == "exit":
        return f"ended with status {ended.returncode} after {ended.seconds:.1f} s"
    why = "its time was over" if ended.how == "limit" else "there was no sign of life"
    return f"was ended after {ended.seconds:.1f} s: {why}{'' if ended.returncode is not None else ', and did not die'}"


def _counted(lines: dict[str, str]) -> str:
    return ", ".join(f"{number} {how}" for how, number in Counter(lines.values()).items()) or "no parts"


# ------------------------------------------------------------------------------------------------------- command line


def gpu_name() -> str | None:
    """Return the driver's name for the first GPU; None if there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def checked_out() -> str:
    """The checkout's commit, with a mark if it was changed since."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown" if done.returncode == 0 else "unknown"


def default_path(gpu: str | None, commit: str) -> Path:
    """``<date>-<commit>.jsonl`` in the folder ``$OUT`` if that is set, in ``bench/results/<gpu>``, or without a GPU in
    a folder outside the records."""
    name = f"{time.strftime('%Y-%m-%d')}-{commit}.jsonl"
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]) / name
    if gpu is None:
        return Path(tempfile.mkdtemp(prefix="gpu-suite-")) / name
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / name


def table(log: record.Log, steps: Sequence[Step]) -> str:
    """The run in a few lines."""
    lines = [f"{'step':12} {'how':8} {'seconds':>8}  parts"]
    for step in steps:
        for line in log.lines(step.name):
            if line["part"] is None and line["status"] != "begun":
                what = line.get("reason") or ", ".join(f"{n} {how}" for how, n in line.get("parts", {}).items())
                lines.append(f"{step.name:12} {line['status']:8} {line.get('seconds', 0):8.1f}  {what}")
    return "\n".join([*lines, *_page(log)])


def _page(log: record.Log) -> list[str]:
    """Return the page of targets and records with their verdicts. A toy run measures nothing."""
    measured = Record(log.path, log.lines())
    if measured.header.get("toy"):
        return []
    try:
        return ["", *page(measured)]
    except Exception as error:  # a table must not cost the run
        return ["", f"(no page of targets: {type(error).__name__}: {error})"]


def parse(argv: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument("--only", help=f"comma-separated; of {', '.join(step.name for step in steps)}")
    where = "default: <date>-<commit> in $OUT or bench/results/<gpu>"
    parser.add_argument("--out", type=Path, metavar="PATH.jsonl", help=where)
    parser.add_argument("--commit", help="what to call the checkout where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="show the steps, start none")
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy sizes: shows that steps run")
    arguments = parser.parse_args(argv)
    names = [step.name for step in steps]
    arguments.only = arguments.only.split(",") if arguments.only else names
    unknown = [name for name in arguments.only if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: steps are {', '.join(names)}")
    if not 0 < arguments.minutes < 1440:
        parser.error(f"--minutes {arguments.minutes:g} is no time for a run")
    if arguments.out and arguments.out.suffix != ".jsonl":
        parser.error(f"--out {arguments.out} does not end in .jsonl")
    return arguments


def show(steps: Sequence[Step], seconds: float) -> None:
    print(f"{'step':12} {'least':>6} {'most':>6}  at most now  what")
    for index, step in enumerate(steps):
        now = allotted(step, steps[index + 1 :], seconds)
        absent = f"  (skipped: {', '.join(missing(step))} not installed)" if missing(step) else ""
        print(f"{step.name:12} {step.least:6.0f} {step.most:6.0f} {now:12.0f}  {step.does}{absent}")
        seconds -= step.least
    print(f"at the least {sum(step.least for step in steps):.0f} s in all")


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    arguments = parse(argv, steps)
    # what runs is known only from the environment, so that step always goes along
    chosen = [step for step in steps if step.name in arguments.only or step.name == ENVIRONMENT]
    if arguments.dry_run:
        show(chosen, 60 * arguments.minutes)
        return 0
    gpu = gpu_name()
    commit = arguments.commit or checked_out()
    path = (arguments.out or default_path(gpu, commit)).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = record.Log(path, uuid.uuid4().hex[:12])
        log.write(
            "suite",
            "begun",
            **{"format": record.FORMAT, "gpu": gpu, "commit": commit, "minutes": arguments.minutes},
            **{"date": time.strftime("%Y-%m-%d %H:%M"), "toy": arguments.toy, "steps": [step.name for step in chosen]},
        )
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    run, status = Run(log, 60 * arguments.minutes, arguments.toy), "ok"
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run.take(chosen)
    except Interrupted as reason:
        status = "failed"
        print(f"interrupted by {reason}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = [line["status"] for line in log.lines() if line["part"] is None and line["step"] != "suite"]
    if any(how in record.BAD for how in ended):
        status = "failed"
    log.write("suite", status, seconds=round(60 * arguments.minutes - run.left, 1))
    print(f"\n{table(log, chosen)}\n\nwrote {path}", flush=True)
    return int(status != "ok")


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
