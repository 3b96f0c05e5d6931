"""Families of checkpoints: what each one's configuration says, and forwards against an independent implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfs_triton
from sfs_triton import CheckpointError, UnsupportedConfigError
from sfs_triton.models import read_spec
from sfs_triton.models.names import LLAMA_NAMES, expected_shapes
from tests.support.margins import assert_logits_close

# A small model with the keys that iLLaDA-8B's public descriptions name: no mask_token_id, few key heads, a tied head.
ILLADA = {
    "model_type": "illada",
    "architectures": ["ILLaDAForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "hidden_act": "silu",
}
# The same for Tiny-A2D: a Qwen3 block, whose heads are wider together than the model.
QWEN3 = {
    **{key: ILLADA[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    "model_type": "a2d-qwen3",
    "architectures": ["A2DQwen3LMHeadModel"],
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "layer_types": ["full_attention"] * 2,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "eos_token_id": 2,
    "mask_token_id": 5,
}
QWEN2 = {
    **{key: value for key, value in QWEN3.items() if key not in ("head_dim", "attention_bias")},
    "model_type": "a2d-qwen2",
    "architectures": ["A2DQwen2LMHeadModel"],
}
MODELS = {"illada": ILLADA, "a2d-qwen3": QWEN3, "a2d-qwen2": QWEN2}


def write(folder: Path, config: dict, **known: int) -> Path:
    """Write a checkpoint of random weights; ``known``: what the configuration does not say."""
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(read_spec({**config, **known}), LLAMA_NAMES)
    tensors = {n: torch.randn(s, generator=generator) * 0.1 + (len(s) == 1) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def forward(config: dict, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, L, V]`` in float64, written from the architecture's description."""
    from safetensors.torch import load_file

    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size, eps = config.get("head_dim") or config["hidden_size"] // heads, config["rms_norm_eps"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [B, L, H, D]
        angle = torch.arange(x.shape[1])[:, None] * config["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{at}self_attn.{p}_proj.weight"].T + w.get(f"{at}self_attn.{p}_proj.bias", 0)).unflatten(
                -1, (-1, size)
            )
            for p in "qkv"
        )
        if f"{at}self_attn.q_norm.weight" in w:
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv, 2) for t in (k, v))
        weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / size**0.5).softmax(-1)
        x = x + torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_an_independent_forward(tmp_path, name):
    engine = sfs_triton.load(write(tmp_path, MODELS[name]), "cpu", "float32")
    ids = torch.arange(40).remainder(128)[None]
    assert_logits_close(engine.model.logits(ids), forward(MODELS[name], tmp_path, ids).float())


@pytest.mark.parametrize("cache", ["none", "region", "prefix", "dual", "refresh"])
def test_heads_are_normalised_under_every_cache_policy(tmp_path, cache):
    """A cache that holds everything changes no token; all paths of attention normalise queries and keys alike."""
    # untied: the random tied head of this size predicts the mask at a mask
    engine = sfs_triton.load(write(tmp_path, {**QWEN3, "tie_word_embeddings": False}), "cpu", "float32")
    sampler = sfs_triton.FixedSteps(block_length=8) if cache in ("prefix", "dual") else sfs_triton.SlowFast()
    policy = {
        "region": sfs_triton.RegionCache(capacity=64, refresh_every=1),
        "refresh": sfs_triton.RefreshCache(prompt_interval=1, response_interval=1),
    }.get(cache, "none" if cache == "none" else cache)
    done = engine.generate([7, 8, 9], gen_length=16, sampler=sampler, cache=policy)
    assert len(done.response) == 16 and 5 not in done.response
    if cache not in ("prefix", "dual"):
        assert done.canvas == engine.generate([7, 8, 9], gen_length=16, sampler=sampler).canvas


def test_what_the_families_say():
    spec = read_spec(ILLADA)
    assert (spec.family, spec.mask_id, spec.end_ids, spec.pad_id, spec.max_length) == ("illada", 5, (2,), 1, 8192)
    assert (spec.tied_head, spec.shifted, spec.qk_norm) == (True, False, False)
    spec = read_spec(QWEN3)
    assert (spec.head_dim, spec.q_width, spec.kv_width, spec.qk_norm, spec.qkv_bias) == (32, 128, 64, True, False)
    spec = read_spec(QWEN2)
    assert (spec.head_dim, spec.qk_norm, spec.qkv_bias, spec.shifted) == (16, False, True, False)


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "default"}, {"type": "default", "factor": 1.0}, {"rope_type": "default", "factor": 1}],
)
def test_scaling_that_changes_nothing_is_accepted(scaling):
    assert read_spec({**ILLADA, "rope_scaling": scaling}) == read_spec(ILLADA)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"rope_type": [], "factor": 1.0}},
        {"layer_norm_eps": 1e-5},
        {"block_size": 32},
        {"architectures": ["ILLaDAForCausalLM", "SDARForCausalLM"]},
        {"architectures": ["DreamForCausalLM"]},
        {"model_type": "llada2"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization": {"quant_method": "awq"}},
    ],
    ids=lambda change: f"{next(iter(change))}={next(iter(change.values()))}"[:40],
)
def test_what_changes_the_computation_is_refused_by_name(change):
    named = next(iter(change)) if "architectures" not in change and "model_type" not in change else "block-diffusion"
    with pytest.raises(UnsupportedConfigError, match=named):
        read_spec({**ILLADA, **change})


# ----------------------------------------------------------------------------------------------------- mask token


def _tokenizer(folder: Path, mask: str | None, named: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefghij")}, []))
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<s>", mask) if t is not None])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask} if named else {}))


@pytest.mark.parametrize(
    ("mask", "named"), [("<odd>", True), *((m, False) for m in ("<[MASK]>", "<|mdm_mask|>", "[MDM_MASK]", "<|mask|>"))]
)
def test_the_tokenizer_names_the_mask(tmp_path, mask, named):
    config = {key: value for key, value in QWEN3.items() if key != "mask_token_id"}
    write(tmp_path, config, mask_token_id=5)
    with pytest.raises(CheckpointError, match=r"'mask_token_id'.*load\(..., mask_token_id=\) gives it"):
        sfs_triton.load(tmp_path, "cpu")
    _tokenizer(tmp_path, mask, named)
    assert sfs_triton.load(tmp_path, "cpu").spec.mask_id == 11
    assert sfs_triton.load(tmp_path, "cpu", mask_token_id=7).spec.mask_id == 7


def test_transformers_classes_take_illada_as_it_is(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModelForMaskedLM

    import sfs_triton.integrations.transformers  # noqa: F401  registers the classes

    model = AutoModelForMaskedLM.from_pretrained(write(tmp_path, ILLADA), dtype=torch.float32)
    model.generation_config.eos_token_id = [2, 9]
    engine = sfs_triton.accelerate(model)
    assert (engine.spec.mask_id, engine.spec.end_ids) == (5, (2, 9))
    ids = torch.arange(40)[None]
    assert_logits_close(engine.model.logits(ids), forward(ILLADA, tmp_path, ids).float())


@pytest.mark.parametrize("value", [-1, 128, 2, True, "5"])
def test_a_mask_that_cannot_be_one(tmp_path, value):
    write(tmp_path, ILLADA)
    with pytest.raises(sfs_triton.SfsError, match="mask_token_id"):
        sfs_triton.load(tmp_path, "cpu", mask_token_id=value)


def test_a_limit_below_the_checkpoints_own(tmp_path):
    engine = sfs_triton.load(write(tmp_path, ILLADA), "cpu", max_length=20)
    with pytest.raises(sfs_triton.ArgumentError, match="the model allows 20"):
        engine.generate([7] * 5, gen_length=16)
    with pytest.raises(sfs_triton.ArgumentError, match="max_length=8193 is not an integer from 1 to 8192"):
        sfs_triton.load(tmp_path, "cpu", max_length=8193)
