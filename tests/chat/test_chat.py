"""The chat: history, settings, the effect and refusals of each command, and its output in a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfs_triton.chat import terminal as chat_terminal
from sfs_triton.chat.commands import COMMANDS, Action, label, parse, perform
from sfs_triton.chat.conversation import Chat, ContextOverflow, Settings, Turn, read_messages
from sfs_triton.chat.terminal import ChatTerminal, InputHistory, printable, printable_json
from sfs_triton.decoding.caching import RegionCache
from sfs_triton.decoding.samplers import FixedSteps, SlowFast, Threshold
from sfs_triton.errors import ArgumentError, NumericalFault
from sfs_triton.scheduling.handles import Stream
from sfs_triton.scheduling.run import Run
from tests.support.paths import ROOT

HOSTILE = "\x1b[2J\x9b31mred\x07\x7f\u202etxet\u2028\r\n\tfine é"
CLEAN = "�[2J�31mred���txet�\n\tfine é"


@pytest.fixture(autouse=True)
def interruptible():
    """Interrupts as at a terminal: what a shell starts in the background ignores them, and so does all it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def chat(embedded) -> Chat:
    return Chat(embedded, Settings(gen_length=32))


def ask(chat: Chat, text: str) -> str:
    with chat.say(text) as turn:
        for _ in turn:
            pass
    return turn.answer.text


def do(chat: Chat, line: str) -> str:
    return perform(chat, parse(line))


def turn_text(role: str, content: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


# Turns


def test_turns_go_through_the_template(chat):
    """The ids that the engine gets are those of the template, written out here, around all that was said before."""
    chat.set_system("Be brief.")
    said = "<|startoftext|>" + turn_text("system", "Be brief.")
    for message in ("Tom has 12 apples.", "How many are 7 * 8?", "And now?"):
        answer = ask(chat, message)
        made = chat.last.generation
        said += turn_text("user", message)
        assert made.canvas[: made.prompt_length] == chat.engine.text.encode(said + ANSWER)
        assert made.tokens == chat.engine.generate(chat.messages[:-1], gen_length=32).tokens
        said += turn_text("assistant", answer.strip())
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_text_settles_in_order(chat):
    chat.change(sampler=FixedSteps(block_length=8))
    with chat.say("Tom has 12 apples and buys 5 more. How many apples does Tom have?") as turn:
        texts = [turn.text for _ in turn]
    assert len(texts) == 32 == turn.steps and texts[-1] == turn.answer.text == turn.text
    assert len(set(texts)) > 4
    assert all(late.startswith(early) for early, late in zip(texts, texts[1:], strict=False))


def test_settings_reach_the_engine(chat):
    sampler = SlowFast(temperature=0.8, eos_stop=True)
    chat.change(sampler=sampler, cache=RegionCache(capacity=64), gen_length=24, seed=5)
    for seed in (5, 6):
        ask(chat, "1,2,3,4")
        assert chat.last.settings.seed == seed
        expected = chat.engine.generate(
            chat.messages[:-1], gen_length=24, sampler=sampler, cache=RegionCache(capacity=64), seed=seed
        )
        assert chat.last.generation.tokens == expected.tokens
    assert chat.settings.seed == 7


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_turn_that_is_left_changes_nothing(chat, steps):
    ask(chat, "first")
    before = chat.messages
    with pytest.raises(KeyboardInterrupt), chat.say("second") as turn:
        if steps == 0:
            raise KeyboardInterrupt
        for frame in turn:
            if frame.step + 1 == steps:
                raise KeyboardInterrupt
    assert turn.answer is None and next(turn, None) is None and turn.steps == steps
    assert chat.messages == before and chat.totals.answers == 1 and chat.totals.stopped == 1
    assert chat.retry().message == "second"
    with chat.retry() as again:
        list(again)
    assert chat.messages[:-2] == before and chat.messages[-2]["content"] == "second"


def test_an_open_turn_is_closed_by_the_next(chat):
    first = chat.say("first")
    next(first)
    ask(chat, "second")
    assert list(first) == [] and [m for m, _ in chat.exchanges] == ["second"]


def test_retry_replaces_the_last_answer(chat):
    ask(chat, "first")
    before = ask(chat, "What is 3 + 4?")
    chat.change(sampler=SlowFast(temperature=2.0), seed=11)
    with chat.retry() as turn:
        next(turn)
        assert chat.exchanges[-1] == ("What is 3 + 4?", before)
    assert chat.exchanges[-1] == ("What is 3 + 4?", before), "a retry that is stopped leaves the old answer"
    with chat.retry() as turn:
        list(turn)
    assert [m for m, _ in chat.exchanges] == ["first", "What is 3 + 4?"]
    assert chat.exchanges[-1][1] == turn.answer.text != before and turn.settings.seed == 12


def test_a_turn_without_room_drops_nothing(chat):
    chat.change(sampler=FixedSteps(steps=2), gen_length=64)
    codec, text = chat.engine.text, "12 apples " * 30
    for _ in range(3):
        ask(chat, text)
    before = chat.messages
    used = len(codec.encode(codec.render([*before, {"role": "user", "content": text}])))
    over = used + 64 - 512
    words = f"{over} tokens over: {used} .*gen_length=64.* 512 .*/reset.*--forget"
    with pytest.raises(ContextOverflow, match=words) as refusal:
        chat.say(text)
    assert refusal.value.over == over > 0 and chat.messages == before
    chat.change(forget=True)
    with chat.retry() as turn:  # a message that was refused can be tried again
        next(turn)
        assert (turn.over, turn.forgotten) == (over, 1) and chat.messages == before
    assert chat.messages == before, "what is stopped forgets nothing"
    with chat.retry() as turn:
        list(turn)
    assert chat.messages[:-2] == before[2:] and turn.answer.forgotten == 1


def test_a_message_that_no_forgetting_makes_room_for(chat):
    chat.change(forget=True)
    ask(chat, "first")
    with pytest.raises(ContextOverflow, match="tokens over.*say less"):
        chat.say("12 apples " * 400)
    assert len(chat.exchanges) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [(" \n", "the message is empty"), ("a\udcff", "message is not valid text"), ("a <|mdm_mask|>", "mask token")],
)
def test_bad_messages_are_refused(chat, text, words):
    with pytest.raises(ArgumentError, match=words):
        chat.say(text)
    assert chat.messages == [] and chat.settings.seed == 0


def test_checkpoints_without_text_are_refused(engines, embedded, monkeypatch):
    with pytest.raises(ArgumentError, match="tokenizer.json"):
        Chat(engines["llada-mha"])
    monkeypatch.setattr(embedded.text, "template", None)
    with pytest.raises(ArgumentError, match="chat template"):
        Chat(embedded)


def test_a_template_may_refuse(embedded, monkeypatch):
    chat = Chat(embedded)
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}hi"
    monkeypatch.setattr(embedded.text, "template", picky)
    with pytest.raises(ArgumentError, match="template refused this: no system here"):
        chat.set_system("You are.")
    assert chat.system == ""


# Commands


def test_every_command_is_parsed(tmp_path):
    assert parse("hello /there") == Action("say", "hello /there")
    assert parse("//etc/passwd") == Action("say", "/etc/passwd")
    for name in ("help", "reset", "undo", "retry", "history", "stats", "quit"):
        assert parse(f"/{name}") == parse(f"/{name}  ") == Action(name)
    assert parse("/sampler slowfast preset=fast tau_high=0.9") == Action(
        "sampler", ("slowfast", {"preset": "fast", "tau_high": 0.9})
    )
    assert parse("/sampler\ttop_k=none eos_stop=true").value == (None, {"top_k": None, "eos_stop": True})
    assert parse("/cache region capacity=64").value == ("region", {"capacity": 64})
    assert parse("/length 64").value == 64 and parse("/seed").value is None
    assert parse("/system  Be brief.\nVery. ").value == "Be brief.\nVery."
    assert parse('/system ""').value == "" and parse("/system").value is None
    assert parse("/watch on").value is True and parse("/forget off").value is False
    assert parse(f"/save {tmp_path}/a b.jsonl").value == tmp_path / "a b.jsonl"
    assert parse("/load ~/x").value == Path.home() / "x"


def test_commands_change_what_they_say(chat):
    assert do(chat, "/sampler threshold tau=0.8") == "sampler threshold tau=0.8"
    assert do(chat, "/sampler") == (
        "sampler threshold temperature=0.0 top_p=none top_k=none cfg_scale=0.0 eos_stop=false tau=0.8 block_length=32 "
        "steps=none"
    )
    assert chat.settings.sampler == Threshold(tau=0.8)
    assert "tau=0.5" in do(chat, "/sampler tau=0.5") and chat.settings.sampler == Threshold(tau=0.5)
    assert do(chat, "/cache dual") == "cache dual" and chat.settings.cache.name == "dual"
    do(chat, "/cache none")
    assert do(chat, "/sampler slowfast preset=fast tau_high=0.9") == "sampler slowfast (fast) tau_high=0.9"
    assert chat.settings.sampler == SlowFast.preset("fast", tau_high=0.9)
    everything = do(chat, "/sampler")
    assert everything.startswith("sampler slowfast preset=fast ") and "tau_high=0.9 " in everything
    do(chat, "/" + everything)  # what is shown can be typed
    assert chat.settings.sampler == SlowFast.preset("fast", tau_high=0.9)
    assert label(chat.settings.sampler, chat.settings.cache) == "slowfast (fast) tau_high=0.9, cache none"
    do(chat, "/sampler preset=llada-reference")
    assert chat.settings.sampler == SlowFast.preset("llada-reference")
    assert do(chat, "/sampler vanilla") == "sampler vanilla" and chat.settings.sampler == FixedSteps()
    assert do(chat, "/sampler fixed steps=8") == "sampler fixed steps=8"
    assert do(chat, "/sampler slowfast") and "capacity=64" in do(chat, "/cache region capacity=64")
    assert "capacity=64" in do(chat, "/cache look_ahead=4") and chat.settings.cache.look_ahead == 4
    assert do(chat, "/length 16") == do(chat, "/length") == "gen_length 16" and chat.settings.gen_length == 16
    assert do(chat, "/seed 9") == do(chat, "/seed") == "seed 9" and chat.settings.seed == 9
    assert do(chat, "/forget on") == do(chat, "/forget") == "forget on" and chat.settings.forget
    assert do(chat, "/system") == "no system message"
    assert do(chat, "/system Be brief.") == "system: Be brief." and chat.messages[0]["content"] == "Be brief."
    assert do(chat, '/system ""') == "no system message" and chat.messages == []
    assert all(f"/{name}" in do(chat, "/help") for name in COMMANDS)


def test_commands_on_the_history(chat):
    assert do(chat, "/history") == "nothing has been said"
    assert "last answer: none" in do(chat, "/stats")
    do(chat, "/system Be brief.")
    answers = [ask(chat, text) for text in ("one", "two")]
    made = chat.last.generation
    assert do(chat, "/history").splitlines()[:2] == ["system: Be brief.", "user: one"]
    last, session = do(chat, "/stats").splitlines()
    assert last.startswith(f"last answer: NFE {made.nfe} | TPF {made.tokens_per_forward:.2f} | ")
    assert last.endswith(f"{made.prompt_length + len(made.tokens)} of 512 positions")
    assert f"NFE {chat.totals.nfe} | " in session and session.endswith("2 answered, 0 not")
    assert chat.totals.nfe > made.nfe
    assert do(chat, "/undo") == "forgot the last exchange; 1 exchange left"
    assert chat.exchanges == [("one", answers[0])]
    assert do(chat, "/reset") == "forgot 1 exchange; the system message stays"
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/", ("'/'", "/help")),
        ("/greet", ("'/greet'", "/help")),
        ("/\x1b[2J", (r"'/\x1b[2J'",)),
        *((f"/{name} now", (f"/{name}", "'now'")) for name in ("help", "reset", "undo", "retry", "history", "stats")),
        ("/quit now", ("/quit", "'now'")),
        ("/undo", ("/undo", "no exchange")),
        ("/sampler greedy", ("/sampler", "'greedy'", "slowfast")),
        ("/sampler threshold tau", ("/sampler", "'tau'", "key=value")),
        ("/sampler threshold tau=", ("tau=''",)),
        ("/sampler threshold tau=nan", ("/sampler", "tau=nan")),
        ("/sampler threshold tau=0.8 tau=0.9", ("/sampler", "'tau=0.9'", "again")),
        ("/sampler threshold k_max=4", ("/sampler", "k_max", "4", "threshold", "tau")),
        ("/sampler slowfast preset=draft", ("/sampler", "preset='draft'", "fast")),
        ("/sampler slowfast name=mine", ("/sampler", "'name=mine'")),
        ("/sampler vanilla steps=4", ("/sampler", "steps", "4", "vanilla")),
        ("/sampler threshold block_length=5", ("gen_length=32", "block_length=5")),
        ("/sampler k_max=" + "9" * 30, ("/sampler", "k_max=999", "beyond")),
        ("/sampler top_k=2.5", ("/sampler", "top_k=2.5")),
        ("/cache disk", ("/cache", "'disk'", "region")),
        ("/cache dual", ("/cache", "'dual'", "SlowFast")),
        ("/cache none capacity=4", ("/cache", "capacity", "4", "none")),
        ("/cache region capacity=-4", ("/cache", "capacity=-4")),
        ("/length many", ("/length", "'many'")),
        ("/length -3", ("/length", "gen_length=-3")),
        ("/length 512", ("/length", "gen_length=512", "512 positions")),
        ("/length " + "9" * 5000, ("/length", "999")),
        ("/seed -1", ("/seed", "seed=-1")),
        ("/seed 1.5", ("/seed", "'1.5'")),
        ("/system a\udcff", ("/system", "system message", "not valid text")),
        ("/system <|mdm_mask|>", ("/system", "mask token")),
        ("/forget maybe", ("/forget", "'maybe'")),
        ("/watch 1", ("/watch", "'1'")),
        ("/save", ("/save", "file")),
        ("/save /", ("/save", "'/'")),
        ("/save /no/such/folder/x", ("/save", "/no/such/folder/x", "No such file")),
        ("/save a\0b", ("/save", r"a\x00b")),
        ("/load", ("/load", "file")),
        ("/load /", ("/load", "'/'")),
        ("/load /dev/zero", ("/load", "/dev/zero", "not a file")),
        ("/load /no/such/file", ("/load", "/no/such/file")),
        ("/load a\0b", ("/load", r"a\x00b")),
    ],
)
def test_bad_commands_are_refused_by_name(chat, line, words):
    before = chat.settings
    with pytest.raises(ArgumentError) as refusal:
        do(chat, line)
    for word in words:
        assert word in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert chat.settings == before and chat.messages == []


# Files


def test_saved_conversations_come_back(chat, tmp_path):
    file = tmp_path / "talk.jsonl"
    chat.set_system("Sei kurz – \u2028 é")
    chat.exchanges = [("one\ntwo", HOSTILE), ("three", "")]
    assert do(chat, f"/save {file}") == f"wrote 5 messages to {file}"
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == chat.messages
    other = Chat(chat.engine, Settings(gen_length=32))
    ask(other, "something else")
    said = do(other, f"/load {file}")
    assert said == f"loaded 5 messages from {file}: {other.count()} of 512 positions"
    assert other.messages == chat.messages
    with pytest.raises(ArgumentError, match="needs a file"):
        do(other, "/save ")
    assert list(tmp_path.iterdir()) == [file]


def message(role: str, content: str = "x") -> str:
    return json.dumps({"role": role, "content": content})


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["nonsense"], ("line 1", "not JSON")),
        (["[" * 100_000], ("line 1", "not JSON")),
        (["[]"], ("line 1", "list", "object")),
        (['{"role": "user"}'], ("line 1", "'role'", "'content'")),
        (['{"role": "user", "content": "x", "name": "y"}'], ("line 1", "'name'")),
        (['{"role": "user", "content": 5}'], ("line 1", "content=5")),
        (['{"role": ["user"], "content": "x"}'], ("line 1", "role=['user']")),
        ([message("tool")], ("line 1", "role='tool'")),
        (['{"role": "user", "content": "\\ud800"}'], ("line 1", "not valid text")),
        ([message("assistant")], ("line 1", "'assistant'", "'user' is due")),
        ([message("user"), message("user")], ("line 2", "'user'", "'assistant' is due")),
        ([message("user"), message("assistant"), message("system")], ("line 3", "system")),
        ([message("user"), "", message("assistant"), message("user")], ("no answer",)),
        ([message("user", "<|mdm_mask|>"), message("assistant")], ("mask token",)),
    ],
)
def test_broken_files_are_refused(chat, tmp_path, lines, words):
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(lines))
    ask(chat, "first")
    before = chat.messages
    with pytest.raises(ArgumentError) as refusal:
        do(chat, f"/load {file}")
    for word in ("/load", str(file), *words):
        assert word in str(refusal.value)
    assert chat.messages == before


def test_files_that_are_no_text_or_too_large(chat, tmp_path, monkeypatch):
    file = tmp_path / "talk.jsonl"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match="talk.jsonl' cannot be read"):
        chat.load(file)
    monkeypatch.setattr("sfs_triton.chat.conversation.LARGEST_FILE", 10)
    file.write_text(message("system"))
    with pytest.raises(ArgumentError, match="larger than 10 bytes"):
        chat.load(file)
    file.write_text("\n")
    assert read_messages(file) == ("", [])


def test_a_failed_save_leaves_the_old_file(chat, tmp_path, monkeypatch):
    file = tmp_path / "talk.jsonl"
    file.write_text("old")

    def fail(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ArgumentError, match="talk.jsonl' cannot be written: No space left"):
        chat.save(file)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


# Faces


class Keyboard(io.TextIOWrapper):
    """Scripted keyboard input that ignores the echo."""

    def __init__(self, text: str):
        super().__init__(io.BytesIO(text.encode("utf-8", "surrogateescape")), encoding="utf-8")

    def isatty(self) -> bool:
        return True


def typed(chat: Chat, text: str, monkeypatch, **options) -> int:
    monkeypatch.setattr(sys, "stdin", Keyboard(text))
    return ChatTerminal(chat, model="embedded", **options).run()


def sfs_chat(*arguments: str, stdin: str | bytes):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from sfs_triton.cli import main as cli

    options = ("--device", "cpu", "--dtype", "float32", "--gen-length", "32")
    return CliRunner().invoke(cli.app, ["chat", *options, *arguments], input=stdin)


def test_a_pipe_gets_an_answer_a_line(chat):
    answers = [ask(chat, text) for text in ("1,2,3", "go\non", "/x")]
    result = sfs_chat(stdin="1,2,3\n\n   \ngo\\\non\n//x")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(answer + "\n" for answer in answers)
    assert result.stderr.count("NFE ") == 3 == result.stderr.count("\n") and "\x1b" not in result.stderr


def test_a_pipe_gets_commands_and_refusals_on_stderr(chat):
    answer = ask(chat, "1,2,3")
    result = sfs_chat(stdin=b"/length 900\n\xff\xfe\n1,2,3\n/history\n/quit\nnever read\n")
    assert result.exit_code == 2 and result.stdout == answer + "\n"
    lines = result.stderr.splitlines()
    assert lines[0] == "error: /length: gen_length=900: the model has only 512 positions"
    assert lines[1].startswith("error: this line is not valid text") and lines[3] == "user: 1,2,3"
    assert sfs_chat(stdin="").exit_code == 0


def test_json_is_an_object_an_answer(chat):
    answer = ask(chat, "1,2,3")
    made = chat.last.generation
    result = sfs_chat("--json", "--seed", "4", stdin="1,2,3\n<|mdm_mask|>\n/sampler vanilla\n/retry\n")
    assert result.exit_code == 2
    first, refusal, second = map(json.loads, result.stdout.splitlines())
    assert (first["text"], first["tokens"], first["nfe"]) == (answer, made.tokens, made.nfe)
    assert first["model"] == "embedded" and first["message"] == "1,2,3" and first["seed"] == 4
    assert first["sampler"]["kind"] == "slowfast" and first["cache"] == {"kind": "none"}
    assert first["tokens_per_forward"] == made.tokens_per_forward and first["tokens_per_second"] > 0
    assert list(refusal) == ["error"] and "mask token" in refusal["error"]
    assert "mask token" in second["error"], "the last message is the refused one"


def test_json_says_what_generate_says(embedded):
    """The same facts under the same names, from one place."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from sfs_triton.cli import main as cli

    options = ["--device", "cpu", "--dtype", "float32", "--gen-length", "32", "--json", "--cache", "region"]
    alone = CliRunner().invoke(cli.app, ["generate", "1,2,3", *options])
    talked = CliRunner().invoke(cli.app, ["chat", *options], input="1,2,3\n")
    one, other = json.loads(alone.stdout), json.loads(talked.stdout)
    assert set(other) - set(one) == {"message", "forgotten"} and set(one) <= set(other)
    for facts in (one, other):
        assert facts.pop("seconds") > 0 and facts.pop("tokens_per_second") > 0
    assert all(other[name] == value for name, value in one.items())
    assert one["sampler"]["kind"] == "slowfast" and one["cache"]["capacity"] == 128


def test_input_that_no_context_has_room_for(chat, monkeypatch):
    """It is refused before it is encoded, and later input is still read."""
    encoded = []
    monkeypatch.setattr(type(chat.engine.text), "encode", lambda codec, text: encoded.append(len(text)) or [0])
    with pytest.raises(ArgumentError, match=r"the message has 40,000 characters, over 32,768: .* 512 positions"):
        chat.say("a" * 40_000)
    with pytest.raises(ArgumentError, match="the system message has 40,000 characters"):
        chat.set_system("a" * 40_000)
    assert max(encoded, default=0) < 1000
    monkeypatch.undo()
    monkeypatch.setattr(chat_terminal, "LARGEST_MESSAGE", 100)
    result = sfs_chat("--gen-length", "8", stdin="a" * 1000 + "\n" + "b\\\n" * 200 + "\n/seed\n/quit\n")
    said = result.stderr.splitlines()
    assert result.exit_code == 2 and said[0] == "error: this line is longer than 100 bytes"
    assert said[1:] == ["error: this message is longer than 100 characters", "seed 0"]


class Screen(io.StringIO):
    """A terminal's."""

    def isatty(self) -> bool:
        return True


class Typist:
    """Types lines at a terminal, which echoes them."""

    def __init__(self, lines: list[str], screen: Screen):
        self.lines, self.screen, self.encoding = iter(lines), screen, "utf-8"

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        line = next(self.lines, "")
        self.screen.write(line)
        return line


def test_the_session_of_the_docs(embedded, monkeypatch, tmp_path):
    """Typing the session of docs/chat.md again gives the same output, speeds left out."""
    (shown,) = re.findall(r"```console\n\$ sfs chat\n(.*?)```", (ROOT / "docs" / "chat.md").read_text(), re.DOTALL)
    screen, stopped = Screen(), int(re.search(r"stopped after step (\d+)", shown)[1])
    lines = [line[2:] + "\n" for line in re.findall(r"^> .+$", shown, re.MULTILINE)]
    asked = [more[4:] + "\n" for more in re.findall(r"^\.\.\. .+$", shown, re.MULTILINE)]
    typist = Typist([lines[0], *asked, *lines[1:]], screen)
    go_on = Turn.__next__

    def pressed(turn: Turn):
        frame = go_on(turn)
        if turn.steps == stopped:
            screen.write("^C")
            signal.raise_signal(signal.SIGINT)
        return frame

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Turn, "__next__", pressed)
    for name, stream in (("stdin", typist), ("stdout", screen), ("stderr", screen)):
        monkeypatch.setattr(sys, name, stream)
    assert ChatTerminal(Chat(embedded), model="embedded").run() == 0
    said = re.sub(r"[\d,]+\.\d tokens/s", "... tokens/s", screen.getvalue())
    assert [line.rstrip() for line in said.splitlines()] == [line.rstrip() for line in shown.splitlines()]


def test_options_of_the_command(tmp_path):
    result = sfs_chat(
        "--system", "Be brief.", "--sampler", "threshold", "--tau", "0.5", stdin="hi\n/history\n/sampler\n"
    )
    assert result.exit_code == 0 and "system: Be brief.\nuser: hi" in result.stderr and "tau=0.5" in result.stderr
    for arguments, words in (
        (("--tau", "0.5"), ("--tau", "threshold")),
        (("--delay", "nan"), ("--delay nan",)),
        (("--gen-length", "512"), ("gen_length=512",)),
        (("--seed", "-1"), ("seed=-1",)),
        (("--system", "<|mdm_mask|>"), ("mask token",)),
        (("--history", str(tmp_path)), ("--history", str(tmp_path))),
        (("--history", str(tmp_path / "no" / "file")), ("--history", "No such file")),
        (("--model", str(tmp_path)), ("config.json",)),
    ):
        result = sfs_chat(*arguments, stdin="hi\n")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert all(word in result.stderr for word in words) and result.stderr.count("\n") == 1


def test_a_turn_over_the_context_says_so():
    turns, options = ("12 apples " * 40 + "\n") * 4, ("--gen-length", "128", "--sampler", "fixed", "--steps", "2")
    result = sfs_chat(*options, stdin=turns)
    assert result.exit_code == 2 and "tokens over" in result.stderr and "--forget" in result.stderr
    assert "forgets" not in result.stderr
    result = sfs_chat(*options, "--forget", stdin=turns + "/history\n")
    assert result.exit_code == 0 and "tokens over: forgets the 1 oldest exchange\n" in result.stderr
    assert result.stderr.count("user: ") < 4


def test_watching_goes_to_stderr(chat, monkeypatch, capsys):
    pytest.importorskip("rich")
    answer = ask(chat, "1,2,3")
    assert typed(Chat(chat.engine, chat.settings), "/watch on\n1,2,3\n/watch\n", monkeypatch, delay=0.0) == 0
    out, err = capsys.readouterr()
    assert out == answer + "\n" and "masks left 0/32" in err and err.count("watch on") == 2


def test_a_terminal_shows_text_as_it_settles(chat, monkeypatch, capsys):
    question = "Tom has 12 apples and buys 5 more. How many apples does Tom have?"
    chat.change(sampler=FixedSteps(block_length=8))
    answer = ask(Chat(chat.engine, chat.settings), question)
    written = []
    monkeypatch.setattr("sfs_triton.chat.terminal._write", lambda stream, text: written.append((stream, text)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal = ChatTerminal(chat, model="embedded")
    terminal._turn(lambda: chat.say(question))
    pieces = [text for stream, text in written if stream is sys.stdout and text]
    assert "".join(pieces) == answer + "\n" and len(pieces) > 4


def test_interrupts_keep_the_session(chat, monkeypatch, capsys):
    """An interrupt from within a frame callback, and a signal, which takes effect at the end of its step."""
    render = pytest.importorskip("sfs_triton.view.canvas")
    hits = []

    def raising(watcher, frame):
        if frame.step == 2:
            raise KeyboardInterrupt

    def signalled(watcher, frame):
        if frame.step == 3:
            hits.append(frame.step)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    for callback, steps in ((raising, 3), (signalled, 4)):
        monkeypatch.setattr(render.Watcher, "__call__", callback)
        chat.change(sampler=FixedSteps())
        assert typed(chat, "1,2,3\n/history\n/stats\n", monkeypatch, watch=True) == 0
        out, err = capsys.readouterr()
        assert out == "" and f"stopped after step {steps}; the unfinished answer is not kept" in err
        assert "nothing has been said" in err and "0 answered" in err
        assert signal.getsignal(signal.SIGINT) is before
    assert hits == [3]
    monkeypatch.setattr(render.Watcher, "__call__", lambda *_: None)
    assert typed(chat, "/retry\n/history\n", monkeypatch, watch=True, as_json=True) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["message"] == "1,2,3" and "user: 1,2,3" in err


def test_a_second_interrupt_does_not_wait_for_the_step(chat, monkeypatch, capsys):
    advance, steps = Run.advance, []

    def stuck(run):
        steps.append(run)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        return advance(run)

    monkeypatch.setattr(Run, "advance", stuck)
    began = time.monotonic()
    assert typed(chat, "1,2,3\n4,5,6\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert time.monotonic() - began < 20 and "stopped after step 2" in err
    assert [m for m, _ in chat.exchanges] == ["4,5,6"] and out == chat.exchanges[0][1] + "\n"


def test_interrupts_at_the_prompt_leave_when_repeated(chat, monkeypatch, capsys):
    presses = iter([KeyboardInterrupt, "/seed", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def line(self, prompt):
        event = next(presses)
        if event is KeyboardInterrupt:
            raise event
        return event

    monkeypatch.setattr(ChatTerminal, "_line", line)
    assert typed(chat, "", monkeypatch) == 0
    err = capsys.readouterr().err
    assert err.count("Ctrl-C again, or Ctrl-D, leaves") == 2 and "seed 0" in err
    assert next(presses) == "never read"


def test_an_interrupt_ends_a_pipe(chat, monkeypatch, capsys):
    render = pytest.importorskip("sfs_triton.view.canvas")
    monkeypatch.setattr(render.Watcher, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    keyboard = Keyboard("1,2,3\n4,5,6\n")
    monkeypatch.setattr(keyboard, "isatty", lambda: False)
    monkeypatch.setattr(sys, "stdin", keyboard)
    assert ChatTerminal(chat, model="embedded", watch=True).run() == 130
    assert capsys.readouterr().out == "" and chat.exchanges == []


def test_failures_keep_the_session(chat, monkeypatch, capsys):
    result, failures = Stream.result, [NumericalFault("row 0 at step 3"), RuntimeError("device \x1b[2J lost")]

    def fail(self):
        if failures:
            raise failures.pop(0)
        return result(self)

    monkeypatch.setattr(Stream, "result", fail)
    assert typed(chat, "1,2\n3,4\n5,6\n", monkeypatch) == 0
    err = capsys.readouterr().err
    assert "error: row 0 at step 3" in err and "error: RuntimeError: device �[2J lost" in err
    assert [m for m, _ in chat.exchanges] == ["5,6"] and chat.totals.stopped == 2


def test_hostile_text_reaches_no_terminal(chat, monkeypatch, capsys, tmp_path):
    assert printable(HOSTILE) == CLEAN
    assert printable("👩\u200d💻 می\u200cخواهم [bold]x[/bold]") == "👩\u200d💻 می\u200cخواهم [bold]x[/bold]"
    shown = printable_json({"text": HOSTILE + "\U000e0041"})
    assert json.loads(shown) == {"text": HOSTILE + "\U000e0041"} and not set(shown) & set(
        "\x1b\x9b\x7f\u202e\U000e0041"
    )

    file = tmp_path / "talk.jsonl"
    file.write_text(message("user", HOSTILE) + "\n" + message("assistant", HOSTILE))
    monkeypatch.setattr(chat.engine.text, "decode", lambda ids: HOSTILE)
    lines = (
        f"/load {file}\n/history\nhi\n/{HOSTILE}\n/load {HOSTILE}\n/system {HOSTILE}\n/sampler {HOSTILE}={HOSTILE}\n"
    )
    for options in ({}, {"as_json": True}):
        typed(chat, lines, monkeypatch, **options)
        out, err = capsys.readouterr()
        assert not {c for c in out + err if c < " " and c not in "\n\t"}
        assert not set(out + err) & set("\x7f\x9b\u202e\u2028") and "red" in out and "red" in err


def test_encodings_without_a_character(chat, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(chat.engine.text, "decode", lambda ids: "é")
    assert typed(chat, "hi\n", monkeypatch) == 0
    assert out.buffer.getvalue() == b"?\n"


def test_history_files_hold_typed_lines_only(chat, monkeypatch, capsys, tmp_path):
    file = tmp_path / "lines"
    file.write_text("old\n")
    assert typed(chat, "/seed 3\n\n/seed\\\n4\n", monkeypatch, history=InputHistory(file)) == 0
    assert file.read_text() == "old\n/seed 3\n/seed\\\n4\n"
    new = tmp_path / "new"
    history = InputHistory(new)
    assert new.stat().st_mode & 0o777 == 0o600
    new.unlink()
    new.mkdir()
    assert typed(chat, "/seed\n/seed\n", monkeypatch, history=history) == 0
    assert capsys.readouterr().err.count("--history") == 1, "said once, then without"
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sfs_triton.cli", "chat", "--gen-length", "16", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=b"hi\n", capture_output=True, timeout=60)
    assert done.returncode == 0 and list(home.iterdir()) == []


class Terminal:
    """A program in a pseudo-terminal of its own, as its foreground process."""

    def __init__(self, *command: str):
        import fcntl
        import pty
        import termios

        self.keys, screen = pty.openpty()
        self.seen = ""
        self.program = subprocess.Popen(
            command,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(screen)

    def wait_for(self, text: str, seconds: float = 40.0) -> str:
        """Read on until ``text`` is there, beyond what earlier calls waited for. Returns what came before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.keys], [], [], left)[0]
            assert ready, f"{text!r} did not come; there was {self.seen!r}"
            self.seen += os.read(self.keys, 4096).decode(errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before

    def press(self, keys: str) -> None:
        time.sleep(0.3)  # Python's readline misses a signal that comes just after it has written its prompt
        os.write(self.keys, keys.encode())

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.keys)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_real_terminal():
    command = [sys.executable, "-m", "sfs_triton.cli", "chat", "--device", "cpu", "--gen-length", "384"]
    terminal = Terminal(*command, "--sampler", "vanilla", "--block-length", "8")
    try:
        terminal.wait_for("embedded: vanilla block_length=8, cache none, 384 of 512 positions an answer")
        terminal.wait_for("> ")
        terminal.press("Tom has 12 apples and buys 5 more. How many apples does Tom have?\n")
        terminal.wait_for("have?\n")
        terminal.wait_for(" ")  # the answer has begun to settle
        terminal.press("\x03")
        terminal.wait_for("\nstopped after step ")
        assert 8 <= int(terminal.wait_for("; ")) < 384
        terminal.wait_for("the unfinished answer is not kept in the history\n> ")
        terminal.press("/history\n")
        terminal.wait_for("nothing has been said\n> ")
        terminal.press("/sampler slowfast\n/length 32\n1,2,3\n")
        terminal.wait_for("NFE ")
        terminal.wait_for("> ")
        terminal.press("\x03")
        terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves\n> ")
        terminal.press("\x04")
        assert terminal.program.wait(20) == 0
    finally:
        terminal.close()
