"""Every static finding has been looked at, and the audit can fail."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

pytest.importorskip("bandit", reason="needs bandit: pip install -e '.[test-all]'")

from tests import audit  # noqa: E402


@pytest.mark.slow  # `make audit` does the same
def test_every_finding_is_reviewed():
    found = audit.bandit()
    assert not found.new, "fix it, or say in tests/audit.py why it may stay"
    assert not found.gone, "remove it from the list in tests/audit.py"
    assert found.reviewed > 0


UNSAFE = ("import pickle", "eval(x)", "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(x)")


def test_a_new_finding_is_seen(tmp_path):
    (tmp_path / "bad.py").write_text("\n".join(["import os, subprocess, torch", *UNSAFE]))
    found = audit.bandit(("bad.py",), tmp_path)
    assert {line.split(":")[1] for line in found.new} == {str(2 + at) for at in range(len(UNSAFE))} and found.gone


def test_code_that_cannot_be_read_is_no_success(tmp_path):
    (tmp_path / "bad.py").write_text("def (\n")
    with pytest.raises(RuntimeError, match=r"could not read.*bad\.py"):
        audit.bandit(("bad.py",), tmp_path)


PACKAGES = [
    {"name": "a", "version": "1", "vulns": []},
    {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]},
    {"name": "c", "skip_reason": "not on the index"},
]


def test_a_vulnerable_package_is_named():
    assert audit.known(PACKAGES) == audit.Known(["b 2: CVE-1, mended in 3"], 2, 1)


@pytest.mark.parametrize(
    ("stdout", "code", "said"),
    [
        (json.dumps({"dependencies": PACKAGES}), 1, "2 packages known, 1 not, 1 vulnerabilities"),
        (json.dumps({"dependencies": PACKAGES[:1]}), 0, "1 packages known, 0 not, 0 vulnerabilities"),
        (json.dumps({"dependencies": PACKAGES[2:]}), 0, "NOT RUN, nothing is known"),
        ("", 0, "NOT RUN, nothing is known about the installed packages: no network"),
    ],
)
def test_what_is_said_of_packages(monkeypatch, capsys, stdout, code, said):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout, "error:\nno network\n")

    monkeypatch.setattr(audit, "bandit", lambda: audit.Findings([], [], 3))
    monkeypatch.setattr(audit.subprocess, "run", run)
    assert audit.main() == code
    assert said in capsys.readouterr().out


def test_the_table_of_versions_has_the_bounds_of_setup():
    """SECURITY.md says what each lower bound was tested with."""
    required = (audit.ROOT / "setup.py").read_text().split("install_requires=[")[1].split("]")[0]
    bounds = dict(re.findall(r"[\"']([\w.-]+)>=([\d.]+)", required))
    table = (audit.ROOT / "SECURITY.md").read_text().split("## Versions")[1]
    assert dict(re.findall(r"^\| ([\w.-]+) \| ([\d.]+) \|", table, re.MULTILINE)) == bounds != {}
