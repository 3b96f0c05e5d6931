"""Chat templates in the manner of public models: the same text as transformers renders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfs_triton import ArgumentError
from sfs_triton.text.chat_template import Renderer, TemplateError
from sfs_triton.text.codec import TextCodec
from tests.support.paths import REAL

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
QUESTION = {"role": "user", "content": '  it\'s <b> \u00e9 \U0001f642 "q" & \\n\n two  '}
ANSWER = {"role": "assistant", "content": "<think>\nso\n</think>\n\nan answer"}
CONVERSATIONS = {
    "one": [QUESTION],
    "system": [{"role": "system", "content": "Be <brief>."}, QUESTION],
    "three": [QUESTION, ANSWER, {"role": "user", "content": "and {{ then }}?", "name": "Ann"}],
    "all": [{"role": "system", "content": "S"}, QUESTION, ANSWER, QUESTION, ANSWER, QUESTION],
    "two users": [QUESTION, QUESTION],
}


@pytest.fixture(scope="module")
def render():
    """Render a template by transformers; None where it refuses."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()), **SPECIAL)
    assert tokenizer.special_tokens_map == SPECIAL

    def rendered(template: str, messages: list[dict], special: dict = SPECIAL) -> str | None:
        how = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        try:
            return tokenizer.apply_chat_template(messages, **how, **special)
        except Exception:
            return None

    return rendered


def ours(template: str, messages: list[dict], special: dict = SPECIAL) -> str | None:
    try:
        return TextCodec(None, template, special).render(messages)
    except ArgumentError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(render, name):
    assert len(TEMPLATES) == 10
    texts = {said: ours(TEMPLATES[name], messages) for said, messages in CONVERSATIONS.items()}
    assert texts == {said: render(TEMPLATES[name], messages) for said, messages in CONVERSATIONS.items()}
    refused = {said for said, text in texts.items() if text is None}
    assert refused == {"inst": {"two users"}, "renamed": {"system", "all"}}.get(name, set())


@pytest.mark.parametrize("folder", ["dream-v0-instruct-7b", "llada-8b-instruct"])
def test_published_templates_render_as_in_transformers(render, folder):
    path = REAL / folder / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip("needs the published files")
    config = json.loads(path.read_text())
    special = {name: config[name] for name in ("bos_token", "eos_token") if isinstance(config.get(name), str)}
    for messages in CONVERSATIONS.values():
        text = ours(config["chat_template"], messages, special)
        assert text is not None and text == render(config["chat_template"], messages, special)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% generation %}x", "endgeneration"),
        ("{% endgeneration %}", "unknown tag"),
        ("{{ missing | tojson }}", "Undefined"),
        ("{{ messages | tojson(indent=[]) }}", "."),
        ("{{ strftime_now(5) }}", "str"),
        ("{{ strftime_now('%Y', 1) }}", "argument"),
        ("{{ strftime_now.__globals__.os }}", "unsafe"),
        ("{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", "."),
        ("{{ [1, 2] | tojson(indent='x' * 10 ** 8) }}", "memory|characters"),
        ("{{ [[[1]]] | tojson(indent=10 ** 9) }}", "memory|characters|more than"),
    ],
)
def test_misuse_is_refused(template, why):
    renderer = Renderer(seconds=10)
    with pytest.raises(TemplateError, match=why):
        renderer.render(template, {"messages": CONVERSATIONS["three"]})
    assert renderer.render("{{ 'a' | tojson }}", {}) == '"a"'
    renderer.close()
