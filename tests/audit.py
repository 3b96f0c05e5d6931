"""Static findings and known vulnerabilities: ``python tests/audit.py``, or ``make audit``.

bandit reads the code: every finding has been looked at, and says here why it stays; one that is new, or gone, fails.
pip-audit asks a database on the network about every installed package: a known vulnerability fails. Where it cannot be
asked that is said, and nothing fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CODE = ("sfs_triton", "kernels", "bench", "setup.py")

# Rules that say nothing about this code.
SKIPPED = {
    "B101": "assert states what a reader may rely on; input is checked by errors.require",
    "B311": "random makes problems and resamples, no secrets; those come from the module secrets",
    "B404": "importing subprocess is not yet calling it; calls are looked at one by one",
}
OWN = "arguments are a list of this program's own, without a shell"
REVIEWED: dict[str, dict[str, str]] = {
    "bench/all.py": {"B603": OWN},
    "bench/baselines/autoregressive.py": {"B105": "token ids of a model, no passwords"},
    "bench/common/figures.py": {"B603": OWN, "B607": "git, as whoever runs the benchmark has it"},
    "bench/cost/loading.py": {"B603": OWN},
    "bench/embedded/tasks.py": {"B608": "text for a model to be trained on, never sent to a database"},
    "bench/eval/inside.py": {"B102": "HumanEval's programs are run to be scored; SECURITY.md says how"},
    "bench/eval/sandbox.py": {"B603": "starts the sandbox that those programs run in"},
    "bench/gpu/__main__.py": {"B603": OWN},
    "bench/gpu/environment.py": {"B603": OWN},
    "bench/gpu/faults.py": {"B603": OWN},
    "bench/gpu/supervise.py": {"B603": OWN},
    "bench/kernels/resources.py": {"B603": OWN},
    "bench/server/loopback.py": {"B603": OWN, "B607": "git, as whoever runs the benchmark has it"},
    "sfs_triton/models/gguf.py": {"B105": "names of tensors, no passwords"},
    "sfs_triton/self_check/choice.py": {"B603": OWN},
    "sfs_triton/text/chat_template.py": {
        "B603": "this package's own file; what strangers wrote goes through standard input"
    },
}


class Findings(NamedTuple):
    """Findings of bandit that were not reviewed, and reviewed findings that it no longer reports."""

    new: list[str]
    gone: list[str]
    reviewed: int


def bandit(paths: tuple[str, ...] = CODE, root: Path = ROOT) -> Findings:
    """Run bandit over ``paths`` below ``root``.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "bandit", "-q", "-f", "json", "-s", ",".join(SKIPPED), "-r", *paths]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"bandit failed: {done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    if report["errors"]:
        raise RuntimeError(f"bandit could not read {report['errors']}")
    found: Counter[tuple[str, str]] = Counter()
    new = []
    for one in report["results"]:
        name, rule = Path(one["filename"]).as_posix().removeprefix("./"), one["test_id"]
        found[name, rule] += 1
        if rule not in REVIEWED.get(name, {}):
            new.append(f"{name}:{one['line_number']}: {rule} {one['issue_text']}")
    listed = {(name, rule) for name, rules in REVIEWED.items() for rule in rules}
    gone = [f"{name}: {rule}" for name, rule in sorted(listed - set(found))]
    return Findings(new, gone, sum(found.values()) - len(new))


class Known(NamedTuple):
    """Vulnerabilities of installed packages. ``asked`` is of how many the database knew anything."""

    vulnerable: list[str]
    asked: int
    unknown: int
    failure: str | None = None


def pip_audit() -> Known:
    """Ask about every package that is installed beside this Python."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json", "--timeout", "10"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return Known([], 0, 0, "no answer within ten minutes")
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Known([], 0, 0, last)
    return known(packages)


def known(packages: list[dict[str, Any]]) -> Known:
    """Return the vulnerabilities in pip-audit's list of packages."""
    asked = [package for package in packages if "skip_reason" not in package]
    vulnerable = [
        f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'none yet'}"
        for package in asked
        for one in package["vulns"]
    ]
    return Known(vulnerable, len(asked), len(packages) - len(asked))


def main() -> int:
    static, installed = bandit(), pip_audit()
    print(f"bandit: {static.reviewed} findings reviewed, {len(static.new)} new, {len(static.gone)} gone")
    for line in [*static.new, *(f"gone, take it from the list: {line}" for line in static.gone)]:
        print(f"  {line}")
    if installed.failure or not installed.asked:
        reason = installed.failure or "the package index here has no advisories"
        print(f"pip-audit: NOT RUN, nothing is known about the installed packages: {reason}")
    else:
        told = f"{installed.asked} packages known, {installed.unknown} not"
        print(f"pip-audit: {told}, {len(installed.vulnerable)} vulnerabilities")
        for line in installed.vulnerable:
            print(f"  {line}")
    return 1 if static.new or static.gone or installed.vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
