"""Weights in int8 on a CPU: products with rounded inputs, loading, refusals, and whole generations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import sfs_triton
from bench.cost import int8_step
from sfs_triton import ArgumentError, BackendError, Engine
from sfs_triton.ops import dispatch
from sfs_triton.ops.dispatch import Quantised, check_int8, operations, quantize
from sfs_triton.ops.torch import int8, linear
from tests.support.combinations import PROMPTS, SOME_PAIRS, assert_same
from tests.support.paths import GOLDEN

CPU = torch.device("cpu")
MATRICES = ("qkv", "out", "gate_up", "down")
exact = pytest.mark.skipif(int8.int8_speed() is None, reason="this CPU has no exact int8 products: int8 is refused")
NAMES = ("llada-gqa", "dream-gqa")  # one without and one with a bias of q, k and v, which shifts its logits, too


def load(name: str, **options) -> Engine:
    return sfs_triton.load(GOLDEN / "models" / name, "cpu", quantization="int8", **options)


def matrices(engine: Engine) -> Iterator[Quantised]:
    for layer in engine.model.weights.layers:
        yield from (getattr(layer, name) for name in MATRICES)
    yield engine.model.weights.head


def some(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def exactly(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute the product of the same codes, rounded inputs too, in float64."""
    size = (x.double().abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    steps = (x.float() / size).round().double()
    return ((steps @ codes.double().T) * size.double() * scale.double()).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- products


@exact
@pytest.mark.parametrize("most", [1, 100, 2**20])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(0, 64, 8), (1, 1, 1), (1, 64, 7), (5, 33, 130), (130, 200, 96)])
def test_a_product_is_near_that_in_float64(monkeypatch, rows, n_in, n_out, most):
    """An input is off by half a step of its row, a weight by half a step of its row of the matrix."""
    monkeypatch.setattr(int8, "_SUMS", most)
    x, weight = some(rows, n_in, 1), some(n_out, n_in, 2)
    x[1:2] *= 1e-3  # each row has steps of its own
    weight[:1] *= 1e3
    codes, scale = quantize(weight, "int8")
    assert codes.dtype == torch.int8 and codes.abs().max() == 127
    assert ((codes.double() * scale.double()[:, None] - weight.double()).abs() <= 0.501 * scale.double()[:, None]).all()
    residual = some(rows, n_out, 3)
    out = linear.linear(x, codes, scale, residual=residual)
    size = x.double().abs().amax(-1, keepdim=True) / 127
    off_x, off_w = 0.501 * size.expand(rows, n_in), (0.501 * scale.double()[:, None]).expand(n_out, n_in)
    budget = off_x @ weight.double().abs().T + (x.double().abs() + off_x) @ off_w.T + 1e-6 * residual.double().abs()
    wanted = x.double() @ weight.double().T + residual.double()
    assert out.shape == (rows, n_out) and out.dtype == torch.float32
    assert ((out.double() - wanted).abs() <= budget + 1e-6 * wanted.abs()).all()
    torch.testing.assert_close(linear.linear(x, codes, scale), exactly(x, codes, scale), rtol=1e-6, atol=0)


@exact
def test_sums_are_exact_at_the_largest_codes():
    """Sums of pairs that saturate at 16 bits, or of all at 24, would differ."""
    x, weight = torch.ones(17, 4096), torch.ones(24, 4096)
    x[::2], weight[::3], weight[1, ::2] = -1, -1, -1
    out = linear.linear(127 * x, *quantize(127 * weight, "int8"))
    assert torch.equal(out.double(), 127.0**2 * x.double() @ weight.double().T)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_numbers_gives_nan_and_leaves_others_alone(bad):
    x, (codes, scale) = some(3, 40, 1), quantize(some(9, 40, 2), "int8")
    good = linear.linear(x, codes, scale)
    x[1, 7] = bad
    out = linear.linear(x, codes, scale)
    assert out[1].isnan().all() and torch.equal(out[::2], good[::2])


def test_zeros_and_small_inputs():
    codes, scale = quantize(torch.cat((torch.zeros(1, 8), some(3, 8, 2))), "int8")
    x = torch.stack((torch.zeros(8), torch.full((8,), 1e-38), torch.ones(8)))
    out = linear.linear(x, codes, scale)
    assert (out[0] == 0).all() and (out[:, 0] == 0).all() and out.isfinite().all()


# ---------------------------------------------------------------------------------------------------- loading, refusals


@exact
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_fused_matrices(engines, name):
    plain, engine = engines[name].model.weights, load(name)
    given = [getattr(layer, name) for layer in plain.layers for name in MATRICES]
    for got, matrix in zip(matrices(engine), [*given, plain.head], strict=True):
        codes, scale = quantize(matrix, "int8")
        assert torch.equal(got.codes, codes) and torch.equal(got.scale, scale)
    assert engine.model.weights.quantization == "int8"
    assert torch.equal(engine.model.weights.embedding, plain.embedding)


@exact
def test_new_values_go_to_the_same_places():
    engine = load("llada-gqa")
    before = [(x.codes.data_ptr(), x.codes.clone()) for x in matrices(engine)]
    for matrix in matrices(engine):
        matrix.codes.zero_()
    engine.update_weights(GOLDEN / "models" / "llada-gqa")
    for matrix, (place, codes) in zip(matrices(engine), before, strict=True):
        assert matrix.codes.data_ptr() == place and torch.equal(matrix.codes, codes)


def test_it_is_refused_elsewhere_than_on_a_cpu_with_torch():
    with pytest.raises(ArgumentError, match="quantization='int8' is for backend 'torch' on a CPU, .* 'cuda:1'"):
        check_int8(torch.device("cuda:1"), None)
    with pytest.raises(ArgumentError, match="for backend 'torch' on a CPU, not 'triton' on 'cpu'"):
        load("llada-gqa", backend="triton")


def test_a_cpu_that_cannot_do_it_is_told(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "int8_speed", lambda: None)
    with pytest.raises(BackendError, match="quantization='int8' needs a CPU with exact products"):
        load("llada-gqa")
    monkeypatch.setattr(dispatch, "int8_speed", lambda: 0.5)
    check_int8(CPU, None)
    assert "take 2.0 times as long as in float32" in caplog.text


# -------------------------------------------------------------------------------------------------------- generations


@pytest.fixture(scope="module", params=NAMES)
def engine(request) -> Engine:
    return load(request.param)


@pytest.mark.sampled(3)
@exact
@pytest.mark.parametrize(("sampler", "policy"), SOME_PAIRS)
def test_both_machines_and_every_policy(monkeypatch, engine, sampler, policy):
    options = {"gen_length": 16, "sampler": sampler, "cache": policy, "seed": 5}
    found = engine.generate(PROMPTS, **options)
    monkeypatch.setattr(linear, "int8_linear", exactly)
    assert_same(found, engine.generate(PROMPTS, **options))


@exact
def test_bfloat16_is_computed_with_the_same_codes():
    wide, half = load("llada-gqa"), load("llada-gqa", dtype="bfloat16")
    x = some(5, wide.spec.d_model, 4).bfloat16()
    ops = operations(None, CPU)
    got, wanted = (
        ops.product(x.to(e.model.dtype), e.model.weights.layers[0].qkv, e.model.weights.layers[0].qkv_bias)
        for e in (half, wide)
    )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02)


@exact
def test_the_embedded_model_answers_as_in_float32():
    prompt = "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45\n3,Kim,77\n4,Leo,12"
    rows = [{"id": 1, "name": "Ann", "age": 31}, {"id": 2, "name": "Bob", "age": 45}]
    rows += [{"id": 3, "name": "Kim", "age": 77}, {"id": 4, "name": "Leo", "age": 12}]
    for form in (None, "int8"):
        assert json.loads(sfs_triton.load("embedded", "cpu", quantization=form).generate(prompt).text) == rows, form


@exact
def test_the_benchmark_times_both(monkeypatch, capsys):
    small = replace(int8_step.EIGHTH, n_layers=1, d_model=64, n_heads=4, n_kv_heads=4, mlp=96, vocab_size=130)
    monkeypatch.setattr(int8_step, "EIGHTH", small)
    monkeypatch.setattr(int8_step, "STEPS", ((24, 8), (40, 40)))
    assert int8_step.main(["--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 24", "8"], ["| 40", "40"]]
    made = int8_step.models()
    assert made["int8"].weights.quantization == "int8" and made["float32"].weights.quantization is None
    ids = torch.arange(20)[None]
    plain, rounded = made["float32"].logits(ids), made["int8"].logits(ids)
    assert 0 < (plain - rounded).norm() < 0.1 * plain.norm()
