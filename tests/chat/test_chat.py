"""The chat: its conversation, the effect and refusals of each command, and its output in a terminal and in a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sfs_triton.chat import Conversation, commands
from sfs_triton.decoding.caching import RegionCache
from sfs_triton.decoding.params import DecodingParams
from sfs_triton.decoding.samplers import FixedSteps, SlowFast, Threshold
from sfs_triton.errors import ArgumentError, NumericalFault
from sfs_triton.view.printable import printable
from tests.support.paths import ROOT

STORY = "Tom has 12 apples and buys 5 more. How many apples does Tom have?"
ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture
def chat(embedded) -> Conversation:
    return Conversation(embedded, DecodingParams(gen_length=32))


def ask(chat: Conversation, text: str) -> str:
    return "".join(piece for piece, _ in chat.answer(text))


def state(chat: Conversation) -> tuple:
    return chat.messages, chat.params, chat.last


def turn(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


# Conversation


def test_messages_go_through_the_template(embedded):
    """The prompt is written out here: the template around all earlier messages."""
    chat = Conversation(embedded, DecodingParams(gen_length=32), system="Be brief.")
    said = "<|startoftext|>" + turn("system", "Be brief.")
    for message in ("Tom has 12 apples.", "How many are 7 * 8?", "And now?"):
        answer = ask(chat, message)
        said += turn("user", message)
        assert chat.last.canvas[: chat.last.prompt_length] == embedded.text.encode(said + ANSWER)
        assert chat.messages[-2:] == [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        said += turn("assistant", answer.strip())
    assert chat.messages[0] == {"role": "system", "content": "Be brief."} and len(chat.messages) == 7
    params = chat.params
    commands.run(chat, "/reset")
    assert chat.messages == [{"role": "system", "content": "Be brief."}] and chat.params == params


def test_text_comes_in_order_while_it_is_decoded(chat):
    chat.change(sampler=FixedSteps(block_length=8))
    *pieces, (rest, none) = chat.answer(STORY)
    assert [frame.step for _, frame in pieces] == list(range(32)) and none is None
    assert sum(bool(text) for text, _ in pieces) > 4
    assert "".join(text for text, _ in pieces) + rest == chat.last.text


def test_an_answer_is_what_the_engine_generates(chat):
    how = {"sampler": SlowFast(temperature=0.8, eos_stop=True), "cache": RegionCache(capacity=64), "gen_length": 24}
    chat.change(**how, seed=5)
    for seed in (5, 6):
        before = chat.messages
        answer = ask(chat, "1,2,3,4")
        prompt = [*before, {"role": "user", "content": "1,2,3,4"}]
        assert answer == chat.last.text == chat.engine.generate(prompt, **how, seed=seed).text
    assert chat.params.seed == 7


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_answer_that_is_stopped_changes_nothing(chat, steps):
    ask(chat, "first")
    before = state(chat)
    answer = chat.answer("second")
    for _ in range(steps):
        next(answer)
    answer.close()
    assert state(chat) == before
    assert ask(chat, "second") == chat.messages[-1]["content"] and chat.messages[:2] == before[0]


@pytest.mark.parametrize("failure", [NumericalFault("sequence 0 at step 2"), RuntimeError("no memory")])
def test_an_answer_that_fails_changes_nothing(chat, monkeypatch, failure):
    def fail(codec, ids):
        raise failure

    before = state(chat)
    answer = chat.answer(STORY)
    next(answer)
    with monkeypatch.context() as patch, pytest.raises(type(failure), match=str(failure)):
        patch.setattr(type(chat.engine.text), "decode", fail)
        list(answer)
    assert state(chat) == before
    assert ask(chat, STORY) == chat.engine.generate(STORY, gen_length=32).text


def test_a_conversation_that_is_full_drops_nothing(chat):
    chat.change(sampler=FixedSteps(steps=2), gen_length=64)
    text = "12 apples " * 40
    with pytest.raises(ArgumentError, match=r"\d+ tokens; with gen_length=64 it is \d+ over the model's 512 positions"):
        for _ in range(4):
            before = state(chat)
            ask(chat, text)
    assert state(chat) == before and len(before[0]) >= 2
    chat.reset()
    assert ask(chat, text) == chat.messages[-1]["content"] and len(chat.messages) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n", "message .* is empty"),
        ("a\udcff", r"message is not valid Unicode: .*'\\udcff' in position 1"),
        ("a <|mdm_mask|>", r"message 'a <\|mdm_mask\|>' holds the mask token"),
        ("a" * 40_000, "the message has 40,000 characters, over 32,768: .* 512 positions"),
    ],
)
def test_bad_messages_are_refused(chat, text, words):
    before = state(chat)
    with pytest.raises(ArgumentError, match=words):
        chat.answer(text)
    assert state(chat) == before
    if text.strip():
        with pytest.raises(ArgumentError, match=words.replace("message", "system")):
            Conversation(chat.engine, system=text)


def test_bad_models_and_parameters_are_refused(engines, embedded):
    with pytest.raises(ArgumentError, match="tokenizer.json"):
        Conversation(engines["llada-mha"])
    with pytest.raises(ArgumentError, match="gen_length=512: the model has only 512 positions"):
        Conversation(embedded, DecodingParams(gen_length=512))


# Commands


def test_commands_set_and_show(chat):
    commands.run(chat, "/sampler threshold tau=0.8 eos_stop=true top_k=null")
    assert chat.params.sampler == Threshold(tau=0.8, eos_stop=True)
    commands.run(chat, "/sampler slowfast preset=fast tau_high=0.9")
    assert chat.params.sampler == SlowFast.preset("fast", tau_high=0.9)
    shown = commands.run(chat, "/sampler")
    assert shown.startswith("slowfast ") and " tau_high=0.9 " in shown and " top_k=null " in shown
    commands.run(chat, "/sampler vanilla")
    assert chat.params.sampler == FixedSteps()
    commands.run(chat, f"/sampler {shown}")  # what is shown can be typed
    assert chat.params.sampler == SlowFast.preset("fast", tau_high=0.9)
    commands.run(chat, "/cache region  capacity=64 ")
    assert chat.params.cache == RegionCache(capacity=64) and commands.run(chat, "/cache").startswith("region ")
    assert commands.run(chat, "/set gen_length=16 seed=9") == commands.run(chat, "/set") == "gen_length=16 seed=9"
    assert (chat.params.gen_length, chat.params.seed) == (16, 9)
    listed = [line.split()[0] for line in commands.run(chat, "/help").splitlines()]
    assert listed[:-1] == ["/reset", "/sampler", "/cache", "/set", "/save", "/help", "/quit"]


def test_saved_messages_can_be_read(chat, tmp_path):
    file = tmp_path / "a talk.jsonl"
    file.write_text("old")
    ask(chat, "one\ntwo \u2028 é")
    assert "2 messages" in commands.run(chat, f"/save {file}")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == chat.messages
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/", ("'/'", "/reset", "/help")),
        ("/undo", ("'/undo'", "/reset, /sampler, /cache, /set, /save, /help, /quit")),
        ("/\x1b[2J", (r"'/\x1b[2J'",)),
        *((f"/{name} now", (f"/{name}", "'now'")) for name in ("help", "reset", "quit")),
        ("/sampler greedy", ("/sampler", "'greedy'", "slowfast")),
        ("/sampler threshold tau", ("/sampler", "'tau'", "name=value")),
        ("/sampler threshold tau=[0.8]", ("/sampler", "tau=[0.8]")),
        ("/sampler threshold tau=0.8 tau=0.9", ("/sampler", "'tau=0.9'", "second")),
        ("/sampler threshold k_max=4", ("/sampler", "k_max", "threshold", "tau")),
        ("/sampler slowfast preset=[1]", ("/sampler", "preset=[1]")),
        ("/sampler slowfast k_max=" + "9" * 5000, ("/sampler", "k_max=")),
        ("/sampler threshold kind=fixed", ("/sampler", "'kind=fixed'", "second")),
        ("/cache disk", ("/cache", "'disk'", "region")),
        ("/set gen_length=many", ("/set", "gen_length='many'")),
        ("/set gen_length=512", ("/set", "gen_length=512", "512 positions")),
        ("/set gen_length=16 seed=1.5", ("/set", "seed=1.5")),
        ("/set sampler=vanilla", ("/set", "'sampler'", "gen_length, seed")),
        ("/save", ("/save", "file")),
        ("/save /no/such/folder/x", ("/save", "/no/such/folder/x", "No such file")),
        ("/save a\0b", ("/save", r"a\x00b")),
    ],
)
def test_bad_commands_are_refused_by_name(chat, line, words):
    before = state(chat)
    with pytest.raises(ArgumentError) as refusal:
        commands.run(chat, line)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert state(chat) == before


# Pipe


def sfs_chat(*arguments: str, stdin: str | bytes):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from sfs_triton.cli import main as cli

    options = ("--device", "cpu", "--dtype", "float32", "--gen-length", "32")
    return CliRunner().invoke(cli.app, ["chat", *options, *arguments], input=stdin)


def test_a_pipe_gets_an_answer_per_message(chat, tmp_path):
    answers = [ask(chat, text) for text in ("1,2,3", "go\non", "/x")]
    result = sfs_chat(stdin="1,2,3\n\n   \ngo\\\non\n//x")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(printable(answer) + "\n" for answer in answers)
    assert result.stderr.count("NFE ") == 3 == result.stderr.count("\n") and "\x1b" not in result.stderr


def test_a_pipe_goes_on_after_a_refusal(chat):
    answer = ask(chat, "1,2,3")
    result = sfs_chat(stdin=b"/set gen_length=900\n\xff\xfe\n" + b"a" * 99_999 + b"\n1,2,3\n/quit\nnever read\n")
    assert result.exit_code == 2 and result.stdout == printable(answer) + "\n"
    lines = result.stderr.splitlines()
    assert lines[0] == "error: /set: gen_length=900: the model has only 512 positions"
    assert "not valid Unicode" in lines[1] and "99,999 characters" in lines[2] and lines[3].startswith("NFE ")
    assert len(lines) == 4 and max(map(len, lines)) < 1100
    assert sfs_chat(stdin="").exit_code == 0


def test_options_of_the_command(tmp_path):
    result = sfs_chat("--system", "Be brief.", "--sampler", "threshold", "--tau", "0.5", stdin="/sampler\n")
    assert result.exit_code == 0 and "threshold" in result.stderr and "tau=0.5" in result.stderr
    result = sfs_chat("--watch", stdin="1,2,3\n")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1 and "masks left 0/32" in result.stderr
    for arguments, words in (
        (("--gen-length", "512"), ("gen_length=512",)),
        (("--system", "<|mdm_mask|>"), ("system '<|mdm_mask|>'", "mask token")),
        (("--model", str(tmp_path)), ("config.json",)),
    ):
        result = sfs_chat(*arguments, stdin="hi\n")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert all(word in result.stderr for word in words) and result.stderr.count("\n") == 1


def test_control_characters_reach_no_terminal():
    line = "\x1b[2J\x9b31mred\x07\x7f\u202etxet\u2028"
    result = sfs_chat(stdin=f"/{line}\n/sampler {line}\n/save /no/{line}\n{line}<|mdm_mask|>\n")
    assert result.exit_code == 2 and result.stderr.count("31mred") == 4
    assert not set(result.stderr) & set("\x1b\x9b\x07\x7f\u202e\u2028")


# Terminal


class Terminal:
    """``sfs chat`` in a pseudo-terminal of its own, as its foreground process."""

    def __init__(self, folder: Path, *options: str):
        self.keys, screen = pty.openpty()
        self.seen = ""
        self.program = subprocess.Popen(
            [sys.executable, "-m", "sfs_triton.cli", "chat", "--device", "cpu", *options],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            preexec_fn=self._take_terminal,
        )
        os.close(screen)

    @staticmethod
    def _take_terminal() -> None:
        """Make the terminal its own. A test run in the background ignores SIGINT, which the program would inherit."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read on until ``text`` is there, beyond what earlier calls waited for. Returns all up to its end."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.keys], [], [], left)[0]
            assert ready, f"{text!r} did not come; there was {self.seen!r}"
            self.seen += os.read(self.keys, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def press(self, keys: str) -> None:
        time.sleep(0.3)  # Python's readline misses a signal that comes just after it has written its prompt
        os.write(self.keys, keys.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.keys)


def test_interrupts_keep_the_conversation(tmp_path):
    with Terminal(tmp_path, "--gen-length", "384", "--sampler", "vanilla", "--block-length", "8") as terminal:
        terminal.wait_for("384 of 512 positions per answer")
        terminal.wait_for("> ")
        terminal.press(STORY + "\n")
        terminal.wait_for(STORY + "\n")
        terminal.wait_for(" ")  # the answer has started to show
        terminal.press("\x03")
        assert "NFE" not in terminal.wait_for("interrupted; an unfinished answer is not kept")
        terminal.wait_for("\n> ")
        terminal.press("half a line")
        terminal.wait_for("half a line")  # readline shows it, so it handles signals by now
        terminal.press("\x03")
        terminal.wait_for("interrupted")
        terminal.wait_for("\n> ")
        terminal.press("/sampler slowfast\n/set gen_length=32\n1,2,3\n")
        terminal.wait_for("NFE ")
        terminal.press("/save talk.jsonl\n")
        terminal.wait_for("wrote 2 messages")
        messages = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
        assert messages[0] == {"role": "user", "content": "1,2,3"}
        terminal.press("\x04")
        assert terminal.program.wait(20) == 0


def test_the_session_of_the_docs(tmp_path):
    """The session of docs/chat.md, typed again, shows the same, without the speeds."""
    (shown,) = re.findall(r"```console\n\$ sfs chat\n(.*?)```", (ROOT / "docs" / "chat.md").read_text(), re.DOTALL)
    seen = ""
    with Terminal(tmp_path) as terminal:
        for prompt, line in re.findall(r"^(> |\.\.\. )(.+)$", shown, re.MULTILINE):
            seen += terminal.wait_for(prompt)
            terminal.press(line + "\n")
        assert terminal.program.wait(20) == 0
        seen += terminal.wait_for("/quit\n")
    assert re.sub(r"[\d,]+\.\d tokens/s", "... tokens/s", seen) == shown
