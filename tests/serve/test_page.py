"""The page at /, in a real browser: its requests, its drawing, its content policy, and its accessibility."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

if not os.environ.get("CI"):  # there, what is missing is an error
    pytest.importorskip("playwright", reason='the page\'s tests need playwright: pip install -e ".[test]"')
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")

from playwright.sync_api import Browser, Page, Request, expect, sync_playwright  # noqa: E402

from sfs_triton import FixedSteps, SlowFast  # noqa: E402
from sfs_triton.serve import app as app_module  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402
from tests.support.server import KEY, STORY, SUMS, TABLE, Running, serving, wait_for  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ENDED = "∎"
# Runs before any script of the page: what the policy stops, what the page says to screen readers, and what it is sent
# (of a stream the browser keeps no copy to ask for).
WATCH = """
window.violations = [];
window.said = [];
window.streams = [];
const given = window.fetch;
window.fetch = async (url, options) => {
  const response = await given(url, options);
  if (!response.ok || !url.endsWith("completions")) return response;
  const [one, other] = response.body.tee();
  const stream = { kind: JSON.parse(options.body).sampler?.kind };
  window.streams.push(stream);
  new Response(other).text().then((text) => (stream.text = text), () => null);
  return new Response(one, response);
};
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective}: ${e.blockedURI}`));
document.addEventListener("DOMContentLoaded", () => {
  const live = document.querySelectorAll("[role=status], [role=alert], [role=log], [aria-live]");
  const note = (records) => said.push(...records.map((record) => record.target.textContent));
  for (const region of live) new MutationObserver(note).observe(region, { childList: true, subtree: true });
});
"""
NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"the page's tests need one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Visit:
    """The page in a tab, and a person's actions on it."""

    def __init__(self, page: Page):
        self.page, self.find = page, page.locator
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("dialog", lambda dialog: (self.problems.append("a dialog: " + dialog.message), dialog.dismiss()))

    def set(self, name: str, value: str | bool) -> None:
        """Change a control by its name, side A's if there are two; folded sections are opened."""
        control = self.find(f"[name={name}]").first
        control.evaluate("e => { const fold = e.closest('details'); if (fold) fold.open = true; }")
        if isinstance(value, bool):
            control.set_checked(value)
        elif control.evaluate("e => e.localName") == "select":
            control.select_option(value)
        else:
            control.fill(value)

    def send(self, text: str) -> Request:
        """Type and press Enter; the request that this makes."""
        with self.page.expect_request("**/v1/chat/completions") as caught:
            self.find("#prompt").fill(text)
            self.find("#prompt").press("Enter")
        return caught.value

    def ask(self, text: str = SUMS, length: int = 32) -> dict:
        """Send, and wait for the end; the body that was sent."""
        self.set("max_tokens", str(length))
        request = self.send(text)
        self.finished()
        return request.post_data_json

    def finished(self) -> None:
        expect(self.find("#status")).to_contain_text("Finished", timeout=30_000)
        self.page.evaluate("new Promise(requestAnimationFrame)")  # after which all that came is drawn

    def cells(self, side: int = 0) -> list[str]:
        return self.find(".side").nth(side).locator(".cells > .cell").all_text_contents()

    def decided(self) -> int:
        return self.find(".side").first.locator(".cells > .cell:not(.mask)").count()

    def counter(self, name: str, side: int = 0) -> str:
        return self.find(".side").nth(side).locator(f"[data-of={name}]").text_content()

    def stub(self, *chunks: dict | str) -> None:
        """Answer requests in the server's place."""
        lines = [f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks]
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(content_type="text/event-stream", body="".join(lines)),
        )


@pytest.fixture
def visit(browser, server) -> Iterator[Visit]:
    with visiting(browser, server) as visit:
        yield visit


@contextmanager
def visiting(browser: Browser, server: Running, **options) -> Iterator[Visit]:
    """The page, which must not have broken its own policy, failed, or asked anything when it is left."""
    context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
    context.add_init_script(WATCH)
    visit = Visit(context.new_page())
    try:
        visit.page.goto(server.url + "/")
        if server.app.state.settings.api_key is None:
            expect(visit.find("#model")).to_have_text("embedded, context 512")
        yield visit
        assert visit.page.evaluate("violations") == [] and visit.problems == []
    finally:
        context.close()


def chunk(frame: dict | None = None, text: str = "") -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}}], **({"diffusion": frame} if frame else {})}


def start(length: int) -> dict:
    how = {"sampler": {"kind": "slowfast", "preset": "paper", "block_length": None}, "cache": {"kind": "none"}}
    rest = {"prompt_length": 3, "suffix_length": 0, "mask_id": 5, "eos_id": 1, "end_ids": [1, 4], "seed": 7}
    return {"type": "start", "response_length": length, **how, **rest}


def step(number: int, texts: dict[int, str], length: int, **changes) -> dict:
    committed = [{"position": p, "token": 9, "text": text, "confidence": 0.9} for p, text in texts.items()]
    fixed = {"block": 0, "cycle": 0, "settled": 0, "closed_from": None, "positions_forwarded": length}
    moving = {"phase": "slow", "span": [0, None], "masks_left": length - number - 1, "seconds": 0.1 * (number + 1)}
    return {"type": "step", "step": number, "committed": committed, **fixed, **moving, **changes}


def end(text: str, nfe: int) -> dict:
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "nfe": nfe}
    return {"type": "end", "finish_reason": "stop", "text": text, **counts, "tokens_per_forward": 2.0, "seconds": 0.5}


def frames_of(visit: Visit, kind: str = "slowfast") -> list[dict]:
    """The frames that the last request with such a sampler was answered with."""
    text = visit.page.evaluate("(kind) => streams.findLast((stream) => stream.kind === kind).text", kind)
    lines = text.splitlines()
    chunks = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]
    return [chunk["diffusion"] for chunk in chunks if "diffusion" in chunk]


def rebuilt(frames: list[dict], count: int) -> list[str | None]:
    """The canvas after ``count`` steps, as docs/serving-api.md says it is rebuilt."""
    opening, steps = frames[0], frames[1 : count + 1]
    canvas = [None] * opening["response_length"]
    for frame in steps:
        for commit in frame["committed"]:
            ended = commit["token"] in opening["end_ids"]
            canvas[commit["position"]] = ENDED if ended else commit["text"].replace("\n", "↵")
    closed = steps[-1]["closed_from"] if steps else None
    return canvas if closed is None else canvas[:closed] + [ENDED] * (len(canvas) - closed)


# ------------------------------------------------------------------------------------------------------------- chat


def test_type_and_send(visit, embedded):
    wanted = embedded.generate(TABLE, gen_length=64, sampler=SlowFast())
    visit.set("max_tokens", "64")
    visit.find("#prompt").fill("")
    visit.find("#prompt").press_sequentially(TABLE.splitlines()[0])
    for line in TABLE.splitlines()[1:]:
        visit.find("#prompt").press("Shift+Enter")
        visit.find("#prompt").press_sequentially(line)
    visit.find("#prompt").press("Enter")
    visit.finished()
    expect(visit.find("#turns .user .text")).to_have_text(TABLE, use_inner_text=True)
    assert visit.find("#turns .model .text").text_content() == wanted.text
    assert visit.counter("step") == f"{wanted.nfe} / {wanted.nfe}" and visit.counter("masks") == "0"
    assert float(visit.counter("tpf")) == pytest.approx(wanted.tokens_per_forward, abs=0.006)
    assert float(visit.counter("speed")) > 0 and visit.find("#prompt").input_value() == ""


def test_frames_arrive_while_it_runs(browser, embedded):
    with serving(embedded) as server, visiting(browser, server) as visit:
        visit.set("sampler", "vanilla")
        visit.set("max_tokens", "16")
        server.gate.close()
        visit.send(SUMS)
        masks = visit.find(".side").first.locator(".cell.mask")
        expect(masks).to_have_count(16)
        expect(visit.find(".side").first).to_have_attribute("aria-busy", "true")
        for decided in (1, 3, 7):
            server.gate.let(decided - visit.decided())
            expect(masks).to_have_count(16 - decided)
            assert visit.counter("step") == f"{decided} / {decided}" and visit.counter("span") == "[0, 16)"
        assert visit.find("#send").is_disabled() and visit.find("#stop").is_enabled()
        server.gate.open()
        visit.finished()
        wanted = embedded.generate(SUMS, gen_length=16, sampler=FixedSteps())
        assert visit.find("#turns .model .text").text_content() == wanted.text and visit.decided() == 16
        expect(visit.find(".side").first).to_have_attribute("aria-busy", "false")


def test_stop_frees_the_row(browser, embedded):
    with serving(embedded) as server, visiting(browser, server) as visit:
        visit.set("sampler", "vanilla")
        server.gate.close()
        visit.send(SUMS)
        server.gate.let(2)
        expect(visit.find(".side").first.locator(".cells .cell:not(.mask)")).to_have_count(2)
        visit.find("#stop").click()
        expect(visit.find("#status")).to_have_text("Stopped.")
        expect(visit.find("#prompt")).to_be_focused()
        wait_for(lambda: all(job.left for job in server.worker.jobs))
        taken = server.gate.taken
        server.gate.open()
        wait_for(lambda: not server.worker.jobs)
        assert server.gate.taken <= taken + 1
        assert "stopped" in visit.find("#turns .note").text_content()
        assert visit.ask("15,44,79,51")["messages"] == [{"role": "user", "content": "15,44,79,51"}]


def test_a_conversation_is_sent_on_until_it_is_cleared(visit):
    visit.ask(SUMS)
    answer = visit.find("#turns .model .text").text_content()
    past = [{"role": "user", "content": SUMS}, {"role": "assistant", "content": answer}]
    assert visit.ask("more")["messages"] == [*past, {"role": "user", "content": "more"}]
    expect(visit.find("#turns > li")).to_have_count(4)
    visit.find("#turns button").first.click()
    assert "".join(visit.cells()).replace("↵", "\n").startswith(answer)
    visit.find("#new").click()
    expect(visit.find("#turns > li")).to_have_count(0)
    assert visit.cells() == [] and visit.ask("again")["messages"] == [{"role": "user", "content": "again"}]


# ----------------------------------------------------------------------------------------------------------- canvas


@pytest.mark.parametrize("eos_stop", [False, True], ids=["full", "eos-stop"])
def test_replay_shows_every_step(visit, eos_stop):
    visit.set("eos_stop", eos_stop)
    visit.set("max_tokens", "48")
    visit.send(STORY)
    visit.finished()
    frames = frames_of(visit)
    steps, slider = frames[1:-1], visit.find("#slider")
    slider.press("Home")
    for count in range(len(steps) + 1):
        wanted = rebuilt(frames, count)
        assert [None if text in "·•" else text for text in visit.cells()] == wanted
        assert visit.find(".cells .mask").count() == wanted.count(None) == int(visit.counter("masks"))
        assert visit.find("#where").text_content() == f"{count} of {len(steps)}"
        if count:
            assert_step(visit, steps[count - 1], last=count == len(steps))
        slider.press("ArrowRight")
    slider.fill("2")
    assert visit.counter("step").startswith("2 /") and places(visit, ".mask") == undecided(frames, 2)
    slider.press("End")
    assert slider.input_value() == str(len(steps))


def undecided(frames: list[dict], count: int) -> list[int]:
    return [position for position, text in enumerate(rebuilt(frames, count)) if text is None]


def assert_step(visit: Visit, frame: dict, last: bool) -> None:
    """Stage, span, fresh tokens and their confidences are those of the frame."""
    assert visit.counter("phase") == frame["phase"]
    s, e = frame["span"]
    assert visit.counter("span") == f"[{s}, {'?' if e is None else e})"
    fresh = sorted(commit["position"] for commit in frame["committed"])
    fresh = [p for p in fresh if frame["closed_from"] is None or p < frame["closed_from"]]
    assert places(visit, f".now.{frame['phase']}") == places(visit, ".now") == fresh
    if not last:
        assert places(visit, ".opens") == [s] and places(visit, ".closes") == ([] if e is None else [e - 1])
    titles = [visit.find(".cells .cell").nth(p).get_attribute("title") for p in fresh[:3]]
    scores = {commit["position"]: commit["confidence"] for commit in frame["committed"]}
    assert all(f"confidence {scores[p]:g}," in title for p, title in zip(fresh, titles, strict=False))
    assert visit.find("#slider").get_attribute("aria-valuetext").endswith(frame["phase"])


def places(visit: Visit, kind: str) -> list[int]:
    script = "(cells, kind) => cells.flatMap((cell, place) => cell.matches(kind) ? [place] : [])"
    return visit.find(".side:first-child .cells > .cell").evaluate_all(script, kind)


def test_confidences_have_levels_and_a_table(visit):
    scores = {0: 0.3, 1: 0.6, 2: 0.8, 3: 0.9, 4: 0.99, 5: None}
    committed = [{"position": p, "token": 9, "text": f"t{p}", "confidence": c} for p, c in scores.items()]
    visit.stub(chunk(start(6)), chunk(step(0, {}, 6, committed=committed)), chunk(end("t", 1)), "[DONE]")
    visit.ask()
    for level in range(5):
        assert places(visit, f".c{level}") == [level]
    visit.find(".side details.step summary").first.click()
    rows = visit.find(".side details.step tbody tr")
    expect(rows).to_have_count(len(scores))
    assert [row.split("\t") for row in rows.all_inner_texts()] == [
        [str(p), f"t{p}", str(c or "–")] for p, c in scores.items()
    ]


def test_play_goes_to_the_end(visit):
    visit.set("sampler", "threshold")
    visit.set("block_length", "16")
    visit.ask(SUMS)
    visit.find("#play").click()
    expect(visit.find("#play")).to_have_text("Pause")
    expect(visit.find("#play")).to_have_text("Play", timeout=10_000)
    assert visit.find("#slider").input_value() == visit.find("#slider").get_attribute("max")


def test_only_cells_that_change_are_touched(visit):
    length, steps = 1024, 40
    frames = [step(n, {n * 25: f"t{n}"}, length) for n in range(steps)]
    visit.stub(chunk(start(length)), *map(chunk, frames), chunk(end("t", steps)), "[DONE]")
    visit.ask()
    script = """async () => {
      const slider = document.getElementById("slider"), touched = new Set();
      const watch = new MutationObserver((records) => records.forEach((r) => touched.add(r.target)));
      const cells = document.querySelector(".cells");
      watch.observe(cells, { childList: true, subtree: true, attributes: true });
      const began = performance.now();
      for (let place = 39; place > 0; place--) {
        slider.value = place;
        slider.dispatchEvent(new Event("input"));
      }
      const seconds = (performance.now() - began) / 1000;
      await new Promise(requestAnimationFrame);
      return [touched.size, seconds];
    }"""
    slider = visit.find("#slider")
    slider.press("End")
    slider.press("ArrowLeft")
    touched, seconds = visit.page.evaluate(script)
    assert len(visit.cells()) == length and touched <= 2 * steps and seconds < 2


# ------------------------------------------------------------------------------------------------------ side by side


@pytest.mark.parametrize("order", ["after", "together"])
def test_compare(visit, order):
    visit.find("#compare").check()
    visit.find("#order select").select_option(order)
    visit.ask(TABLE, 64)
    kinds = visit.page.evaluate("streams.map((stream) => stream.kind)")
    if order == "together":
        kinds.sort()  # either may come first
    assert kinds == ["slowfast", "vanilla"]
    slow, fast = (frames_of(visit, kind)[1:] for kind in ("vanilla", "slowfast"))
    rows = visit.find("#summary tbody tr").all_inner_texts()
    assert rows[0].split("\t")[:3] == ["SlowFast", str(fast[-1]["nfe"]), f"{fast[-1]['tokens_per_forward']:.2f}"]
    assert rows[1].split("\t")[:2] == ["vanilla", "64"]
    said = visit.find("#summary caption").text_content()
    assert f"{64 / fast[-1]['nfe']:.1f} times fewer forwards" in said and "texts are equal" in said
    assert visit.cells(0) == visit.cells(1)
    visit.find("#slider").fill("32")
    assert visit.counter("step", 1) == "32 / 64" and visit.find(".side").nth(1).locator(".mask").count() == 32
    assert visit.counter("step", 0).startswith(f"{int(32 / 64 * (len(fast) - 1) + 0.5)} /")
    check_times(visit, fast[:-1], slow[:-1])


def check_times(visit: Visit, *sides: list[dict]) -> None:
    """With the time axis, a position shows each side's state at that time."""
    visit.find("#scale select").select_option("time")
    times = sorted({0, *(frame["seconds"] for frames in sides for frame in frames)})
    assert visit.find("#slider").get_attribute("max") == str(len(times) - 1)
    for place in (0, 3, 20):
        visit.find("#slider").fill(str(place))
        for side, frames in enumerate(sides):
            had = sum(frame["seconds"] <= times[place] for frame in frames)
            assert visit.counter("step", side) == f"{had} / {len(frames)}"


def test_one_canvas_again(visit):
    visit.find("#compare").check()
    visit.ask(SUMS, 16)
    assert visit.find(".side:visible").count() == 2
    visit.find("#compare").uncheck()
    assert visit.find(".side:visible").count() == 1 and visit.find("#summary").is_hidden()
    visit.find("#turns button").click()
    assert visit.find(".side:visible").count() == 2 and visit.find("#summary").is_visible()
    visit.ask("more", 16)
    assert visit.find(".side:visible").count() == 1


# ---------------------------------------------------------------------------------------------------------- controls

CONTROLS = {
    "untouched": ({}, {"sampler": {"kind": "slowfast", "preset": "paper"}, "cache": {"kind": "none"}}),
    "slowfast": (
        {"preset": "fast", "tau_high": "0.9", "tau_min": "0.2", "k_max": "4", "block_length": "8", "eos_stop": True},
        {
            "sampler": {"kind": "slowfast", "preset": "fast", "tau_high": 0.9, "tau_min": 0.2, "k_max": 4}
            | {"block_length": 8, "eos_stop": True}
        },
    ),
    "threshold": (
        {"sampler": "threshold", "tau": "0.7", "block_length": "16"},
        {"sampler": {"kind": "threshold", "tau": 0.7, "block_length": 16}},
    ),
    "fixed": (
        {"sampler": "fixed", "steps": "8", "metric": "entropy", "eos": "last"},
        {"sampler": {"kind": "fixed", "steps": 8, "metric": "entropy", "eos": "last"}},
    ),
    "cache": (
        {"cache": "region", "capacity": "64", "refresh_every": "4"},
        {"cache": {"kind": "region", "capacity": 64, "refresh_every": 4}},
    ),
    "common": (
        {"temperature": "0.5", "top_p": "0.9", "seed": "3", "stop": "x\u00e9"},
        {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x\u00e9"},
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_change_the_request(visit, name):
    changes, wanted = CONTROLS[name]
    for control, value in changes.items():
        visit.set(control, value)
    body = visit.ask(SUMS, 16)
    assert {field: body[field] for field in wanted} == wanted
    fixed = {"model": "embedded", "max_tokens": 16, "stream": True, "frames": True}
    assert {field: body[field] for field in fixed} == fixed
    assert set(body) == {"messages", "temperature", "sampler", "cache", *fixed, *wanted}


def test_what_the_server_decides_is_left_to_it(visit):
    visit.set("sampler", "")
    visit.set("cache", "")
    assert not {"sampler", "cache"} & set(visit.ask(SUMS, 16))
    assert visit.find(".side h3").first.text_content() == "SlowFast"
    visit.set("sampler", "slowfast")
    visit.ask(SUMS, 16)
    assert visit.find("[name=tau_high]").get_attribute("placeholder") == "0.85"  # what was used
    visit.set("preset", "fast")
    assert visit.find("[name=tau_high]").get_attribute("placeholder") == "default"


def test_bad_numbers_are_not_sent(visit):
    visit.page.on("request", lambda request: visit.problems.append(request.url))
    for name, value in (("max_tokens", "513"), ("temperature", "3"), ("tau_high", "2"), ("k_max", "1.5")):
        visit.set(name, value)
        visit.find("#prompt").fill(SUMS)
        visit.find("#prompt").press("Enter")
        expect(visit.find(f"[name={name}]").first).to_be_focused()
        visit.set(name, "")


# ----------------------------------------------------------------------------------------------------------- errors

REFUSED = "Failed to load resource"  # what the browser says of every answer that is an error


def test_refusals_are_shown_and_the_prompt_comes_back(visit):
    asked = lambda route: route.request.post_data_json | {"sampler": "greedy"}  # noqa: E731
    visit.page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=json.dumps(asked(route))))
    visit.send(SUMS)
    expect(visit.find("#error")).to_contain_text("'greedy'")
    assert visit.find("#prompt").input_value() == SUMS and visit.find("#send").is_enabled()
    visit.page.unroute_all()
    visit.send("Ann " * 600)
    expect(visit.find("#error")).to_contain_text("the context is 512")
    assert visit.ask(SUMS)["messages"] == [{"role": "user", "content": SUMS}]
    assert visit.find("#error").text_content() == "" and visit.find("#turns .note").first.text_content() == "failed"
    assert len(visit.problems) == 2 and all(REFUSED in problem for problem in visit.problems)
    visit.problems.clear()


def test_a_stream_that_fails_says_so(visit):
    begun = [chunk(start(4)), chunk(step(0, {0: "a"}, 4), "a")]
    visit.stub(*begun, {"error": {"message": "the row broke", "code": "numerical_fault"}})
    visit.send(SUMS)
    expect(visit.find("#error")).to_have_text("the row broke")
    assert visit.cells() == ["a", "•", "•", "•"]
    visit.page.unroute_all()
    visit.stub(*begun)
    visit.send(SUMS)
    expect(visit.find("#error")).to_contain_text("connection was lost")


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</span><script>alert(2)</script>",
    "\u202egnp.exe\u200b",
    "<b>&amp;",
    "\"'`",
]


def test_model_text_is_only_ever_text(visit):
    text, size = "".join(HOSTILE), len(HOSTILE)
    evil = start(size)
    evil["sampler"]["preset"] = HOSTILE[0]
    frames = [step(0, dict(enumerate(HOSTILE)), size, masks_left=0)]
    visit.find(".side details.step summary").first.click()
    elements = "document.querySelectorAll('img, script, b, style, iframe, object').length"
    before = visit.page.evaluate(elements)
    visit.stub(chunk(evil), *[chunk(frame, text) for frame in frames], chunk(end(text, 1)), "[DONE]")
    visit.ask(HOSTILE[0])
    assert visit.find("#turns .model .text").text_content() == text
    assert visit.find("#turns .user .text").text_content() == HOSTILE[0]
    shown = visit.cells()
    assert shown[:2] == HOSTILE[:2] and shown[3:] == HOSTILE[3:]
    assert shown[2] == "\ufffdgnp.exe\ufffd"  # nothing that turns or hides what is beside it
    assert visit.find(".side details.step .token").first.text_content() == HOSTILE[0]
    visit.page.unroute_all()
    visit.stub({"error": {"message": HOSTILE[0]}})
    visit.send("x")
    expect(visit.find("#error")).to_have_text(HOSTILE[0])
    assert visit.page.evaluate(elements) == before


# ------------------------------------------------------------------------------------------------------ the policy


def test_headers(server):
    for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg", "/health", "/nope", "/page/nope.js"):
        headers = httpx.get(server.url + path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert httpx.get(server.url + "/page/app.js").headers["content-type"].startswith("text/javascript")
    assert httpx.head(server.url + "/").status_code == 200 and httpx.get(server.url + "/page/").status_code == 404
    assert httpx.post(server.url + "/", json={}).status_code == 405


def test_nothing_comes_from_elsewhere():
    sinks = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|@import"
    for path in app_module.PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(rf"https?://|{sinks}", text), path
        if path.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*src=)", text), path


def test_the_policy_holds(visit):
    """The absence of violations is meaningful only if violations are detected."""
    visit.page.evaluate("""() => {
      const script = document.createElement("script");
      try { script.textContent = "window.ran = true"; } catch { window.refused = true; }
      document.body.append(script);
      document.body.insertAdjacentElement("beforeend", Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
    }""")
    wait_for(lambda: len(visit.page.evaluate("violations")) >= 2)
    assert visit.page.evaluate("[window.ran, window.refused]") == [None, True]
    visit.page.evaluate("violations.length = 0")
    visit.problems.clear()


def test_api_key(browser, embedded):
    with serving(embedded, api_key=KEY) as server, visiting(browser, server) as visit:
        expect(visit.find("#error")).to_have_text("a valid API key is needed")
        expect(visit.page.get_by_label("API key")).to_be_focused()
        visit.page.keyboard.type("wrong-wrong")
        with visit.page.expect_response("**/v1/models") as refused:
            visit.page.keyboard.press("Enter")
        assert refused.value.status == 401 and visit.find("#access").is_visible()
        visit.page.get_by_label("API key").fill(KEY)
        visit.page.get_by_role("button", name="Use key").click()
        expect(visit.find("#model")).to_have_text("embedded, context 512")
        expect(visit.find("#prompt")).to_be_focused()
        assert visit.find("#error").text_content() == "" and visit.find("#access").is_hidden()
        visit.ask(SUMS)
        assert visit.page.evaluate("[document.cookie, JSON.stringify(localStorage)]") == ["", "{}"]
        visit.page.reload()
        expect(visit.find("#model")).to_have_text("embedded, context 512")
        assert all(REFUSED in problem for problem in visit.problems)
        visit.problems.clear()


# ---------------------------------------------------------------------------------------------------- accessibility


def test_phone(browser, server):
    with visiting(browser, server, viewport=NARROW, is_mobile=True, has_touch=True) as visit:
        assert fits(visit)
        visit.find("details").evaluate_all("all => all.forEach((fold) => (fold.open = true))")
        visit.find("#compare").check()
        visit.ask("W" * 300, 32)
        assert fits(visit)
        chat, canvas = (visit.find(part).bounding_box() for part in ("#chat", "#canvas"))
        assert canvas["y"] >= chat["y"] + chat["height"] and canvas["width"] <= 360
        text = "W" * 400
        visit.stub(chunk(start(4)), chunk(step(0, {1: text}, 4), text), chunk(end(text, 1)), "[DONE]")
        visit.ask("x")
        assert fits(visit) and visit.cells()[1] == text


def fits(visit: Visit) -> bool:
    return visit.page.evaluate("document.documentElement.scrollWidth") <= 360


# The contrast of each text with the background behind it, by WCAG's formula; only those below 4.5.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => rgba(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (rgba(colour)[3] === 255) return colour;
  } };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!(own || e.matches("input, select, textarea")) || !e.checkVisibility() || e.matches(":disabled")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${e.localName}.${e.className}: ${(a + 0.05) / (b + 0.05)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("system", ["light", "dark"])
def test_contrast_in_light_and_dark(browser, server, system):
    with visiting(browser, server, color_scheme=system) as visit:
        visit.find("#compare").check()
        visit.find("details").evaluate_all("all => all.forEach((fold) => (fold.open = true))")
        visit.ask(STORY, 48)
        visit.find("#slider").fill("20")
        seen = {}
        for theme in ("system", "light", "dark"):
            visit.page.get_by_label("Theme").select_option(theme)
            assert visit.page.evaluate(CONTRAST) == []
            seen[theme] = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert seen["light"] != seen["dark"] and seen["system"] == seen[system]
        visit.page.reload()
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == seen["dark"]
        assert visit.find("#theme").input_value() == "dark"


def test_names_headings_and_landmarks(visit):
    visit.find("#compare").check()
    visit.find("details").evaluate_all("all => all.forEach((fold) => (fold.open = true))")
    visit.ask(SUMS)
    tree = visit.page.context.new_cdp_session(visit.page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n["ignored"]]
    controls = {"button", "textbox", "combobox", "slider", "checkbox", "spinbutton", "region", "table"}
    assert [node for node in nodes if node[0] in controls and not node[1].strip()] == []
    assert {"slider", "spinbutton", "checkbox", "combobox", "textbox", "button"} <= {role for role, _ in nodes}
    assert {"main", "banner", "status", "alert"} <= {role for role, _ in nodes}
    assert {"Chat", "Canvas", "Conversation"} <= {name for role, name in nodes if role == "region"}
    levels = visit.find("h1, h2, h3").evaluate_all("all => all.map((h) => Number(h.localName[1]))")
    assert levels.count(1) == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = visit.find("[id]").evaluate_all("all => all.map((e) => e.id)")
    assert len(ids) == len(set(ids)) and visit.find("html").get_attribute("lang") == "en"


def test_all_of_it_by_keyboard(visit):
    visit.find("#prompt").focus()
    visit.page.keyboard.type(SUMS)
    visit.page.keyboard.press("Enter")
    visit.finished()
    visit.find(".skip").focus()
    order = ["Skip to the prompt"]
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        focused = visit.page.evaluate("""() => {
          const e = document.activeElement, style = getComputedStyle(e);
          return e === document.body ? null : [e.id || e.name || e.textContent.trim(), style.outlineStyle, e.tabIndex];
        }""")
        if focused is None:
            break
        assert focused[1] != "none" and focused[2] == 0, focused
        order.append(focused[0])
    wanted = ["Skip to the prompt", "theme", "new", "log", "prompt", "send", "max_tokens", "compare", "slider"]
    assert [name for name in order if name in wanted] == wanted
    assert {"back", "play", "sampler", "preset", "cache", "Tokens of this step"} <= set(order)


def test_screen_readers_are_told_sparingly(visit):
    visit.set("sampler", "vanilla")
    visit.ask(SUMS, 64)
    said = [text for text in visit.page.evaluate("said") if text]
    assert said[0] == "Sent." and said[1].startswith("Finished: 64 forwards") and len(said) == 2
    hidden = visit.find(".cells .mask:not([aria-hidden])").count()
    visit.find("#slider").press("Home")
    assert hidden == visit.find(".cells .mask:not([aria-hidden])").count() == 0


def test_the_folder_is_packaged():
    setup = (ROOT / "setup.py").read_text()
    assert '"serve/page/*"' in setup and all(path.is_file() for path in app_module.PAGE.iterdir())
