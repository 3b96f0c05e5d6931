"""Several choices per request, and log probabilities of chosen tokens."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import torch  # noqa: E402

from sfs_triton import Engine, FixedSteps, SlowFast  # noqa: E402
from sfs_triton.models import Transformer  # noqa: E402
from sfs_triton.serve.logprobs import TokenScores  # noqa: E402
from sfs_triton.text.codec import UNFINISHED, TextCodec  # noqa: E402
from tests.support.dream import write_tokenizer  # noqa: E402
from tests.support.server import STORY, SUMS, TABLE, chat, chunks_of, error_of, serving, wait_for  # noqa: E402

COMPLETIONS = "/v1/completions"


# --------------------------------------------------------------------------------------------------------- choices


def test_choices_have_the_seeds_that_follow(server, embedded):
    sampler = SlowFast(temperature=1.5)
    alone = [embedded.generate(STORY, gen_length=16, sampler=sampler, seed=5 + n) for n in range(3)]
    answer = server.client().chat.completions.create(**chat(STORY, max_tokens=16, temperature=1.5, seed=5, n=3))
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.seed == 5
    assert [choice.message.content for choice in answer.choices] == [one.text for one in alone]
    assert len({one.text for one in alone}) > 1
    usage = answer.usage
    assert usage.prompt_tokens == alone[0].prompt_length and usage.nfe == sum(one.nfe for one in alone)
    assert usage.completion_tokens == sum(len(one.tokens) for one in alone)


@pytest.mark.parametrize("chats", [True, False])
def test_choices_are_streamed_side_by_side(server, embedded, chats):
    asked = {"model": "embedded", "max_tokens": 16, "temperature": 1.5, "seed": 5, "n": 8, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    client = server.client()
    if chats:
        chunks = list(client.chat.completions.create(messages=chat(STORY)["messages"], **asked))
    else:
        chunks = list(client.completions.create(prompt=STORY, **asked))
    texts, reasons = [""] * 8, [None] * 8
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += (choice.delta.content or "") if chats else choice.text
        assert reasons[choice.index] is None, "nothing follows the end of a choice"
        reasons[choice.index] = choice.finish_reason
    sampler = SlowFast(temperature=1.5)
    how = {"gen_length": 16, "sampler": sampler, "apply_chat_template": chats}
    assert texts == [embedded.generate(STORY, seed=5 + n, **how).text for n in range(8)]
    assert set(reasons) <= {"stop", "length"} and chunks[-1].choices == [] and chunks[-1].usage.nfe > 0


def test_a_choice_that_fails_ends_the_others(embedded, monkeypatch):
    from sfs_triton.serve.jobs import OutputProcessor

    process = OutputProcessor.process

    def broken(processor, sequence):
        if sequence.params.seed == 6 and sequence.steps == 2:
            raise UnicodeError("no text")
        process(processor, sequence)

    monkeypatch.setattr(OutputProcessor, "process", broken)
    with serving(embedded) as server:
        for stream in (False, True):
            answer = server.post(chat(sampler="vanilla", seed=5, n=3, stream=stream))
            assert (answer.status_code == 500) is not stream and "internal_error" in answer.text
            assert "[DONE]" not in answer.text
            wait_for(lambda: server.worker.running == server.worker.waiting == 0)
        assert server.post(chat(max_tokens=4, n=2)).status_code == 200


def test_a_client_that_leaves_ends_all_of_its_choices(embedded):
    import httpx

    with serving(embedded, max_batch=2) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        held = pool.submit(server.post, chat(max_tokens=4))
        wait_for(lambda: server.gate.taken == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/chat/completions", json=chat(sampler="vanilla", n=8), timeout=0.3)
        server.gate.open()
        assert held.result().status_code == 200
        wait_for(lambda: server.worker.running == server.worker.waiting == 0)
        assert server.metrics()["left"] == 8


# ----------------------------------------------------------------------------------------------- log probabilities


def logs_of(probabilities: list[float]) -> list[float]:
    return pytest.approx([math.log(p) for p in probabilities], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "sampler", "mine"),
    [
        (TABLE, "slowfast", SlowFast()),
        (SUMS, {"kind": "fixed", "steps": 4, "metric": "maskgit_plus"}, FixedSteps(steps=4, metric="maskgit_plus")),
    ],
)
def test_log_probabilities_are_those_of_the_engine(server, embedded, text, sampler, mine):
    wanted = embedded.generate(text, gen_length=64, sampler=mine, trace=True)
    end = embedded.spec.end_of(wanted.tokens)
    asked = chat(text, max_tokens=64, logprobs=True, top_logprobs=0)
    whole = server.client().chat.completions.create(**asked, extra_body={"sampler": sampler}).choices[0]
    scores = whole.logprobs.content
    assert [score.token for score in scores] == [embedded.text.piece(token) for token in wanted.tokens[:end]]
    assert [score.logprob for score in scores] == logs_of(wanted.probabilities[:end])
    assert bytes(b for score in scores for b in score.bytes).decode() == whole.message.content == wanted.text
    assert all(score.top_logprobs == [] for score in scores) and whole.logprobs.refusal is None
    chunks = list(server.client().chat.completions.create(**asked, stream=True, extra_body={"sampler": sampler}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].logprobs]
    assert [score for part in parts for score in part.logprobs.content] == scores
    for part in parts:  # each part of the text comes with its own tokens
        assert bytes(b for score in part.logprobs.content for b in score.bytes).decode() == part.delta.content


@pytest.mark.parametrize("stop", [None, "Ann", '"id":2'])
def test_log_probabilities_of_completions(server, embedded, stop):
    sampler = FixedSteps(block_length=8)
    wanted = embedded.generate(TABLE, gen_length=32, sampler=sampler, trace=True, apply_chat_template=False)
    body = {"prompt": TABLE, "max_tokens": 32, "logprobs": 0, "sampler": {"kind": "vanilla", "block_length": 8}}
    body |= {} if stop is None else {"stop": stop}
    choice = server.post(body, COMPLETIONS).json()["choices"][0]
    logs, text = choice["logprobs"], choice["text"]
    assert "".join(logs["tokens"]).startswith(text) and logs["top_logprobs"] is None
    count = len(logs["tokens"])
    assert logs["token_logprobs"] == logs_of(wanted.probabilities[:count])
    for token, at in zip(logs["tokens"], logs["text_offset"], strict=True):
        assert text[at : at + len(token)] == token[: len(text) - at]
    parts = [chunk["choices"][0] for chunk in chunks_of(server.post({**body, "stream": True}, COMPLETIONS))]
    for name, values in logs.items():
        streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name] or ()]
        assert streamed == (values or [])


def test_parts_of_characters_share_an_offset(embedded):
    """Two characters of two bytes each, a letter before and after, and a special token within."""
    codec, parts = embedded.text, ("<0x61>", "<0xC3>", "<0xA4>", "<|eot_id|>", "<0xC3>", "<0xB6>", "<0x62>")
    ids = [codec.token_id(token) for token in parts]
    scores = TokenScores(codec, codec.piece)
    scores._probabilities = dict.fromkeys(range(len(ids)), 0.5)
    found = [*scores.take(ids, 3), *scores.take(ids, len(ids))]
    assert codec.decode(ids) == "a\u00e4\u00f6b"
    assert [score.offset for score in found] == [0, 1, 1, 1, 1, 1, 3]
    assert [score.data for score in found] == [b"a", b"\xc3", b"\xa4", b"", b"\xc3", b"\xb6", b"b"]
    assert found[3].token == "<|eot_id|>" and found[1].token == UNFINISHED


def test_bytes_of_a_byte_level_tokenizer(tmp_path):
    """Of any tokens, together: what the tokenizer decodes."""
    codec = TextCodec.from_folder(write_tokenizer(tmp_path))
    assert [codec.bytes_of(token) for token in codec.encode("\u00e9 \U0001f642 \n")[2:4]] == [b"\xf0", b"\x9f"]

    @given(st.lists(st.integers(0, 270), max_size=16))
    def check(ids: list[int]) -> None:
        scores = TokenScores(codec, codec.piece)
        scores._probabilities = dict.fromkeys(range(len(ids)), 0.5)
        data = b"".join(score.data for score in scores.take(ids, len(ids)))
        assert data.decode("utf-8", "replace") == codec.decode(ids)

    check()


def test_scores_that_are_no_probabilities_are_refused(server):
    for options in (
        {"kind": "threshold", "metric": "entropy"},
        "entropy-bound",
        {"kind": "fixed", "metric": "entropy"},
    ):
        error = error_of(server.post(chat(logprobs=True, sampler=options)))
        assert error["param"] == "logprobs" and "metric='entropy'" in error["message"]
    assert (
        server.post(chat(logprobs=True, sampler={"kind": "entropy-bound", "metric": "confidence"})).status_code == 200
    )


@pytest.fixture(scope="module")
def uniform(embedded):
    """A server of a model that draws every token equally often, many of which are bytes."""
    weights = replace(embedded.model.weights, head=torch.zeros_like(embedded.model.weights.head))
    with serving(Engine(Transformer(embedded.spec, weights), embedded.text)) as running:
        yield running


def test_streams_of_random_tokens_add_up_to_whole_answers(uniform):
    asked = chat(max_tokens=64, temperature=2, seed=11, n=8, logprobs=True, sampler={"kind": "fixed", "steps": 8})
    whole = uniform.post(asked).json()["choices"]
    assert sum(UNFINISHED in choice["message"]["content"] for choice in whole) >= 4
    texts, scores = [""] * 8, [[] for _ in range(8)]
    for chunk in chunks_of(uniform.post({**asked, "stream": True})):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            scores[choice["index"]] += (choice["logprobs"] or {}).get("content", [])
    assert texts == [choice["message"]["content"] for choice in whole]
    assert scores == [choice["logprobs"]["content"] for choice in whole]
