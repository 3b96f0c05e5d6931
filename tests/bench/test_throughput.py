"""The main benchmark, run small."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sfs_triton
from bench import throughput
from bench.common import rows, summary
from bench.common.figures import wilson_interval
from bench.common.tally import Done, Tally, Visit
from bench.cost.visits import BASELINE_OF, Bench
from bench.embedded import problems
from bench.quality.work import few_shot, read_work
from bench.shapes.inflate import inflate
from tests.support.paths import GOLDEN

KEYS = {
    *(
        "by",
        "sampler",
        "preset",
        "cache",
        "backend",
        "execution",
        "batch",
        "nfe",
        "tpf",
        "tokens_per_second",
        "speedup",
    ),
    *("tokens_per_second_p20", "tokens_per_second_p80", "ms_per_forward", "ms_per_forward_p20", "ms_per_forward_p80"),
    *("accuracy", "peak_memory_bytes", "extrapolated"),
}
PLAIN, OURS = rows.PLAIN, rows.OURS
SHORT = ["--prompts", "countdown", "--gen-length", "32", "--limit", "1"]


@pytest.fixture(autouse=True)
def visits_once(monkeypatch):
    monkeypatch.setattr("bench.cost.visits.BRIEF", 0.0)


@pytest.fixture(scope="module")
def engine():
    return sfs_triton.load("embedded", "cpu", "float32")


def test_records_and_picture(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert throughput.main(["--limit", "1", "--gen-length", "64", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [(r["by"], r["sampler"], r["cache"]) for r in record["rows"]] == [
        (PLAIN, "vanilla", "none"),
        (OURS, "vanilla", "none"),
        (OURS, "semi-autoregressive", "none"),
        (PLAIN, "threshold", "none"),
        (PLAIN, "threshold", "prefix"),
        (PLAIN, "threshold", "dual"),
        (OURS, "threshold", "none"),
        (OURS, "threshold", "prefix"),
        (OURS, "threshold", "dual"),
        (OURS, "threshold", "region"),
        (PLAIN, "slowfast", "none"),
        (PLAIN, "slowfast", "refresh"),
        (OURS, "slowfast", "none"),
        (OURS, "slowfast", "refresh"),
        (OURS, "slowfast", "region"),
    ]
    assert all(set(r) >= KEYS for r in record["rows"]) and record["machine"]["cpu"]
    assert record["rows"][0]["nfe"] == 64 and record["rows"][0]["speedup"] == 1.0
    counts = ("nfe", "tokens", "full_forwards", "positions_forwarded", "correct")
    by_row = {(r["by"], r["sampler"], r["cache"]): [r[name] for name in counts] for r in record["rows"]}
    for sampler, cache in BASELINE_OF:
        assert by_row[PLAIN, sampler, cache] == by_row[OURS, sampler, cache], "the same work, by other means"
    for row in record["rows"]:
        assert row["tpf"] == pytest.approx(row["tokens"] / row["nfe"] / row["generations"])
        assert row["ms_per_forward_p20"] <= row["ms_per_forward"] <= row["ms_per_forward_p80"]
        assert not row["extrapolated"] and row["accuracy"] == 1.0
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.png"]
    shown = capsys.readouterr().out
    assert "slowfast (paper)" in shown
    *_, last = shown.split("right")  # the head of the short table
    assert [line.split("│")[1].strip() for line in last.splitlines() if "│" in line] == [
        "one token per forward",
        *(summary.name(row) for row in summary.chosen(record["rows"])[1:3]),
        "Fast-dLLM's threshold, region cache",
        "SlowFast, region cache",
    ]
    assert "for an answer instead of 64." in last and last.endswith(f"picture {tmp_path / 'run.png'}\n")


def test_other_sizes_prompts_and_batches(tmp_path, capsys):
    """Vanilla decoding is sampled, an autoregressive model is there, solved problems come first."""
    pytest.importorskip("transformers")
    out = tmp_path / "run.json"
    chosen = ["--samplers", "vanilla,slowfast,autoregressive", "--cache", "none,region", "--sampled-steps", "2"]
    sizes = ["--geometry", "toy-512", "--prompt-length", "200", "--gen-length", "32", "--batch", "1,2", "--limit", "2"]
    sizes += ["--prompts", "countdown"]
    assert throughput.main([*sizes, *chosen, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert all(150 < n <= 200 for n in record["prompt_tokens"]) and record["model"] == "toy-512 (inflated)"
    by_row = {(r["batch"], r["by"], r["sampler"], r["cache"]): r for r in record["rows"]}
    ours = [(batch, OURS, "slowfast", cache) for batch in (1, 2) for cache in ("none", "region")]
    others = [
        (1, PLAIN, "vanilla", "none"),
        (1, PLAIN, "slowfast", "none"),
        (1, rows.AUTOREGRESSIVE, "autoregressive", "none"),
    ]
    assert set(by_row) == {*ours, *others}, "baselines decode one prompt at a time"
    vanilla, llama = by_row[others[0]], by_row[others[2]]
    assert vanilla["extrapolated"] and llama["extrapolated"] and not by_row[ours[0]]["extrapolated"]
    assert vanilla["accuracy"] is None and vanilla["nfe"] == 32 and vanilla["checked"] == 0
    assert vanilla["tokens"] == llama["tokens"] == by_row[1, OURS, "slowfast", "region"]["tokens"]
    assert llama["nfe"] == llama["tokens"] / 2 and llama["note"] == "launched: on cpu"
    for cache in ("none", "region"):
        assert by_row[1, OURS, "slowfast", cache]["tokens"] == by_row[2, OURS, "slowfast", cache]["tokens"]
    assert "~" in capsys.readouterr().out


def test_dense_weights_have_no_answers(tmp_path):
    out = tmp_path / "run.json"
    chosen = ["--samplers", "slowfast", "--cache", "region", *SHORT]
    assert throughput.main(["--geometry", "toy-512", "--weights", "dense", *chosen, "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["accuracy"] is None and row["checked"] == 0 and row["ms_per_forward"] > 0


def test_few_shot_prompts_fill_the_room_and_end_with_the_problem(engine):
    text = engine.text
    (problem,) = problems.held_out("records", 1, text, gen_length=64, max_length=256)
    alone = text.encode(text.render([{"role": "user", "content": problem.question}]))
    sizes = [len(few_shot(text, problem, length, random.Random(3))) for length in (len(alone), 300, 1100)]
    assert sizes[0] == len(alone) and sizes[0] < sizes[1] <= 300 < sizes[2] <= 1100 and sizes[2] > 900
    ids = few_shot(text, problem, 1100, random.Random(3))
    tail = text.encode(text.render([{"role": "user", "content": problem.question}]))[1:]
    assert ids[-len(tail) :] == tail, "all but the start of the text"
    with pytest.raises(ValueError, match="--prompt-length 3: a problem alone"):
        few_shot(text, problem, 3, random.Random(3))


def test_examples_are_none_of_the_problems(engine):
    work = read_work(engine, "records", limit=4, seed=0, gen_length=128, prompt_length=300)
    for question in work.questions:
        told = engine.text.decode(question.prompt)
        assert told.count(question.problem.question.strip()) == 1 and question.problem.held_out
        assert question.problem.answer not in told


def test_a_sampled_visit_costs_its_steps_times_all(engine, monkeypatch):
    """Use a clock that ticks once per reading."""
    big = inflate(engine, "toy-512", "cpu", "float32")
    bench, ticks = Bench(big, 32, sampled_steps=4), iter(range(1000))
    canvases = []
    monkeypatch.setattr("bench.cost.visits.vanilla.step", lambda model, canvas, *_: canvases.append(canvas.tolist()))
    monkeypatch.setattr("bench.cost.visits.time.perf_counter", lambda: float(next(ticks)))
    row = next(row for row in rows.every_row(32) if row.who == PLAIN and row.sampler == "vanilla")
    visit = bench.visit(row, [[1, 2, 3]], Done(20, 4, 4, 140, "", tuple(range(100, 132))))
    assert bench.extrapolates(row) and (visit.seconds, visit.pace) == (32.0, 1.0)
    assert visit.done == [Done(20, 32, 32, 32 * 35)]
    masks = [canvas.count(big.spec.mask_id) for canvas in canvases]
    assert masks == [32, 32, 24, 16, 8], "one to warm up, then spread through the generation"
    assert canvases[2][:11] == [1, 2, 3, *range(100, 108)]


def test_the_median_of_repeated_visits_counts(engine, monkeypatch):
    """Use a clock that has given 1, 4 and 2 seconds when it has ended."""
    ticks = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr("bench.cost.visits.BRIEF", 5.5)
    monkeypatch.setattr("bench.cost.visits.time.perf_counter", lambda: next(ticks))
    bench, row = Bench(engine, 16), next(row for row in rows.every_row(16) if row.who == OURS)
    monkeypatch.setattr(bench, "_ours", lambda row: lambda prompts: [Done(20, 4, 4, 140)])
    assert (bench.visit(row, [[1, 2, 3]]).seconds, next(ticks, None)) == (2.0, None)


def test_an_execution_that_failed_is_no_figure(engine, monkeypatch):
    names = iter(["cuda_graphs", "eager", "eager"])
    monkeypatch.setattr(sfs_triton.Engine, "execution", property(lambda _: next(names)))
    bench = Bench(engine, 16)
    row = rows.chosen(rows.every_row(16), {"by": [OURS], "samplers": ["slowfast"], "cache": ["region"]})[0]
    with pytest.raises(RuntimeError, match="execution by cuda_graphs failed and eager went on"):
        bench.visit(row, [[1, 2, 3]])


def test_what_no_baseline_has_is_left_out():
    golden = GOLDEN / "models"
    for name, lacking in (("llada-gqa", set()), ("dream-gqa", {"prefix", "dual"})):
        bench = Bench(sfs_triton.load(golden / name, "cpu", "float32"), 32)
        left_out = {row.cache for row in rows.every_row(32) if bench.lacks(row)}
        assert left_out == lacking


def test_a_summary_is_of_medians_and_means():
    row = rows.every_row(128)[0]
    tally = Tally(row, 2)
    for seconds in (1.0, 2.0, 9.0):
        tally.add(Visit([Done(10, 4, 1, 40), Done(30, 6, 2, 60)], seconds, seconds / 6), [True, None])
    summary = tally.summary(vanilla_rate=10.0)
    assert (summary["tokens_per_second"], summary["speedup"]) == (20.0, 2.0)
    assert summary["ms_per_forward"] == pytest.approx(1e3 * 2.0 / 6)
    assert (summary["nfe"], summary["full_forwards"], summary["positions_forwarded"]) == (5.0, 1.5, 50.0)
    assert (summary["correct"], summary["checked"], summary["generations"], summary["tpf"]) == (3, 3, 6, 4.0)
    assert summary["peak_memory_bytes"] is None and summary["seconds"] == 12.0


def test_the_short_table_names_the_fastest_whoever_it_is_by():
    line = {"nfe": 4.0, "batch": 1, "extrapolated": False, "speedup": None, "correct": 1, "checked": 2}
    given = [(PLAIN, "slowfast", "none", 5.0), (PLAIN, "slowfast", "refresh", 9.0), (OURS, "slowfast", "region", 7.0)]
    every = [{**line, **dict(zip(("by", "sampler", "cache", "tokens_per_second"), row, strict=True))} for row in given]
    found = summary.chosen([*every, {**every[0], "batch": 4, "tokens_per_second": 99.0}])
    assert found == every[1:]
    assert summary.cells(found[0]) == ["SlowFast, refresh cache", PLAIN, "4", "9", "1 of 2"]
    assert summary.meaning(found).endswith("The fastest of these rows: SlowFast, refresh cache, by plain torch.")
    assert summary.chosen([]) == []


def test_every_way_of_ours_once_and_others_as_they_are():
    found = rows.spread_out(rows.every_row(128), ["triton", "torch"], ["cuda_graphs", "eager"])
    ours = [row for row in found if row.who == OURS]
    assert len(set(found)) == len(found) and len(ours) == 4 * sum(row.who == OURS for row in rows.every_row(128))
    assert all(row.backend is None and row.execution is None for row in found if row.who != OURS)
    assert all((row.sampler, row.cache) in BASELINE_OF for row in found if row.who == PLAIN)
    assert replace(ours[0], backend=None, execution=None) in rows.every_row(128)


@pytest.mark.slow
def test_as_a_script(tmp_path):
    """The way users start it: nothing beside the script may shadow what it imports."""
    out = tmp_path / "run.json"
    script = Path(throughput.__file__)
    arguments = ["--samplers", "slowfast", "--cache", "none", "--limit", "1", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["rows"][0]["tokens_per_second"] > 0


def test_own_prompts_without_answers(tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "15,44,79,50"}\n')
    out = tmp_path / "run.json"
    arguments = ["--prompts", str(prompts), "--samplers", "slowfast", "--cache", "region", "--gen-length", "32"]
    assert throughput.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 and rows[0]["accuracy"] is None and rows[0]["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], "--limit 0"),
        (["--gen-length", "-4"], "--gen-length -4"),
        (["--prompt-length", "0"], "--prompt-length 0"),
        (["--batch", "1,x"], "'1,x' is not positive numbers"),
        (["--batch", "0"], "'0' is not positive numbers"),
        (["--geometry", "llada-8t"], "llada-8t"),
        (["--geometry", "toy-512", "--model", "embedded"], "--model embedded has its own sizes"),
        (["--weights", "dense"], "--weights dense needs a --geometry"),
        (["--sampled-steps", "129"], "--sampled-steps 129"),
        (["--json", "run.txt"], "run.txt does not end in .json"),
    ],
)
def test_bad_arguments(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--json", str(tmp_path / "run.json"), *arguments])
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


AFTER_ONE_ROW = ["--samplers", "slowfast", "--cache", "none", *SHORT]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--samplers", "beam"], "--samplers 'beam'"),
        (["--cache", "turbo"], "--cache 'turbo'"),
        (["--by", "magic"], "--by 'magic'"),
        (["--samplers", "vanilla", "--cache", "region"], "--samplers vanilla --cache region leaves no row"),
        (["--prompts", "nowhere"], "--prompts 'nowhere'"),
        (["--prompt-length", "500"], "--prompt-length 500 and --gen-length 128"),
        (["--prompt-length", "20"], "--prompt-length 20: a problem alone"),
        (["--backend", "cuda", *AFTER_ONE_ROW], "backend='cuda'"),
        (["--cuda-graphs", *AFTER_ONE_ROW], "cuda_graphs=True needs a GPU"),
    ],
)
def test_what_cannot_be_measured_leaves_nothing(arguments, named, tmp_path, capsys):
    assert throughput.main([*arguments, "--json", str(tmp_path / "run.json")]) == 2
    assert named in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_bad_prompt_file_and_model(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\n[1]\n')
    assert throughput.main(["--prompts", str(broken), "--json", str(tmp_path / "run.json")]) == 2
    assert "broken.jsonl:2" in capsys.readouterr().out
    out = str(tmp_path / "run.json")
    assert throughput.main(["--prompts", str(broken), "--prompt-length", "99", "--json", out]) == 2
    assert "--prompt-length 99 packs problems" in capsys.readouterr().out
    assert throughput.main(["--model", str(tmp_path), "--json", str(tmp_path / "run.json")]) == 2
    assert "config.json" in capsys.readouterr().out


def test_wilson_interval():
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0


def test_unwritable_results_are_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert throughput.main(["--json", str(tmp_path / "file" / "run.json")]) == 2
    assert "cannot be written" in capsys.readouterr().out
