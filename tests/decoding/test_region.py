"""The region cache compared with a simulation that keeps the keys and values of each position's last forward."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import sfs_triton
from sfs_triton import ArgumentError, FixedSteps, RegionCache, SlowFast, Threshold
from sfs_triton.models import Transformer
from tests.conformance import MARGIN
from tests.reference import decode, logits_of
from tests.reference.slowfast import Row
from tests.support.combinations import EXECUTIONS, engine_with
from tests.support.paths import GOLDEN, MODELS

LENGTH = 24


@pytest.fixture(scope="module", params=MODELS)
def engine(request) -> sfs_triton.Engine:
    return sfs_triton.load(GOLDEN / "models" / request.param, "cpu", "float32")


class Simulation:
    """A model whose forwards take a list of positions, each of them chosen by the rules of the region cache."""

    def __init__(self, model: Transformer, capacity: int, refresh_every: int | None, rotate: bool):
        self.model, self.capacity, self.refresh_every, self.rotate = model, capacity, refresh_every, rotate
        self.encoded: dict[int, int] = {}  # the token that a position had when it was last forwarded
        self.age: dict[int, int] = {}
        self.kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.listed: list[int] = []  # number of positions that each step forwards

    def positions(self, canvas: list[int], limit: int, wanted: list[int], step: int) -> list[int]:
        every = range(limit)
        if step == 0 or self.refresh_every and step % self.refresh_every == 0:
            return list(every)
        dirty = [p for p in every if canvas[p] != self.encoded[p]]
        shift = int(self.model.spec.shifted)
        needed = sorted({p - back for p in wanted for back in (0, shift)} - set(dirty))
        assert len(dirty) + len(needed) <= self.capacity, "the simulation has no steps that decide in part"
        rest = sorted(set(every) - set(dirty) - set(needed), key=lambda p: (self.age[p], p)) if self.rotate else []
        return sorted(dirty + needed + rest[: self.capacity - len(dirty) - len(needed)])

    def forward(self, canvas: list[int], limit: int, wanted: list[int], step: int) -> dict[int, torch.Tensor]:
        """Logits at each wanted position."""
        spec, weights = self.model.spec, self.model.weights
        listed = self.positions(canvas, limit, wanted, step)
        self.listed.append(len(listed))
        inverse = spec.rope_theta ** -(torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
        angle = torch.tensor(listed)[:, None].float() * inverse
        cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))

        def rotate(x: torch.Tensor) -> torch.Tensor:
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin

        x = weights.embedding[[canvas[p] for p in listed]]
        for index, layer in enumerate(weights.layers):
            h = F.rms_norm(x, (spec.d_model,), layer.attn_norm, spec.norm_eps)
            heads = F.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, spec.head_dim))
            q, k, v = heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
            for p, key, value in zip(listed, rotate(k), v, strict=True):
                self.kept[index, p] = key, value
            keys, values = (torch.stack([self.kept[index, p][i] for p in range(limit)]) for i in (0, 1))
            keys, values = (t.repeat_interleave(spec.n_heads // spec.n_kv_heads, 1) for t in (keys, values))
            weight = (torch.einsum("qhd,khd->hqk", rotate(q), keys) * spec.head_dim**-0.5).softmax(-1)
            x = x + F.linear(torch.einsum("hqk,khd->qhd", weight, values).flatten(1), layer.out)
            h = F.rms_norm(x, (spec.d_model,), layer.mlp_norm, spec.norm_eps)
            gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        for p in listed:
            self.encoded[p], self.age[p] = canvas[p], step
        logits = F.linear(F.rms_norm(x, (spec.d_model,), weights.norm, spec.norm_eps), weights.head)
        shift = int(spec.shifted)
        return {p: logits[listed.index(p - shift)] for p in wanted}


def simulate(monkeypatch, engine, prompt: list[int], sampler: SlowFast, simulation: Simulation):
    """The oracle's machine on the simulated model."""
    mask_id, eos_id, vocab = engine.spec.mask_id, engine.spec.eos_id, engine.spec.vocab_size

    def look(row: Row, length: int, positions: list[int], **draw):
        logits = torch.zeros(len(row.canvas), vocab)
        for p, values in simulation.forward(row.canvas, row.limit, positions, row.nfe).items():
            logits[p] = values
        row.logits_fn = lambda ids: logits[: len(ids)]
        return plain(row, len(row.canvas), positions, **draw)

    plain = Row.look
    monkeypatch.setattr(Row, "look", look)
    canvas = prompt + [mask_id] * LENGTH
    return decode(logits_of(engine.model, canvas), canvas, len(prompt), sampler, mask_id, eos_id)


def some_prompt(engine, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 100) for _ in range(rng.randrange(14, 30))]


SETTINGS = {
    "rotation": (SlowFast(), {"capacity": 50}),
    "no rotation": (SlowFast(), {"capacity": 64, "rotate": False}),
    "refreshed": (SlowFast(), {"capacity": 50, "refresh_every": 3}),
    "llada-reference": (SlowFast.preset("llada-reference"), {"capacity": 49}),
    "dream-reference": (SlowFast.preset("dream-reference"), {"capacity": 49, "rotate": False}),
    "shared step": (SlowFast(share_stable=True, tau_slow=0.6), {"capacity": 50}),
    "end of text": (SlowFast(eos_stop=True, eos_horizon=False), {"capacity": 50}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_simulation(monkeypatch, engine, name):
    sampler, options = SETTINGS[name]
    for seed, execution in enumerate(EXECUTIONS):
        prompt = some_prompt(engine, seed)
        simulation = Simulation(
            engine.model, options["capacity"], options.get("refresh_every"), options.get("rotate", True)
        )
        with monkeypatch.context() as patched:
            wanted = simulate(patched, engine, prompt, sampler, simulation)
        if wanted.margin < MARGIN:
            continue  # another order of summation may decide otherwise
        cache = RegionCache(span_cap=None, **options)
        done = engine_with(engine, execution).generate(prompt, gen_length=LENGTH, sampler=sampler, cache=cache)
        assert (done.response, done.nfe) == (wanted.tokens, wanted.nfe)
        assert done.forward_lengths == simulation.listed


def test_a_list_of_everything_is_no_cache(engine):
    """With room for the whole canvas every step is a full forward: as none, but for the fast stage's shorter ones."""
    for seed, sampler in enumerate(
        (Threshold(block_length=8), FixedSteps(block_length=8), Threshold(block_length=None))
    ):
        prompt = some_prompt(engine, seed)
        whole = engine.generate(prompt, gen_length=LENGTH, sampler=sampler)
        listed = engine.generate(prompt, gen_length=LENGTH, sampler=sampler, cache=RegionCache(capacity=99))
        assert (listed.tokens, listed.nfe) == (whole.tokens, whole.nfe)
        assert listed.full_forwards == listed.nfe


@pytest.mark.parametrize("capacity", [2, 5])
@pytest.mark.parametrize("sampler", [SlowFast(), Threshold(block_length=8), Threshold(block_length=None)])
def test_tiny_lists_come_to_an_end(engine, sampler, capacity):
    cache = RegionCache(capacity=capacity)
    done = engine.generate(some_prompt(engine, 7), gen_length=LENGTH, sampler=sampler, cache=cache)
    assert done.masks_left == 0 and engine.spec.mask_id not in done.canvas
    assert max(done.forward_lengths[1:]) <= capacity and done.full_forwards == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"capacity": 1}, "capacity=1 "),
        ({"capacity": 2.5}, "capacity=2.5 "),
        ({"span_cap": 0}, "span_cap=0 "),
        ({"look_ahead": -1}, "look_ahead=-1 "),
        ({"refresh_every": 0}, "refresh_every=0 "),
        ({"refresh_every": True}, "refresh_every=True "),
        ({"rotate": "no"}, "rotate='no' "),
    ],
)
def test_options_are_checked(options, named):
    with pytest.raises(ArgumentError, match=named):
        RegionCache(**options)


def test_combinations_that_do_not_work_are_refused(engine):
    for sampler in (FixedSteps(), FixedSteps(block_length=64)):
        with pytest.raises(ArgumentError, match="does not go with cache='region', capacity=128.*'vanilla'.*below 64"):
            engine.generate([5, 6, 7], gen_length=64, sampler=sampler, cache="region")
    with pytest.raises(ArgumentError, match="look_ahead=4 does not go with zero_history"):
        sampler = SlowFast.preset("dream-reference")
        engine.generate([5, 6, 7], gen_length=64, sampler=sampler, cache=RegionCache(look_ahead=4))
    canvas = [engine.spec.mask_id, 5, engine.spec.mask_id]
    if engine.spec.shifted:
        with pytest.raises(ArgumentError, match="cache='region': canvas 0 starts with a mask"):
            engine.infill(canvas, cache="region")
    else:
        assert engine.infill(canvas, cache="region").masks_left == 0


def test_a_capped_window_over_a_mean_of_zeros_is_refused(engine):
    """A cycle could restart before its decided positions, and never reach a mask."""
    sampler = SlowFast(zero_history=True, k_max=2, window=3, slow_end="filled")
    with pytest.raises(ArgumentError, match="span_cap=4 does not go with zero_history=True"):
        engine.generate([5, 6, 7], gen_length=24, sampler=sampler, cache=RegionCache(span_cap=4))
    assert engine.generate([5, 6, 7], gen_length=24, sampler=sampler, cache=RegionCache(capacity=6)).masks_left == 0


def test_a_capacity_that_is_not_given_follows_the_window_on_a_cpu():
    policy, long = RegionCache(), SlowFast()
    assert policy.most == 128 and policy.on_cpu(long, 128) is policy
    assert policy.on_cpu(long, 136).most == 160 and policy.on_cpu(long, 1000).most == 1024
    assert policy.on_cpu(Threshold(block_length=32), 1000).most == 128
    assert policy.on_cpu(Threshold(block_length=128), 1000).most == 288  # a block and the commits of the one before
    assert RegionCache(span_cap=40).on_cpu(long, 1000).most == 128
    assert RegionCache(capacity=128).on_cpu(long, 1000).most == 128
    assert RegionCache(capacity=64, span_cap=8).on_cpu(long, 1000).most == 64


def test_a_response_longer_than_the_usual_capacity_is_not_cut_up():
    engine = sfs_triton.load("embedded", "cpu")
    prompt = "Rewrite as JSON:\nid,name,age\n1,Ann,31\n2,Bob,45"
    whole, cut, every = (
        engine.generate(prompt, gen_length=136, cache=cache) for cache in ("region", RegionCache(capacity=128), "none")
    )
    assert whole.nfe == every.nfe < cut.nfe
    assert whole.text == every.text
