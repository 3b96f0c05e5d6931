"""Reading checkpoints: right logits from good ones, named errors from bad ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, UnsupportedConfigError
from sfs_triton.checkpoint import EMBEDDED
from sfs_triton.models import read_spec
from tests.support.margins import assert_logits_close
from tests.support.paths import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_recorded_ones(engines, golden, name):
    recorded = load_file(golden / "logits" / f"{name}.safetensors")
    for index in {key.split(".")[0] for key in recorded}:
        logits = engines[name].model.logits(recorded[f"{index}.input_ids"])
        assert_logits_close(logits, recorded[f"{index}.logits"])


def test_sharded_index_gives_the_same_weights(checkpoint, engines):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, checkpoint / file)
    weight_map = {n: file for file, part in halves.items() for n in part}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(
        sfs_triton.load(checkpoint, "cpu").model.logits(ids), engines["llada-mha"].model.logits(ids), atol=0, rtol=0
    )


def test_index_may_not_leave_the_folder(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    index = {"weight_map": {"model.transformer.wte.weight": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.\./outside\.safetensors"):
        sfs_triton.load(checkpoint, "cpu")


def test_shard_without_a_promised_tensor(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "a.safetensors")
    index = {"weight_map": {"model.transformer.nothing": "a.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model.transformer.nothing"):
        sfs_triton.load(checkpoint, "cpu")


def _rewrite(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_missing_tensor_is_named(checkpoint):
    _rewrite(checkpoint, lambda t: t.pop("model.transformer.blocks.1.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.transformer\.blocks\.1\.up_proj\.weight"):
        sfs_triton.load(checkpoint, "cpu")


def test_extra_tensor_is_named(checkpoint):
    _rewrite(checkpoint, lambda t: t.update({"model.transformer.blocks.0.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"no place for: model\.transformer\.blocks\.0\.q_proj\.bias"):
        sfs_triton.load(checkpoint, "cpu")


def test_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    _rewrite(checkpoint, lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"ln_f\.weight has shape \[63\].*\[64\]"):
        sfs_triton.load(checkpoint, "cpu")


def test_integer_weights_are_refused(checkpoint):
    _rewrite(checkpoint, lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="ln_f.weight has dtype torch.int8"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000])
def test_truncated_weights(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        sfs_triton.load(checkpoint, "cpu")


def test_corrupt_header(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="cannot be read"):
        sfs_triton.load(checkpoint, "cpu")


def test_pickles_are_never_opened(checkpoint):
    class Bomb:
        def __reduce__(self):
            return (open, (str(checkpoint / "exploded"), "w"))

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        sfs_triton.load(checkpoint, "cpu")
    assert not (checkpoint / "exploded").exists()


@pytest.mark.parametrize(
    "key", ["d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length", "mask_token_id", "eos_token_id"]
)
def test_missing_config_key_is_named(checkpoint, edit_config, key):
    edit_config(checkpoint, **{key: None})
    with pytest.raises(CheckpointError, match=key):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("layer_norm_type", "default"),
        ("bias_for_layer_norm", True),
        ("include_bias", True),
        ("rope", False),
        ("block_type", "sequential"),
        ("activation_type", "gelu"),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("clip_qkv", 8.0),
    ],
)
def test_unsupported_flag_is_refused_by_name(checkpoint, edit_config, key, value):
    edit_config(checkpoint, **{key: value})
    with pytest.raises(UnsupportedConfigError, match=f"{key}={value!r}"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear"}),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("head_dim", 32),
    ],
)
def test_unsupported_dream_flag_is_refused_by_name(golden, key, value):
    config = json.loads((golden / "models" / "dream-gqa" / "config.json").read_text())
    with pytest.raises(UnsupportedConfigError, match=key):
        read_spec({**config, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", 0),
        ("d_model", -4),
        ("n_heads", "4"),
        ("n_layers", True),
        ("n_heads", 5),
        ("n_kv_heads", 3),
        ("rms_norm_eps", float("nan")),
        ("mask_token_id", 512),
        ("eos_token_id", 500),
        ("vocab_size", 1e9),
    ],
)
def test_impossible_values_are_refused(checkpoint, edit_config, key, value):
    edit_config(checkpoint, **{key: value})
    with pytest.raises(CheckpointError):
        sfs_triton.load(checkpoint, "cpu")


def test_unknown_family_is_refused(checkpoint, edit_config):
    edit_config(checkpoint, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedConfigError, match="LlamaForCausalLM"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_config_that_is_not_an_object(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        sfs_triton.load(checkpoint, "cpu")


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        sfs_triton.load(tmp_path, "cpu")


def test_illada_style_checkpoint(tmp_path, engines):
    """Llama-style keys and names, tied head, grouped-query attention, no shift."""
    config = {
        "model_type": "illada",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "mask_token_id": 5,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "hidden_act": "silu",
    }
    spec = read_spec(config)
    assert (spec.family, spec.tied_head, spec.shifted, spec.n_kv_heads) == ("illada", True, False, 2)
    from sfs_triton.models.names import LLAMA_NAMES, expected_shapes

    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) * 0.1 for n, s in expected_shapes(spec, LLAMA_NAMES).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = sfs_triton.load(tmp_path, "cpu", "float32")
    assert engine.model.weights.head is engine.model.weights.embedding
    done = engine.generate([7, 8, 9], gen_length=16)
    assert len(done.response) == 16 and 5 not in done.response


def test_hub_id_offline_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'nobody/nothing' is not a local folder.* no copy.* the hub cannot be"):
        sfs_triton.load("nobody/nothing", "cpu")


@pytest.mark.parametrize("device", ["", 0, "nonsense"])
def test_a_device_that_is_none(device):
    if device == 0 and torch.cuda.is_available():
        pytest.skip("0 is a GPU")
    with pytest.raises(ArgumentError, match=f"device='{device}' cannot be used"):
        sfs_triton.load("embedded", device)


@pytest.mark.parametrize(
    "path", ["/n.gguf", "/n", "./nope", "../nope", "nope/", "~/nope", "a/b/c", ".hidden", "C:\\nope", Path("org/nope")]
)
def test_a_path_is_not_tried_as_a_hub_id(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **named: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError) as caught:
        sfs_triton.load(path, "cpu")
    assert str(caught.value) == f"{str(path)!r} is a path, and does not exist"


def test_a_revision_of_a_hub_id(monkeypatch):
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert all(pattern.endswith((".json", ".jinja", ".safetensors", "merges.txt")) for pattern in allow_patterns)
        return str(EMBEDDED)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("some/model", "some/model@v1.0"):
        assert sfs_triton.load(name, "cpu").spec.n_layers > 0
    assert asked == [("some/model", None), ("some/model", "v1.0")]
    with pytest.raises(sfs_triton.ArgumentError, match="'some/model@' names no revision"):
        sfs_triton.load("some/model@", "cpu")


def test_unknown_dtype():
    with pytest.raises(sfs_triton.ArgumentError, match="dtype='float8'"):
        sfs_triton.load("embedded", "cpu", "float8")


def test_corrupt_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        sfs_triton.load(checkpoint, "cpu")


def test_chat_template_runs_in_a_sandbox(embedded):
    from sfs_triton.text.codec import TextCodec

    codec = TextCodec(embedded.text.tokenizer, "{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(sfs_triton.ArgumentError, match="chat template refused"):
        codec.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_sequence_length", 2**40),
        ("n_layers", 2**20),
        ("include_qkv_bias", "false"),
        ("weight_tying", "no"),
        ("rope_theta", 10**400),
        ("architectures", 5),
        ("rope_scaling", {"type": "linear", "factor": 8}),
    ],
)
def test_hostile_values_are_refused_before_anything_is_allocated(checkpoint, edit_config, key, value):
    edit_config(checkpoint, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        sfs_triton.load(checkpoint, "cpu")


def test_a_long_context_costs_nothing_until_it_is_used(checkpoint, edit_config):
    edit_config(checkpoint, max_sequence_length=2**24)
    assert len(sfs_triton.load(checkpoint, "cpu").generate([1, 2, 3], gen_length=8).canvas) == 11


def test_null_means_the_default(checkpoint, edit_config):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "n_kv_heads": None, "embedding_size": None, "pad_token_id": None}))
    spec = sfs_triton.load(checkpoint, "cpu").spec
    assert (spec.n_kv_heads, spec.vocab_size, spec.pad_id) == (4, 512, 496)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"type": "linear", "factor": 8}),
        ("rope_parameters", [1]),
        ("layer_types", ["sliding_attention"]),
        ("layer_types", 5),
    ],
)
def test_llama_style_rope_and_layers(golden, key, value):
    config = json.loads((golden / "models" / "dream-gqa" / "config.json").read_text())
    with pytest.raises(UnsupportedConfigError, match=key):
        read_spec({**config, key: value})


def _with_template(embedded, template):
    from sfs_triton.text.codec import TextCodec

    return TextCodec(embedded.text.tokenizer, template, {})


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{% nonsense %}", "{{ raise_exception('no') }}"])
def test_broken_templates_are_named(embedded, template):
    with pytest.raises(sfs_triton.ArgumentError, match="chat template refused"):
        _with_template(embedded, template).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, "x"])
def test_messages_are_checked(embedded, message):
    with pytest.raises(sfs_triton.ArgumentError, match="message"):
        embedded.text.render([message])


def test_named_templates(embedded, tmp_path):
    from sfs_triton.text.codec import TextCodec

    (tmp_path / "tokenizer.json").write_text(embedded.text.tokenizer.to_str())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": [{"name": "default", "template": "hello"}]}))
    assert TextCodec.from_folder(tmp_path).template == "hello"
    path.write_text(json.dumps({"chat_template": [{"name": "tools", "template": "hello"}]}))
    with pytest.raises(CheckpointError, match="chat_template"):
        TextCodec.from_folder(tmp_path)


@pytest.mark.parametrize("path", [None, "", "/nowhere/at/all"])
def test_what_is_no_folder(path):
    with pytest.raises(sfs_triton.SfsError, match="folder|does not exist"):
        sfs_triton.load(path, "cpu")
