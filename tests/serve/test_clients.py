"""Stock clients in a conversation of three turns, streamed and whole, against a server on loopback."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from sfs_triton import Threshold  # noqa: E402
from tests.support.server import SUMS, Running, serving  # noqa: E402

QUESTIONS = [SUMS, "id,name\n1,Ann", "15,44 and \u00e9 \U0001f642?"]
PROMPT = "1,2,3,"  # of which the model makes "2"
LENGTH = 20  # not a whole number of blocks


@pytest.fixture(scope="module")
def server(embedded):
    with serving(embedded, sampler=Threshold(block_length=16)) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(embedded) -> list[str]:
    """The answers of the engine, each to all that was said before."""
    messages = [{"role": "system", "content": "Sums."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        made = embedded.generate(messages, gen_length=32, sampler=Threshold(block_length=16))
        tokens = made.response[:LENGTH]
        text = embedded.text.decode(tokens[: embedded.spec.end_of(tokens)])
        messages.append({"role": "assistant", "content": text})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_the_official_client(server, wanted):
    create = server.client().chat.completions.create
    forms: list[Callable] = [lambda message: message, lambda message: message.model_dump(), lambda m: m.to_dict()]
    messages: list = [{"role": "system", "content": [{"type": "text", "text": "Sums."}]}]
    for question, answer, form in zip(QUESTIONS, wanted, forms, strict=True):
        messages.append({"role": "user", "content": question, "name": "Ann"})
        asked = {"model": "embedded", "messages": messages, "max_tokens": LENGTH}
        chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        assert chunks[-1].usage.completion_tokens <= LENGTH
        whole = create(**asked, logprobs=True, n=2)
        assert [choice.message.content for choice in whole.choices] == [answer] * 2
        assert b"".join(bytes(score.bytes) for score in whole.choices[0].logprobs.content).decode() == answer
        messages.append(form(whole.choices[1].message))


def test_the_official_client_streams_into_a_message(server, embedded):
    """The helper of the client that collects a stream; its message is sent back."""
    messages = [{"role": "user", "content": SUMS}]
    with server.client().chat.completions.stream(model="embedded", messages=messages, max_tokens=64) as stream:
        message = stream.get_final_completion().choices[0].message
    wanted = embedded.generate(SUMS, gen_length=64, sampler=Threshold(block_length=16))
    assert message.content == wanted.text
    messages += [message, {"role": "user", "content": SUMS}]
    again = server.client().chat.completions.create(model="embedded", messages=messages, max_tokens=4)
    assert again.choices[0].message.content is not None


def test_langchain(server, wanted):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, SystemMessage

    how = {"model": "embedded", "base_url": server.url + "/v1", "api_key": "none", "max_tokens": LENGTH}
    model = langchain.ChatOpenAI(**how, stream_usage=True, max_retries=0)
    messages: list = [SystemMessage([{"type": "text", "text": "Sums."}])]
    for number, (question, answer) in enumerate(zip(QUESTIONS, wanted, strict=True)):
        messages.append(HumanMessage(question, name="Ann"))
        chunks = list(model.stream(messages))
        streamed = sum(chunks[1:], chunks[0])
        assert streamed.content == answer and streamed.usage_metadata["output_tokens"] <= LENGTH
        whole = model.bind(logprobs=True).invoke(messages)
        assert whole.content == answer
        scores = whole.response_metadata["logprobs"]["content"]
        assert b"".join(bytes(score["bytes"]) for score in scores).decode() == answer
        messages.append(whole if number % 2 else streamed)
    several = langchain.ChatOpenAI(**how, n=2, temperature=1.0, seed=3).generate([messages])
    assert len(several.generations[0]) == 2
    completion = langchain.OpenAI(**how, temperature=0, max_retries=0)  # sends its prompt in a list
    assert completion.invoke(PROMPT) == "".join(completion.stream(PROMPT)) == "2"


def test_litellm(server, wanted, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # importing it asks no other server
    litellm = pytest.importorskip("litellm")
    litellm.telemetry, litellm.suppress_debug_info = False, True
    how = {"api_base": server.url + "/v1", "api_key": "none", "max_tokens": LENGTH, "num_retries": 0}
    messages: list = [{"role": "system", "content": "Sums."}]
    for number, (question, answer) in enumerate(zip(QUESTIONS, wanted, strict=True)):
        messages.append({"role": "user", "content": question, "name": "Ann"})
        chunks = list(litellm.completion(model="openai/embedded", messages=messages, stream=True, **how))
        streamed = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        assert streamed.content == answer
        whole = litellm.completion(model="openai/embedded", messages=messages, n=2, **how)
        assert [choice.message.content for choice in whole.choices] == [answer] * 2
        messages.append(whole.choices[1].message if number % 2 else streamed.model_dump())
    asked = {"model": "text-completion-openai/embedded", "prompt": [PROMPT], "logprobs": 0}
    assert litellm.text_completion(**asked, **how).choices[0].text == "2"


def test_messages_of_other_servers_are_refused_by_name(server: Running):
    """Requests that this server cannot answer are a client's own error, with the field."""
    openai = pytest.importorskip("openai")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match=r"messages.1.tool_calls.*calls no tools"):
        server.client().chat.completions.create(model="embedded", messages=said)
    with pytest.raises(openai.BadRequestError, match=r"messages.1.role"):
        tool = {"role": "tool", "tool_call_id": "1", "content": "y"}
        server.client().chat.completions.create(model="embedded", messages=[said[0], tool])
