"""The recorded cases of every reference implementation, and that the checker can fail."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conformance
from tests.support.paths import GOLDEN, MODELS, ROOT

SCRIPT = ROOT / "tests" / "conformance.py"
SHARE = 40  # one of so many recorded cases; make test-slow checks all
LOGITS = 3  # recorded inputs of each model whose logits are compared
RECORDED = {
    path.name: [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((GOLDEN / "cases").glob("*.jsonl"))
}


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=1800)


@pytest.fixture
def checked(monkeypatch, capsys):
    """Run the check in this process; return its status, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            status = conformance.main()
        except SystemExit as refusal:
            status = refusal.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("model", MODELS)
def test_a_share_of_the_recorded_cases(golden, checked, model):
    status, out, _ = checked(golden, "--share", str(SHARE), "--model", model)
    cases = sum(len(conformance.share_of(recorded, SHARE)) for name, recorded in RECORDED.items() if model in name)
    assert status == 0 and out.splitlines()[-1] == f"{cases + LOGITS} passed, 0 failed", out[-3000:]


@pytest.mark.parametrize("name", RECORDED)
def test_a_share_has_every_value_of_every_setting(name):
    """Every file is a kind of recording of one model, so the share has both."""
    cases = RECORDED[name]
    share = conformance.share_of(cases, SHARE)
    assert {case["method"] for case in share} == {case["method"] for case in cases}
    for key in {key for case in cases for key in case["settings"]}:
        some, every = ({json.dumps(case["settings"].get(key)) for case in part} for part in (share, cases))
        assert some == every, key
    values = {value for case in cases for value in conformance.values_of(case)}
    assert len(share) <= max(len(cases) / SHARE + 1, len(values) / 2)


@pytest.mark.slow
def test_all_recorded_cases(golden):
    done = _run(golden, "--backend", "torch")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "1288 passed, 0 failed"


@pytest.mark.slow
def test_some_cases_of_every_kind_through_the_kernels(golden):
    done = _run(golden, "--backend", "triton", "--every", "60")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "55 passed, 0 failed"


@pytest.fixture
def small(golden, tmp_path) -> Path:
    """One model with two of its cases, which take the fewest steps."""
    shutil.copytree(golden / "models" / "llada-mha", tmp_path / "models" / "llada-mha")
    (tmp_path / "logits").mkdir()
    (tmp_path / "cases").mkdir()
    lines = [json.dumps(case) for case in sorted(RECORDED["llada-mha.slowfast.jsonl"], key=lambda case: case["nfe"])]
    (tmp_path / "cases" / "llada-mha.slowfast.jsonl").write_text("\n".join(lines[:2]) + "\n")
    return tmp_path


@pytest.mark.slow
def test_a_case_through_the_kernels(small, checked):
    status, out, _ = checked(small, "--backend", "triton", "--limit", "1")
    assert status == 0 and out.splitlines()[-1] == "1 passed, 0 failed", out


def _rewrite_first_case(folder: Path, change) -> None:
    path = folder / "cases" / "llada-mha.slowfast.jsonl"
    first, *rest = path.read_text().splitlines()
    case = json.loads(first)
    change(case)
    path.write_text("\n".join([json.dumps(case), *rest]) + "\n")


def test_output_form(small, checked):
    status, out, _ = checked(small)
    assert status == 0 and out.splitlines() == ["slowfast/llada-reference 2/2", "2 passed, 0 failed"]


def _wrong_token(case):
    case["out"][0][3] += 1


def _wrong_nfe(case):
    case["nfe"] += 1


def _wrong_span(case):
    case["trace"][2][10] = 1


def _wrong_fill(case):
    case["trace"][0][11] = []


def _unknown(case):
    case["method"] = "beam_search"


@pytest.mark.parametrize("change", [_wrong_token, _wrong_nfe, _wrong_span, _wrong_fill, _unknown])
def test_a_wrong_or_unknown_case_fails(small, checked, change):
    _rewrite_first_case(small, change)
    status, out, _ = checked(small)
    assert status == 1 and out.splitlines()[-1] == "1 passed, 1 failed"


def _case(key: str) -> dict:
    """Return the recorded case whose id starts with ``key``."""
    (found,) = (case for cases in RECORDED.values() for case in cases if case["id"].startswith(key))
    return copy.deepcopy(found)


def _checked(engines, case: dict) -> str | None:
    setup = conformance.METHODS[case["method"]](case["settings"])
    return conformance.check(engines[case["id"].split("/")[0]], case, setup)


def _no_idle_forwards(case):
    """Number those that commit something, and only these."""
    (calls,) = case["unmask_call"]
    numbers = {call: index for index, call in enumerate(sorted(set(calls)))}
    case["unmask_call"] = [[numbers[call] for call in calls]]


def _fewer_forwards(case):
    case["calls"] -= 1


def _later_at_the_end(case):
    case["unmask_call"][0][-1] += 1


def _without(setting: str):
    return lambda case: case["settings"].pop(setting)


def _whole_blocks(case):
    case["settings"]["block_length"] = 20  # divides 60


def _a_token_behind_the_end(case):
    """In the block of the end-of-text, where this package computes nothing after it."""
    (tokens,), end = case["out"], case["settings"]["eos_id"]
    tokens[tokens.index(end) + 1] += 1


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("dream-gqa/credit/s20", _no_idle_forwards),
        ("llada-gqa/credit/s12", _no_idle_forwards),
        ("dream-gqa/credit/s20", _fewer_forwards),
        ("dream-gqa/hierarchy/s10", _later_at_the_end),
        ("dream-gqa/hierarchy/s10", _whole_blocks),
        ("dream-gqa/hierarchy/s12", _without("start_block_align")),
        ("dream-gqa/credit/s16", _a_token_behind_the_end),
        ("dream-gqa/credit/s16", _fewer_forwards),
        ("llada-mha/d2confidence/s06", _without("factor")),
        ("dream-gqa/d2confidence/s07", _without("factor")),
        ("dream-gqa/d2confidence/s10", _without("sigma")),
        ("llada-mha/ebsampler/s13", _without("sigma")),
    ],
)
def test_what_only_some_records_have_is_compared(engines, key, change):
    case = _case(key)
    assert _checked(engines, case) is None
    change(case)
    assert _checked(engines, case) is not None


def test_a_failure_is_the_exit_code(small):
    _rewrite_first_case(small, _wrong_token)
    assert _run(small).returncode == 1


def test_refusals(small, tmp_path, checked):
    assert "no folder 'cases'" in checked(tmp_path / "models")[2]
    status, _, said = checked(small, "--backend", "cuda")
    assert status == 2 and "backend='cuda'" in said
    assert "--model 'gpt' is not a model" in checked(small, "--model", "gpt")[2]
    for option in ("--limit", "--every", "--share"):
        status, _, said = checked(small, option, "0")
        assert status == 2 and f"{option} 0 is not positive" in said
