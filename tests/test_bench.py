"""The main benchmark, run small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import throughput
from bench.figures import wilson_interval

KEYS = {
    "sampler",
    "preset",
    "cache",
    "loop",
    "nfe",
    "tpf",
    "tokens_per_second",
    "speedup",
    "ms_per_forward",
    "accuracy",
}


def test_records_and_picture(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert throughput.main(["--limit", "1", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [(r["sampler"], r["cache"]) for r in record["rows"]] == [
        ("vanilla", "none"),
        ("semi-autoregressive", "none"),
        ("threshold", "none"),
        ("threshold", "prefix"),
        ("threshold", "dual"),
        ("threshold", "region"),
        ("slowfast", "none"),
        ("slowfast", "refresh"),
        ("slowfast", "region"),
    ]
    assert all(set(r) >= KEYS for r in record["rows"]) and record["machine"]["cpu"]
    assert record["rows"][0]["nfe"] == 128 and record["rows"][0]["speedup"] == 1.0
    for row in record["rows"]:
        assert row["tpf"] == pytest.approx(row["tokens"] / row["nfe"] / row["generations"])
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.png"]
    assert "slowfast (paper)" in capsys.readouterr().out


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
    arguments = ["--prompts", str(prompts), "--samplers", "slowfast", "--cache", "none", "--gen-length", "32"]
    assert throughput.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 and rows[0]["accuracy"] is None and rows[0]["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--samplers", "beam"], "beam"),
        (["--cache", "turbo"], "turbo"),
        (["--prompts", "nowhere"], "nowhere"),
        (["--limit", "0"], "--limit 0"),
        (["--gen-length", "-4"], "--gen-length -4"),
    ],
)
def test_bad_arguments(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        throughput.main([*arguments, "--json", str(tmp_path / "run.json")])
    assert named in str(stopped.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_prompt_file_and_model(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\n[1]\n')
    with pytest.raises(SystemExit, match="broken.jsonl:2"):
        throughput.main(["--prompts", str(broken), "--json", str(tmp_path / "run.json")])
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
