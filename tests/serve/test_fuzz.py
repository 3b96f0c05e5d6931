"""Schemathesis against the server's OpenAPI document: nothing fails inside, and refusals have the documented form."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
pytest.importorskip("openai")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sfs_triton.decoding.caching import POLICIES  # noqa: E402
from sfs_triton.decoding.samplers import SAMPLERS  # noqa: E402
from sfs_triton.decoding.samplers.fixed import FIXED_METRICS  # noqa: E402
from sfs_triton.decoding.samplers.slowfast import ROUNDINGS, SLOW_ENDS, SPREADS  # noqa: E402
from tests.support.server import serving  # noqa: E402

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = {
    ("POST", "/v1/chat/completions"): 120,
    ("POST", "/v1/completions"): 120,
    ("GET", "/v1/models"): 5,
    ("GET", "/v1/models/{model}"): 20,
    ("GET", "/health"): 5,
    ("GET", "/ready"): 5,
    ("GET", "/metrics"): 5,
}


@pytest.fixture(scope="module")
def server(embedded):
    """Its answers are short, so that many requests take little time."""
    with serving(embedded, default_tokens=4, max_tokens=8, max_body=1 << 16) as running:
        yield running


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_the_document_has_these_routes(document):
    operations = [result.ok() for result in document.get_all_operations()]
    assert {(operation.method.upper(), operation.path) for operation in operations} == set(ROUTES)


def settled(examples: int) -> settings:
    """Use the same examples in every run, so that a failure depends on the code alone."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [(route, POSITIVE) for route in ROUTES] + [(route, NEGATIVE) for route in ROUTES if route[0] == "POST"]


@pytest.mark.parametrize(("route", "mode"), CASES, ids=lambda part: getattr(part, "value", None) or " ".join(part))
def test_nothing_that_is_sent_breaks_the_server(document, route, mode):
    method, path = route
    operation, seen = document[path][method], set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settled(ROUTES[route])
    def check(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        seen.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
    if method == "POST":
        assert 400 in seen and (200 in seen) == (mode is POSITIVE)


def some_options(kinds: dict[str, type]):
    """A kind with some of its options, most of them with values of the right type."""

    def of(kind: str):
        names = sorted({f.name for f in fields(kinds[kind])} - {"temperature", "top_p"})
        fixed = {"kind": kind} | ({"block_length": 1} if "block_length" in names else {})  # fits every length
        return st.dictionaries(st.sampled_from(names or ["x"]), VALUES, max_size=2).map(lambda given: fixed | given)

    return st.sampled_from(sorted(kinds)).flatmap(of)


WORDS = [*SPREADS, *SLOW_ENDS, *ROUNDINGS, *FIXED_METRICS, "x"]
NUMBERS = st.integers(-2, 20) | st.floats(0, 1) | st.sampled_from([-1.5, 1e-9, 511, 512, 513, 2**40, 1e300])
VALUES = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS)


def test_no_options_of_samplers_and_caches_break_it(server):
    seen = Counter()

    @given(
        sampler=some_options(SAMPLERS),
        cache=st.none() | some_options(POLICIES),
        temperature=st.sampled_from([0, 1e-6, 0.5, 2]),
        top_p=st.sampled_from([None, 1e-3, 0.5, 1]),
        suffix=st.sampled_from([None, "\n3,Kim"]),
        stream=st.booleans(),
        tokens=st.integers(1, 8),
    )
    @settled(100)
    def check(stream, tokens, **options):
        body = {"prompt": "id,name\n1,", "max_tokens": tokens, "stream": stream, "frames": stream, "seed": 1, **options}
        answer = server.post({name: value for name, value in body.items() if value is not None}, "/v1/completions")
        seen[answer.status_code] += 1
        assert answer.status_code in (200, 400), answer.text
        assert '"error"' not in answer.text or answer.status_code == 400, answer.text

    check()
    assert min(seen[200], seen[400]) > 15, "examples of one kind only"
