"""Several processes that share one model decode as one process does, exchange little data, and never hang."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import WINO, ArgumentError, FixedSteps, NoCache, RefreshCache, RegionCache, SlowFast, Threshold
from sfs_triton import distributed as parallel
from sfs_triton.distributed import Vocabulary, share
from sfs_triton.models import Transformer
from sfs_triton.ops.dispatch import Choice, CreditRules, Credits, Draw, operations
from sfs_triton.ops.torch import sharded
from tests.support import ranks
from tests.support.combinations import PAIRS, POLICIES, SAMPLERS, assert_same
from tests.support.margins import assert_logits_close
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [200, 201, 202]]
SHORT = {"prompts": PROMPTS, "gen_length": [16, 8], "seed": [5, 6]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with ranks.World(2, tmp_path_factory.mktemp("two")) as world:
        yield world


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with ranks.World(4, tmp_path_factory.mktemp("four")) as world:
        yield world


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory) -> dict[str, Path]:
    """The golden models, and Dream with its head tied to its embedding."""
    found = {name: golden / "models" / name for name in ("llada-mha", "llada-gqa", "dream-gqa", "dream-r7")}
    found["tied"] = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(found["dream-gqa"], found["tied"])
    tensors = load_file(found["tied"] / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, found["tied"] / "model.safetensors")
    config = json.loads((found["tied"] / "config.json").read_text())
    (found["tied"] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return found


def _check(world: ranks.World, model: str | Path, options: list[dict], quantization: str | None = None) -> None:
    """Every rank's results are those of one process, down to the trace."""
    alone = sfs_triton.load(model, "cpu", "float32", quantization=quantization)
    wanted = [alone.generate(**given) for given in options]
    for rank, got in enumerate(world.run(ranks.generate, model, options, quantization=quantization)):
        assert isinstance(got, list), f"rank {rank}: {got}"
        for given, mine, one in zip(options, got, wanted, strict=True):
            assert len(one) == len(given["prompts"]) and one[0].nfe > 1, given
            assert_same(mine, one)


def test_texts_are_exchanged_in_host_memory(monkeypatch):
    """Whatever the default device of the caller's tensors is."""
    group = object.__new__(parallel.ProcessGroup)
    group.size, group._host = 2, None
    monkeypatch.setattr(group, "_gather", lambda x, where: x[None].repeat(2, *[1] * x.dim()))
    with torch.device("meta"):
        assert group.exchange("réponse") == ["réponse"] * 2


# -------------------------------------------------------------------------------------------------------- same tokens


def test_every_sampler_with_every_policy(two, models):
    one = {"prompts": PROMPTS[:1], "gen_length": 16, "trace": True}
    options = [one | {"sampler": SAMPLERS[s], "cache": POLICIES[p]} for s, p in PAIRS]
    _check(two, models["dream-gqa"], options)


@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_and_other_shapes(request, models, size):
    world = request.getfixturevalue({2: "two", 4: "four"}[size])
    chosen = [(SlowFast(), NoCache()), (SlowFast(), RegionCache(capacity=12, refresh_every=5))]
    chosen += [(Threshold(block_length=8), POLICIES["dual"]), (FixedSteps(steps=6), RefreshCache(3, 2, 1.0))]
    if size == 4:  # whose model's logits are not shifted
        chosen += [(WINO(tau=0.05, tau_back=0.5, block_length=8), NoCache())]
    for model in ("llada-gqa", "tied") if size == 2 else ("llada-mha",):
        _check(world, models[model], [SHORT | {"sampler": s, "cache": p, "trace": True} for s, p in chosen])


def test_quantised_weights_are_those_of_one_process(two, models):
    chosen = [(SlowFast(), NoCache()), (FixedSteps(steps=6, metric="entropy"), NoCache())]
    for model in ("dream-gqa", "tied"):
        _check(two, models[model], [SHORT | {"sampler": s, "cache": p, "trace": True} for s, p in chosen], "fp8")


DRAWS = {
    "warm": SlowFast(temperature=0.7),
    "warm-maskgit": FixedSteps(steps=6, metric="maskgit_plus", temperature=0.5),
    "warm-margin": FixedSteps(steps=6, metric="topk_margin", temperature=0.5),
    "warm-entropy": FixedSteps(steps=6, metric="entropy", temperature=0.5),
    "guided": SlowFast(cfg_scale=0.8),
    "top-p": FixedSteps(steps=6, metric="entropy", temperature=0.4, top_p=0.9),
    "top-k": Threshold(block_length=8, temperature=0.6, top_k=5),
    "eos": SlowFast(eos_stop=True),
}


def test_likelihoods(two, models):
    pairs = [(PROMPTS[0], [9, 8, 7]), (PROMPTS[1], [4, 5])]
    options = [{"mc_num": 4, "mc_batch": 2}, {"method": "confidence", "check_greedy": True}]
    alone = sfs_triton.load(models["dream-gqa"], "cpu", "float32")
    for got in two.run(ranks.likelihoods, models["dream-gqa"], pairs, options):
        for given, mine in zip(options, got, strict=True):
            for one, other in zip(mine, alone.likelihood(pairs, **given), strict=True):
                assert one.value == pytest.approx(other.value, rel=1e-4)
                assert (one.greedy, one.forwards) == (other.greedy, other.forwards)


def test_vectors_in_prompts(two, models):
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    options = SHORT | {"prompt_embeds": [([1, 3], vectors), None], "cache": POLICIES["region"]}
    _check(two, models["dream-gqa"], [options])
    own = [options, options | {"prompt_embeds": [([1, 3], vectors + 1), None]}]
    for got in two.run(ranks.generate_own, models["dream-gqa"], own):
        assert got.kind == "ArgumentError" and "different requests" in got.text


def test_noise_guidance_filters_and_early_stops(two, models):
    _check(two, models["dream-gqa"], [SHORT | {"sampler": sampler} for sampler in DRAWS.values()])
    guided = SHORT | {"sampler": DRAWS["guided"]}
    _check(two, models["dream-gqa"], [guided | {"cache": cache} for cache in ("region", RefreshCache(3, 2, 0.0))])


@pytest.mark.parametrize("size", [2, 4])
def test_the_embedded_model_answers_as_it_does_alone(request, embedded, size):
    world = request.getfixturevalue({2: "two", 4: "four"}[size])
    options = {"gen_length": 48, "cache": "region", "sampler": SlowFast()}
    questions = ["15,44,79,50", "2,3,5,25", "61,10,30,41"]
    wanted = embedded.generate(questions, **options)
    for got in world.run(ranks.generate, "embedded", [{"prompts": questions, **options}]):
        # which of its many positions of confidence 1 comes first is a matter of the last bit
        for mine, one in zip(got[0], wanted, strict=True):
            assert (mine.text, mine.canvas, mine.nfe) == (one.text, one.canvas, one.nfe)


def test_infilling(two, models, engines):
    canvas = [3, 14, 500, 500, 65, 500, 89, 79, 500, 38]
    wanted = engines["dream-gqa"].infill(canvas)
    for got in two.run(ranks.infill, models["dream-gqa"], canvases=canvas):
        assert_same(got, wanted)


@pytest.mark.parametrize("model", ["llada-gqa", "dream-gqa", "tied"])
def test_logits_are_those_of_the_whole_model(two, models, model):
    alone = sfs_triton.load(models[model], "cpu", "float32").model
    with torch.inference_mode():
        wanted = alone.logits(torch.tensor([PROMPTS[0]]))
    for got in two.run(ranks.logits, models[model], [PROMPTS[0]]):
        assert_logits_close(got, wanted)


def test_kernels_give_the_same(two, models):
    options = [{"prompts": PROMPTS[1], "gen_length": 4, "sampler": SlowFast(temperature=t)} for t in (0.0, 0.7)]
    alone = sfs_triton.load(models["dream-gqa"], "cpu", "float32")
    wanted = [alone.generate(**given) for given in options]
    for got in two.run(ranks.generate, models["dream-gqa"], options, backend="triton"):
        for mine, one in zip(got, wanted, strict=True):
            assert_same(mine, one)


# --------------------------------------------------------------------------------- the head and its shards, one process


class Threads(parallel.Group):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list):
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(30)
        out = torch.stack(self._slots)
        self._barrier.wait(30)
        return out


def _choose_by_shards(logits: torch.Tensor, draw: Draw, size: int, kept: list | None = None, **keys) -> list[Choice]:
    """``Ops.choose`` of every rank. The head is the identity, so that hidden states are logits. ``kept`` takes the
    divergences of each."""
    ops, vocab = operations("torch", torch.device("cpu")), logits.shape[1]
    barrier, slots = threading.Barrier(size), [None] * size

    def choose(rank: int) -> Choice:
        group = Threads(rank, size, barrier, slots)
        head = torch.eye(vocab)[slice(*group.share(vocab))]
        mine = copy.deepcopy(keys)
        if kept is not None:
            kept.append(mine["divergences"])
        return ops.choose(logits, head, draw, vocabulary=Vocabulary(group, vocab), **mine)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(choose, range(size)))


METRICS = [("confidence", False), ("confidence", True), ("margin", False), ("margin", True), ("entropy", True)]
FILTERS = [{}, {"top_k": 3}, {"nucleus": True}, {"entropy": True}]
FILTERS += [{"eos": "never"}, {"eos_penalty": 3.0}, {"eos": "last", "entropy": True}, {"eos": "last", "top_k": 3}]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("metric, tempered", METRICS)
def test_scores_from_shards(size, noise, metric, tempered):
    torch.manual_seed(size)
    logits = torch.randn(7, 23) * 3
    logits[1, [4, 20]] = 9.0  # a tie between ranks, and the lowest id wins
    logits[2, 5:] = -1e30
    keys = {name: torch.arange(7) + n for n, name in enumerate(("seed", "position", "step"))} if noise else {}
    keys["ends"] = torch.stack((logits[0].argmax(), torch.tensor(20)))
    if noise:
        keys["temperature"] = torch.linspace(0.3, 1.2, 7)
    for filters in FILTERS:
        draw = Draw(metric, noise=noise, tempered=tempered, **filters)
        if draw.entropy:
            keys |= {"raised": torch.arange(7) * 3, "raise_by": torch.arange(7.0)}
        if draw.nucleus:
            keys["top_p"] = torch.linspace(0.5, 0.9, 7)
        token, score, entropy = operations("torch", logits.device).choose(logits, torch.eye(23), draw, **keys)
        for mine, value, mean in _choose_by_shards(logits, draw, size, **keys):
            assert mine.tolist() == token.tolist() and mine.dtype == torch.int32
            torch.testing.assert_close(value, score, rtol=1e-5, atol=1e-5)
            assert (mean is None) == (entropy is None) == (not draw.entropy)
            if draw.entropy:
                torch.testing.assert_close(mean, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"eos": "never"}])
def test_credit_from_shards(options):
    logits = torch.randn(7, 23, generator=torch.Generator().manual_seed(0))
    token = torch.stack([torch.randperm(23, generator=torch.Generator().manual_seed(n))[:4] for n in range(8)]).int()
    token[:, 2:] = -1
    keys = {"place": torch.arange(7), "ends": logits[0].argmax()[None]}
    keys["credits"] = Credits(token, (token >= 0).float() * torch.arange(8)[:, None])
    draw = Draw(credit=CreditRules(0.7, 0.8, 0.2), **options)
    wanted = operations("torch", logits.device).choose(logits, torch.eye(23), draw, **copy.deepcopy(keys))
    assert wanted.token.tolist() != logits.argmax(1).tolist()
    for mine in _choose_by_shards(logits, draw, 3, **keys):
        assert mine.token.tolist() == wanted.token.tolist()
        torch.testing.assert_close(mine.score, wanted.score)


def test_divergence_from_shards():
    logits, before = torch.randn(2, 7, 23, generator=torch.Generator().manual_seed(0))
    known, draw = torch.arange(7) > 1, Draw(divergence=True)

    def keys() -> dict[str, torch.Tensor]:
        return {"place": torch.arange(7), "before": before, "known": known, "divergences": torch.full((8,), -1.0)}

    given, kept = keys(), []
    wanted = operations("torch", logits.device).choose(logits, torch.eye(23), draw, **given)
    now, then = logits.double().log_softmax(-1), before.double().log_softmax(-1)
    truth = torch.nn.functional.kl_div(then, now, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(given["divergences"][2:7], truth[2:].float())
    assert (given["divergences"][:2] > 20).all() and given["divergences"][7] == -1

    for mine in _choose_by_shards(logits, draw, 3, kept=kept, **keys()):
        assert mine.token.tolist() == wanted.token.tolist()
    for divergences in kept:
        torch.testing.assert_close(divergences, given["divergences"])
    assert len(kept) == 3


@pytest.mark.parametrize("metric, tempered", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_logit_on_one_rank_spoils_the_score_on_all(metric, tempered, bad):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    logits[1, 7] = bad
    parts, draw = {0: logits[:, :6], 6: logits[:, 6:]}, Draw(metric=metric, tempered=tempered)
    gathered = torch.stack([sharded.partials(part, draw, vocab_start=start) for start, part in parts.items()])
    token, score = sharded.merge(gathered, metric)
    if metric == "entropy":
        score = sum(sharded.entropy(part, score) for part in parts.values())
    assert score.isnan().tolist() == [False, True, False]
    assert all(0 <= t < 12 for t in token.tolist())


def test_a_vocabulary_that_does_not_divide():
    assert [share(10, rank, 4) for rank in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    group = parallel.Group()
    group.size = 4
    assert Vocabulary(group, 10).start == 0


# -------------------------------------------------------------------------------------------------------------- traffic


NUMBERS = {
    "paper": (SlowFast(), {5}),
    "margin": (DRAWS["warm-margin"], {6}),
    "entropy": (DRAWS["warm-entropy"], {6, 1}),
}


@pytest.mark.parametrize("sampler, numbers", NUMBERS.values(), ids=NUMBERS)
def test_a_few_numbers_per_position_and_never_logits(two, models, sampler, numbers):
    spec = sfs_triton.load(models["dream-gqa"], "cpu").spec
    options = {"prompts": PROMPTS[0], "gen_length": 16, "sampler": sampler}
    for done, gathered, sent in two.run(ranks.traffic, models["dream-gqa"], **options):
        assert {shape[0] if len(shape) > 1 else 1 for shape in gathered} == numbers  # per position that the head takes
        assert max(shape[-1] for shape in gathered) <= 16
        assert sent["all_gather"] == sum(4 * torch.Size(shape).numel() for shape in gathered)
        # the rest are sums of hidden states: an embedding, and two a layer, each of at most the canvas
        assert sent["all_reduce"] <= done.positions_forwarded * spec.d_model * 4 * (1 + 2 * spec.n_layers)
        assert sent["all_gather"] < done.nfe * spec.vocab_size * 4


# --------------------------------------------------------------------------------------------------- loading and memory


@pytest.mark.parametrize("model", ["dream-gqa", "tied"])
def test_a_rank_reads_and_keeps_its_part_only(two, models, model):
    path = models[model]
    spec = sfs_triton.load(path, "cpu").spec
    whole = {name: tensor.numel() for name, tensor in load_file(path / "model.safetensors").items()}
    shared = {name for name in whole if "norm" not in name}
    found = two.run(ranks.parts, path)
    for name, size in whole.items():
        read = [rank["read"][name] for rank in found]
        assert sum(read) == size if name in shared else read == [size, size], name
        assert max(read) <= -(-size // 2) or name not in shared, name
    alone = sum(whole.values())
    norms = sum(size for name, size in whole.items() if name not in shared)
    for rank in found:
        kept = (alone - norms) // 2 + norms + spec.d_model  # and the row of zeros that ends the embedding
        assert rank["kept"] == kept
        assert list(rank["layer"]) == [spec.q_width // 2 + spec.kv_width, spec.d_model]


def test_caches_hold_the_rank_s_heads_only(two, models):
    spec = sfs_triton.load(models["dream-gqa"], "cpu").spec
    for heads, values in two.run(ranks.caches, models["dream-gqa"]):
        assert heads == spec.n_kv_heads // 2
        assert values == spec.n_layers * spec.kv_width * 64


def _cosine(a: torch.Tensor, b: torch.Tensor, group: parallel.Group) -> torch.Tensor:
    return Transformer._likeness(SimpleNamespace(group=group), a, b)


@pytest.mark.parametrize("size", [2, 4])
def test_likeness_of_values_that_are_shared(size):
    """It decides which positions dLLM-Cache recomputes, so all ranks must have the same bits."""
    a, b = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(3))
    b[0, 1], b[1, 2] = a[0, 1], 0.0
    barrier, slots = threading.Barrier(size), [None] * size

    def share_of(rank: int) -> torch.Tensor:
        group = Threads(rank, size, barrier, slots)
        part = slice(*group.share(16))
        return _cosine(a[..., part], b[..., part], group)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(share_of, range(size)))
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], _cosine(a, b, parallel.ALONE))


# ------------------------------------------------------------------------------------------------ refusals and failures


def test_sizes_that_do_not_fit(four, two, models):
    for failed in four.run(ranks.generate, models["dream-gqa"], [SHORT]):
        assert failed.kind == "ArgumentError"
        assert "tensor_parallel=4 does not divide the model's 2 key/value heads and MLP width 176" in failed.text
        assert failed.text.endswith("possible are 1, 2")
    assert {failed.kind for failed in two.run(ranks.generate, models["dream-r7"], [SHORT])} == {"ArgumentError"}


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_no_number_of_processes(size):
    with pytest.raises(ArgumentError, match="tensor_parallel="):
        sfs_triton.load("embedded", "cpu", tensor_parallel=size)


def test_not_started_for_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ArgumentError, match="tensor_parallel=2, but this is one of 1 processes .* torchrun"):
        sfs_triton.load("embedded", "cpu", tensor_parallel=2)


def test_cuda_graphs_are_refused(two, models):
    for failed in two.run(ranks.with_cuda_graphs, models["dream-gqa"]):
        assert failed.kind == "ArgumentError" and "cuda_graphs=True does not go with tensor_parallel=2" in failed.text


def test_what_only_one_rank_can_load(tmp_path, models):
    with ranks.World(2, tmp_path, patience=20) as world:
        broken = tmp_path / "broken"
        first, second = world.run(ranks.load_own, [models["dream-gqa"], broken])
        assert second.kind == "CheckpointError"
        assert first.kind == "RankFailure" and "rank 1: CheckpointError: " in first.text and str(broken) in first.text
        other = world.run(ranks.load_own, [models["dream-gqa"], models["llada-gqa"]])
        assert {failed.kind for failed in other} == {"ArgumentError"}
        assert "ranks 0 and 1 have different models" in other[0].text
        assert world.run(ranks.load_own, [models["dream-gqa"]] * 2) == ["Engine", "Engine"]


def test_different_requests_are_found_and_nothing_is_lost(tmp_path, models):
    with ranks.World(2, tmp_path, patience=20) as world:
        for failed in world.run(ranks.generate_own, models["dream-gqa"], [SHORT, SHORT | {"seed": 9}]):
            assert failed.kind == "ArgumentError" and "ranks 0 and 1 have different requests" in failed.text
        _check(world, models["dream-gqa"], [SHORT])


@pytest.mark.parametrize("how, patience", [("exits", 30), ("raises", 30), ("sleeps", 2)])
def test_a_rank_that_fails_ends_the_others_wait(tmp_path, models, how, patience):
    with ranks.World(2, tmp_path, patience=patience) as world:
        began = time.monotonic()
        kept, failed = world.run(ranks.die, models["dream-gqa"], 1, 3, how, limit=60, prompts=PROMPTS[0], gen_length=24)
        assert time.monotonic() - began < 30
        assert kept.kind == "RankFailure" and "waited for the others in vain" in kept.text
        if how == "exits":
            assert failed is None
            return
        assert failed.kind == ("KeyError" if how == "raises" else "RankFailure")
        for again in world.run(ranks.after, models["dream-gqa"], prompts=PROMPTS[0], gen_length=8):
            assert again.kind == "RankFailure" and "has left its group" in again.text


def test_a_stream_that_fails_on_one_rank_ends_the_others_wait(tmp_path, models):
    with ranks.World(2, tmp_path, patience=30) as world:
        start = time.monotonic()
        given = {"prompts": PROMPTS[0], "gen_length": 24}
        kept, failed = world.run(ranks.die_in_a_stream, models["dream-gqa"], 1, 3, limit=60, **given)
        assert time.monotonic() - start < 25
        assert kept.kind == "RankFailure" and failed.kind == "KeyError"


def test_what_one_rank_has_no_memory_for_none_has(two, models):
    options = {"prompts": PROMPTS, "gen_length": [9, 7]}  # a batch that no other test has left behind
    wanted = sfs_triton.load(models["llada-mha"], "cpu", "float32").generate(**options)
    for got in two.run(ranks.short_of_memory, models["llada-mha"], **options):
        assert_same(got, wanted)


def test_a_generation_within_another_is_refused(two, models):
    assert {failed.kind for failed in two.run(ranks.nested, models["dream-gqa"])} == {"ArgumentError"}


# --------------------------------------------------------------------------------------------------------- front ends


def _torchrun(*words: str, stdin: str = "", ranks: int = 2) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    shared = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *launch, *words],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | shared,
        timeout=150,
    )


def test_the_command_line_answers_once(embedded):
    pytest.importorskip("typer")
    options = ["--gen-length", "32", "--cache", "region", "--device", "cpu"]
    done = _torchrun("-m", "sfs_triton.cli", "generate", "-", "--tensor-parallel", "2", *options, stdin="15,44,79,50\n")
    wanted = embedded.generate("15,44,79,50", gen_length=32, cache="region")
    assert (done.returncode, done.stdout) == (0, wanted.text + "\n"), done.stderr
    assert done.stderr.count(f"NFE {wanted.nfe} |") == 1


def test_refusals_of_the_command_line(monkeypatch, capsys):
    typer = pytest.importorskip("typer.testing")
    from sfs_triton.cli.main import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (["generate", "a"], ["generate", "a", "--tensor-parallel", "3"], ["chat"]):
        done = typer.CliRunner().invoke(app, words)
        assert done.exit_code == 2 and "one of 2 processes" in done.stderr, words
    monkeypatch.setenv("RANK", "1")
    done = typer.CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 2 and done.stderr.startswith("rank 1: error: sfs serve is one process"), done.stderr


@pytest.mark.slow
def test_the_benchmark_writes_once(tmp_path):
    pytest.importorskip("rich")
    out = tmp_path / "record.json"
    options = ["--samplers", "slowfast", "--cache", "region", "--limit", "2", "--gen-length", "64", "--device", "cpu"]
    done = _torchrun("bench/throughput.py", "--tensor-parallel", "2", *options, "--json", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["tensor_parallel"] == 2 and {row["by"] for row in record["rows"]} == {"sfs_triton"}
    assert done.stdout.count(str(out)) == 1


def test_an_evaluation_by_groups(tmp_path, embedded):
    """Two groups of two: each group is one process to lm-eval, and its second member ends with the first."""
    pytest.importorskip("lm_eval")
    questions = ["15,44,79,50", "2,3,5,25", "61,10,30,41"]
    prompts = [embedded.text.render([{"role": "user", "content": question}]) for question in questions]
    with ranks.World(4, tmp_path) as world:
        first, second, third, fourth = world.run(ranks.evaluate, prompts, 2)
    assert second == fourth == "ended with 0"
    assert (first[2:], third[2:]) == ((0, 2), (1, 2))
    wanted = [
        embedded.generate(question, gen_length=32, cache="region", sampler=SlowFast(tau_high=0.9)).text
        for question in questions
    ]
    assert all("=" in text for text in wanted)
    assert (first[0], third[0]) == (wanted[::2], wanted[1::2])
    values = [each.value for each in embedded.likelihood([(p, "7") for p in prompts], method="confidence")]
    assert (first[1], third[1]) == (pytest.approx(values[::2], rel=1e-4), pytest.approx(values[1::2], rel=1e-4))


def test_an_evaluation_refuses_an_engine_that_is_shared(embedded):
    pytest.importorskip("lm_eval")
    from sfs_triton.integrations.lm_eval import DiffusionLM

    with pytest.raises(ArgumentError, match="tensor_parallel='a' is not an integer"):
        DiffusionLM(embedded, tensor_parallel="a")
    with pytest.raises(ArgumentError, match="tensor_parallel=2, but this is one of 1 processes"):
        DiffusionLM("embedded", tensor_parallel=2)
