"""The page about reliability: its figures are those of the records, and every test that it names exists."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench.server import reliability, soak  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"


def test_the_page_in_the_repository_is_current(capsys):
    assert reliability.main(["--check"]) == 0, "run python -m bench.server.reliability"
    assert "is current" in capsys.readouterr().out


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert sum(bool(test) for _, test in named) > 25
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test in found, f"{file} has no {test}"


def test_the_record_of_the_soak_passed_its_checks():
    _, record = reliability.newest(reliability.RESULTS, "soak")
    checks = soak.judge(record)
    assert all(checks.values()) and not record["first_failures"]
    assert record["checks"] == checks and record["minutes"] >= 30
    warm_up = 60 * record["warm_up_minutes"]
    fitted, half = soak.slope(record["resident_at_rest_mib"], warm_up)
    assert (round(fitted, 4), round(half, 4)) == (record["slope_mib_per_minute"], record["slope_interval"])


@pytest.fixture
def copy(tmp_path) -> tuple[Path, Path]:
    """A page and records of one's own."""
    folder = tmp_path / "bench" / "results" / "a-machine"
    folder.mkdir(parents=True)
    for name in reliability.PARTS:
        for kind in {"load": ["serve-load"], "ptx": ["ptx-sm80", "ptx-sm90"]}.get(name, [name]):
            path, record = reliability.newest(reliability.RESULTS, kind)
            (folder / path.name).write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return page, folder


def _main(page: Path, folder: Path, *more: str) -> int:
    return reliability.main(["--page", str(page), "--results", str(folder.parent), *more])


def test_figures_that_changed_are_noticed_and_renewed(copy, capsys):
    page, folder = copy
    assert _main(page, folder) == 0 and (page.parent / "soak.png").stat().st_size > 10_000
    assert _main(page, folder, "--check") == 0
    (path,) = folder.glob("*-soak.json")
    record = json.loads(path.read_text())
    record |= {"requests": 987_654, "checks": {**record["checks"], "no sequence is stuck": False}}
    later = folder / "2999-01-01-soak.json"
    later.write_text(json.dumps(record))
    assert _main(page, folder, "--check") == 1 and "is not current" in capsys.readouterr().out
    assert _main(page, folder) == 0
    text = page.read_text()
    assert "987,654" in text and "2999-01-01-soak.json" in text and "failed: no sequence is stuck" in text


def test_what_is_missing_is_named(copy, capsys):
    page, folder = copy
    (path,) = folder.glob("*-determinism.json")
    path.unlink()
    assert _main(page, folder) == 2 and "*-determinism.json" in capsys.readouterr().err
    page.write_text("nothing")
    assert _main(page, folder) == 2 and "<!-- soak: begin -->" in capsys.readouterr().err
