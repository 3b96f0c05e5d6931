"""The torch operations against their definitions."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from sfs_triton.ops import torch_backend as torch_impl
from sfs_triton.ops.dispatch import Draw, Ops, operations
from sfs_triton.ops.torch.commit import rank_by_score
from sfs_triton.ops.torch.confidence import confidence, filter_logits
from sfs_triton.ops.torch.philox import gumbel, philox
from sfs_triton.runner import ExecutionChoice, Pair
from tests.reference.confidence import Ends, look
from tests.support.paths import ROOT


def _philox_in_python(key: tuple[int, int], counter: list[int]) -> int:
    mask = 0xFFFFFFFF
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c[0]


def test_philox_matches_the_known_answers_and_plain_python():
    # known answer of the Random123 distribution: zero key and counter
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, zero, zero).item() == 0x6627E8D5
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(0, 2**62, (50,), generator=generator)
    words = torch.randint(0, 2**31, (3, 50), generator=generator)
    drawn = philox(seed, *words)
    for i in range(50):
        key = (seed[i].item() & 0xFFFFFFFF, seed[i].item() >> 32)
        assert drawn[i].item() == _philox_in_python(key, [*words[:, i].tolist(), 0])


def test_noise_is_finite_for_the_largest_word():
    seed, token, zero = torch.tensor(192), torch.tensor(100010), torch.tensor(0)
    assert philox(seed, token, zero, zero).item() >> 8 == 2**24 - 1
    assert gumbel(seed, token, zero, zero).isfinite()


def test_gumbel_max_draws_with_softmax_frequencies():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 20000
    seeds = torch.arange(n)[:, None]
    zero = torch.zeros(1, dtype=torch.int64)
    drawn = (logits + gumbel(seeds, torch.arange(5), zero, zero)).argmax(-1)
    expected = logits.softmax(-1)
    share = torch.bincount(drawn, minlength=5) / n
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() < 4.5 * sigma).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_confidence_is_the_softmax_of_the_argmax(dtype):
    logits = (torch.randn(33, 257, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    token, score = confidence(logits.clone())
    exact = logits.double().softmax(-1)
    assert torch.equal(token.long(), logits.float().argmax(-1))
    torch.testing.assert_close(score.double(), exact.gather(-1, token[:, None])[:, 0], atol=1e-6, rtol=1e-6)


def test_ties_go_to_the_lowest_id_and_lowest_position():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert confidence(logits)[0].tolist() == [1, 0]
    assert rank_by_score(torch.tensor([[0.5, 0.9, 0.9, 0.5]])).tolist() == [[2, 0, 1, 3]]


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("metric", ["confidence", "entropy"])
def test_bad_rows_have_nan_scores_and_do_not_touch_others(row, metric):
    score = confidence(torch.tensor([row, [0.0, 1.0]]), metric=metric)[1]
    assert score[0].isnan() and not score[1].isnan()


def test_metrics_follow_their_definitions():
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(2))
    p = (logits / 0.7).softmax(-1)
    top = p.sort(-1, descending=True).values
    # a vanishing share of noise would still move ties; temperature only tempers here, tokens come from top_k=1
    zero = torch.zeros(9, dtype=torch.int64)
    draw = {"temperature": torch.full((9,), 0.7), "tempered": True, "seed": zero, "position": zero, "step": zero}
    margin = confidence(logits.clone(), metric="margin", **draw)[1]
    torch.testing.assert_close(margin, top[:, 0] - top[:, 1])
    entropy = confidence(logits.clone(), metric="entropy", **draw)[1]
    torch.testing.assert_close(entropy, (p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = filter_logits(logits.expand(5, -1), None, torch.tensor([0.4, 0.6, 0.9, 1.0, math.inf])).isfinite().sum(1)
    assert kept.tolist() == [1, 2, 3, 4, 4]  # each row has its own
    assert filter_logits(logits, 2, None).isfinite().tolist() == [[True, True, False, False]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.8), (5, 0.7)])
@pytest.mark.parametrize(
    ("metric", "tempered"),
    [("confidence", False), ("confidence", True), ("margin", False), ("margin", True), ("entropy", True)],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_choices_are_the_oracles(impl, metric, tempered, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(7, 16, generator=generator), torch.randn(40, 16, generator=generator)
    draw = Draw(metric, noise=temperature > 0, nucleus=top_p is not None, top_k=top_k, tempered=tempered)
    keys = {"seed": torch.arange(7) + 2**40, "position": torch.arange(7) * 3, "step": torch.full((7,), 5)}
    numbers = keys | {"temperature": torch.full((7,), temperature)} if temperature else {}
    if top_p is not None:
        numbers["top_p"] = torch.full((7,), top_p)
    noise = gumbel(*(keys[name][:, None] if name == "seed" else torch.arange(40) for name in ("seed", "token")),
                   keys["position"][:, None], keys["step"][:, None])  # fmt: skip
    wanted = look(hidden @ head.T, metric, temperature, top_k, top_p, tempered, noise)
    ops = operations(impl, torch.device("cpu"))
    token, score, _ = ops.choose(hidden, head, draw, **numbers)
    assert token.tolist() == wanted.tokens
    torch.testing.assert_close(score, torch.tensor(wanted.scores), atol=1e-6, rtol=1e-5)
    both = ops.choose(hidden, head, replace(draw, entropy=True), **numbers)
    assert both.token.tolist() == wanted.tokens
    torch.testing.assert_close(both.score, score, atol=1e-6, rtol=1e-5)
    entropies = torch.tensor(look(hidden @ head.T, "entropy").scores)
    torch.testing.assert_close(both.entropy, -entropies, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", range(12))  # every option with every metric, filter and implementation
def test_ends_of_a_text_are_chosen_as_by_the_oracle(number):
    """The tokens 3 and 17 end a text: each is the most likely one of some rows."""
    impl, ends = ("torch", "triton")[number // 4 % 2], (3, 17)
    how = [{"eos": "never"}, {"eos": "last"}, {"eos_penalty": 2.0}, {"eos": "last", "eos_penalty": 1e4}][number % 4]
    metric, tempered = [("confidence", False), ("margin", False), ("entropy", True)][number % 3]
    temperature, (top_k, top_p) = (0.0, 0.7)[number // 2 % 2], [(None, None), (2, None), (4, 0.6)][number // 4]
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(9, 40, generator=generator)
    logits[:3, 3] += 5
    logits[3:5, 17] += 5
    logits[5, 3:18:14] += 5
    logits[6, 17] = float("nan")  # of the whole row, as a hidden state
    draw = Draw(metric, temperature > 0, top_p is not None, top_k, tempered, **how)
    keys = {"seed": torch.arange(9) + 7, "position": torch.arange(9) * 3, "step": torch.full((9,), 5)}
    numbers = keys | {"temperature": torch.full((9,), temperature)} if temperature else {}
    if top_p is not None:
        numbers["top_p"] = torch.full((9,), top_p)
    noise = gumbel(keys["seed"][:, None], torch.arange(40), keys["position"][:, None], keys["step"][:, None])
    rule = Ends(ends, draw.eos, draw.eos_penalty)
    good = [row for row in range(9) if row != 6]
    wanted = look(logits[good], metric, temperature, top_k, top_p, tempered, noise[good], rule)
    choose = operations(impl, torch.device("cpu")).choose
    token, score, _ = choose(logits, torch.eye(40), draw, ends=torch.tensor(ends), **numbers)
    assert token[good].tolist() == wanted.tokens and score[6].isnan()
    torch.testing.assert_close(score[good], torch.tensor(wanted.scores), atol=1e-6, rtol=1e-5)
    beside = choose(logits[good], torch.eye(40), Draw(entropy=True, **how), ends=torch.tensor(ends)).entropy
    entropies = torch.tensor(look(logits[good], "entropy", ends=rule, lowest=False).scores)
    torch.testing.assert_close(beside, -entropies, atol=1e-6, rtol=1e-5)
    assert any(t in ends for t in wanted.tokens) == (draw.eos != "never")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_raised_logit(impl):
    """Before ends of a text are treated, in 16 bits too, and no other row's or token's."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    logits[3, 7] = float("nan")
    token, by = torch.tensor([3, 0, 39, 3, 3]), torch.tensor([20.0, 0.0, 20.0, 20.0, 2.5])
    wanted = logits.bfloat16().float()
    wanted[torch.arange(5), token] += by
    choose, draw = operations(impl, torch.device("cpu")).choose, Draw(eos_penalty=4.0)
    dtype = torch.float32 if impl == "triton" else torch.bfloat16
    raised = {"raised": token, "raise_by": by, "ends": torch.tensor([3])}
    found = choose(logits.bfloat16().to(dtype), torch.eye(40, dtype=dtype), draw, **raised)
    good = [0, 1, 2, 4]
    oracle = look(wanted[good], ends=Ends((3,), penalty=4.0))
    assert found.token[good].tolist() == oracle.tokens and found.token[[0, 2]].tolist() == [3, 39]
    torch.testing.assert_close(found.score[good], torch.tensor(oracle.scores), atol=1e-6, rtol=1e-5)
    assert found.score[3].isnan()


def test_default_implementation():
    """Torch for every operation; on a GPU, which need not be there to be asked for, ``publish`` is a kernel."""
    for impl in (None, "torch"):
        for device, kernels in (("cpu", set()), ("cuda", {"publish"})):
            ops = operations(impl, torch.device(device))
            for name in (field.name for field in fields(Ops)):
                by_torch = getattr(ops, name) is getattr(torch_impl, name)
                assert by_torch == (name not in kernels), (impl, device, name)


def test_plain_torch_on_a_gpu_needs_no_triton():
    """Nor a compiler: the kernel of ``publish``, which is only for captured graphs, is imported when it is launched."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sfs_triton.ops.dispatch import operations\n"
        "operations('torch', torch.device('cuda'))\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def test_publish_on_a_gpu_is_the_kernel(monkeypatch):
    published = pytest.importorskip("sfs_triton.kernels.publish")
    given = []
    monkeypatch.setattr(published, "publish", lambda *arguments: given.append(arguments))
    operations("torch", torch.device("cuda")).publish([], [], 1, 2)
    assert given == [([], [], 1, 2)]


def test_default_execution():
    for device in ("cpu", "cuda"):
        model = SimpleNamespace(device=torch.device(device), backend="torch")
        choice = ExecutionChoice(model)
        assert choice.current.name == "eager" and choice.pair == Pair("torch", cuda_graphs=False)
