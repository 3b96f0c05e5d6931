"""Chat templates within their limits, and the process that renders them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from sfs_triton import ArgumentError
from sfs_triton.text import chat_template as of_templates
from sfs_triton.text.chat_template import Renderer, TemplateError
from sfs_triton.text.codec import TextCodec

VARIABLES = {"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": True}
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='xy') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.fixture
def renderer():
    made = Renderer(seconds=0.5)
    yield made
    made.close()


def test_values_and_text(renderer):
    said = "é \n \ud800 𝔘 {{ 1 }}"
    variables = {"messages": [{"role": "user", "content": said}], "bos_token": "<s>"}
    assert renderer.render("{{ bos_token }}{{ messages[0]['content'] }}", variables) == "<s>" + said
    assert renderer.render("{% if true %}\n  {{ missing }}x\n{% endif %}", {}) == "  x\n"


@pytest.mark.parametrize(
    "template", [FOREVER, "{{ lipsum(n=10 ** 7) }}", "{{ (range(99999)|list * 100)|sort|join }}"], ids=str
)
def test_a_template_that_never_ends(renderer, template):
    renderer.render("", {})
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"more than 0\.5 s|out of memory|wrote more"):
        renderer.render(template, VARIABLES)
    assert time.monotonic() - began < 30
    assert renderer.render("{{ messages[0].content }}", VARIABLES) == "hello"


@pytest.mark.parametrize("template", [DOUBLING, "{{ 'x' * 10 ** 10 }}", "{{ '%9999999999d' % 1 }}"], ids=str)
def test_a_template_that_fills_the_memory(template):
    renderer = Renderer(seconds=60)
    with pytest.raises(TemplateError, match="out of memory"):
        renderer.render(template, VARIABLES)
    assert renderer.render("still {{ 1 + 1 }}", {}) == "still 2"
    renderer.close()


def test_a_template_that_writes_too_much():
    renderer = Renderer(seconds=60)
    with pytest.raises(TemplateError, match="wrote more than 16777216 characters"):
        renderer.render("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", {})
    renderer.close()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion|parser"),
    ],
)
def test_refusals(renderer, template, why):
    with pytest.raises(TemplateError, match=why):
        renderer.render(template, VARIABLES)


def test_what_json_does_not_hold(renderer):
    with pytest.raises(TemplateError, match="nothing but what JSON holds"):
        renderer.render("x", {"messages": [{"content": object()}]})


def test_a_process_that_was_killed_is_started_again(renderer):
    renderer.render("x", {})
    first = renderer._process.pid
    os.kill(first, signal.SIGKILL)
    renderer._process.wait()
    assert renderer.render("{{ 1 }}", {}) == "1"
    assert renderer._process.pid != first


def test_one_process_for_all(renderer):
    renderer.render("x", {})
    first = renderer._process.pid
    assert [renderer.render("{{ n }}", {"n": n}) for n in range(20)] == [str(n) for n in range(20)]
    assert renderer._process.pid == first


def test_threads_get_their_own_answers():
    renderer, found = Renderer(seconds=60), {}

    def ask(number: int) -> None:
        found[number] = [renderer.render("{{ n }}-{{ i }}", {"n": number, "i": i}) for i in range(20)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"{n}-{i}" for i in range(20)] for n in range(4)}
    renderer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_copy_of_this_process_has_a_renderer_of_its_own():
    """The one that the package uses: with it a copy would read answers that are its parent's."""
    assert of_templates.render("{{ 1 }}", {}) == "1"
    mine = of_templates._renderer._process.pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = of_templates.render("{{ 2 }}", {})
            os.write(write, f"{text} {of_templates._renderer._process.pid}".encode())
            of_templates._renderer.close()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text, pid = pipe.read().split()
    os.waitpid(child, 0)
    assert text == "2" and int(pid) != mine
    assert of_templates.render("{{ 3 }}", {}) == "3" and of_templates._renderer._process.pid == mine


def test_no_process_is_an_error(renderer, monkeypatch):
    monkeypatch.setattr(of_templates, "get_executable", lambda: "/nowhere/python")
    with pytest.raises(TemplateError, match="no process to render it can be started"):
        renderer.render("x", {})
    monkeypatch.setattr(of_templates, "get_executable", lambda: sys.executable)
    monkeypatch.setattr(of_templates, "_RUN", "raise SystemExit(3)")
    with pytest.raises(TemplateError, match="does not start"):
        renderer.render("x", {})


def test_a_codec_says_which_messages(embedded, monkeypatch):
    monkeypatch.setattr(of_templates._renderer, "seconds", 0.5)
    codec = TextCodec(embedded.text.tokenizer, FOREVER, {})
    with pytest.raises(ArgumentError, match=r"chat template refused messages=.*more than 0\.5 s"):
        codec.render([{"role": "user", "content": "x"}])
