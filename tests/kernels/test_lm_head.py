"""From hidden states to tokens: the kernels against their torch twin and against `confidence` on stored logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.confidence import confidence
from sfs_triton.kernels.launch import recording
from sfs_triton.kernels.lm_head import LmHeadConfig, lm_head, lm_head_config, lm_head_partials
from sfs_triton.kernels.partials import merge_partials
from sfs_triton.ops.torch import confidence as confidence_twin
from sfs_triton.ops.torch import lm_head as twin
from sfs_triton.ops.torch.linear import dequantise, quantize
from tests.support.combinations import by_pairs

KEYS = ("seed", "position", "step")
SMALL = LmHeadConfig(BLOCK_T=16, BLOCK_V=32, BLOCK_K=32, BLOCK_S=16, num_warps=4, num_stages=2, programs=4)


def whole(*shape: int, dtype: torch.dtype, seed: int = 0, most: int = 3) -> torch.Tensor:
    """Small whole numbers: products and sums of them are exact, so tokens do not hang on the order of addition."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(n_columns: int, n_features: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers in float8, and scales that are powers of two: with them, too, logits are exact."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-2, 2, (n_columns,), generator=generator)
    return whole(n_columns, n_features, dtype=torch.float32, seed=seed).to(torch.float8_e4m3fn), scale


def noise_of(n_rows: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Make noise keys and temperatures, different for every sequence."""
    generator = torch.Generator().manual_seed(n_rows)
    most = {"seed": 2**63 - 1, "position": 4096, "step": 1024}
    keys = {name: torch.randint(0, most[name], (n_rows,), generator=generator) for name in KEYS}
    keys["temperature"] = 0.3 + torch.rand(n_rows, generator=generator)
    return {name: key.to(device) for name, key in keys.items()}


def results(guards: Guards, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return guards.empty(n_rows, dtype=torch.int32), guards.empty(n_rows)


@pytest.mark.parametrize("noise", [False, True], ids=["argmax", "noise"])
@pytest.mark.parametrize(
    ("n_rows", "n_columns", "n_features"),
    [(0, 9, 8), (1, 1, 1), (3, 500, 64), (17, 77, 40), (70, 200, 33)],
)
def test_equals_its_twin(guards, dtype, n_rows, n_columns, n_features, noise):
    hidden = guards.copy(whole(n_rows, n_features, dtype=dtype))
    weight = guards.copy(whole(n_columns, n_features, dtype=dtype, seed=1))
    draw = {name: guards.copy(key) for name, key in noise_of(n_rows).items()} if noise else {}
    out = results(guards, n_rows)
    token, score = lm_head(hidden, weight, **draw, out=out)
    assert token is out[0] and score is out[1]
    same = twin.lm_head(hidden, weight, **draw)
    assert torch.equal(token, same[0])
    truth = (hidden.double() @ weight.double().T).softmax(-1).gather(-1, token[:, None].long())[:, 0]
    assert_within_budget(score, truth, same[1])


CONFIGS = {
    "16x128": lm_head_config(16, 300, 2),
    "16x128-noise": lm_head_config(16, 300, 2, noise=True),
    "32x128": lm_head_config(32, 300, 2),
    "32x128-noise": lm_head_config(32, 300, 2, noise=True),
    "64x128": lm_head_config(64, 300, 2),
    "64x64-noise": lm_head_config(64, 300, 2, noise=True),
    "128x128": lm_head_config(128, 300, 2),
    "16x64-float32": lm_head_config(16, 300, 4),
    "32x64-float32": lm_head_config(32, 300, 4),
    "small": SMALL,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_config(guards, config):
    dtype = torch.float32 if config.BLOCK_K == 32 else torch.float16
    hidden = guards.copy(whole(20, 96, dtype=dtype))
    weight = guards.copy(whole(300, 96, dtype=dtype, seed=1))
    draw = noise_of(20, hidden.device) if config.BLOCK_S < config.BLOCK_V else {}
    token, score = lm_head(hidden, weight, **draw, out=results(guards, 20), config=config)
    wanted = twin.lm_head(hidden, weight, **draw)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("noise", [False, True], ids=["argmax", "noise"])
@pytest.mark.parametrize(
    ("n_rows", "n_columns", "n_features"),
    [(0, 9, 8), (1, 1, 1), (3, 500, 128), (17, 77, 40), (70, 200, 33)],
)
def test_float8_equals_its_twin(guards, dtype, n_rows, n_columns, n_features, noise):
    hidden = guards.copy(whole(n_rows, n_features, dtype=dtype))
    weight, scale = map(guards.copy, codes(n_columns, n_features))
    draw = {name: guards.copy(key) for name, key in noise_of(n_rows).items()} if noise else {}
    token, score = lm_head(hidden, weight, scale=scale, **draw, out=results(guards, n_rows))
    same = twin.lm_head(hidden, weight, scale=scale, **draw)
    assert torch.equal(token, same[0])
    wide = dequantise(weight, scale.double(), torch.float64)
    truth = (hidden.double() @ wide.T).softmax(-1).gather(-1, token[:, None].long())[:, 0]
    assert_within_budget(score, truth, same[1])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("n_rows", "noise", "native", "n_features"),
    by_pairs([16, 32, 64, 128], [False, True], [None, False, True], [128, 96]),
)
def test_every_config_of_float8(guards, n_rows, noise, native, n_features):
    if native and guards.empty(1).is_cuda and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert float8")
    even = n_features == 128
    config = replace(lm_head_config(n_rows, 300, 2, noise, float8=True, even=even), NATIVE_FP8=native)
    most = (64 if noise else 128) if even else 32
    assert config.BLOCK_T == min(n_rows, most) and (config.BLOCK_K == 32) == (not even)
    hidden = guards.copy(whole(20, n_features, dtype=torch.float16))
    weight, scale = map(guards.copy, codes(300, n_features))
    draw = noise_of(20, hidden.device) if noise else {}
    with recording() as recorded:
        lm_head(*(x.to("meta") for x in (hidden, weight)), scale=scale.to("meta"), config=config)
    taken = {name: recorded[0].arguments[name] for name in ("HAS_SCALE", "EVEN_K", "NATIVE_FP8")}
    assert taken == {"HAS_SCALE": True, "EVEN_K": True, "NATIVE_FP8": native}
    token, score = lm_head(hidden, weight, scale=scale, **draw, out=results(guards, 20), config=config)
    wanted = twin.lm_head(hidden, weight, scale=scale, **draw)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1], atol=1e-6, rtol=1e-5)


def test_float8_of_any_numbers_is_near_its_twin(guards, dtype):
    """The twin rounds scaled weights to ``dtype``, the kernel does not, so almost equal logits may change places."""
    hidden = guards.copy(random(33, 64, dtype=dtype))
    weight, scale = map(guards.copy, quantize(random(500, 64, dtype=torch.float32, seed=1)))
    token, score = lm_head(hidden, weight, scale=scale, out=results(guards, 33))
    truth = hidden.double() @ dequantise(weight, scale.double(), torch.float64).T
    size = hidden.double().abs() @ dequantise(weight, scale.double(), torch.float64).abs().T
    eps = torch.finfo(dtype).eps
    # the stored logit is rounded to dtype; float32 sums err by less
    slack = eps * truth.abs().max(-1).values + 64 * torch.finfo(torch.float32).eps * size.max(-1).values
    gap = truth.max(-1).values - truth.gather(-1, token[:, None].long())[:, 0]
    assert (gap <= slack).all()
    share = truth.softmax(-1).gather(-1, token[:, None].long())[:, 0]
    assert ((score.double() / share).log().abs() <= 2 * slack + 1e-5).all()


@pytest.mark.parametrize("cuts", [[], [91], [7, 300]], ids=[1, 2, 3])
def test_float8_shards_merge_into_the_whole(guards, cuts):
    config = LmHeadConfig(16, 64, 32, 32, num_warps=4, num_stages=2, programs=2)
    hidden = guards.copy(whole(5, 24, dtype=torch.float32))
    weight, scale = map(guards.copy, codes(333, 24))
    draw = noise_of(5, hidden.device)
    shards = list(zip([0, *cuts], [*cuts, 333], strict=True))
    found = []
    for start, stop in shards:
        part = {"weight": weight[start:stop], "scale": scale[start:stop], "vocab_start": start, **draw}
        values, winner = guards.empty(4, 5), guards.empty(5, dtype=torch.int32)
        found.append(lm_head_partials(hidden, **part, out=(values, winner), config=config))
        wanted = twin.lm_head_partials(hidden, **part)
        assert torch.equal(winner, wanted[1])
        torch.testing.assert_close(values, wanted[0], atol=1e-5, rtol=1e-5)
    values, winner = map(torch.stack, zip(*found, strict=True))
    token, score = merge_partials(values, winner, out=results(guards, 5))
    one = lm_head(hidden, weight, scale=scale, **draw, config=config)
    assert torch.equal(token, one[0])
    torch.testing.assert_close(score, one[1])


@pytest.mark.parametrize("count", [None, -1, 0, 1, 16, 39, 40, 99])
def test_row_lists_and_counts(guards, count):
    hidden = guards.copy(whole(11, 24, dtype=torch.float32))
    weight = guards.copy(whole(100, 24, dtype=torch.float32, seed=1))
    rows = torch.randint(0, 11, (40,), generator=torch.Generator().manual_seed(2))
    rows = rows.int() if count is None or count % 2 else rows  # both index types are taken
    live = 40 if count is None else min(max(count, 0), 40)
    rows[live:] = -1
    rows, out = guards.copy(rows), results(guards, 40)
    limit = None if count is None else guards.copy(torch.tensor([count], dtype=torch.int32))
    token, score = lm_head(hidden, weight, rows=rows, count=limit, out=out, config=SMALL)
    assert (token[live:] == guards.empty(1, dtype=torch.int32)).all() and score[live:].isnan().all()
    wanted = twin.lm_head(hidden[rows[:live].long()], weight)
    assert torch.equal(token[:live], wanted[0])
    torch.testing.assert_close(score[:live], wanted[1], atol=1e-6, rtol=1e-5)
    counted = twin.lm_head(hidden, weight, rows=rows, count=limit)
    assert torch.equal(counted[0][:live], token[:live]) and not counted[0][live:].any()


@pytest.mark.parametrize("count", [1, 20, 33])
def test_counts_without_a_list(guards, count):
    hidden = guards.copy(whole(33, 24, dtype=torch.float32))
    weight = guards.copy(whole(100, 24, dtype=torch.float32, seed=1))
    hidden[count:] = math.nan
    token, score = lm_head(
        hidden, weight, count=torch.tensor([count], dtype=torch.int32, device=hidden.device), out=results(guards, 33)
    )
    assert torch.equal(token[:count], twin.lm_head(hidden[:count], weight)[0])
    assert score[:count].isfinite().all() and score[count:].isnan().all()


def test_logits_are_rounded_as_if_stored(device):
    """4,097 becomes 4,096 in float16: the lower id must win, though its logit was less before."""
    hidden = torch.ones(1, 64, dtype=torch.float16, device=device)
    weight = whole(100, 64, dtype=torch.float16).to(device)
    weight[[7, 30, 90]] = 64.0
    weight[[30, 90], 0] = 65.0
    token, score = lm_head(hidden, weight, config=SMALL)
    stored = confidence(torch.nn.functional.linear(hidden, weight))
    assert token == 7 and stored[0] == 7
    torch.testing.assert_close(score, stored[1])


def test_equals_confidence_on_stored_logits(device, dtype):
    hidden, weight = random(33, 64, dtype=dtype).to(device), random(1000, 64, dtype=dtype, seed=1).to(device)
    stored = torch.nn.functional.linear(hidden, weight)
    token, score = lm_head(hidden, weight)
    wanted = confidence(stored)
    # roundings of the two products may differ in the last place, which decides between almost equal logits only
    gap = stored.max(-1).values.float() - stored.gather(-1, token[:, None].long())[:, 0].float()
    assert (gap <= 4 * torch.finfo(dtype).eps * stored.abs().max()).all()
    same = token == wanted[0]
    assert same.float().mean() > 0.9
    torch.testing.assert_close(score[same], wanted[1][same], atol=1e-5, rtol=40 * torch.finfo(dtype).eps)


CUTS = {1: [], 2: [91], 3: [7, 300], 4: [90, 91, 92], 5: [1, 90, 91, 320]}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("noise", [False, True], ids=["argmax", "noise"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_shards_merge_into_the_whole(guards, cuts, noise):
    config = LmHeadConfig(16, 64, 32, 32, num_warps=4, num_stages=2, programs=2)
    n_rows, n_columns = 5, 333
    hidden = guards.copy(whole(n_rows, 24, dtype=torch.float32))
    weight = guards.copy(whole(n_columns, 24, dtype=torch.float32, seed=1))
    weight[[100, 332]] = weight[50].clone()
    hidden[0] = weight[50] * 2  # tied across shards
    hidden[1] = math.nan
    draw = noise_of(n_rows, hidden.device) if noise else {}
    edges = [0, *cuts, n_columns]
    shards = list(zip(edges[:-1], edges[1:], strict=True))[::-1]  # the order is free
    values = guards.empty(len(shards), 4, n_rows)
    winner = guards.empty(len(shards), n_rows, dtype=torch.int32)
    for index, (start, stop) in enumerate(shards):
        part = {"weight": weight[start:stop], "vocab_start": start, **draw}
        lm_head_partials(hidden, **part, out=(values[index], winner[index]), config=config)
        wanted = twin.lm_head_partials(hidden, **part)
        assert torch.equal(winner[index], wanted[1])
        fine = [row for row in range(n_rows) if row != 1]
        torch.testing.assert_close(values[index][:, fine], wanted[0][:, fine], atol=1e-5, rtol=1e-5)
    token, score = merge_partials(values, winner, out=results(guards, n_rows))
    one = lm_head(hidden, weight, **draw, config=config)
    assert torch.equal(token, one[0]) and (noise or token[0] == 50)
    assert score[1].isnan()
    torch.testing.assert_close(score, one[1], equal_nan=True)
    torch.testing.assert_close(twin.merge_partials(values, winner), (token, score), equal_nan=True)


def test_partials_of_rows_that_are_not_counted_are_left_alone(guards):
    hidden, weight = whole(5, 8, dtype=torch.float32), whole(20, 8, dtype=torch.float32, seed=1)
    out = guards.empty(4, 5), guards.empty(5, dtype=torch.int32)
    hidden, weight, count = (guards.copy(x) for x in (hidden, weight, torch.tensor([2], dtype=torch.int32)))
    values, winner = lm_head_partials(hidden, weight, count=count, out=out, config=SMALL)
    assert values[:, 2:].isnan().all() and values[:, :2].isfinite().all()
    assert (winner[2:] == guards.empty(1, dtype=torch.int32)).all() and (winner[:2] < 20).all()
    assert lm_head_partials(hidden, weight)[0].shape == (4, 5)


def test_a_real_vocabulary(guards):
    hidden = guards.copy(whole(3, 16, dtype=torch.float16))
    weight = guards.copy(whole(126464, 16, dtype=torch.float16, seed=1))
    weight[126463] = hidden[0] * 2  # the last program's last column
    # the interpreter's time goes by tiles
    config = None if hidden.is_cuda else LmHeadConfig(16, 1024, 16, 1024, num_warps=4, num_stages=1, programs=60)
    token, score = lm_head(hidden, weight, out=results(guards, 3), config=config)
    wanted = twin.lm_head(hidden, weight)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1], atol=1e-6, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 50), st.integers(1, 9), st.booleans())
def test_any_shape_and_grid(n_rows, n_columns, n_features, programs, noise):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guards = Guards(device)
    hidden = guards.copy(whole(n_rows, n_features, dtype=torch.float32, seed=n_rows, most=1))  # many ties
    weight = guards.copy(whole(n_columns, n_features, dtype=torch.float32, seed=n_columns, most=1))
    draw = noise_of(n_rows, device) if noise else {}
    n_tiles = -(-n_rows // SMALL.BLOCK_T)
    config = LmHeadConfig(**{**vars(SMALL), "programs": max(programs, n_tiles)})
    token, score = lm_head(hidden, weight, **draw, out=results(guards, n_rows), config=config)
    guards.check()
    wanted = twin.lm_head(hidden, weight, **draw)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rows_stay_alone(device, bad):
    hidden = whole(20, 16, dtype=torch.float32).to(device)
    weight = whole(50, 16, dtype=torch.float32, seed=1).to(device)
    fine = lm_head(hidden, weight, config=SMALL)
    hidden[17] = bad
    token, score = lm_head(hidden, weight, config=SMALL)
    rest = [row for row in range(20) if row != 17]
    assert score[17].isnan() and 0 <= token[17] < 50
    assert torch.equal(token[rest], fine[0][rest]) and torch.equal(score[rest], fine[1][rest])


def test_logits_of_minus_infinity_are_never_chosen(device):
    hidden = torch.ones(1, 16, device=device)
    weight = whole(60, 16, dtype=torch.float32).to(device)
    weight[:40, 0] = -math.inf
    token, score = lm_head(hidden, weight, config=SMALL)
    wanted = twin.lm_head(hidden, weight)
    assert torch.equal(token, wanted[0]) and token >= 40
    torch.testing.assert_close(score, wanted[1])
    weight[:, 0] = -math.inf
    token, score = lm_head(hidden, weight, config=SMALL)
    assert score.isnan() and token == 0


def test_row_strides_are_free(device):
    hidden = whole(6, 50, dtype=torch.float32).to(device)[::2, 3:27]
    weight = whole(70, 50, dtype=torch.float32, seed=1).to(device)[:, 20:44]
    token, score = lm_head(hidden, weight, config=SMALL)
    wanted = twin.lm_head(hidden, weight)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1])


def test_tokens_are_drawn_with_softmax_frequencies(device):
    n = 20000 if device.type == "cuda" else 400
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], device=device)
    hidden, weight = torch.zeros(n, 16, device=device), torch.zeros(5, 16, device=device)
    hidden[:, 0], weight[:, 0] = 1.0, logits
    draw = {"temperature": torch.full((n,), 0.7, device=device), "seed": torch.arange(n, device=device)}
    draw |= {name: torch.full((n,), 3, device=device) for name in KEYS[1:]}
    config = LmHeadConfig(256, 16, 16, 16, num_warps=4, num_stages=1, programs=16)
    token, score = lm_head(hidden, weight, **draw, config=config)
    expected = (logits / 0.7).softmax(-1)
    share = torch.bincount(token, minlength=5) / n
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4.5 * sigma).all()
    assert torch.equal(token, confidence_twin.confidence(logits.expand(n, -1), **draw)[0])
    torch.testing.assert_close(score, logits.softmax(-1)[token])


def test_grids_fill_the_gpu_once():
    for n_rows in (1, 16, 17, 64, 65, 128, 500, 2124, 100_000):
        for noise in (False, True):
            config = lm_head_config(n_rows, 126464, 2, noise)
            n_tiles = -(-n_rows // config.BLOCK_T)
            resident = 132 if config.num_warps == 8 else 264
            used = config.programs // n_tiles * n_tiles
            assert used >= min(resident * 0.98, n_tiles * 8)
            # what a stage holds times the stages fits every target
            assert config.num_stages * (config.BLOCK_T + config.BLOCK_V) * config.BLOCK_K * 2 <= 163 * 1024
            codes_ = lm_head_config(n_rows, 126464, 2, noise, float8=True)
            assert codes_.BLOCK_T == config.BLOCK_T and codes_.programs == config.programs
            stage = (2 * codes_.BLOCK_T + codes_.BLOCK_V) * codes_.BLOCK_K
            assert (codes_.num_stages - 1) * stage * (8 // codes_.num_warps) <= 163 * 1024
            assert (codes_.num_stages - 1) * codes_.BLOCK_V * codes_.BLOCK_K * (8 // codes_.num_warps) >= 32 * 1024
    assert lm_head_config(4, 100, 2).programs == 1
    assert lm_head_config(0, 100, 2).programs == 1


def test_refuses_what_it_cannot_take(device, monkeypatch):
    x, w = torch.ones(4, 16, device=device), torch.ones(40, 16, device=device)
    ids, one = torch.zeros(3, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32, device=device)
    values, winner = torch.ones(2, 4, 3, device=device), torch.zeros(2, 3, dtype=torch.int32, device=device)
    noise = noise_of(4, device)
    config = lm_head_config(4, 40, 4)
    for message, call in {
        "hidden has dtype int32": lambda: lm_head(x.int(), w),
        "config has 0 programs for 1 row tiles": lambda: lm_head(x, w, config=replace(config, programs=0)),
        "hidden has strides": lambda: lm_head(torch.ones(16, 16, device=device).T, w),
        r"weight has shape \[40, 8\]": lambda: lm_head(x, w[:, :8]),
        "weight has dtype float32, not float8_e4m3fn": lambda: lm_head(x, w, scale=w[:, 0].contiguous()),
        "weight has dtype float8_e4m3fn, not float32": lambda: lm_head(x, w.to(torch.float8_e4m3fn)),
        r"scale has shape \[3\]": lambda: lm_head(x, w.to(torch.float8_e4m3fn), scale=torch.ones(3, device=device)),
        "weight has strides .* not contiguous": lambda: lm_head(
            x[:, :8], w.to(torch.float8_e4m3fn)[:, :8], scale=torch.ones(40, device=device)
        ),
        "weight has dtype float16": lambda: lm_head(x, w.half()),
        r"weight has shape \[0, 16\]: there is nothing": lambda: lm_head(x, w[:0]),
        "weight has strides": lambda: lm_head(torch.ones(4, 40, device=device), w.T),
        "rows has dtype float32": lambda: lm_head(x, w, rows=x[:, 0].contiguous()),
        "rows has entries, hidden has no rows": lambda: lm_head(x[:0], w, rows=ids),
        "count has dtype int64": lambda: lm_head(x, w, count=one.long()),
        r"count has shape \[3\]": lambda: lm_head(x, w, count=ids),
        "step is None": lambda: lm_head(x, w, **{**noise, "step": None}),
        r"temperature has shape \[4\], not \[3\]": lambda: lm_head(x, w, rows=ids, **noise),
        r"seed has shape \[4\], not \[3\]": lambda: lm_head(
            x, w, rows=ids, **{**noise, "temperature": noise["temperature"][:3]}
        ),
        r"out\[0\] has shape": lambda: lm_head(x, w, out=(ids, x[:, 0])),
        "vocab_start=-1": lambda: lm_head_partials(x, w, vocab_start=-1),
        "vocab_start=2147483640": lambda: lm_head_partials(x, w, vocab_start=2**31 - 8),
        r"out\[0\] has shape \[2, 4, 3\]": lambda: lm_head_partials(x, w, out=(values, winner)),
        "values has 0 shards": lambda: merge_partials(values[:0], winner[:0]),
        r"values has shape \[4, 3\]": lambda: merge_partials(values[0], winner),
        r"winner has shape \[1, 3\]": lambda: merge_partials(values, winner[:1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setenv("SFS_TRITON_DEBUG", "1")
    for bad, count in ((4, None), (-1, None), (-2, one)):
        with pytest.raises(ValueError, match="rows holds values in"):
            lm_head(x, w, rows=ids + bad, count=count)
    lm_head(x, w, rows=torch.tensor([3, -1], dtype=torch.int32, device=device), count=one)
