"""Weights in float8: conversion, refusals, correct values, and that everything runs on them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from bench.baselines import PlainModel
from bench.cost.step_count import Setting, kinds, steps_of
from bench.quality import quantised as bench_quantised
from sfs_triton import ArgumentError, CheckpointError, Engine, FixedSteps, SlowFast
from sfs_triton.models import Transformer, load_weights, read_spec
from sfs_triton.models import weights as module
from sfs_triton.models.names import LLAMA_NAMES, expected_shapes
from sfs_triton.models.weights import LayerWeights, Weights
from sfs_triton.ops.dispatch import Quantised, operations
from sfs_triton.ops.torch.linear import dequantise, quantize
from tests.support.combinations import PROMPTS, SOME_PAIRS, assert_same
from tests.support.live_bytes import LiveBytes
from tests.support.margins import assert_logits_close
from tests.support.paths import GOLDEN, ROOT
from tests.support.rank import Rank

MATRICES = ("qkv", "out", "gate_up", "down")
NAMES = ("llada-gqa", "dream-gqa")  # one without and one with a bias of q, k and v, which shifts its logits, too
CPU = torch.device("cpu")


def load(name: str, **options) -> Engine:
    return sfs_triton.load(GOLDEN / "models" / name, "cpu", options.pop("dtype", "float32"), **options)


def multiplied_out(weights: Weights, dtype: torch.dtype = torch.float32) -> Weights:
    """Plain weights of the same values."""

    def plain(x):
        return dequantise(x.codes, x.scale, dtype) if isinstance(x, Quantised) else x

    layers = tuple(LayerWeights(*(plain(getattr(layer, f.name)) for f in fields(layer))) for layer in weights.layers)
    return replace(weights, layers=layers, head=plain(weights.head))


def matrices(weights: Weights) -> dict[str, torch.Tensor | Quantised]:
    named = {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(weights.layers) for name in MATRICES}
    return {**named, "head": weights.head}


@pytest.fixture(scope="module", params=NAMES)
def fp8(request) -> Engine:
    return load(request.param, quantization="fp8")


@pytest.fixture(scope="module")
def same_values(fp8) -> Engine:
    """Build an engine that computes with plain matrices the values that the other computes with codes."""
    return Engine(Transformer(fp8.spec, multiplied_out(fp8.model.weights)))


@pytest.fixture
def tied(tmp_path) -> Path:
    config = {
        **{"model_type": "illada", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 129, "max_position_embeddings": 64},
        **{"rope_theta": 5e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "mask_token_id": 5},
        **{"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "hidden_act": "silu"},
    }
    shapes = expected_shapes(read_spec(config), LLAMA_NAMES)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("at_once", [1, 1000, 2**24])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_fused_matrices(monkeypatch, engines, name, at_once):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    plain, quantised = engines[name].model.weights, load(name, quantization="fp8").model.weights
    for (where, got), given in zip(matrices(quantised).items(), matrices(plain).values(), strict=True):
        codes, scale = quantize(given)
        assert torch.equal(got.codes.view(torch.uint8), codes.view(torch.uint8)), where
        assert torch.equal(got.scale, scale), where
    for mine, theirs in zip(quantised.layers, plain.layers, strict=True):
        for vector in ("attn_norm", "mlp_norm", "qkv_bias"):
            assert (getattr(mine, vector) is None) == (getattr(theirs, vector) is None)
            assert getattr(mine, vector) is None or torch.equal(getattr(mine, vector), getattr(theirs, vector))
    assert torch.equal(quantised.embedding, plain.embedding) and torch.equal(quantised.norm, plain.norm)


def test_codes_are_made_of_the_files_numbers_and_not_of_rounded_ones(fp8):
    name = "dream-gqa" if fp8.spec.shifted else "llada-gqa"
    half = load(name, quantization="fp8", dtype="bfloat16").model.weights
    assert half.embedding.dtype == torch.bfloat16 and half.layers[0].attn_norm.dtype == torch.bfloat16
    for got, wanted in zip(matrices(half).values(), matrices(fp8.model.weights).values(), strict=True):
        assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
        assert torch.equal(got.scale, wanted.scale)


def test_a_tied_head_becomes_a_matrix_of_its_own(tied):
    plain, quantised = sfs_triton.load(tied, "cpu"), sfs_triton.load(tied, "cpu", quantization="fp8")
    assert plain.model.weights.head is plain.model.weights.embedding
    assert isinstance(quantised.model.weights.embedding, torch.Tensor)
    codes, scale = quantize(plain.model.weights.embedding)
    head = quantised.model.weights.head
    assert torch.equal(head.codes.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(head.scale, scale)
    assert len(quantised.generate([7, 8, 9], gen_length=16).response) == 16


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_have_parts_of_the_codes_of_one_process(fp8, rank):
    folder = GOLDEN / "models" / ("dream-gqa" if fp8.spec.shifted else "llada-gqa")
    mine = load_weights(folder, fp8.spec, CPU, torch.float32, Rank(rank), quantization="fp8")
    whole, spec = fp8.model.weights, fp8.spec
    for got, all_ in zip(mine.layers, whole.layers, strict=True):
        for name, parts in {
            "qkv": (spec.d_model, spec.kv_width, spec.kv_width),
            "gate_up": (spec.mlp, spec.mlp),
        }.items():
            matrix, begin, rows = getattr(all_, name), 0, []
            for n in parts:
                rows.append(torch.arange(begin + n * rank // 2, begin + n * (rank + 1) // 2))
                begin += n
            at = torch.cat(rows)
            assert torch.equal(getattr(got, name).codes.view(torch.uint8), matrix.codes.view(torch.uint8)[at])
            assert torch.equal(getattr(got, name).scale, matrix.scale[at])
        for name in ("out", "down"):
            matrix = getattr(all_, name)
            half = matrix.shape[1] // 2
            columns = matrix.codes.view(torch.uint8)[:, rank * half : (rank + 1) * half]
            assert torch.equal(getattr(got, name).codes.view(torch.uint8), columns)
            assert torch.equal(getattr(got, name).scale, matrix.scale)


def test_no_more_is_in_memory_than_the_result_and_one_tensor(monkeypatch, checkpoint):
    at_once = 64 * 16
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    spec = read_spec(json.loads((checkpoint / "config.json").read_text()))
    reads: list[int] = []
    with LiveBytes() as live:
        for name in ("rows", "read"):
            real = getattr(module.TensorReader, name)

            def noted(self, *args, real=real):
                found = real(self, *args)
                reads.append(found.nbytes)
                return live.note(found)

            monkeypatch.setattr(module.TensorReader, name, noted)
        made = load_weights(checkpoint, spec, CPU, torch.float32, quantization="fp8")
    size = bench_quantised.weight_bytes(made)
    shapes = {name: x.shape for name, x in matrices(made).items()}
    kept = spec.vocab_size * spec.d_model * 4 + (2 * spec.n_layers + 1) * spec.d_model * 4
    assert size == kept + sum(n * k + 4 * n for n, k in shapes.values())
    assert len(reads) > 2 * len(shapes)  # matrices came in pieces
    # the file's own pages of a tensor; of some of its rows magnitudes, quotients, flags, codes: five floats hold them
    largest = spec.vocab_size * spec.d_model * 4
    assert size <= live.most <= size + largest + 5 * 4 * at_once, (size, live.most)
    whole = sum(x.nbytes for x in load_file(checkpoint / "model.safetensors").values())
    assert live.most < 0.6 * whole  # which is what a plain load ends with, and a quantised one never has


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["model.transformer.blocks.1.k_proj.weight", "model.transformer.blocks.0.ff_out.weight"]
)
def test_what_has_no_code_is_refused_by_name(monkeypatch, checkpoint, name, bad):
    monkeypatch.setattr(module, "AT_ONCE", 300)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name][[9, 30], 4] = bad
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} has NaN or infinities, the first in row 9")):
        sfs_triton.load(checkpoint, "cpu", quantization="fp8")


def test_integer_matrices_are_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.transformer.blocks.1.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has dtype torch\.int8"):
        sfs_triton.load(checkpoint, "cpu", quantization="fp8")


@pytest.mark.parametrize("quantization", ["int4-48", "", "FP8", True, torch.float8_e4m3fn])
def test_unknown_quantizations_are_refused_before_anything_is_read(quantization):
    with pytest.raises(ArgumentError, match="quantization=.* is not one of"):
        sfs_triton.load("/nowhere", "cpu", quantization=quantization)


def test_what_takes_no_quantised_weights_says_so(fp8, same_values):
    with pytest.raises(ArgumentError, match="a baseline takes no quantised weights"):
        PlainModel(fp8.model)
    assert PlainModel(same_values.model).weights.embedding is same_values.model.weights.embedding


# ----------------------------------------------------------------------------------------------------------- products


def test_rows_are_sliced_without_a_copy(fp8):
    matrix = fp8.model.weights.layers[0].qkv
    part = matrix[8:24]
    assert part.shape == (16, matrix.shape[1]) and part.nbytes == 16 * (matrix.shape[1] + 4)
    assert part.codes.data_ptr() == matrix.codes[8:].data_ptr() and part.scale.data_ptr() == matrix.scale[8:].data_ptr()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_product_errs_by_no_more_than_the_codes_rounding(fp8, engines, impl):
    """An element of a row is off by at most max(|w| / 16, scale / 1024); the rest is float32's own rounding."""
    exact = engines["dream-gqa" if fp8.spec.shifted else "llada-gqa"].model.weights
    ops = operations(impl, CPU)
    generator = torch.Generator().manual_seed(3)
    d = fp8.spec.d_model
    for rows in (None, slice(0, d), slice(d, None)):
        x = torch.randn(2, 5, d, generator=generator)
        layer, plain = fp8.model.weights.layers[0], exact.layers[0]
        out = ops.product(x, layer.qkv, layer.qkv_bias, rows)
        matrix, codes = plain.qkv[rows or slice(None)].double(), layer.qkv[rows or slice(None)]
        wanted = x.double() @ matrix.T
        if plain.qkv_bias is not None:
            wanted = wanted + plain.qkv_bias[rows or slice(None)].double()
        off = torch.maximum(matrix.abs() / 16, codes.scale.double()[:, None] / 1024)
        bound = x.double().abs() @ off.T
        own = 2 * d * torch.finfo(torch.float32).eps * (x.double().abs() @ matrix.abs().T + wanted.abs())
        assert out.shape == wanted.shape and ((out.double() - wanted).abs() <= bound + own).all()
        assert (out.double() - wanted).abs().max() > own.max()  # they were quantised at all


def test_products_of_nothing_and_of_single_rows(fp8):
    matrix, d = fp8.model.weights.layers[0].out, fp8.spec.d_model
    for impl in ("torch", "triton"):
        ops = operations(impl, CPU)
        assert ops.product(torch.ones(2, 0, d), matrix).shape == (2, 0, d)
        assert ops.product(torch.ones(d), matrix).shape == (d,)


# -------------------------------------------------------------------------------------------------------- generations


def test_logits_are_those_of_the_values(fp8, same_values):
    ids = torch.arange(40)[None]
    assert_logits_close(fp8.model.logits(ids), same_values.model.logits(ids))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
def test_both_machines_and_every_policy(fp8, same_values, sampler, policy):
    options = {"gen_length": 16, "sampler": sampler, "cache": policy, "seed": 5}
    assert_same(fp8.generate(PROMPTS, **options), same_values.generate(PROMPTS, **options))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "sampler",
    [
        SlowFast(temperature=0.8),
        SlowFast(temperature=0.8, top_p=0.9),
        SlowFast(temperature=0.8, top_k=20),
        SlowFast(cfg_scale=0.5),
        FixedSteps(steps=8, metric="entropy", temperature=0.5),
    ],
    ids=["noise", "top-p", "top-k", "guidance", "entropy"],
)
def test_every_way_to_choose(fp8, same_values, sampler):
    options = {"gen_length": 16, "sampler": sampler, "seed": 5}
    assert_same(fp8.generate(PROMPTS, **options), same_values.generate(PROMPTS, **options))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        pytest.param("llada-gqa", SlowFast(), id="llada-gqa-argmax"),
        pytest.param("dream-gqa", SlowFast(temperature=0.8, top_k=20), id="dream-gqa-top-k", marks=pytest.mark.slow),
    ],
)
def test_kernels_give_the_tokens_of_torch(name, sampler):
    options = {"gen_length": 8, "sampler": sampler, "cache": "region" if sampler.top_k is None else "none", "seed": 3}
    torch_, kernels = (load(name, quantization="fp8", backend=impl) for impl in ("torch", "triton"))
    ids = torch.arange(12)[None]
    assert_logits_close(kernels.model.logits(ids), torch_.model.logits(ids))
    assert_same(kernels.generate(PROMPTS[0], **options), torch_.generate(PROMPTS[0], **options))


def test_weights_of_half_precision_are_rounded_once():
    """In bfloat16 a weight is its code times its scale, rounded; not the scale rounded first."""
    engine = load("llada-gqa", quantization="fp8", dtype="bfloat16")
    same = Engine(Transformer(engine.spec, multiplied_out(engine.model.weights, torch.bfloat16)))
    ids = torch.arange(40)[None]
    assert engine.model.dtype == torch.bfloat16
    assert torch.equal(engine.model.logits(ids), same.model.logits(ids))


# --------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_cost_model_counts_the_bytes_of_codes(backend):
    plain, codes = (Setting(prompt=64, response=64, capacity=64, span_cap=32, quantization=q) for q in (None, "fp8"))
    listed = list(kinds(plain, "region"))[1]
    was, now = (steps_of(setting, backend, "region").count(listed).parts for setting in (plain, codes))
    half = 32 * 4096 * (4 * 4096 + 3 * 12288)
    if backend == "triton":  # plain torch multiplies weights out in memory, which only adds to what is moved
        assert 0.95 * half <= was["products"].bytes - now["products"].bytes <= half
        assert 0.99 * 126464 * 4096 <= was["head"].bytes - now["head"].bytes <= 126464 * 4096
    else:
        assert sum(part.bytes for part in now.values()) > sum(part.bytes for part in was.values())
    assert now["products"].flops == was["products"].flops
    with pytest.raises(ValueError, match="quantization='int8'"):
        Setting(quantization="int8")


@pytest.mark.slow
def test_agreement_is_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_quantised.times, "__defaults__", (1,))
    page, path = tmp_path / "page.md", tmp_path / "record.json"
    assert bench_quantised.main(["--limit", "1", "--tasks", "records", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    by_label = {(line["group"], line["label"]): line for line in record["lines"]}
    exact = by_label["SlowFast paper, cache none", "float32"]
    assert exact["same_responses"] == exact["same_tokens"] == 1 and exact["lost"] == exact["gained"] == 0
    small = by_label["SlowFast paper, cache none", "fp8, float32"]
    assert 0.25 < small["bytes"] / exact["bytes"] < 0.31
    assert by_label["one forward", "fp8, float32"]["positions"] == 128
    before = path.read_text()
    capsys.readouterr()
    bench_quantised.main(["--limit", "1", "--tasks", "records", "--json", str(path)])
    assert path.read_text() == before and capsys.readouterr().out == ""  # nothing was missing
    monkeypatch.setattr(bench_quantised, "costs", lambda: "what it costs\n")
    marks = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("quantised", "costs"))
    page.write_text(f"above\n{marks}below\n")
    bench_quantised.main(["--json", str(path), "--write-doc", str(page)])
    text = page.read_text()
    assert text.count("fp8, bfloat16") == 2 and "what it costs" in text and text.endswith("below\n")


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--threads", "0"], ["--tasks", "chess"]])
def test_agreement_refuses(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        bench_quantised.main([*arguments, "--json", str(tmp_path / "x.json")])
    assert arguments[1] in capsys.readouterr().err


def test_tables_of_the_page_are_those_of_the_record():
    (path,) = (ROOT / "bench" / "results").glob("*/*-quantised.json")
    page = (ROOT / "docs" / "quantised.md").read_text()
    renew = "run python -m bench.quality.quantised --json RECORD --write-doc docs/quantised.md"
    assert bench_quantised.tables(json.loads(path.read_text())) in page, renew
    assert bench_quantised.costs() in page, renew
