"""Head, noise and float8 products in blocks: bounded memory at the size of LLaDA-8B, and the results of one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfs_triton.ops.dispatch import Draw, Quantised, operations
from sfs_triton.ops.torch import blocks
from sfs_triton.ops.torch.confidence import METRICS, confidence
from sfs_triton.ops.torch.linear import dequantise, linear, quantize
from sfs_triton.ops.torch.lm_head import lm_head, lm_head_partials, merge_partials
from sfs_triton.ops.torch.philox import gumbel, gumbel_max
from tests.support.live_bytes import LiveBytes

CPU, META = torch.device("cpu"), torch.device("meta")
V, D, MLP = 126464, 4096, 12288  # LLaDA-8B
DRAWS = {
    "confidence": Draw(),
    "noise": Draw(noise=True),
    "margin": Draw("margin", noise=True, tempered=True),
    "entropy": Draw("entropy"),
    "entropy-beside": Draw(entropy=True),
    "top-p": Draw(noise=True, nucleus=True),
    "top-p-and-k": Draw(noise=True, nucleus=True, top_k=50, tempered=True),
}


def options_of(draw: Draw, n_rows: int, device: torch.device = CPU, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = {name: torch.randint(0, 2**31, (n_rows,), generator=generator) for name in ("seed", "position", "step")}
    keys["temperature"] = 0.3 + torch.rand(n_rows, generator=generator)
    given = keys if draw.noise else {}
    if draw.nucleus:
        given = given | {"top_p": 0.5 + 0.5 * torch.rand(n_rows, generator=generator)}
    return {name: value.to(device) for name, value in given.items()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows and columns, of sizes that divide nothing."""
    for name, size in (("LOGITS", 1300), ("SORTED", 700), ("NOISE", 330), ("WEIGHTS", 500)):
        monkeypatch.setattr(blocks, name, size)


def exact(*shape: int, seed: int) -> torch.Tensor:
    """Integers, whose products and sums are exact in float32: no order of summation changes a bit."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "n_rows"), [*((name, n_rows) for name in DRAWS for n_rows in (64, 300)), ("confidence", 8 * 4096)]
)
@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "fp8"])
def test_the_head_needs_less_than_a_gigabyte(name, quantised, n_rows):
    draw, ops = DRAWS[name], operations("torch", CPU)
    hidden, given = torch.empty(n_rows, D, dtype=torch.bfloat16, device=META), options_of(draw, n_rows, META)
    head = torch.empty(V, D, dtype=torch.bfloat16, device=META)
    if quantised:
        head = Quantised(head.to(torch.float8_e4m3fn), torch.empty(V, device=META))
    with LiveBytes() as live:
        token, score, _ = ops.choose(hidden, head, draw, **given)
    assert token.shape == score.shape == (n_rows,)
    assert live.most < 1e9, f"{live.most / 1e9:.2f} GB"


@pytest.mark.parametrize(("n_out", "n_in"), [(2 * MLP, D), (D, MLP), (V, D)])
def test_a_float8_product_needs_less_than_a_gigabyte(n_out, n_in):
    codes = torch.empty(n_out, n_in, dtype=torch.float8_e4m3fn, device=META)
    x, scale = torch.empty(2, 128, n_in, dtype=torch.bfloat16, device=META), torch.empty(n_out, device=META)
    with LiveBytes() as live:
        out = linear(x, codes, scale)
    assert out.shape == (2, 128, n_out)
    assert live.most - out.nbytes < 0.5e9, f"{live.most / 1e9:.2f} GB"


def test_the_measure_counts_what_is_alive_at_one_time():
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        for _ in range(3):
            torch.empty(250)
        assert live.most == 1000
        kept = torch.empty(250)
        view = kept.view(25, 10)
        del kept
        outside[:500].add_(1)
        torch.empty(500)
    assert live.most == 3000 and view.numel() == 250


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("total", "width", "most"), [(0, 8, 4), (1, 0, 4), (7, 3, 6), (7, 30, 6), (5, 1, 100)])
def test_blocks_cover_everything_once(total, width, most):
    found = list(blocks.blocks(total, width, most))
    assert [i for at in found for i in range(at.start, at.stop)] == list(range(total))
    assert found and all((at.stop - at.start) * width <= max(most, width) for at in found)


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("name", DRAWS)
def test_blocks_change_no_bit_of_a_choice(request, name, quantised):
    draw, ops, hidden, head = DRAWS[name], operations("torch", CPU), exact(23, 16, seed=1), exact(257, 16, seed=2)
    matrix = Quantised(head.to(torch.float8_e4m3fn), torch.ones(257)) if quantised else head
    given = options_of(draw, 23)
    whole = ops.choose(hidden, matrix, draw, **given)
    request.getfixturevalue("small_blocks")
    for got, wanted in zip(ops.choose(hidden, matrix, draw, **given), whole, strict=True):
        assert got is wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize("noise", [False, True])
def test_blocks_change_no_bit_of_listed_rows_and_shards(request, noise):
    hidden, head = exact(23, 16, seed=1), exact(257, 16, seed=2)
    given = options_of(Draw(noise=noise), 19)
    given |= {"rows": torch.arange(19).flip(0).int(), "count": torch.tensor([15], dtype=torch.int32)}
    parts = [lm_head_partials(hidden, head[a:b], vocab_start=a, **given) for a, b in ((0, 100), (100, 257))]
    whole = lm_head(hidden, head, **given)
    request.getfixturevalue("small_blocks")
    again = [lm_head_partials(hidden, head[a:b], vocab_start=a, **given) for a, b in ((0, 100), (100, 257))]
    for part, same in zip(parts, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(lm_head(hidden, head, **given), whole, strict=True))
    merged = merge_partials(torch.stack([p[0] for p in again]), torch.stack([p[1] for p in again]))
    assert torch.equal(merged[0][:15], whole[0][:15]) and (whole[0][15:] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tempered", [False, True])
def test_noise_in_blocks_gives_the_token_of_noise_in_one_piece(small_blocks, metric, tempered):
    given = options_of(Draw(noise=True), 9, seed=3)
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(4)) * 3
    keys = {name: value[:, None] for name, value in given.items()}
    noise = gumbel(keys["seed"], torch.arange(500), keys["position"], keys["step"])
    drawn = logits / keys["temperature"] + noise if tempered else logits + noise * keys["temperature"]
    token, _ = confidence(logits, metric=metric, tempered=tempered, **given)
    assert torch.equal(token, drawn.argmax(-1).int())


@pytest.mark.parametrize("skip_nan", [False, True])
def test_ties_nan_and_infinities_across_blocks(monkeypatch, small_blocks, skip_nan):
    inf, nan = float("inf"), float("nan")
    monkeypatch.setattr("sfs_triton.ops.torch.philox.gumbel", lambda seed, ids, *_: torch.zeros(len(seed), len(ids)))
    logits = torch.zeros(7, 400)
    logits[1, [90, 300]] = 1  # a tie in two blocks
    logits[2, 300] = nan
    logits[3, [250, 350]] = nan
    logits[4] = -inf
    logits[5] = nan
    logits[6, 399] = inf
    keys = options_of(Draw(noise=True), 7)
    best, column = gumbel_max(logits, **keys, skip_nan=skip_nan)
    alone = torch.where(logits.isnan(), -inf, logits) if skip_nan else logits
    wanted, at = alone.max(-1)
    torch.testing.assert_close(best, wanted, equal_nan=True, atol=0, rtol=0)
    assert torch.equal(column, at) and torch.equal(column, alone.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_codes_are_rounded_once(dtype):
    weight = torch.randn(61, 40, generator=torch.Generator().manual_seed(5)) * torch.logspace(-6, 3, 61)[:, None]
    codes, scale = quantize(weight)
    wide = codes.to(torch.promote_types(dtype, torch.float32)) * scale[:, None]
    assert torch.equal(dequantise(codes, scale, dtype), wide.to(dtype))


def test_a_float8_product_in_blocks(small_blocks):
    weight, x = exact(61, 40, seed=6), exact(3, 5, 40, seed=7)
    codes, residual = weight.to(torch.float8_e4m3fn), exact(3, 5, 61, seed=8)
    assert torch.equal(linear(x, codes, torch.ones(61)), F.linear(x, weight))
    assert torch.equal(linear(x, codes, torch.ones(61), residual=residual), F.linear(x, weight) + residual)
