"""The soak: its requests, its verdicts, and a short run."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("typer")

import httpx  # noqa: E402

from bench.server import soak, soak_requests  # noqa: E402
from bench.server.loopback import Server, check_loopback, own_server  # noqa: E402
from tests.support.server import Running, serving  # noqa: E402


@pytest.fixture(scope="module")
def server(embedded):
    limits = {"max_batch": soak.MAX_BATCH, "max_batches": soak.MAX_BATCHES, "time_limit": 60.0}
    with serving(embedded, **limits) as running:
        yield running


def options(server: Running, **changes) -> argparse.Namespace:
    given = {"clients": 2, "minutes": 0.4, "seed": 0, "note": "", "load": [0.0, 0.0, 0.0], "url": server.url}
    return argparse.Namespace(**{**given, **changes})


# ---------------------------------------------------------------------------------------------------------- requests


def test_every_setting_is_answered(server):
    """The fixed set has each of them."""
    for ask in soak_requests.FIXED:
        response = server.post(ask.body, ask.path)
        assert response.status_code == 200, (ask, response.text)


def test_what_is_to_be_refused_is(server):
    for path, body in soak_requests._REFUSED:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, (path, body, response.text)


def test_requests_are_mixed():
    rng = random.Random(0)
    asks = [soak_requests.any_of_all(rng) for _ in range(3000)]
    kinds = Counter(ask.kind for ask in asks)
    assert set(kinds) == {"whole", "streamed", "fixed", "leaves", "malformed", "state", "late"}
    bodies = [ask.body for ask in asks if ask.kind in ("whole", "streamed")]
    for name in ("stop", "suffix", "top_p", "messages", "prompt"):
        assert sum(name in body for body in bodies) > 50, name
    assert sum(body.get("frames", False) for body in bodies) > 50
    assert {str(body["cache"]) for body in bodies} == {str(cache) for _, cache in soak_requests.SETTINGS}
    assert len({body["temperature"] for body in bodies}) > 2 and len({body["max_tokens"] for body in bodies}) > 6


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_a_slope_is_that_of_the_samples_after_the_warm_up():
    samples = [(60.0 * minute, 500.0 if minute < 5 else 300 + 0.7 * minute) for minute in range(20)]
    assert soak.slope(samples, 300) == pytest.approx((0.7, 0.0), abs=1e-6)
    rng = random.Random(1)
    noisy = [(60.0 * minute, 300 + rng.gauss(0, 2)) for minute in range(200)]
    fitted, half = soak.slope(noisy, 0)
    assert abs(fitted) < 2 * half and half == pytest.approx(1.96 * 2 / (200**3 / 12) ** 0.5, rel=0.2)
    with pytest.raises(ValueError, match="2 samples after 1080 s"):
        soak.slope(samples, 1080)


FINE = {
    **{"slope_mib_per_minute": 0.4, "slope_bound": 0.5, "running_at_end": 0, "waiting_at_end": 0, "server_errors": 0},
    **{"slots": 32, "slots_taken_first": 32, "slots_taken_last": 32, "fixed_compared": 9, "fixed_different": 0},
    **{"failures": 0, "log": "", "exit_code": 0},
}


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("slope_mib_per_minute", 0.6, "memory is flat"),
        ("running_at_end", 1, "no sequence is stuck"),
        ("waiting_at_end", 1, "no sequence is stuck"),
        ("slots_taken_last", 31, "no slot is lost"),
        ("slots_taken_first", 31, "no slot is lost"),
        ("server_errors", 1, "no answer of the server's fault (5xx)"),
        ("fixed_different", 1, "fixed requests get the same answers"),
        ("fixed_compared", 0, "fixed requests get the same answers"),
        ("failures", 1, "everything else was as expected"),
        ("log", "Traceback", "nothing in the log"),
        ("exit_code", 1, "SIGTERM ends it with exit code 0"),
    ],
)
def test_each_figure_can_fail_its_check(name, value, check):
    assert all(soak.judge(FINE).values())
    assert [told for told, fine in soak.judge({**FINE, name: value}).items() if not fine] == [check]


def _asked(server: Running, *asks: soak_requests.Ask) -> soak.SoakCounts:
    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            its = soak.Soak(client, options(server))
            for ask in asks:
                await its.ask(ask, random.Random(3))
            return its.tally

    return asyncio.run(run())


def test_answers_that_change_are_noticed(server, monkeypatch):
    ask = soak_requests.FIXED[0]
    assert _asked(server, ask, ask).failures == []
    changed = {**ask.body, "messages": [{"role": "user", "content": "15,44"}]}
    other = soak_requests.Ask("fixed", ask.path, changed)
    monkeypatch.setattr(soak, "FIXED", _Same([ask, other]))
    tally = _asked(server, ask, other)
    assert tally.outcomes["fixed", "another answer"] == 1 and len(tally.failures) == 1


class _Same(list):
    """A list in which everything is the first."""

    def index(self, value):
        return 0


def test_outcomes_that_are_not_expected_are_noticed(server):
    path = soak_requests.CHAT
    fine = {"messages": [{"role": "user", "content": "15"}], "max_tokens": 4}
    tally = _asked(server, soak_requests.Ask("whole", path, {"messages": []}))
    assert tally.outcomes["whole", "400"] == 1 and "400 after" in tally.failures[0]
    tally = _asked(server, *[soak_requests.Ask("malformed", "/v1/models", fine)] * 2)
    assert len(tally.failures) + tally.outcomes["malformed", "hung up"] + tally.outcomes["malformed", "400"] == 2
    assert tally.failures


# --------------------------------------------------------------------------------------------------------- a short one


@pytest.mark.slow
def test_a_short_soak(server, monkeypatch):
    monkeypatch.setattr(soak, "_REST", 0.2)
    monkeypatch.setattr(soak, "WARM_UP", 0.0)
    record = asyncio.run(soak.run(Server(server.url, 0), options(server)))
    checks = soak.judge({**record, "log": "", "exit_code": 0})
    checks.pop("memory is flat")  # which it is not in the first seconds
    assert all(checks.values()), record["first_failures"]
    assert record["slots_taken_first"] == soak.MAX_BATCH * soak.MAX_BATCHES
    assert len(record["resident_at_rest_mib"]) >= 3 and min(mib for _, mib in record["resident_at_rest_mib"]) > 50
    assert json.loads(soak.as_text({**record, "log": "", "exit_code": 0}))["requests"] == record["requests"] > 10
    assert server.worker.running == server.worker.waiting == 0


def test_a_server_that_does_not_start_is_said_so():
    with pytest.raises(SystemExit, match="no-such-checkpoint"), own_server("/no-such-checkpoint"):
        raise AssertionError("it started")


@pytest.mark.parametrize("url", ["http://example.org", "http://8.8.8.8:80", "nothing", "http://[::2]/"])
def test_only_loopback_is_loaded(url):
    assert check_loopback(url) == f"--url {url}: only loopback is loaded"
    assert check_loopback("http://[::1]:80") is check_loopback("http://127.0.0.5:9/v1") is check_loopback(None) is None
