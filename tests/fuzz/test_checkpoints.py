"""Untrusted checkpoints: reading any file contents ends soon, with an engine or a documented error.

Every case runs in a process of its own that has 20 seconds and a gigabyte.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton.text.chat_template import Renderer, TemplateError
from sfs_triton.text.codec import TextCodec
from tests.fuzz.limits import confined
from tests.support import gguf_bytes
from tests.support.dream import SETTINGS as DREAM_SETTINGS
from tests.support.dream import vocabulary, write_tokenizer
from tests.support.paths import GOLDEN

pytest.importorskip("resource", reason="limits on memory are set as POSIX has them")

DOCUMENTED = {"done", "ArgumentError", "CheckpointError", "UnsupportedConfigError", "NumericalFault", "StepCapExceeded"}
MODELS = ("llada-gqa", "dream-gqa")
EMBEDDED = Path(sfs_triton.__file__).parent / "embedded"

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**53 + 1, 2**63, 10**40, 10**400, -(2**63)]) | st.integers()
FLOATS = st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1e308, 0.5, 64.0])
TEXTS = st.sampled_from(["", "true", "64", "../..", "\0", "x" * 100_000, "\ud800", "silu", "llada moe"]) | st.text()
LEAVES = st.none() | st.booleans() | NUMBERS | FLOATS | TEXTS
DEEP = st.integers(1, 500).map(lambda depth: json.loads("[" * depth + "]" * depth))
VALUES = LEAVES | DEEP | st.lists(LEAVES, max_size=3) | st.dictionaries(TEXTS, LEAVES, max_size=3)
GONE = object()  # in the place of a value: the key is removed
KEYS = ["rope_scaling", "rope_parameters", "layer_types", "head_dim", "n_kv_heads", "embedding_size", "architectures"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def _check(folder: Path, seen: Counter, use: bool = True) -> None:
    """The folder can be loaded and used, or is refused."""

    def load() -> None:
        engine = sfs_triton.load(folder, "cpu", "float32")
        if use:
            engine.generate([3, 4], gen_length=2)

    found = confined(load)
    assert found in DOCUMENTED, found
    seen[found] += 1


def _base(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "models" / model / "config.json").read_text())


def _dump(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def _fill(folder: Path, model: str) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "models" / model / name, folder / name)


def test_configurations(fuzz, folder):
    seen: Counter = Counter()
    places = st.sampled_from([*sorted(set(_base("llada-gqa")) | set(_base("dream-gqa"))), *KEYS])
    changes = st.dictionaries(places, VALUES | st.just(GONE), min_size=1, max_size=3)

    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        model, changed = drawn
        _fill(folder, model)
        config = {**_base(model), **changed}
        _dump(folder / "config.json", {key: value for key, value in config.items() if value is not GONE})
        _check(folder, seen)

    fuzz(check, st.tuples(st.sampled_from(MODELS), changes), examples=30, share=0.05)
    assert min(seen["done"], seen["CheckpointError"]) > 0


# --------------------------------------------------------------------------------------------------------------- bytes


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """Cuts, overwritten and inserted bytes; places are shares of the length."""
    kinds = st.sampled_from(["cut", "write", "insert"])
    some = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"[" * 5000, b"9" * 5000, b"NaN", b"{}"])
    return draw(st.lists(st.tuples(kinds, st.floats(0, 1), some), min_size=1, max_size=3))


def damaged(data: bytes, how: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, some in how:
        at = int(share * len(data))
        data = data[:at] + {"cut": b"", "write": some + data[at + len(some) :], "insert": some + data[at:]}[kind]
    return data


def test_damaged_files(fuzz, folder):
    seen: Counter = Counter()

    def check(drawn: tuple[str, str, bool, list]) -> None:
        model, name, header, how = drawn
        _fill(folder, model)
        data = (folder / name).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0] if header and name != "config.json" else len(data)
        (folder / name).write_bytes(damaged(data[:end], how) + data[end:])
        _check(folder, seen)

    files = st.sampled_from(["config.json", "model.safetensors"])
    fuzz(check, st.tuples(st.sampled_from(MODELS), files, st.booleans(), damage()), examples=20, share=0.03)
    assert seen["CheckpointError"] > 0


def test_safetensors_headers(fuzz, folder):
    """Names, types, shapes and offsets that the rest of the file does not go with."""
    seen: Counter = Counter()
    kinds = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "C64", "I8", "BOOL"])
    sizes = st.lists(st.sampled_from([-1, 0, 1, 2, 64, 2**31, 2**62, 2**64]), max_size=3)
    places = st.lists(st.sampled_from([-1, 0, 1, 64, 10**6, 2**63, 2**64 - 1]), min_size=2, max_size=2)
    fields = [("dtype", kinds), ("shape", sizes), ("data_offsets", places)]
    one = st.one_of(*(st.tuples(st.just(name), values | VALUES) for name, values in fields))
    alone = st.tuples(st.sampled_from(["rename", "remove", "twice", "metadata"]), VALUES)
    changes = st.lists(st.tuples(st.integers(0, 100), one | alone), min_size=1, max_size=2)
    lengths = st.none() | st.sampled_from([0, 1, 7, 10**8, 10**8 + 1, 2**63, 2**64 - 1])

    def check(drawn: tuple[str, list, int | None]) -> None:
        model, changed, length = drawn
        _fill(folder, model)
        data = (folder / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        for index, (kind, value) in changed:
            names = sorted(set(header) - {"__metadata__"})
            name = names[index % len(names)] if names else "x"
            _change(header, name, kind, value)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        begin = struct.pack("<Q", len(text) if length is None else length)
        (folder / "model.safetensors").write_bytes(begin + text + data[8 + size :])
        _check(folder, seen)

    fuzz(check, st.tuples(st.sampled_from(MODELS), st.just([]) | changes, lengths), examples=30, share=0.05)
    assert seen["CheckpointError"] > 0


def _change(header: dict, name: str, kind: str, value: Any) -> None:
    if kind == "rename":
        header[str(value)] = header.pop(name, {})
    elif kind == "remove":
        header.pop(name, None)
    elif kind == "twice":
        header["twice"] = header.get(name)  # two names for the same bytes
    elif kind == "metadata":
        header["__metadata__"] = value
    elif isinstance(header.get(name), dict):
        header[name][kind] = value


def test_indices(fuzz, folder):
    """Shards that are elsewhere, missing, or not those that were promised."""
    seen: Counter = Counter()
    tensors = load_file(GOLDEN / "models" / "llada-gqa" / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, folder / "b.safetensors")
    (folder / "c.safetensors").mkdir()
    shutil.copy(GOLDEN / "models" / "llada-gqa" / "config.json", folder)
    shutil.copy(GOLDEN / "models" / "llada-gqa" / "model.safetensors", folder.parent / "outside.safetensors")
    good = {name: "ab"[index % 2] + ".safetensors" for index, name in enumerate(names)}
    outside = ["../outside.safetensors", str(folder.parent / "outside.safetensors"), "./a.safetensors", "..", "a\0"]
    others = ["a.safetensors", "b.safetensors", "c.safetensors", "missing.safetensors", "config.json", ".safetensors"]
    files = st.sampled_from([*outside, *others]) | VALUES
    keys = st.sampled_from([*names, "made.up.weight"]) | TEXTS
    changes = st.dictionaries(keys, files | st.just(GONE), max_size=3)

    def check(drawn: tuple[dict, Any]) -> None:
        changed, instead = drawn
        mapping = {key: value for key, value in {**good, **changed}.items() if value is not GONE}
        index = {"metadata": {}, "weight_map": mapping} if instead is None else instead
        _dump(folder / "model.safetensors.index.json", index)
        _check(folder, seen, use=False)

    fuzz(check, st.tuples(changes, st.none() | st.none() | VALUES), examples=20, share=0.03)
    assert min(seen["done"], seen["CheckpointError"]) > 0


# ---------------------------------------------------------------------------------------------- tokenizers, templates


def _paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Places in a tokenizer file, of long lists only the first few."""
    found = [at] if at else []
    if isinstance(value, dict):
        for key in list(value)[:12]:
            found += _paths(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            found += _paths(value[index], (*at, index))
    return found


def _replaced(value: Any, at: tuple, by: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if by is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = by
    return value


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


# parts that are valid on their own, and what a stranger may put into them
PARTS = [
    {"type": "Sequence", "normalizers": [_replace({"String": "a"}, "a" * 100)] * 4},
    _replace({"String": ""}, "a" * 1000),
    _replace({"Regex": "(a+)+$"}, "b"),
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Prepend", "prepend": "a" * 10_000},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "x"},
    {
        "type": "WordPiece",
        "vocab": {"a": 0},
        "unk_token": "x",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 0,
    },
    {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
    {"type": "Unigram", "vocab": [], "unk_id": None},
    {"type": "Unigram", "vocab": [["a", float("nan")], ["a", 1e308]], "unk_id": 7},
]
TOKENIZER = json.loads((EMBEDDED / "tokenizer.json").read_text())
SETTINGS = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
SAID = ["", "a" * 40 + "b", "1+2=3 \0\n é 𝔘", "<|mdm_mask|>x<|eot_id|>"]


def _speak(folder: Path) -> None:
    codec = TextCodec.from_folder(folder)
    for text in SAID:
        ids = codec.encode(text)
        codec.decode(ids)
    codec.decode([0, 1, 2, 10**6])
    codec.piece(3)
    codec.token_id("a")


def test_tokenizers(fuzz, folder):
    seen: Counter = Counter()
    values = VALUES | st.just(GONE) | st.sampled_from(PARTS)
    changes = st.lists(st.tuples(st.sampled_from(_paths(TOKENIZER)), values), min_size=1, max_size=2)
    places = ["normalizer", "pre_tokenizer", "model", "decoder", "post_processor"]
    whole = st.tuples(st.sampled_from([(place,) for place in places]), st.sampled_from(PARTS)).map(lambda one: [one])

    def check(changed: list[tuple[tuple, Any]]) -> None:
        made = TOKENIZER
        for at, value in changed:
            try:
                made = _replaced(made, at, value)
            except (KeyError, IndexError, TypeError):  # the first change took the place of the second
                continue
        _dump(folder / "tokenizer.json", made)
        found = confined(lambda: _speak(folder))
        assert found in DOCUMENTED, found
        seen[found] += 1

    fuzz(check, changes | whole, examples=20, share=0.04)
    assert min(seen["done"], seen["CheckpointError"]) > 0


def test_tokenizer_settings(fuzz, folder):
    """``tokenizer_config.json`` and the rendering of what it has for a template."""
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    seen: Counter = Counter()
    changes = st.dictionaries(st.sampled_from([*SETTINGS, "tool_template"]), VALUES | st.just(GONE), max_size=3)

    def check(changed: dict[str, Any]) -> None:
        settings = {key: value for key, value in {**SETTINGS, **changed}.items() if value is not GONE}
        _dump(folder / "tokenizer_config.json", settings)

        def render() -> None:
            codec = TextCodec.from_folder(folder)
            codec.encode(codec.render([{"role": "user", "content": "1+2"}]))

        found = confined(render)
        assert found in DOCUMENTED, found
        seen[found] += 1

    fuzz(check, changes, examples=15, share=0.01)
    assert seen["done"] > 0


def test_byte_level_tokenizers(fuzz, folder):
    """vocab.json, merges.txt and added tokens that do not go together."""
    seen: Counter = Counter()
    vocab, texts = vocabulary(), st.sampled_from(["", "a", "ab", "<|im_end|>", "Ġ", "\0", "\ud800", "x" * 10_000])
    entries = st.dictionaries(texts | st.text(max_size=3), NUMBERS | VALUES, max_size=3)
    lines = st.lists(st.sampled_from(["a b", "h e", "a", "a b c", "", "#version: 0.2", "\ud800 a"]), max_size=4)
    settings = st.dictionaries(
        st.sampled_from(["tokenizer_class", "added_tokens_decoder", "mask_token", "chat_template"]),
        VALUES | st.dictionaries(st.sampled_from(["0", "496", "-1", "9" * 30, "x"]), VALUES, max_size=2),
        max_size=2,
    )
    times = st.sampled_from([1, 1, 1, 100_000])

    def check(drawn: tuple[dict, list[str], int, dict]) -> None:
        more, merges, repeated, changed = drawn
        write_tokenizer(folder)
        _dump(folder / "vocab.json", {**vocab, **more})
        with open(folder / "merges.txt", "ab") as file:
            file.write(("\n".join(merges) + "\n").encode("utf-8", "surrogatepass") * repeated)
        _dump(folder / "tokenizer_config.json", {**DREAM_SETTINGS, **changed})
        found = confined(lambda: _speak(folder))
        assert found in DOCUMENTED, found
        seen[found] += 1

    fuzz(check, st.tuples(entries, lines, times, settings), examples=20, share=0.03)
    assert min(seen["done"], seen["CheckpointError"]) > 0


def test_generation_configurations(fuzz, folder):
    seen: Counter = Counter()
    _fill(folder, "llada-gqa")
    ids = st.lists(st.integers(-2, 600) | LEAVES, max_size=20) | st.integers(0, 600) | VALUES
    changes = st.dictionaries(st.sampled_from(["eos_token_id", "pad_token_id", "temperature"]), ids, max_size=2)

    def check(found: Any) -> None:
        _dump(folder / "generation_config.json", found)
        _check(folder, seen)

    fuzz(check, changes | VALUES, examples=20, share=0.02)
    assert min(seen["done"], seen["CheckpointError"]) > 0


def test_adapters(fuzz, folder):
    """Adapters whose settings or tensors are not those of the base, or of an adapter."""
    seen: Counter = Counter()
    module = "base_model.model.model.transformer.blocks.0.q_proj"
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}
    keys = [*good, "use_dora", "modules_to_save", "rank_pattern", "init_lora_weights", "fan_in_fan_out"]
    changes = st.dictionaries(st.sampled_from(keys), VALUES | st.just(GONE), max_size=2)
    names = st.sampled_from([module, module + "x", "base_model.model.lm_head", "", "module." * 500])
    sizes = st.sampled_from([(2, 128), (128, 2), (3, 128), (0, 128), (2,), (2, 128, 1), ()])
    parts = st.sampled_from(["A", "B", "A.default", "embedding_A", "magnitude_vector", "A" * 1000])
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool])
    extra = st.lists(st.tuples(names, parts, sizes, kinds), max_size=2)

    def check(drawn: tuple[dict, list]) -> None:
        changed, more = drawn
        config = {key: value for key, value in {**good, **changed}.items() if value is not GONE}
        _dump(folder / "adapter_config.json", config)
        tensors = {f"{module}.lora_A.weight": torch.ones(2, 128), f"{module}.lora_B.weight": torch.ones(128, 2)}
        for name, part, size, kind in more:
            tensors[f"{name}.lora_{part}.weight"] = torch.zeros(size).to(kind)
        save_file(tensors, folder / "adapter_model.safetensors")
        found = confined(lambda: sfs_triton.load(GOLDEN / "models" / "llada-gqa", "cpu", adapter=folder))
        assert found in DOCUMENTED, found
        seen[found] += 1

    fuzz(check, st.tuples(changes, extra), examples=20, share=0.03)
    assert min(seen["done"], seen["CheckpointError"], seen["UnsupportedConfigError"]) > 0


def test_gguf_files(fuzz, folder):
    """Metadata of any value, tensors elsewhere or of other types, and damaged bytes."""
    pytest.importorskip("gguf")
    seen: Counter = Counter()
    tensors = {"token_embd.weight": torch.randn(64, 32), "output_norm.weight": torch.ones(32)}
    for part, size in {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (32, 32)}.items():
        tensors[f"blk.0.{part}.weight"] = torch.randn(size)
    for part, size in {"attn_v": (32, 32), "attn_output": (32, 32), "ffn_down": (32, 64)}.items():
        tensors[f"blk.0.{part}.weight"] = torch.randn(size)
    tensors |= {f"blk.0.ffn_{part}.weight": torch.randn(64, 32) for part in ("gate", "up")}
    tensors |= {"output.weight": torch.randn(64, 32)}
    good = {
        **{"general.architecture": "llada", "llada.block_count": 1, "llada.context_length": 64},
        **{"llada.embedding_length": 32, "llada.feed_forward_length": 64, "llada.attention.head_count": 2},
        **{"llada.attention.head_count_kv": 2, "llada.vocab_size": 64, "llada.rope.freq_base": 10000.0},
        **{"llada.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.mask_token_id": 60},
        **{"tokenizer.ggml.eos_token_id": 61, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"},
        **{"tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 3]},
        **{"tokenizer.ggml.merges": [], "general.alignment": 32},
    }
    plain = st.booleans() | NUMBERS | FLOATS | TEXTS | st.lists(st.sampled_from(["a", "a b", "ab"]), max_size=4)
    changes = st.dictionaries(st.sampled_from(list(good)), plain | st.lists(st.integers(0, 9), max_size=4), max_size=2)

    def check(drawn: tuple[dict, list]) -> None:
        changed, how = drawn
        data = gguf_bytes.whole({**good, **changed}, tensors)
        end = len(data) - sum(tensor.nbytes for tensor in tensors.values())
        (folder / "model.gguf").write_bytes(damaged(data[:end], how) + data[end:])
        _check(folder / "model.gguf", seen)

    fuzz(check, st.tuples(changes, st.just([]) | damage()), examples=20, share=0.04)
    assert min(seen["done"], seen["CheckpointError"]) > 0


PIECES = [
    "{{ messages[0]['content'] }}",
    "{{ bos_token }}",
    "{% for m in messages %}",
    "{% for a in range(99999) %}",
    "{% endfor %}",
    "{% if messages|length > 1 %}",
    "{% endif %}",
    "{% set ns = namespace(x='ab') %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{{ ns.x }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 7 ** 7 ** 7 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'x'|center(10 ** 9) }}",
    "{{ lipsum(n=10 ** 6) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ self.__dict__ }}",
    "{{ ((messages|tojson) * 9999)|urlize }}",
    "{# ",
    "{%",
]


def test_templates(fuzz):
    """Templates end in time and expose nothing outside: the result is text or a documented error."""
    renderer, seen = Renderer(seconds=0.5), Counter()
    variables = {"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": True, "bos_token": "<s>"}

    def check(pieces: list[str]) -> None:
        try:
            text = renderer.render("".join(pieces), variables)
        except TemplateError as error:
            seen["it took" if str(error).startswith("it took") else "error"] += 1
            return
        seen["text"] += 1
        assert "root:" not in text and "<class" not in text and "site-packages" not in text, text[:500]

    try:
        fuzz(check, st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=6), examples=20, share=0.04)
    finally:
        renderer.close()
    assert min(seen["text"], seen["error"]) > 0


def test_other_files_are_not_read(folder):
    """Files that could bring code, or repeat what others say, may hold anything."""
    _fill(folder, "llada-gqa")
    for name in ("modeling_llada.py", "configuration_llada.py", "special_tokens_map.json"):
        (folder / name).write_bytes(b"\xff{[" + b"raise SystemExit" * 100)
    assert confined(lambda: sfs_triton.load(folder, "cpu", "float32")) == "done"


def test_the_limits_limit():
    """Show that these tests can fail."""
    assert confined(lambda: None) == "done"
    assert "MemoryError" in confined(lambda: bytearray(2**32))
    assert "memory" in confined(lambda: torch.zeros(2**31))
    assert confined(lambda: [None for _ in iter(int, 1)], seconds=1).startswith("killed by SIGALRM")
    assert "ZeroDivisionError" in confined(lambda: 1 // 0)
