"""Accuracy under parallelism: the area, its intervals, a small sweep, and helpers that both measurements share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.common import pages
from bench.embedded.carried import carried
from bench.embedded.tasks import Problem
from bench.quality import aup, measured, policies, sweep, sweep_summary
from sfs_triton import FixedSteps, NoCache, RegionCache, SlowFast, Threshold
from tests.support.paths import ROOT


def weight(accuracy: float, best: float) -> float:
    return math.exp(-3 * (1 - accuracy / best))


def test_one_point_is_a_rectangle():
    assert aup.aup([(10.0, 80.0)], 80.0) == 800.0
    assert aup.aup([(10.0, 80.0)], 95.0) == 800.0  # left of the first point nothing is weighed


def test_trapezoids_are_of_weighed_accuracies():
    wanted = 1 * 90 + (3 - 1) * (90 + 88 * weight(88, 90)) / 2 + (4 - 3) * (88 * weight(88, 90) + 90) / 2
    assert aup.aup([(1, 90), (3, 88), (4, 90)], 90) == pytest.approx(wanted, rel=1e-12)


def test_another_method_may_be_the_best():
    wanted = 2 * 60 + (4 - 2) * (60 * weight(60, 80) + 58 * weight(58, 80)) / 2
    assert aup.aup([(2, 60), (4, 58)], 80) == pytest.approx(wanted, rel=1e-12)
    assert aup.aup([(2, 60), (4, 60)], 50) == 2 * 60 + 2 * 60  # no weight is above 1


def test_points_more_than_five_percent_down_do_not_count():
    kept = [(1, 90), (3, 88)]
    assert aup.cut(kept) == 85
    assert aup.aup([*kept, (5, 84.9)], 90) == aup.aup(kept, 90)
    assert aup.aup([*kept, (5, 85)], 90) > aup.aup(kept, 90)
    through = 1 * 90 + (6 - 1) * (90 + 88 * weight(88, 90)) / 2
    assert aup.aup([(1, 90), (3, 70), (6, 88)], 90) == pytest.approx(through, rel=1e-12)


def test_the_slowest_point_sets_the_cut_however_bad():
    assert aup.cut([(5, 95), (1, 40)]) == 35
    assert aup.aup([(5, 95), (1, 40)], 95) == pytest.approx(40 + 4 * (40 * weight(40, 95) + 95) / 2, rel=1e-12)


def test_order_and_ties():
    points = [(1, 90), (3, 88), (4, 86)]
    assert aup.aup(points[::-1], 90) == aup.aup(points, 90)
    assert aup.aup([*points, (3, 87), (1, 70)], 90) == aup.aup(points, 90)  # of equal ones the most accurate stays
    assert aup.curve([(2, 5), (1, 7), (2, 6)]) == [(1, 7), (2, 6)]


def test_nothing_right_is_no_area():
    assert aup.aup([(1, 0), (2, 0)], 0) == 0


def test_resamples_are_the_same_every_time():
    drawn = aup.resamples(20, 50)
    assert drawn.shape == (50, 20) and (drawn.sum(1) == 20).all()
    assert (drawn == aup.resamples(20, 50)).all() and (drawn != aup.resamples(20, 50, seed=1)).any()
    assert drawn[0].tolist() == [1, 2, 1, 1, 2, 0, 0, 1, 0, 1, 1, 2, 2, 1, 0, 1, 0, 0, 2, 2]


def test_interval_is_the_middle_95_percent():
    assert aup.interval(range(1001)) == (25.0, 975.0) and aup.interval([3.0] * 9) == (3.0, 3.0)


def record_of(*lines: tuple[str, str, str, list[int], list[int]]) -> dict:
    """A record of (group, label, right, tokens, nfe)."""
    names = ("group", "label", "right", "tokens", "nfe")
    rest = {"task": "records", "full_forwards": 1.0, "positions_forwarded": 2.0}
    return {
        "lines": [
            {**rest, **dict(zip(names, line, strict=True)), **measured.count([c == "1" for c in line[2]])}
            for line in lines
        ]
    }


def test_summary_of_a_record():
    record = record_of(
        (*sweep_summary.DEFAULT, "1110", [4, 4, 4, 4], [2, 2, 2, 2]),
        ("SlowFast paper", "tau_high 0.99", "1111", [4, 4, 4, 4], [4, 4, 4, 4]),
        ("Threshold", "tau 0", "0000", [3, 4, 4, 5], [1, 1, 1, 1]),
        (sweep_summary.ALONE, "k_max 1", "1110", [4, 4, 4, 4], [1, 1, 1, 1]),
    )
    [summary] = sweep_summary.summaries(record, times=200)
    paper, threshold, alone = summary.methods
    assert (summary.task, summary.n) == ("records", 4)
    assert [(p.pace, p.accuracy, p.lost) for p in paper.points] == [(2.0, 75.0, 0.0), (1.0, 100.0, -25.0)]
    assert paper.area == 100 and paper.cut == 95  # the point of 75% does not count
    assert threshold.points[0].pace_interval[0] < 4 < threshold.points[0].pace_interval[1]
    assert threshold.points[0].accuracy_interval[1] > 40 and threshold.points[0].lost == 75
    assert paper.fastest.label == "tau_high 0.85" and threshold.fastest is None
    assert alone.area is None and alone.fastest.label == "k_max 1" and summary.swept == []
    again = sweep_summary.summaries(record, times=200)
    assert sweep_summary.tables(again) == sweep_summary.tables([summary])


def test_settings_are_resampled_together():
    """Two settings that are right on the same problems differ by nothing, in every resample."""
    same = ("1100", [4, 4, 4, 4], [2, 2, 2, 2])
    record = record_of((*sweep_summary.DEFAULT, *same), ("SlowFast fast", "tau 0.85", *same))
    [summary] = sweep_summary.summaries(record, times=50)
    assert summary.methods[1].points[0].lost_interval == (0.0, 0.0)
    assert summary.methods[0].area_interval == summary.methods[1].area_interval


def test_a_record_without_the_default():
    with pytest.raises(SystemExit, match="no line 'SlowFast paper, tau_high 0.85' for task 'records'"):
        sweep_summary.summaries(record_of(("Threshold", "tau 0.9", "1", [1], [1])))


STORY = "Ann starts with 20 pens. That leaves 20-5={} pens. The boxes hold 3*4={} pens, so Ann has {}+{}={}.\n#### {}"
WORDS = Problem("words", "?", STORY.format(15, 12, 15, 12, 27, 27), "?")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (WORDS.answer, True),
        (STORY.format(9, 8, 9, 8, 1, 1), True),  # no sum is right, and every number is carried
        (STORY.format(9, 8, 15, 8, 1, 1), False),
        (STORY.format(9, 8, 9, 12, 1, 1), False),
        (STORY.format(9, 8, 9, 8, 1, 27), False),
        (WORDS.answer.replace("20-5", "20-6"), False),
        (WORDS.answer.replace("20-5", "20+5"), False),
        (WORDS.answer.replace("Ann", "Bob"), True),
        (WORDS.answer.replace("\n", " 1+1=27 \n"), False),
        ("", False),
    ],
)
def test_carried(answer, right):
    assert carried(WORDS, answer) == right


@pytest.fixture
def few(monkeypatch):
    """Three settings, and the calls that decode them."""
    chosen = [
        measured.Variant(*sweep_summary.DEFAULT, SlowFast(), NoCache()),
        measured.Variant("Threshold, blocks of 32", "tau 0.9", Threshold(), RegionCache()),
        measured.Variant("FixedSteps, one block", "steps 1", FixedSteps(steps=1), NoCache()),
    ]
    decode, calls = measured.decode, []
    monkeypatch.setattr(sweep, "variants", lambda most_steps: chosen)
    monkeypatch.setattr(measured, "decode", lambda *what: calls.append(what[1].label) or decode(*what))
    return calls


def measure(path: Path, *more: str) -> dict:
    assert sweep.main(["--limit", "2", "--device", "cpu", "--json", str(path), *more]) == 0
    return json.loads(path.read_text())


def test_a_run_that_was_interrupted_goes_on(few, tmp_path, monkeypatch):
    whole = measure(tmp_path / "whole.json")
    assert [(line["task"], line["label"]) for line in whole["lines"]] == [
        (task, label) for task in ("records", "carried") for label in ("tau_high 0.85", "tau 0.9", "steps 1")
    ]
    for line in whole["lines"]:
        assert (line["n"], len(line["right"]), len(line["tokens"]), len(line["nfe"])) == (2, 2, 2, 2)
        assert line["correct"] == line["right"].count("1")
    assert whole["lines"][2]["nfe"] == [1, 1] and whole["machine"]["cpu"] and whole["dtype"] == "bfloat16"

    counted, count = [], measured.count

    def stop(right):
        counted.append(right)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return count(right)

    monkeypatch.setattr(measured, "count", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "parts.json")
    assert json.loads((tmp_path / "parts.json").read_text())["lines"] == whole["lines"][:3]
    few.clear()
    assert measure(tmp_path / "parts.json")["lines"] == whole["lines"]
    assert few == ["tau_high 0.85", "tau 0.9", "steps 1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.json", "whole.json"]

    text = (tmp_path / "whole.json").read_text()
    assert len(text.splitlines()) < 40 and sum('"right"' in line for line in text.splitlines()) == 6
    with pytest.raises(SystemExit, match=r"--limit 3, but .* has lines of \[2\]"):
        measure(tmp_path / "whole.json", "--limit", "3")
    with pytest.raises(SystemExit, match="--dtype float32, but .* is of 'bfloat16'"):
        measure(tmp_path / "whole.json", "--dtype", "float32")


def test_a_page_keeps_what_is_outside_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep: begin -->\nold\n<!-- sweep: end -->\nafter\n")
    points = [("1110", [4] * 4, [nfe] * 4) for nfe in (4, 2, 1)]
    record = record_of(
        (*sweep_summary.DEFAULT, *points[0]),
        *(("SlowFast paper", f"tau_high {at}", *point) for at, point in enumerate(points)),
    )
    path = tmp_path / "run.json"
    measured.keep(record, record["lines"].pop(), path)
    assert json.loads(path.read_text()) == record
    assert sweep.main(["--json", str(path), "--write-doc", str(page)]) == 0
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(first) == ["page-accuracy.png", "page-aup.png", "page.md", "run.json"]
    assert all(first[f"page-{name}.png"].startswith(b"\x89PNG\r\n\x1a\n") for name in ("accuracy", "aup"))
    text = page.read_text()
    assert text.startswith("before\n<!-- sweep: begin -->\n**records**, 4 held-out problems")
    assert text.endswith("<!-- sweep: end -->\nafter\n") and "old" not in text
    assert sweep.main(["--json", str(path), "--write-doc", str(page)]) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], "--limit 0 is not positive"),
        (["--threads", "-1"], "--threads -1 is not positive"),
        (["--most-steps", "0"], "--most-steps 0 is not positive"),
        (["--tasks", "records,poems"], "--tasks 'poems' is not one of"),
        (["--dtype", "float8"], "float8"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--limit", "1", "--device", "toaster"], "device='toaster'"),
    ],
)
def test_bad_arguments(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*arguments, "--json", str(tmp_path / "run.json")])
    assert named in str(stopped.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "{", "[]", '{"lines": 3}', '{"lines": [{}]}'])
def test_what_is_no_record(text, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="run.json is no record"):
        sweep.main(["--json", str(path), "--write-doc", str(tmp_path / "page.md")])


def test_pages_that_cannot_be_written(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.md: No such file"):
        pages.write_doc(tmp_path / "nowhere.md", "sweep", str)
    page = tmp_path / "page.md"
    page.write_text("<!-- sweep: end --><!-- sweep: begin -->")
    with pytest.raises(SystemExit, match="no marker '<!-- sweep: begin -->'"):
        pages.write_doc(page, "sweep", str)
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]


def between(page: str, name: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]


@pytest.fixture(scope="module")
def committed() -> dict:
    [path] = (ROOT / "bench" / "results").glob("*-sweep.json")
    return measured.read(path)


def test_the_record_has_every_setting(committed):
    """The record has some of the slow settings as well, in the order of the tables."""
    every, wanted = ([(v.group, v.label) for v in sweep.variants(most)] for most in (128, 32))
    assert len(set(every)) == len(every)
    for task in sweep.TASKS:
        lines = [line for line in committed["lines"] if line["task"] == task]
        there = [(line["group"], line["label"]) for line in lines]
        assert there == [setting for setting in every if setting in there] and set(there) >= set(wanted)
        assert {line["n"] for line in lines} == {500}


def test_pages_say_what_their_records_say(committed):
    assert between("sweep.md", "sweep") == sweep_summary.tables(sweep_summary.summaries(committed))
    [record] = (ROOT / "bench" / "results").glob("*-policies.json")
    assert between("sweep.md", "policies") == policies.tables(measured.read(record))


def test_policies_run_small(tmp_path, monkeypatch, embedded):
    chosen = [
        measured.Variant("Threshold", "none", Threshold(), NoCache()),
        measured.Variant("Threshold", "region, C = 128", Threshold(), RegionCache()),
    ]
    monkeypatch.setattr(policies, "variants", lambda: chosen)
    path = tmp_path / "run.json"
    assert policies.main(["--limit", "1", "--tasks", "records", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    [committed] = (ROOT / "bench" / "results").glob("*-policies.json")
    assert set(record) == set(measured.read(committed)) and record["gen_length"] == 128
    assert set(record["lines"][0]) == set(measured.read(committed)["lines"][0])
    assert record["lines"][0]["same_as_none"] == 1.0 and record["lines"][1]["full_forwards"] == 1.0
    monkeypatch.setattr(policies, "decode", None)
    assert policies.main(["--limit", "1", "--tasks", "records", "--json", str(path)]) == 0  # nothing is done again
    with pytest.raises(SystemExit, match="--limit 2, but"):
        policies.main(["--limit", "2", "--json", str(path)])
