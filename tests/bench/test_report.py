"""The page of benchmarks: its rendering of records, and that the one in the repository is current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.common.rows import Row
from bench.common.tally import Done, Tally, Visit
from bench.gpu import record, targets
from bench.report import __main__ as report
from bench.report.card_page import card_of
from sfs_triton import SlowFast

GPU = "NVIDIA H200"


def _lines(date: str = "2027-01-02 10:00", *, factor: float = 1.0, toy: bool = False) -> list[tuple]:
    """A made-up run: (step, status, part, values)."""
    decode = {"calls": {"cudaGraphLaunch": 9}, "waits": {}, "kernels": 900}
    profile = {
        **{"gpu_ms": 4.0, "span_ms": 4.5, "kernels": 345, "family_ms": {"products": 3.0, "attention": 1.0}},
        "top": [{"kernel": "nvjet_tst", "count": 129, "ms": 3.0}],
    }
    step = {"policy": "region", "kind": "list", "positions": 128, "predicted_kernels": 345, "predicted_ms": 4.5}
    cold = {"l2": "cold", "copy_gb_per_s": 4200.0}
    head = {"operation": "lm_head", "case": "llada-8b-64", "bytes": 1_050_000_000}
    return [
        ("suite", "begun", None, {"gpu": GPU, "date": date, "commit": "abc1234", "toy": toy, "format": 1}),
        ("environment", "ok", "machine", {"torch": "2.11.0", "packages": {"triton": "3.6.0"}, "cuda": True}),
        ("environment", "ok", "nvidia-smi", {"driver_version": "580.1"}),
        ("environment", "ok", None, {}),
        ("baseline", "ok", "ceilings", {"copy_gb_per_s": 4200.0, "matmul_tflops": 800.0}),
        ("baseline", "ok", "1 rows", {"rows": 1, "ms": 4.0}),
        ("baseline", "ok", "128 rows", {"rows": 128, "ms": 4.2}),
        ("baseline", "ok", "full", {"rows": 2124, "ms": 50.0}),
        ("baseline", "ok", "vanilla", {"rows": 2124, "ms": 60.0, "launched_ms": 61.0}),
        ("baseline", "ok", "products, 128 rows", {"rows": 128, **_products()}),
        ("baseline", "ok", "attention, 128 rows", {"rows": 128, "flash": {"us_each": 30.0}, "cudnn": "no plan"}),
        ("engine", "ok", "triton, region, list", {**step, "backend": "triton", "eager_ms": 9.0, "ms": 5.0 * factor,
                                                  "machine_share": 0.03, "profile": profile}),
        ("engine", "failed", "torch, region, list", {**step, "backend": "torch", "eager_ms": 19.0}),
        ("sync", "ok", "none, torch, cuda_graphs", {"policy": "none", "backend": "torch",
                                               "execution": "cuda_graphs", "nfe": 10,
                                               "ms_per_step": 2.0, "kernels_per_step": 90, "calls_per_step": 1.1,
                                               "decode": decode, "generation": {"copies": {"Memcpy DtoH": 1}}}),
        *(("throughput", "ok", f"region, problem {n}", _visit(60.0 * factor + n)) for n in (0, 1, 2)),
        ("throughput", "ok", "zeros", {"dense_over_inflated_list": 1.03, "dense_over_inflated_full": 1.1}),
        ("kernels", "ok", "t[1]", {**head, **cold, "implementation": "triton", "p50_us": 275.0, "gb_per_s": 3800.0}),
        ("kernels", "ok", "t[2]", {**head, **cold, "implementation": "torch", "p50_us": 550.0}),
        ("kernels", "ok", "t[3]", {"operation": "confidence", "case": "llada-8b-512", "implementation": "triton",
                                   **cold, "p50_us": 40.0, "gb_per_s": 3780.0, "roofline_share": 0.9}),
        ("tests", "failed", "tests/test_x.py::test_y", {"error": "boom"}),
        ("tests", "failed", None, {}),
    ]  # fmt: skip


def _visit(ms: float) -> dict:
    """Make a visit of one problem by a row of the throughput step."""
    tally = Tally(Row("sfs_triton", "slowfast", "paper", SlowFast(), "region", "triton", "cuda_graphs"))
    tally.add(Visit([Done(92, 4, 1, 500)], 4e-3 * ms, 1e-3 * ms, 20 * 2**30), [True])
    return {"row": tally.row.name, "weights": "the embedded model, inflated", **tally.summary(None)}


def _products() -> dict:
    return {name: {"gb_per_s": 4000.0, "tflops": 500.0} for name in ("qkv", "out", "gate_up", "down", "head")}


def _write(folder: Path, name: str, lines: list[tuple]) -> Path:
    path = folder / "nvidia-h200" / name
    path.parent.mkdir(exist_ok=True)
    log = record.Log(path, "run")
    for step, status, part, values in lines:
        log.write(step, status, part, **values)
    return path


def _row(text: str, begin: str) -> list[str]:
    """Return the cells of the first row of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_in_the_repository_is_current(capsys):
    assert report.main(["--check"]) == 0, "run python -m bench.report"
    assert "is current" in capsys.readouterr().out


def test_without_a_record_every_measured_cell_is_empty(tmp_path):
    text = report.render(targets.records(tmp_path))
    assert "There is no record of a GPU yet" in text
    for quantity in (
        "step of 128 positions",
        "everything in a step",
        "blocking CUDA calls",
        "confidence",
        "fused head",
    ):
        assert _row(text, quantity)[2:] == ["", "", "", ""], quantity
    assert _row(text, "d3LLM")[-1] == ""


def test_a_record_beside_the_targets(tmp_path):
    _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    text = report.render(targets.records(tmp_path))
    assert _row(text, "step of 128 positions")[1:] == [
        *("<= 4.7 ms; stretch 4.1", "5.00 ms (triton, replayed)", "no", "1.06", "")
    ]
    assert _row(text, "everything in a step")[2:5] == ["3.0%", "no", "1.50"]
    assert _row(text, "blocking CUDA calls")[2:4] == [
        "0 between the first step and the last; 1 copies to the host in all",
        "yes",
    ]
    assert _row(text, "confidence from logits [512")[2:4] == ["90%", "yes"]
    assert _row(text, "fused head, 64 rows")[2:5] == ["275 us, 1.10 x", "yes", "0.96"]
    assert _row(text, "fused head, 16 rows")[2:] == ["", "", "", ""], "nobody measured it"
    assert _row(text, "copy bandwidth")[2:5] == ["4.20 TB/s", "", "1.02"], "an assumption is not met or missed"
    assert _row(text, GPU) == [GPU, "2027-01-02 10:00", "abc1234", "580.1", "2.11.0", "3.6.0", "1 ok, 1 failed"]


def test_the_tables_of_a_record(tmp_path):
    _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    text = report.render(targets.records(tmp_path))
    assert _row(text, "region | list | triton") == [
        *("region", "list", "triton", "128", "9.00", "5.00", "4.50", "1.11", "345 / 345", "3.0%", "", "")
    ]
    assert _row(text, "region | list | torch")[4:] == ["19.00", "", "4.50", "", "", "", "", "failed"]
    assert _row(text, "sfs_triton | slowfast")[2:] == [
        *("region", "triton cuda_graphs", "61.00", "4.0", "1.0", "23.00", "377.0", "20.0", "3 of 3", "")
    ]
    assert "dense random weights over those with these: 1.030 of list, 1.100 of full" in text
    assert _row(text, "lm_head")[1:5] == ["llada-8b-64", "275.0", "550.0", "2.00"]
    assert _row(text, "tests")[1:] == ["1 failed", "tests/test_x.py::test_y"]
    assert _row(text, "128 | flash")[2] == "30.0" and _row(text, "128 | cudnn")[2] == "no plan"
    assert _row(text, "embedded, float32")[8] == "0"
    assert "4,000 / 500" in text


def test_a_record_has_pictures_where_it_has_figures(tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    _write(results, "2027-01-02-abc1234.jsonl", _lines())
    out = tmp_path / "page.md"
    assert report.main(["--results", str(results), "--out", str(out)]) == 0
    for name in ("steps", "throughput"):
        file = f"benchmarks-nvidia-h200-{name}.png"
        assert f"]({file})" in out.read_text() and (tmp_path / file).read_bytes()[:4] == b"\x89PNG"
    bare = tmp_path / "bare" / "results"
    bare.mkdir(parents=True)
    _write(bare, "2027-01-02-abc1234.jsonl", [line for line in _lines() if line[0] not in ("engine", "throughput")])
    assert report.main(["--results", str(bare), "--out", str(tmp_path / "bare" / "page.md")]) == 0
    assert "benchmarks-" not in (tmp_path / "bare" / "page.md").read_text()
    assert not list((tmp_path / "bare").glob("*.png"))


def test_the_largest_gaps_come_with_what_the_profile_shows(tmp_path):
    path = _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    first, second = targets.gaps(targets.Record(path, record.read(path)))
    assert first.startswith("everything in a step") and "1.50 x the target" in first
    assert second.startswith("step of 128 positions") and "products 75%, attention 25%; 0.50 ms between them" in second
    assert "`nvjet_tst` x 129 3.00 ms" in second


def test_change_since_the_last_record(tmp_path):
    _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    _write(tmp_path, "2027-02-02-def5678.jsonl", _lines("2027-02-02 10:00", factor=0.9))
    text = report.render(targets.records(tmp_path))
    assert "`nvidia-h200/2027-02-02-def5678`, beside `nvidia-h200/2027-01-02-abc1234`" in text
    assert _row(text, "step of 128 positions")[2:] == ["4.50 ms (triton, replayed)", "yes", "0.96", "-10.0%"]
    assert _row(text, "region | list | triton")[10] == "-10.0%"
    assert len([line for line in text.splitlines() if line.startswith(f"| {GPU}")]) == 2


def test_ratios_to_what_others_measured_are_marked(tmp_path):
    _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    text = report.render(targets.records(tmp_path))
    assert _row(text, "d3LLM")[4:] == ["18.2", "3.6 †"] and _row(text, "DiffusionGemma")[4:] == ["", ""]
    assert "5.00 ms: NVIDIA H200" in text and "**across machines**" in text


def test_later_lines_count(tmp_path):
    """A record may hold several runs: repeated parts replace earlier ones, omitted parts do not."""
    path = _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    about = {"policy": "region", "kind": "list", "backend": "triton", "positions": 128}
    again = {**about, "ms": 3.0, "predicted_ms": 4.5, "predicted_kernels": 345}
    _write(tmp_path, path.name, [("engine", "ok", "triton, region, list", again), ("baseline", "late", "full", {})])
    (found,) = targets.records(tmp_path)
    assert targets.best_step(found)["ms"] == 3.0 and found.part("baseline", "full")["ms"] == 50.0


def test_toys_and_runs_without_a_gpu_are_no_records(tmp_path):
    _write(tmp_path, "toy.jsonl", _lines(toy=True))
    _write(tmp_path, "none.jsonl", [("suite", "begun", None, {"gpu": None, "date": "2027"})])
    (tmp_path / "nvidia-h200" / "other.jsonl").write_text('{"what": "is this"}\nnor is this\n')
    (tmp_path / "top.jsonl").write_text((tmp_path / "nvidia-h200" / "toy.jsonl").read_text())
    assert targets.records(tmp_path) == []


def test_records_as_one_document(tmp_path):
    path = _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    lines = record.read(path)
    path.with_suffix(".json").write_text(json.dumps({"lines": lines}))
    path.unlink()
    (found,) = targets.records(tmp_path)
    assert found.part("baseline", "full")["ms"] == 50.0


def test_the_command(tmp_path, capsys):
    out = tmp_path / "page.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out), "--check"]) == 1
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0 and out.read_text().startswith(
        "# Benchmarks"
    )
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "none" / "page.md")]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("values", [{}, {"ms": None}])
def test_lines_that_lack_what_was_to_be_measured(tmp_path, values):
    """A step that was cut off leaves such lines."""
    lines = [(step, status, part, {} if step == "baseline" else given) for step, status, part, given in _lines()]
    lines.append(("engine", "hung", "triton, none, full", values))
    lines.append(("engine", "crashed", "triton, region, list", values))
    _write(tmp_path, "2027-01-02-abc1234.jsonl", lines)
    text = report.render(targets.records(tmp_path))
    assert _row(text, "step of 128 positions")[2] == ""


def _cpu_run(root: Path, date: str, ms: float) -> Path:
    """A made-up run of ``make bench-all``: its folder."""
    folder = root / "bench" / "results" / "amd-epyc-2-cores" / f"{date}-abc1234"
    folder.mkdir(parents=True)
    about = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "gpu": None, "torch": "2.13.0", "commit": "abc1234"}
    run = {"machine": about, "date": f"{date} 10:00", "jobs": [{"job": "table", "status": 0, "seconds": 90.0}]}
    plain = {**_visit(2 * ms), "by": "plain torch", "cache": "none", "extrapolated": True, "checked": 0}
    rows = [plain, {**_visit(ms), "speedup": 2.0}]
    record = {
        **{"machine": about, "model": "embedded", "dtype": "torch.float32", "prompts": "records", "problems": 3},
        **{"prompt_tokens": [79, 104, 88], "gen_length": 128, "rows": rows},
    }
    speed = [{"test": "test_eager[embedded-vanilla]", "median_s": 1.0, "speed_over_plain": 1.125}]
    for name, content in (("run", run), ("table", record), ("speed", speed)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_without_a_gpu_is_on_the_page_and_in_the_readme(tmp_path, capsys):
    old, new = (_cpu_run(tmp_path, date, ms) for date, ms in (("2027-01-02", 99.0), ("2027-02-01", 10.0)))
    out, readme = tmp_path / "page.md", tmp_path / "README.md"
    readme.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    where = ["--results", str(tmp_path / "bench" / "results"), "--out", str(out), "--readme", str(readme)]
    assert report.main([*where, "--check"]) == 1 and not out.exists()
    assert report.main(where) == 0 and report.main([*where, "--check"]) == 0
    page, text = out.read_text(), readme.read_text()
    assert _row(page, "sfs_triton | slowfast") == [
        *("sfs_triton", "slowfast (paper)", "region", "2,300", "2.0x", "4.0", "23.00", "10.0", "1", "500", "1 of 1")
    ]
    assert (
        _row(page, "plain torch | slowfast")[3:5] == ["~1,150", ""] and _row(page, "plain torch | slowfast")[-1] == ""
    )
    assert _row(text, "SlowFast, region") == ["SlowFast, region cache", "sfs_triton", "4", "2,300 (2x)", "1 of 1"]
    assert _row(text, "SlowFast |") == ["SlowFast", "plain torch", "4", "~1,150", ""]
    assert "The fastest of these rows: SlowFast, region cache, by sfs_triton." in text
    for shown in (page, text):
        assert new.name in shown and old.name not in shown
        assert "3 problems (records), prompts of 79 to 104 tokens, 128 response positions, float32" in shown
    assert _row(out.read_text(), "embedded-vanilla")[1] == "1.12" and "1.5 minutes: table 90 s" in out.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert f"![tokens per second and accuracy](../bench/results/amd-epyc-2-cores/{new.name}/table.png)" in page
    readme.write_text(text.replace("2,300", "9,999"))
    assert report.main([*where, "--check"]) == 1
    assert f"{readme} is not current" in capsys.readouterr().out
    readme.write_text("no place for it")
    assert report.main(where) == 2 and "no marker '<!-- table: begin -->'" in capsys.readouterr().err


def test_the_page_of_cards_has_what_a_record_measured(tmp_path):
    _write(tmp_path, "2027-01-02-abc1234.jsonl", _lines())
    page, out = tmp_path / report.CARDS_PAGE, tmp_path / "page.md"
    page.write_text("before\n<!-- cards: begin -->\n<!-- cards: end -->\n")
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = page.read_text()
    assert _row(text, "h200 | bfloat16")[-1] == "5.0 and not measured"
    assert _row(text, "h200 | fp8")[-1] == _row(text, "h100 | bfloat16")[-1] == "not measured"
    assert _row(text, "rtx4090 | bfloat16")[2:6] == ["23", "4", "17.0", "200"]
    page.write_text("no place for it")
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", None),
    ],
)
def test_cards_of_names_that_drivers_give(gpu, card):
    assert card_of(gpu) == card


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert report.main(["--results", "/nowhere", "--out", str(tmp_path / "page.md")]) == 2
    assert "--results /nowhere is no folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_baseline_is_told_with_what_it_has_and_lacks():
    text = report.baselines_section()
    for baseline in report.BASELINES.values():
        part = text.partition(f"**{baseline.name}**")[2].partition("\n- **")[0]
        shared = text.partition("\n- **")[0]
        for item in (*baseline.has, *baseline.lacks):
            assert (item in part) != (item in shared), f"{baseline.name}: {item}"
