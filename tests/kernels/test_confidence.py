"""From logits to token and score: the kernel against its torch twin and against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.common.testing import Guards, assert_within_budget
from sfs_triton.kernels.confidence import METRICS, ConfidenceConfig, confidence, confidence_config
from sfs_triton.kernels.launch import launch
from sfs_triton.kernels.philox import gumbel, philox
from sfs_triton.ops.torch import confidence as twin
from sfs_triton.ops.torch import philox as twin_philox
from tests.reference.confidence import look

SMALL = ConfidenceConfig(BLOCK_V=128, num_warps=1)  # many chunks of few columns
KEYS = ("seed", "position", "step")


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def noise_of(n_rows: int, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """Make noise keys and temperatures, different for every sequence."""
    generator = torch.Generator().manual_seed(seed)
    most = {"seed": 2**63 - 1, "position": 4096, "step": 1024}
    keys = {name: torch.randint(0, most[name], (n_rows,), generator=generator) for name in KEYS}
    keys["temperature"] = 0.3 + torch.rand(n_rows, generator=generator)
    return {name: key.to(device) for name, key in keys.items()}


def results(guards: Guards, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return guards.empty(n_rows, dtype=torch.int32), guards.empty(n_rows)


def exact_entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.double().softmax(-1)
    return torch.special.xlogy(p, p).sum(-1).float()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n_rows", "n_columns"), [(0, 8), (1, 1), (3, 17), (4, 500), (2, 9001)])
def test_equals_its_twin(guards, dtype, metric, n_rows, n_columns):
    logits = guards.copy(random(n_rows, n_columns, dtype=dtype))
    out = results(guards, n_rows)
    same = twin.confidence(logits.clone(), metric=metric)
    truth = twin.confidence(logits.double(), metric=metric)[1]
    if metric == "entropy":
        truth = exact_entropy(logits)
        # The twin adds 1e-10 to each probability. Of one near 1 float32 knows the logarithm to half a unit of 1, not of
        # the logarithm, so the bound is in units of 1 + |entropy|.
        unit = torch.finfo(torch.float32).eps * (1 + truth.abs())
        assert ((same[1] - truth).abs() <= n_columns * 1e-10 + 8 * unit).all()
    token, score = confidence(logits, metric=metric, out=out)
    assert token is out[0] and score is out[1]
    assert torch.equal(token, same[0])
    assert_within_budget(score, truth, same[1])


@pytest.mark.parametrize(("n_rows", "n_columns"), [(3, 126464), (1, 155136)])
def test_real_vocabularies(guards, n_rows, n_columns):
    logits = guards.copy(random(n_rows, n_columns, dtype=torch.float16, scale=2.0))
    logits[0, n_columns - 1] = 40.0  # in the last, partial chunk
    token, score = confidence(logits, out=results(guards, n_rows))
    same = twin.confidence(logits.clone())
    assert torch.equal(token, same[0]) and token[0] == n_columns - 1
    assert_within_budget(score, twin.confidence(logits.double())[1], same[1])


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("metric", METRICS)
def test_follows_the_definitions(device, metric, temperature, tempered):
    logits, given = random(6, 300, dtype=torch.float32), noise_of(6)
    noise = twin_philox.gumbel(given["seed"][:, None], torch.arange(300), *(given[k][:, None] for k in KEYS[1:]))
    wanted = look(logits, metric, temperature, tempered=tempered, noise=noise)
    given["temperature"].fill_(temperature)
    given = {name: key.to(device) for name, key in given.items()} if temperature else {}
    settings_ = {"metric": metric, "tempered": tempered, **given}
    for config in (None, SMALL):
        token, score = confidence(logits.to(device), **settings_, config=config)
        assert token.tolist() == wanted.tokens
        torch.testing.assert_close(score.cpu(), torch.tensor(wanted.scores), atol=1e-6, rtol=1e-5)
    assert torch.equal(token, twin.confidence(logits.to(device), **settings_)[0])


@pytest.mark.parametrize("noise", [False, True], ids=["argmax", "noise"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_rows_bits_depend_on_itself_alone(device, metric, noise):
    logits = random(3, 9000, dtype=torch.float32).to(device)
    draw, how = noise_of(3, device) if noise else {}, {"metric": metric, "tempered": noise}
    token, score = confidence(logits, **draw, **how)
    for row in range(3):
        own = {name: key[row : row + 1] for name, key in draw.items()}
        alone = confidence(logits[row : row + 1], **own, **how)
        assert torch.equal(alone[0], token[row : row + 1]) and torch.equal(alone[1], score[row : row + 1])


@pytest.mark.parametrize("metric", METRICS)
def test_counters_are_left_zero_for_any_number_of_launches(guards, metric):
    counters = guards.empty(5, dtype=torch.int32).zero_()
    logits = guards.copy(random(1, 200, dtype=torch.float32))
    out = results(guards, 1)
    first = [x.clone() for x in confidence(logits, metric=metric, out=out, counters=counters, config=SMALL)]
    for _ in range(3 if metric != "confidence" else 1000 if logits.is_cuda else 100):
        confidence(logits, metric=metric, out=out, counters=counters, config=SMALL)
        assert torch.equal(out[0], first[0]) and torch.equal(out[1], first[1])
    assert not counters.any()


LOGIT = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 3.0, 3.0]) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(METRICS), st.booleans())
def test_ties_infinities_and_nan(data, metric, noise):
    """Rows are short patterns repeated over several chunks: every value is tied, and some rows are all bad."""
    n_rows, repeats = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 120))
    patterns = [data.draw(st.lists(LOGIT, min_size=3, max_size=3)) for _ in range(n_rows)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guards = Guards(device)
    logits = guards.copy(torch.tensor(patterns).repeat(1, repeats))
    draw = {"metric": metric} | ({name: guards.copy(key) for name, key in noise_of(n_rows).items()} if noise else {})
    token, score = confidence(logits, **draw, out=results(guards, n_rows), config=SMALL)
    same = twin.confidence(logits.clone(), **draw)
    guards.check()
    good = ~same[1].isnan()
    assert torch.equal(score.isnan(), ~good)
    assert ((token >= 0) & (token < logits.shape[1])).all()
    assert torch.equal(token[good], same[0][good])
    torch.testing.assert_close(score[good], same[1][good], atol=1e-6, rtol=1e-5)


def test_the_lowest_of_equal_ids_wins_across_chunks(device):
    logits = torch.zeros(3, 1000, device=device)
    logits[0, [400, 130, 999]] = 2.0
    logits[1, [999, 127]] = 2.0
    token, margin = confidence(logits, metric="margin", config=SMALL)
    assert token.tolist() == [130, 127, 0]
    assert margin.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n_columns", [5, 300])
def test_bad_rows_stay_alone(device, bad, n_columns):
    logits = random(3, n_columns, dtype=torch.float32).to(device)
    fine = confidence(logits.clone(), config=SMALL)
    logits[1] = bad
    token, score = confidence(logits, config=SMALL)
    assert score[1].isnan() and 0 <= token[1] < n_columns
    assert torch.equal(score[[0, 2]], fine[1][[0, 2]]) and torch.equal(token[[0, 2]], fine[0][[0, 2]])


@pytest.mark.parametrize("sequence_length", [1, 3, 6])
def test_shifted_logits(guards, sequence_length):
    logits = guards.copy(random(6, 200, dtype=torch.float32))
    source = [row if row % sequence_length == 0 else row - 1 for row in range(6)]
    draw = {name: guards.copy(key) for name, key in noise_of(6).items()}
    token, score = confidence(logits, **draw, sequence_length=sequence_length, out=results(guards, 6), config=SMALL)
    wanted = twin.confidence(logits[source], **draw)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(score, wanted[1])
    assert torch.equal(twin.confidence(logits.clone(), **draw, sequence_length=sequence_length)[0], wanted[0])


def test_any_row_stride(device):
    wide = random(4, 1003, dtype=torch.float32).to(device)
    for logits in (wide[:, 1:998], wide[::2, :500], wide[:1].expand(3, -1)):
        token, score = confidence(logits, config=SMALL)
        wanted = twin.confidence(logits.clone())
        assert torch.equal(token, wanted[0])
        torch.testing.assert_close(score, wanted[1])


@triton.jit
def _noise_kernel(seed_ptr, token_ptr, position_ptr, step_ptr, word_ptr, noise_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    seed, position, step = tl.load(seed_ptr + at), tl.load(position_ptr + at), tl.load(step_ptr + at)
    token = tl.load(token_ptr + at)
    tl.store(word_ptr + at, philox(seed, token, position, step).to(tl.int64))
    tl.store(noise_ptr + at, gumbel(seed, token, position, step))


def test_random_words_are_those_of_the_twin(device):
    generator = torch.Generator().manual_seed(3)
    word = torch.randint(-(2**63), 2**63 - 1, (4, 2048), generator=generator)
    word[1:] &= 0xFFFFFFFF
    word[:, 0] = 0
    word[:, 1] = torch.tensor([192, 100010, 0, 0])  # the largest of all words
    seed, token, position, step = word.to(device)
    drawn, noise = torch.empty_like(seed), torch.empty(2048, device=device)
    launch(
        _noise_kernel,
        (1,),
        seed_ptr=seed,
        token_ptr=token,
        position_ptr=position,
        step_ptr=step,
        word_ptr=drawn,
        noise_ptr=noise,
        BLOCK=2048,
    )
    wanted = twin_philox.philox(seed, token, position, step)
    assert torch.equal(drawn, wanted)
    assert drawn[1] >> 8 == 2**24 - 1 and noise.isfinite().all()
    least = wanted >> 8 < 2**24 - 1
    exact = ((wanted >> 8).float() + 0.5) * 2.0**-24
    torch.testing.assert_close(noise[least].double(), -(-exact[least].double().log()).log(), atol=2e-6, rtol=1e-5)


def test_tokens_are_drawn_with_softmax_frequencies(device):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -math.inf])
    n = 20000 if device.type == "cuda" else 250
    draw = {"temperature": torch.full((n,), 0.7, device=device), "seed": torch.arange(n, device=device)}
    draw |= {name: torch.full((n,), 7, device=device) for name in KEYS[1:]}
    token, score = confidence(logits.expand(n, -1).to(device), **draw)
    expected = (logits / 0.7).softmax(-1)
    share = torch.bincount(token.cpu(), minlength=6) / n
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4.5 * sigma).all()
    torch.testing.assert_close(score.cpu(), logits.softmax(-1)[token.cpu()])


def test_configs_know_the_vocabulary_only():
    for n_columns in (1, 100, 5000, 126464, 152064, 155136):
        for noise in (False, True):
            config = confidence_config(n_columns, noise)
            assert 128 <= config.BLOCK_V <= 4096
            assert config.BLOCK_V <= (512 if noise else 1024) * config.num_warps


def test_refuses_what_it_cannot_take(device):
    x, at = torch.ones(4, 300, device=device), noise_of(4, device)
    for message, call in {
        "logits has dtype int64": lambda: confidence(x.long()),
        "logits has shape": lambda: confidence(x[0]),
        "logits has strides": lambda: confidence(torch.ones(8, 8, device=device).T),
        "logits has 0 columns": lambda: confidence(x[:, :0]),
        "metric='mass'": lambda: confidence(x, metric="mass"),
        "temperature has dtype float64": lambda: confidence(x, **{**at, "temperature": at["temperature"].double()}),
        r"temperature has shape \[1\]": lambda: confidence(x, **{**at, "temperature": at["temperature"][:1]}),
        "position is None": lambda: confidence(x, **{**at, "position": None}),
        "seed has dtype int32": lambda: confidence(x, **{**at, "seed": at["seed"].int()}),
        r"step has shape \[3\]": lambda: confidence(x, **{**at, "step": at["step"][:3]}),
        "sequence_length=3 does not divide": lambda: confidence(x, sequence_length=3),
        "sequence_length=0 does not divide": lambda: confidence(x, sequence_length=0),
        r"out\[0\] has dtype int64": lambda: confidence(x, out=(at["seed"], x[:, 0])),
        r"out\[1\] has strides": lambda: confidence(x, out=(at["seed"].int(), x[:, 0])),
        "counters has 3 entries": lambda: confidence(x, counters=at["seed"][:3].int(), config=SMALL),
        "counters has dtype int64": lambda: confidence(x, counters=at["seed"], config=SMALL),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
