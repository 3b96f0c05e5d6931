"""Weights in 4 bits: codes and scales, products, loading, refusals, and whole generations."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import CheckpointError, Engine, FixedSteps, SlowFast, Threshold
from sfs_triton.models import Transformer, load_weights, read_spec
from sfs_triton.models import weights as module
from sfs_triton.models.weights import LayerWeights, Weights
from sfs_triton.ops import triton_backend
from sfs_triton.ops.dispatch import Quantised, operations, quantize
from sfs_triton.ops.torch import blocks, int4, linear
from tests.support.combinations import PROMPTS, assert_same
from tests.support.live_bytes import LiveBytes
from tests.support.margins import assert_logits_close
from tests.support.paths import GOLDEN
from tests.support.rank import Rank

CPU = torch.device("cpu")
FOLDER = GOLDEN / "models" / "llada-gqa"
MATRICES = ("qkv", "out", "gate_up", "down")


def load(form: str = "int4", **options) -> Engine:
    return sfs_triton.load(FOLDER, "cpu", options.pop("dtype", "float32"), quantization=form, **options)


def matrices(weights: Weights) -> list[torch.Tensor | Quantised]:
    return [getattr(layer, name) for layer in weights.layers for name in MATRICES]


def some(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(rows: int, columns: int, group: int, zeros: bool) -> tuple[Quantised, torch.Tensor]:
    """Random codes in memory, and the matrix that they are in float64, one weight after another."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(columns // group, rows, generator=generator)
    zero = torch.randint(0, 17, scale.shape, generator=generator, dtype=torch.uint8) if zeros else None
    wide = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            middle = 8 if zero is None else int(zero[k // group, n])
            wide[n, k] = (int(values[n, k]) - middle) * float(scale[k // group, n])
    return Quantised(int4.pack(values, group), scale, zero), wide


# -------------------------------------------------------------------------------------------------- codes and products


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_values_are_those_of_their_codes(group, zeros):
    matrix, wide = stored(3, 256, group, zeros)
    assert matrix.group == group and matrix.shape == (3, 256) and matrix.codes.shape == (3, 128)
    assert torch.equal(matrix.values(torch.float64), wide)
    assert torch.equal(matrix.values(torch.bfloat16), wide.bfloat16())
    part = matrix[1:3]
    assert torch.equal(part.values(torch.float64), wide[1:3]) and part.codes.data_ptr() == matrix.codes[1:].data_ptr()


@pytest.mark.parametrize("form", ["int4", "int4-64"])
def test_a_matrix_of_16_steps_per_group_is_kept(form):
    group = linear.GROUPS[form]
    codes = torch.randint(-8, 8, (5, 2 * group), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::group] = -8
    weight = codes * torch.tensor([0.5, -2.0, 1.0, 2.0**-120, 4.0])[:, None]
    made = Quantised(*quantize(weight, form))
    assert torch.equal(made.values(torch.float32), weight) and made.form == form


@pytest.mark.parametrize("at_once", [1, 1000, 2**20])
def test_scales_are_searched(monkeypatch, at_once):
    """Errors are those of the nearest codes, and in sum less than with the scale of the largest magnitude."""
    monkeypatch.setattr(int4, "_AT_ONCE", at_once)
    weight = some(20, 256)
    made = Quantised(*quantize(weight, "int4-64"))
    values, scale = made.values(torch.float64), made.scale.double().t().repeat_interleave(64, 1)
    nearest = (weight.double() / scale).round().clamp(-8, 7) * scale
    assert ((values - weight).abs() <= (nearest - weight).abs() + 1e-6).all()
    groups = weight.double().view(20, 4, 64)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    plain = ((groups / largest).round().clamp(-8, 7) * largest - groups).square().sum(2)
    ours = (values.view(20, 4, 64) - groups).square().sum(2)
    assert (ours <= plain * (1 + 1e-5)).all() and ours.sum() < 0.95 * plain.sum()


def test_zeros_small_numbers_and_what_has_no_code():
    weight = torch.cat((torch.zeros(1, 128), torch.full((1, 128), 1e-39), 1e-30 * some(1, 128), some(3, 128)))
    weight[4, 7], weight[5, 9] = math.nan, -math.inf
    codes, scale = quantize(weight, "int4")
    values = Quantised(codes, scale).values(torch.float32)
    assert (values[0] == 0).all() and (values[1] == 0).all()
    assert (values[2] - weight[2]).double().norm() < 0.2 * weight[2].double().norm()
    assert scale[0].isfinite().tolist() == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="rows of 100, which are no whole groups of 128"):
        quantize(torch.ones(3, 100), "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
def test_products_in_blocks(monkeypatch, zeros, dtype):
    matrix, wide = stored(21, 256, 64, zeros)
    x, residual = some(5, 256, 3).to(dtype), some(5, 21, 4).to(dtype)
    whole = linear.linear(x, matrix.codes, matrix.scale, matrix.zero, residual=residual)
    wanted = x.double() @ wide.to(dtype).double().T + residual.double()
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.2}
    torch.testing.assert_close(whole.double(), wanted, **near)
    monkeypatch.setattr(blocks, "WEIGHTS", 4 * 256)
    parts = linear.linear(x, matrix.codes, matrix.scale, matrix.zero, residual=residual)
    torch.testing.assert_close(parts.double(), wanted, **near)


def test_a_product_needs_less_than_a_gigabyte():
    """The widest matrix of an 8B model, decoded in blocks."""
    meta = torch.device("meta")
    matrix = Quantised.empty(37888, 3584, "int4", meta)
    with LiveBytes() as live:
        linear.linear(torch.empty(128, 3584, dtype=torch.bfloat16, device=meta), matrix.codes, matrix.scale)
    assert 0 < live.most < 2**30


# ---------------------------------------------------------------------------------------------------- loading, refusals


@pytest.mark.parametrize("form", ["int4", "int4-64"])
def test_codes_are_those_of_the_fused_matrices(monkeypatch, engines, form):
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    plain, made = engines["llada-gqa"].model.weights, load(form).model.weights
    for got, given in zip(matrices(made), matrices(plain), strict=True):
        codes, scale = quantize(given, form)
        assert torch.equal(got.codes, codes) and torch.equal(got.scale, scale) and got.zero is None
    codes, scale = quantize(plain.head)
    assert torch.equal(made.head.codes.view(torch.uint8), codes.view(torch.uint8)), "the head is in float8"
    assert torch.equal(made.head.scale, scale) and torch.equal(made.embedding, plain.embedding)
    assert made.quantization == form


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_have_parts_of_the_codes_of_one_process(rank):
    whole, spec = load("int4-64").model.weights, read_spec(json.loads((FOLDER / "config.json").read_text()))
    mine = load_weights(FOLDER, spec, CPU, torch.float32, Rank(rank), quantization="int4-64")
    for got, all_ in zip(mine.layers, whole.layers, strict=True):
        n = spec.mlp // 2
        rows = torch.cat([torch.arange(first + n * rank, first + n * (rank + 1)) for first in (0, spec.mlp)])
        assert torch.equal(got.gate_up.codes, all_.gate_up.codes[rows])
        assert torch.equal(got.gate_up.scale, all_.gate_up.scale[:, rows])
        assert torch.equal(got.down.codes, all_.down.codes.chunk(2, 1)[rank])
        assert torch.equal(got.down.scale, all_.down.scale.chunk(2)[rank])
    with pytest.raises(CheckpointError, match=r"attn_out\.weight has .*64.* no whole groups of 128: .*'int4-64'"):
        load_weights(FOLDER, spec, CPU, torch.float32, Rank(rank), quantization="int4")


def test_no_more_is_in_memory_than_the_result_and_one_tensor(monkeypatch):
    at_once = 64 * 128
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    spec = read_spec(json.loads((FOLDER / "config.json").read_text()))
    with LiveBytes() as live:
        for name in ("rows", "read"):
            real = getattr(module.TensorReader, name)
            monkeypatch.setattr(module.TensorReader, name, lambda *args, real=real: live.note(real(*args)))
        made = load_weights(FOLDER, spec, CPU, torch.float32, quantization="int4")
    size = sum(
        x.nbytes for layer in made.layers for x in (getattr(layer, f.name) for f in fields(layer)) if x is not None
    )
    size += made.embedding.nbytes + made.norm.nbytes + made.head.nbytes
    weights = sum(math.prod(x.shape) for x in matrices(made))
    assert sum(x.nbytes for x in matrices(made)) == weights // 2 + 4 * weights // 128
    largest = spec.vocab_size * spec.d_model * 4  # pages of the file
    assert size <= live.most <= size + largest + 5 * 4 * at_once, (size, live.most)


@pytest.mark.parametrize(
    ("form", "name", "instead"),
    [
        ("int4", "blocks.0.q_proj.weight has 64 columns", "int4-64"),
        ("int4-64", "ff_out.weight has 176 columns", "fp8"),
    ],
)
def test_rows_that_are_no_whole_groups_are_refused_by_name(checkpoint, form, name, instead):
    match = rf"{re.escape(name)}, which are no whole groups of .*: quantization='{instead}'"
    with pytest.raises(CheckpointError, match=match):
        sfs_triton.load(checkpoint, "cpu", quantization=form)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_code_is_refused_by_name(tmp_path, bad):
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    tensors = load_file(FOLDER / "model.safetensors")
    name = "model.transformer.blocks.1.k_proj.weight"
    tensors[name][[9, 30], 4] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} has NaN or infinities, the first in row 9")):
        sfs_triton.load(tmp_path, "cpu", quantization="int4")


def test_new_values_go_to_the_same_places():
    engine = load()
    before = [(x.codes.data_ptr(), x.codes.clone(), x.scale.clone()) for x in matrices(engine.model.weights)]
    for matrix in matrices(engine.model.weights):
        matrix.codes.zero_()
    engine.update_weights(FOLDER)
    for matrix, (place, codes, scale) in zip(matrices(engine.model.weights), before, strict=True):
        assert matrix.codes.data_ptr() == place
        assert torch.equal(matrix.codes, codes) and torch.equal(matrix.scale, scale)


# -------------------------------------------------------------------------------------------------------- generations


def multiplied_out(engine: Engine) -> Engine:
    """Build an engine that computes with plain matrices of the same values."""

    def plain(x):
        return x.values(engine.model.dtype) if isinstance(x, Quantised) else x

    weights = engine.model.weights
    layers = tuple(LayerWeights(*(plain(getattr(layer, f.name)) for f in fields(layer))) for layer in weights.layers)
    return Engine(Transformer(engine.spec, replace(weights, layers=layers, head=plain(weights.head))))


@pytest.mark.parametrize(
    ("sampler", "policy"),
    [
        (SlowFast(), "none"),
        (SlowFast(temperature=0.8, top_k=20), "region"),
        (Threshold(block_length=4), "dual"),
        (FixedSteps(steps=6), "refresh"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_generations_are_those_of_the_values(sampler, policy):
    engine = load()
    options = {"gen_length": 12, "sampler": sampler, "cache": policy, "seed": 5}
    assert_same(engine.generate(PROMPTS, **options), multiplied_out(engine).generate(PROMPTS, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_values(dtype):
    engine, ids = load(dtype=dtype), torch.arange(40)[None]
    found, wanted = engine.model.logits(ids), multiplied_out(engine).model.logits(ids)
    if dtype == "float32":
        assert_logits_close(found, wanted)
    else:  # activations are rounded to 8 bits after each sum
        torch.testing.assert_close(found, wanted, rtol=0, atol=2**-6 * wanted.abs().max().item())


def test_kernels_give_the_logits_of_torch(monkeypatch):
    """By the kernel, and with more rows than it is for by way of the decoded matrix."""
    monkeypatch.setattr(triton_backend, "FEW_ROWS", 16)
    torch_, kernels = load(), load(backend="triton")
    for length in (12, 17):
        ids = torch.arange(length)[None]
        assert_logits_close(kernels.model.logits(ids), torch_.model.logits(ids))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_products_take_a_bias(impl):
    matrix, wide = stored(21, 128, 32, True)
    x, bias = some(6, 128, 3), some(1, 21, 4)[0]
    out = operations(impl, CPU).product(x.view(2, 3, 128), matrix, bias, slice(3, 20))
    torch.testing.assert_close(
        out.double().view(6, 17), x.double() @ wide[3:20].T + bias[3:20].double(), rtol=1e-5, atol=1e-4
    )


def test_the_embedded_model_answers_as_in_float32():
    prompt = "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45"
    plain, small = sfs_triton.load("embedded", "cpu"), sfs_triton.load("embedded", "cpu", quantization="int4")
    one, other = (engine.generate(prompt).text.splitlines()[0] for engine in (plain, small))
    assert one == other and one.startswith('[{"id":1,"name":"Ann","age":31}')
