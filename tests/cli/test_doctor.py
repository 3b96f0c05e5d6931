"""``sfs doctor``, with the check's findings given."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner  # noqa: E402

from sfs_triton.cli import doctor  # noqa: E402
from sfs_triton.cli import main as cli  # noqa: E402
from sfs_triton.self_check import verdict  # noqa: E402
from sfs_triton.self_check.verdict import Verdict  # noqa: E402
from tests.support.paths import GOLDEN  # noqa: E402

FINE = {
    **{"record": "finding", "operation": "attention", "shape": "q float16[1, 64, 4, 32]", "fault": None},
    **{"error": 1e-4, "allowed": 1e-3, "microseconds": 21.5, "torch_microseconds": 35.0},
}
WRONG = {**FINE, "operation": "silu_mul", "fault": "error 3.1e-01, allowed 1.0e-03", "error": 0.0, "allowed": 0.0}
STEP = {"record": "step", "cache": "region", "fault": None}
TIMES = {"record": "times", "cache": "region", "torch": 0.018, "triton": 0.005, "spread": 0.02}
GOOD = Verdict("triton", True, "Triton passed the check", seconds=31.0, findings=[FINE, STEP, TIMES])


def sfs(*arguments: str):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


@pytest.fixture
def found(monkeypatch):
    """Let the check find something, as on a card; return the list of its requests."""
    asked: list = []

    def let(result: Verdict) -> list:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(verdict, "obtain", lambda request, run, force: asked.append((request, force)) or result)
        return asked

    return let


def test_a_card_without_faults(found):
    asked = found(GOOD)
    result = sfs()
    assert result.exit_code == 0, result.output
    for words in ("attention              1   1.0e-04   1.0e-03         21.5         35.0  ok", "5.00 ms by Triton"):
        assert words in result.stdout
    assert "default   backend='triton', cuda_graphs=True" in result.stdout and "to pin" not in result.stdout
    ((request, force),) = asked
    assert force and request.thorough and request.spec.d_model == 256, "the embedded model, checked anew"


def test_a_fault_is_shown_with_what_to_do(found):
    reason = "the check found a fault: silu_mul at q float16[1, 64, 4, 32]: error 3.1e-01, allowed 1.0e-03"
    bad = Verdict.torch(reason, fault=True, findings=[FINE, WRONG, {**STEP, "fault": "two replays differ"}])
    found(bad)
    result = sfs()
    assert result.exit_code == 1
    assert "FAULT at q float16[1, 64, 4, 32]: error 3.1e-01" in result.stdout and reason in result.stdout
    assert "FAULT: two replays differ" in result.stdout
    assert 'to pin    sfs_triton.load(..., backend="torch", cuda_graphs=False)' in result.stdout


def test_json(found):
    found(replace(GOOD, fault=True))
    result = sfs("--json", "--card", "rtx4090")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["check"]["operations"][0]["operation"] == "attention" and report["check"]["fault"]
    assert report["model"]["name"] == "llada-8b" and report["predictions"]["card"] == "rtx4090"
    assert report["cpu"]["threads"] >= 1 and report["versions"]["torch"]


def test_without_a_gpu_nothing_is_checked(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    result = sfs(str(GOLDEN / "models" / "dream-gqa"), "--card", "h200")
    assert result.exit_code == 0, result.output
    assert "no GPU: plain torch runs" in result.stdout and "Predicted for h200, nothing measured" in result.stdout
    assert "model     " + str(GOLDEN) in result.stdout


def test_a_folder_needs_only_its_configuration(found, tmp_path):
    asked = found(GOOD)
    (tmp_path / "config.json").write_text((GOLDEN / "models" / "llada-gqa" / "config.json").read_text())
    assert sfs(str(tmp_path)).exit_code == 0
    assert asked[0][0].spec.family == "llada"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--card", "voodoo"], "--card='voodoo'"),
        (["--dtype", "int3"], "--dtype='int3'"),
        (["--quantization", "fp1"], "--quantization='fp1'"),
        (["--device", "foo"], "device='foo' cannot be used"),
        (["--device", ""], "device='' cannot be used"),
        (["/nowhere"], "'/nowhere' is neither a folder nor one of"),
    ],
)
def test_refusals(arguments, word):
    result = sfs(*arguments)
    assert result.exit_code == 2 and word in result.stderr, result.output
