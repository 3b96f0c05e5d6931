"""The command line: its output streams, its refusals, the live view and the picture."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from PIL import Image, ImageChops  # noqa: E402
from rich.console import Console  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import sfs_triton  # noqa: E402
from sfs_triton.cli import main as cli  # noqa: E402
from sfs_triton.decoding.samplers import KLASS, FixedSteps, SlowFast, Threshold  # noqa: E402
from sfs_triton.errors import ArgumentError  # noqa: E402
from sfs_triton.view import canvas as render
from sfs_triton.view import plot, record  # noqa: E402
from tests.support.paths import GOLDEN, ROOT  # noqa: E402

UNREADABLE = GOLDEN / "models" / "llada-mha"
MASK, EOS = 500, 496
PROMPT = "w15 w44 w79 w50"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with a tokenizer of one word an id; some words hold what a terminal must not get to see."""
    folder = tmp_path_factory.mktemp("model")
    for source in UNREADABLE.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    words = {f"w{i}": i for i in range(512)}
    for word, index in {"<|endoftext|>": EOS, "<|mdm_mask|>": MASK}.items():
        del words[f"w{index}"]
        words[word] = index
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mdm_mask|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> sfs_triton.Engine:
    return sfs_triton.load(model, device="cpu")


def sfs(*arguments: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def generate(model: Path, *options: str, prompt: str = PROMPT, stdin: str | bytes | None = None):
    return sfs(
        "generate", prompt, "--model", str(model), "--device", "cpu", "--gen-length", "32", *options, stdin=stdin
    )


def refused(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_version():
    result = sfs("--version")
    assert (result.exit_code, result.stdout) == (0, f"sfs_triton {sfs_triton.__version__}\n")


def test_text_on_stdout_and_summary_on_stderr(model, engine):
    result = generate(model)
    expected = engine.generate(PROMPT, gen_length=32)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.text + "\n"
    assert result.stderr.count("\n") == 1
    assert f"NFE {expected.nfe} | TPF {expected.tokens_per_forward:.2f} | " in result.stderr
    assert f"{expected.positions_forwarded:,} positions forwarded" in result.stderr


@pytest.mark.parametrize(
    ("options", "sampler", "cache"),
    [
        (("--preset", "llada-reference", "--k-max", "3"), SlowFast.preset("llada-reference", k_max=3), "refresh"),
        (
            ("--tau-min", "0.2", "--tau-high", "0.7", "--window", "3"),
            SlowFast(tau_min=0.2, tau_high=0.7, window=3),
            "none",
        ),
        (
            ("--sampler", "threshold", "--tau", "0.5", "--block-length", "16"),
            Threshold(tau=0.5, block_length=16),
            "dual",
        ),
        (("--sampler", "klass history=3 take=calm", "--tau", "0.4"), KLASS(history=3, take="calm", tau=0.4), "none"),
        (("--sampler", "fixed", "--steps", "8"), FixedSteps(steps=8), "prefix"),
        (("--sampler", "vanilla", "--eos-stop"), FixedSteps(eos_stop=True), "none"),
        (("--eos", "last", "--eos-penalty", "2.5"), SlowFast(eos="last", eos_penalty=2.5), "none"),
        (
            ("--grow", "8", "--end-think-token-ids", "7, 9", "--end-think-logit-boost", "30"),
            SlowFast(grow=8, end_think_token_ids=[7, 9], end_think_logit_boost=30),
            "none",
        ),
        (("--temperature", "0.8", "--cfg-scale", "0.5"), SlowFast(temperature=0.8, cfg_scale=0.5), "none"),
    ],
)
def test_options_reach_the_sampler(model, engine, options, sampler, cache):
    result = generate(model, *options, "--cache", cache, "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    expected = engine.generate(PROMPT, gen_length=32, sampler=sampler, cache=cache, seed=3)
    assert (said["tokens"], said["nfe"], said["text"]) == (expected.tokens, expected.nfe, expected.text)
    assert said["tokens_per_forward"] == expected.tokens_per_forward
    assert said["forwards"] == expected.forwards and said["positions_forwarded"] == expected.positions_forwarded
    assert said["cache"]["kind"] == cache and said["seed"] == 3 and said["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "slowfast (paper), cache none"),
        ({"preset": "fast", "temperature": 0.5}, "slowfast (fast), cache none"),
        ({"tau_high": 0.5}, "slowfast (paper, changed), cache none"),
        ({"sampler": "slowfast preset=fast"}, "slowfast preset=fast (fast), cache none"),
        ({"sampler": "multi-block"}, "multi-block (d3llm-llada), cache none"),
        ({"sampler": "fixed", "cache": "region"}, "fixed, cache region"),
    ],
)
def test_labels_name_a_preset_and_say_if_it_is_changed(options, label):
    assert cli.CommandOptions(prompt="", **options).label() == label


def test_help_names_the_samplers_of_an_option():
    shown = " ".join(sfs("generate", "--help").stdout.replace("\u2502", " ").split())
    for words in ("multi-block: d3llm-llada", "threshold, local-leap, fixed: steps", "hierarchy 32"):
        assert words in shown


def test_no_prompt(model, engine):
    options = ("--no-chat-template", "--sampler", "fixed", "--json")
    (wanted,) = engine.generate([[]], gen_length=32, sampler=FixedSteps())
    assert json.loads(generate(model, *options, prompt="").stdout)["tokens"] == wanted.tokens
    assert generate(model, "--no-chat-template", "--sampler", "fixed", "--watch", prompt="").exit_code == 0
    refused(generate(model, "--no-chat-template", prompt="-", stdin=""), "prompt is empty")


def test_prompt_from_stdin(model):
    assert generate(model, prompt="-", stdin=PROMPT + "\n").stdout == generate(model).stdout
    refused(generate(model, prompt="-", stdin=""), "prompt is empty")
    refused(generate(model, prompt="-", stdin=" \n\n"), "prompt is empty")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sampler", "greedy"), ("greedy", "slowfast", "vanilla")),
        (("--tau", "0.9"), ("--tau", "slowfast", "threshold")),
        (("--sampler", "threshold tau=0.5", "--tau", "0.9"), ("--tau", "'threshold tau=0.5'")),
        (("--sampler", "threshold seed=1"), ("seed", "threshold")),
        (("--sampler", "threshold temperature=1"), ("temperature is an option of its own",)),
        (("--cache", "region capacity=x"), ("capacity='x'",)),
        (("--sampler", "threshold", "--k-max", "4"), ("--k-max", "threshold")),
        (("--sampler", "vanilla", "--steps", "4"), ("--steps", "vanilla")),
        (("--sampler", "fixed", "--preset", "paper"), ("--preset", "fixed")),
        (("--preset", "draft"), ("preset", "draft")),
        (("--gen-length", "-3"), ("gen_length=-3",)),
        (("--gen-length", "1000000000"), ("gen_length=1000000000", "512")),
        (("--block-length", "5"), ("gen_length=32", "block_length=5")),
        (("--cache", "prefix"), ("prefix", "SlowFast")),
        (("--cache", "disk"), ("disk",)),
        (("--temperature", "nan"), ("temperature=nan",)),
        (("--seed", "-1"), ("seed=-1",)),
        (("--device", "toaster"), ("device='toaster'",)),
        (("--dtype", "int4"), ("dtype='int4'",)),
        (("--delay", "1"), ("--delay", "--watch")),
        (("--watch", "--delay", "-1"), ("--delay",)),
    ],
)
def test_bad_options_are_refused_by_name(model, options, words):
    refused(generate(model, *options), *words)


def test_bad_models_and_prompts_are_refused(model, tmp_path):
    refused(generate(tmp_path), "config.json")
    refused(generate(UNREADABLE, "--watch"), "tokenizer.json")
    refused(generate(model, prompt=""), "prompt is empty")
    refused(generate(model, prompt="w1 <|mdm_mask|>"), "mask token (id 500, at position 1")
    refused(generate(model, prompt="w1 \udcff"), "prompt is not valid Unicode")
    refused(generate(model, prompt="-", stdin=b"w1 \xff"), "prompt is not valid Unicode")


def program(*arguments: str, **options) -> subprocess.CompletedProcess:
    """``sfs`` as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "sfs_triton.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=120, **options)


@pytest.mark.sampled(3)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["generate", "chat", "--version"])
def test_a_full_disk_is_a_line(command):
    arguments = {"generate": ["hi", "--gen-length", "4"], "chat": ["--gen-length", "4"]}.get(command, [])
    with open("/dev/full", "w") as full:
        done = program(command, *arguments, input="hi\nho\n", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "error: stdout cannot be written: No space left on device\n"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_reader_that_has_left_is_no_traceback(command):
    arguments = {"generate": ["hi", "--gen-length", "4"], "chat": ["--gen-length", "4"]}[command]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        done = program(command, *arguments, input="hi\nho\n", stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "")


def test_encodings_without_a_character():
    code = "import sys; from sfs_triton.cli.main import Output; print('a\\u00e9', file=Output(sys.stdout), flush=True)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"a?\n"), done.stderr


def test_streams_may_be_closed():
    code = "import os; [os.close(n) for n in (0, 1)]; os.execvp(os.sys.executable, os.sys.argv[1:])"
    command = [sys.executable, "-c", code, sys.executable, "-m", "sfs_triton.cli", "chat", "--gen-length", "4"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_prompt_that_begins_with_a_dash(model):
    refusal = generate(model, prompt="-5 apples")
    assert refusal.exit_code == 2 and "after --" in refusal.stderr
    assert "after --" not in generate(model, "--tua", "0.5").stderr
    options = ("--model", str(model), "--device", "cpu", "--gen-length", "8")
    assert sfs("generate", *options, "--", "-5 apples").exit_code == 0


def test_options_of_a_checkpoint(model, monkeypatch, tmp_path):
    """Every command hands them to ``load``."""
    import sfs_triton.serve.command as serving

    seen, stop = [], RuntimeError("loaded")

    def load(*_, **options):
        seen.append({name: options[name] for name in ("mask_token_id", "max_length", "adapter")})
        raise stop

    for module in (cli, serving, sfs_triton.batch.run):
        monkeypatch.setattr(module, "load", load)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    given = ("--model", str(model), "--mask-token-id", "7", "--max-length", "64", "--adapter", "my-lora")
    for command in (["generate", "a"], ["chat"], ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]):
        assert sfs(*command, *given).exception is stop
    assert sfs("serve", "--port", "0", *given).exception is stop
    assert seen == [{"mask_token_id": 7, "max_length": 64, "adapter": "my-lora"}] * 4


def test_a_prompt_far_over_the_context_is_not_encoded(model, monkeypatch):
    monkeypatch.setattr(sfs_triton.text.TextCodec, "encode", lambda *_: pytest.fail("encoded"))
    refused(generate(model, prompt="-", stdin="a" * 100_000), "100,000 characters, over 32,768", "512 positions")
    monkeypatch.setattr(cli, "LARGEST_INPUT", 50)
    refused(generate(model, prompt="-", stdin="a" * 51), "on stdin", "larger than 50 characters")


def test_missing_extras_are_named(model, monkeypatch, tmp_path):
    for module, package, command in (
        ("canvas", "rich.cells", ("generate", PROMPT, "--watch")),
        ("plot", "matplotlib", ("plot", PROMPT, str(tmp_path / "map.png"))),
        ("record", "PIL", ("generate", PROMPT, "--record", str(tmp_path / "canvas.gif"))),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, f"sfs_triton.view.{module}")
            patch.delattr(sfs_triton.view, module)
            patch.setitem(sys.modules, package, None)
            refused(sfs(*command, "--model", str(model)), package.split(".")[0], "sfs_triton[cli]")


def test_without_typer_main_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == 'error: the command line needs typer: pip install "sfs_triton[cli]"\n'


def test_module_runs_as_a_program(model):
    command = [sys.executable, "-m", "sfs_triton.cli", "generate", PROMPT, "--model", str(model), "--gen-length", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    run = subprocess.run([*command, "--watch"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1 and run.stdout.startswith("w")
    assert "masks left 0/16" in run.stderr and "NFE " in run.stderr and "\x1b" not in run.stderr


# The live view


@pytest.mark.parametrize("eos_stop", [False, True])
@pytest.mark.parametrize(
    "sampler", [SlowFast(), SlowFast.preset("dream-reference"), Threshold(tau=0.3, block_length=16)]
)
def test_canvas_follows_the_trace(engine, sampler, eos_stop):
    sampler = sampler.replace(eos_stop=eos_stop)
    frames = []
    result = engine.generate(PROMPT, gen_length=64, sampler=sampler, trace=True, on_step=frames.append)
    canvas = render.Canvas(
        64,
        MASK,
        engine.spec.end_ids,
        staged=isinstance(sampler, SlowFast),
        block_length=sampler.block_length,
    )
    for frame, step in zip(frames, result.trace, strict=True):
        canvas.update(frame)
        offset = step.block * 16
        assert canvas.phase == step.phase
        assert canvas.cycle == (step.cycle if canvas.staged else step.block)
        assert canvas.span == (step.s + offset, None if step.e is None else step.e + offset)
        assert [p for p, c in enumerate(canvas.commit_step) if c == step.step] == step.committed
    assert canvas.masks_left == 0 and not canvas.running
    assert canvas.tokens_per_forward == result.tokens_per_forward


def terminal(**options) -> Console:
    size = {"width": 80, "height": 24, **options}
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", legacy_windows=False, **size)


def watch(engine, console: Console, length: int = 64) -> str:
    sampler = SlowFast()
    with render.Watcher(engine, sampler, length, delay=0.0, console=console) as watcher:
        engine.generate(PROMPT, gen_length=length, sampler=sampler, on_step=watcher)
    return console.file.getvalue()


def test_stages_differ_in_more_than_hue(engine):
    """Slow is underlined (4), fast bold (1), new tokens reversed (7): also where there is no colour."""
    coloured, plain = watch(engine, terminal(no_color=False)), watch(engine, terminal(no_color=True))
    for code in ("\x1b[4;35m", "\x1b[1;36m", "\x1b[4;7;35m", "\x1b[1;7;36m"):
        assert code in coloured
    assert "\x1b[4m" in plain and "\x1b[1m" in plain and "\x1b[4;7m" in plain and "\x1b[1;7m" in plain
    for text in (coloured, plain):
        assert "slow step" in text and "fast step" in text and "⟦" in text and "⟧" in text and "masks left" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (20, 8), (12, 3)])
def test_view_fits_the_terminal(engine, width, height):
    sampler, frames = SlowFast(), []
    engine.generate(PROMPT, gen_length=100, sampler=sampler, on_step=frames.append)
    console = terminal(width=width, height=height)
    watcher = render.Watcher(engine, sampler, 100, console=console)
    for frame in frames:
        watcher.canvas.update(frame)
        if frame.step % 50 in (0, 3):
            lines = console.render_lines(watcher.view.panel(width, height, "title"), pad=False)
            assert len(lines) < max(height, 7)  # a border, a status and one line of canvas at least
            assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


def test_tokens_cannot_break_the_view():
    assert render.readable("a\nb", render.Glyphs()) == "a↵b"
    assert render.readable("\x1b[31m\t\u202e\udcff", render.Glyphs()) == "�[31m ��"
    assert render.readable("", render.Glyphs()) == "�"
    assert render.readable("né\n", render.ASCII) == "n?$"


def test_without_a_terminal_only_some_plain_frames_are_printed(model):
    result = generate(model, "--watch")
    assert result.exit_code == 0 and result.stdout == generate(model).stdout
    assert 2 <= result.stderr.count("masks left") <= render.PLAIN_FRAMES + 1
    assert "masks left 0/32" in result.stderr and "\x1b" not in result.stderr


# The picture


def test_plot_writes_a_picture_and_nothing_else(model, tmp_path):
    for name, magic in (("map.png", b"\x89PNG"), ("map.SVG", b"<?xml")):
        result = sfs("plot", PROMPT, str(tmp_path / name), "--model", str(model), "--gen-length", "16")
        assert result.exit_code == 0, result.output
        assert result.stdout == "" and f"wrote {tmp_path / name}" in result.stderr
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.SVG", "map.png"]


def test_plot_shows_what_the_trace_says(engine):
    sampler = SlowFast.preset("llada-reference", block_length=32)
    result = engine.generate(PROMPT, gen_length=64, sampler=sampler, trace=True)
    figure = plot.confidence_map(result, sampler, title="slowfast")
    assert figure.get_suptitle() == f"slowfast   |   NFE {result.nfe}   |   TPF {result.tokens_per_forward:.2f}"
    axes = figure.axes[1]
    shown = axes.images[1].get_array()
    assert shown.shape == (result.nfe, 64)
    for row, step in enumerate(result.trace):
        assert [p for p in range(64) if not shown.mask[row, p]] == [
            p for p, c in enumerate(step.confidence) if c is not None
        ]
    marked = {tuple(map(int, xy)) for dots in axes.collections[:2] for xy in dots.get_offsets()}
    assert marked == {(p, row) for row, step in enumerate(result.trace, start=1) for p in step.committed}
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"slow step", "fast step", "span start s", "span end e", "new cycle"} <= legend


def test_plot_refuses_paths_it_cannot_write(model, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path, word in (
        (tmp_path / "map.bmp", "'.bmp'"),
        (tmp_path / "map", "no suffix"),
        (tmp_path / "missing" / "map.png", "does not exist"),
        (tmp_path / "folder.png", "is a folder"),
    ):
        refused(sfs("plot", PROMPT, str(path), "--model", str(model)), str(path), word)


def test_failed_write_leaves_the_old_picture(engine, tmp_path, monkeypatch):
    result = engine.generate(PROMPT, gen_length=8, trace=True)
    figure = plot.confidence_map(result, SlowFast(), title="t")
    out = tmp_path / "map.png"
    out.write_bytes(b"old")

    def fail(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(ArgumentError, match="map.png.*No space left"):
        plot.save(figure, out)
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


# The animated picture


def test_record_writes_a_picture_of_several_samplers(model, tmp_path):
    out, how = tmp_path / "canvas.gif", ("--model", str(model), "--gen-length", "8")
    plain = sfs("generate", PROMPT, "--sampler", "vanilla", *how)
    result = sfs("generate", PROMPT, "--sampler", "vanilla", "--beside", "fixed, slowfast", "--record", str(out), *how)
    assert result.exit_code == 0 and result.stdout == plain.stdout and f"wrote {out}" in result.stderr
    assert list(tmp_path.iterdir()) == [out]
    with Image.open(out) as picture:
        assert picture.n_frames == 9 and picture.info["loop"] == 0, "the empty canvas, and a token per step"


def test_recorded_positions_are_filled_in_their_steps(engine, tmp_path):
    recordings = [record.Recording(name, 12) for name in ("vanilla", "slowfast")]
    results = [engine.generate(PROMPT, gen_length=12, sampler=each.title, on_step=each) for each in recordings]
    animation = record.Animation(engine, recordings)
    for panel, result in enumerate(results):
        left, top = animation._corners[panel]
        for boxes, committed in zip(animation.boxes[panel], result.commit_step[result.prompt_length :], strict=True):
            corner = (left + boxes[0].x, top + record.HEADER + boxes[0].y)
            looks = [animation.frame(step).getpixel(corner) // record.SHADES for step in range(14)]
            wanted = [record.MASKED] * (committed + 1) + [0, 1, 1, 2, 2, 2, 2] + [3] * 14
            assert looks == wanted[:14]
    animation.save(tmp_path / "canvas.gif")
    steps = [step for step, _ in record.shown_steps([result.nfe for result in results])]
    with Image.open(tmp_path / "canvas.gif") as picture:
        for place, step in enumerate(steps):
            picture.seek(place)
            assert ImageChops.difference(picture.convert("RGB"), animation.frame(step).convert("RGB")).getbbox() is None


def test_text_of_recorded_tokens_that_change():
    """A piece has the place that the finished text gives it; newlines end lines, other controls are replaced."""
    pieces = {1: "ab", 2: "},\n{", 3: "\x1b[2J", 4: "w" * 99}
    spec, text = SimpleNamespace(end_ids=(9,), mask_id=0), SimpleNamespace(piece=pieces.get)
    recording = record.Recording("t", 4, [[2, 0, 0, 0], [1, 2, 3, 4]], [[0, -1, -1, -1], [1, 1, 1, 1]])
    animation = record.Animation(SimpleNamespace(text=text, spec=spec), [recording])
    (first,), (second, third), (fourth,), (long,) = animation.boxes[0]
    assert first.y == second.y == 0 and third.y == fourth.y == record.LINE and third.x == 0
    assert long.width == record.PANEL and long.y == 2 * record.LINE
    assert animation._pieces(2) == ["},\u21b5", "{"] and "\x1b" not in animation._pieces(3)[0]
    assert animation.frame(1).size == animation.frame(2).size


def test_one_of_a_thousand_recorded_positions():
    spec = SimpleNamespace(end_ids=(), mask_id=0)
    recording = record.Recording("t", 1200, [[1] + [0] * 1199, [1] * 1200], [[0] + [-1] * 1199, [0] + [1] * 1199])
    animation = record.Animation(SimpleNamespace(text=SimpleNamespace(piece=str), spec=spec), [recording])
    bar = record.MARGIN + 34
    ends = [animation.frame(step).getpixel((x, bar)) for step in (1, 2) for x in (record.MARGIN, 500)]
    assert ends == [0, record.MASKED * record.SHADES, 0, 0]


@pytest.mark.parametrize("counts", [(1,), (64,), (3, 64), (5, 5), (2, 9, 700), (1024, 2000)])
def test_shown_steps(counts):
    """Few enough, with the last of each panel, and slow enough to follow."""
    steps, milliseconds = zip(*record.shown_steps(counts), strict=True)
    assert list(steps) == sorted(set(steps)) and {0, *counts} <= set(steps) and steps[-1] == max(counts)
    assert len(steps) <= 2 * record.MOST_FRAMES + len(counts) + 1
    assert milliseconds[0] == record.FIRST or len(steps) == 1
    assert milliseconds[-1] == record.LAST and all(ms >= record.FASTEST and ms % 10 == 0 for ms in milliseconds)


def test_record_refuses_what_it_cannot_write_or_draw(model, engine, tmp_path):
    out, how = str(tmp_path / "canvas.gif"), ("--model", str(model), "--gen-length", "8")
    for path, word in ((tmp_path / "canvas.png", "'.png'"), (tmp_path / "missing" / "canvas.gif", "does not exist")):
        refused(sfs("generate", PROMPT, "--record", str(path), *how), f"record={str(path)!r}", word)
    refused(sfs("generate", PROMPT, "--beside", "vanilla", *how), "--beside applies only with --record")
    refused(sfs("generate", PROMPT, "--record", out, "--beside", "beam", *how), "--sampler beam")
    for drawn in (("--record", out), ("--watch",)):
        refused(sfs("generate", PROMPT, "--grow", "4", *drawn, *how), "--grow 4 does not go with --watch or --record")
    refused(sfs("generate", PROMPT, "--record", out, "--beside", "vanilla", "--cache", "dual", *how), "cache='dual'")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match="beam: nothing was decoded"):
        record.Animation(engine, [record.Recording("beam", 8)])


HOSTILE = "a\x1b]0;owned\x07\u202eb"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_text_of_a_model_cannot_steer_a_terminal():
    """A pipe gets it as it is."""
    import pty

    program = (
        "import sys; from sfs_triton import text; from sfs_triton.cli import main as cli\n"
        f"text.TextCodec.decode = lambda codec, tokens: {HOSTILE!r}\n"
        "sys.argv = ['sfs', 'generate', '1,2', '--gen-length', '8', '--device', 'cpu']; cli.main()"
    )
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}, "timeout": 60}
    piped = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, **how)
    assert piped.stdout.decode() == HOSTILE + "\n"
    terminal, screen = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stdout=screen, check=True, **how)
        assert os.read(terminal, 4096).decode() == "a\ufffd]0;owned\ufffd\ufffdb\r\n"
    finally:
        os.close(terminal), os.close(screen)
