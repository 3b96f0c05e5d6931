"""The embedded model in larger shapes: the same function, in memory and through files."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sfs_triton
from bench import ROOT
from bench.common.testing import assert_within_budget
from bench.embedded import problems, tasks
from bench.shapes import geometry, inflate, inflation
from sfs_triton import ArgumentError, CheckpointError, OutOfDeviceMemory, RefreshCache, RegionCache, SlowFast, Threshold
from sfs_triton.checkpoint import EMBEDDED
from sfs_triton.models import Transformer, load_weights, read_spec
from sfs_triton.models.cache import Scope
from sfs_triton.models.names import LLADA_NAMES, LLAMA_NAMES, expected_shapes
from tests.support.margins import assert_logits_close, decision_margin

TOYS = ("toy-512", "toy-768", "toy-1024", "toy-tied")
REAL = ("llada-8b", "illada-8b")
CPU, META = torch.device("cpu"), torch.device("meta")
MODEL_IDS = 896  # of the embedded model


@pytest.fixture(scope="module")
def grown(embedded):
    """Toys in float32, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = inflate.inflate(embedded, name, "cpu")
        return made[name]

    return get


@pytest.fixture(scope="module")
def double(embedded):
    """The embedded model in float64."""
    return Transformer(embedded.spec, load_weights(EMBEDDED, embedded.spec, CPU, torch.float64))


@pytest.fixture(scope="module")
def pair(embedded, grown, double):
    """Return a toy and the embedded model, both in float64 where they are equal but for rounding.

    The embedded model is sure of many positions at once: their confidences differ by units of float32's rounding, and
    the order of summation would decide between them. Rounding in float64 is a millionth of that. A tied head changes
    confidences by more, in float64 as well; decisions that are compared there must have a margin.
    """
    made = {}

    def get(name):
        if name == "toy-tied":
            return grown(name), embedded
        if name not in made:
            made[name] = inflate.inflate(embedded, name, "cpu", torch.float64)
        return made[name], sfs_triton.Engine(double, embedded.text)

    return get


@pytest.fixture(scope="module")
def canvas(embedded):
    """A record to be rewritten, with half of its answer filled in."""
    problem = problems.held_out("records", 1, embedded.text, seed=11)[0]
    done = embedded.generate(problem.question)
    ids = torch.tensor([done.canvas])
    ids[0, done.prompt_length :: 2] = embedded.spec.mask_id
    return ids


@pytest.fixture(scope="module")
def short(embedded):
    """Prompts whose answers need some steps, of different lengths."""
    chosen = [p for kind in ("words", "countdown") for p in problems.held_out(kind, 2, embedded.text, seed=5)]
    return [p.question for p in chosen[1:]]


def _plan(embedded, name, dtype=torch.float32):
    return inflation.Plan(embedded, geometry.geometry_spec(name, embedded.spec), dtype)


def _masked(logits, canvas, mask_id=5):
    """Select the logits of masked positions, for the ids that the model has."""
    return logits[canvas == mask_id][:, :MODEL_IDS]


# --------------------------------------------------------------------------------------------------------- the function


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "bound"), [("toy-512", 1e-10), ("toy-768", 1e-10), ("toy-1024", 1e-10), ("toy-tied", 2e-5)]
)
def test_logits_in_float64(embedded, double, canvas, name, bound):
    """Without rounding they are equal; the tied head's copy adds 2^-24 to mean squares."""
    logits = inflate.inflate(embedded, name, "cpu", torch.float64).model.logits(canvas)
    torch.testing.assert_close(_masked(logits, canvas), _masked(double.logits(canvas), canvas), atol=bound, rtol=0)


@pytest.mark.parametrize("name", TOYS)
def test_logits_in_float32(embedded, grown, double, canvas, name):
    """No further from the truth than the small model's own rounding."""
    models = (grown(name).model, double, embedded.model)
    assert_within_budget(*(_masked(m.logits(canvas), canvas) for m in models), tolerance=2e-6)


@pytest.mark.parametrize("name", TOYS)
def test_ids_that_the_model_does_not_have_are_never_probable(embedded, grown, canvas, name):
    every_mask = torch.full_like(canvas, embedded.spec.mask_id)
    for ids in (canvas, every_mask):
        logits = grown(name).model.logits(ids)[ids == embedded.spec.mask_id]
        assert logits.shape[1] == 2000
        assert (logits.softmax(-1)[:, MODEL_IDS:] == 0).all()
        assert (logits[:, MODEL_IDS:] < inflation.UNUSED_LOGIT).all()


def test_the_largest_rms_holds_for_other_problems(embedded, canvas):
    plan = _plan(embedded, "toy-768")
    largest = inflation.largest_rms(embedded, plan.constant)
    weights, scope = embedded.model.weights, Scope(0, canvas.shape[1], canvas.shape[1])
    hidden = embedded.model.forward(canvas, scope)[..., plan.constant]
    rms = weights.embedding[0, plan.constant] * weights.norm[plan.constant] / hidden
    assert 0.1 * largest < rms.max() < 0.5 * inflation.RMS_HEADROOM * largest


HOWS = {
    "slowfast": (SlowFast(), "none"),
    "slowfast-region": (SlowFast(), RegionCache(capacity=24)),
    "slowfast-refresh": (SlowFast(), RefreshCache(ratio=0.0)),  # rounding decides which rows a share refreshes
    "slowfast-fast": (SlowFast.preset("fast"), "none"),
    "slowfast-fast-refresh": (SlowFast.preset("fast"), RefreshCache(ratio=0.0)),
    "slowfast-fast-region": (SlowFast.preset("fast"), RegionCache(capacity=24, look_ahead=4)),
    "slowfast-drawn": (SlowFast(temperature=0.7), "none"),
    "threshold": (Threshold(block_length=16), "none"),
    "threshold-prefix": (Threshold(block_length=16), "prefix"),
    "threshold-dual": (Threshold(block_length=16), "dual"),
    "threshold-region": (Threshold(block_length=16), RegionCache(capacity=24)),
    "vanilla": (sfs_triton.FixedSteps(), "none"),
}
WITH = [  # each model, sampler and cache policy
    ("toy-512", "vanilla"),
    ("toy-768", "slowfast-refresh"),
    ("toy-768", "slowfast-drawn"),
    ("toy-768", "threshold-region"),
    ("toy-768", "threshold-prefix"),
    ("toy-1024", "slowfast-region"),
    ("toy-tied", "slowfast-fast-refresh"),
    ("toy-tied", "threshold-dual"),
]
MORE = [("toy-768", how) for how in HOWS if how != "vanilla"] + [
    ("toy-512", "slowfast"),
    ("toy-tied", "slowfast-fast"),
    ("toy-tied", "slowfast-fast-region"),
]
TIED_MARGIN = 1e-4  # a tied head and rounding change confidences by 2e-5 at most


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "how"), WITH + [pytest.param(*each, marks=pytest.mark.slow) for each in MORE if each not in WITH]
)
def test_generations_are_equal(pair, short, name, how):
    """Tokens, the step that filled each, and what each step forwarded."""
    sampler, cache = HOWS[how]
    options = {"gen_length": 32, "sampler": sampler, "cache": cache, "trace": name == "toy-tied"}
    mine, wanted = (engine.generate(short, **options) for engine in pair(name))
    if name == "toy-tied":
        assert min(decision_margin(d, sampler) for d in wanted) > TIED_MARGIN
    for field in ("canvas", "commit_step", "nfe", "forward_lengths", "positions_forwarded", "text"):
        assert [getattr(d, field) for d in mine] == [getattr(d, field) for d in wanted], field
    assert max(d.nfe for d in wanted) > 4


@pytest.mark.parametrize("name", ["toy-768", "toy-tied"])
def test_answers_are_right(embedded, pair, name):
    chosen, sampler = problems.held_out("records", 3, embedded.text, seed=6), SlowFast.preset("fast")
    questions = [p.question for p in chosen]
    mine, wanted = (e.generate(questions, sampler=sampler, trace=True) for e in pair(name))
    assert min(decision_margin(d, sampler) for d in wanted) > TIED_MARGIN
    assert [(d.tokens, d.nfe) for d in mine] == [(d.tokens, d.nfe) for d in wanted]
    assert sum(tasks.correct(p, d.text) for p, d in zip(chosen, mine, strict=True)) >= 2


@pytest.mark.parametrize("name", ["toy-1024", "toy-tied"])
def test_answers_in_bfloat16(embedded, name):
    """6 problems: no more than one may come out differently than in the small model's bfloat16."""
    small = sfs_triton.load("embedded", "cpu", "bfloat16")
    large = inflate.inflate(embedded, name, "cpu", "bfloat16")
    assert large.model.dtype == torch.bfloat16
    chosen = problems.held_out("records", 6, embedded.text, seed=7)
    mine, wanted = (e.generate([p.question for p in chosen]) for e in (large, small))
    assert sum(a.tokens == b.tokens for a, b in zip(mine, wanted, strict=True)) >= 5
    assert sum(tasks.correct(p, d.text) for p, d in zip(chosen, mine, strict=True)) >= 5


@pytest.mark.parametrize("name", ["llada-mha", "llada-gqa"])
def test_a_model_with_grouped_queries(engines, name):
    """Larger groups, and heads of twice the width; without more ids no constant channel is needed."""
    small = engines[name]
    wide = {"d_model": 256, "n_heads": 8, "n_kv_heads": small.spec.n_kv_heads, "mlp": 300, "n_layers": 5}
    large = inflate.inflate(small, replace(small.spec, **wide), "cpu")
    ids = torch.arange(60)[None] * 7
    assert_logits_close(large.model.logits(ids), small.model.logits(ids))


# -------------------------------------------------------------------------------------------------- required conditions

NONE = torch.arange(0)
MUTATIONS = {
    "scale of the residual stream": ("toy-768", {"f": 1.0}, {}),
    "scale of queries": ("toy-768", {"q_scale": 1.0}, {}),
    "rotary pairs": ("toy-768", {"channels": torch.arange(32)}, {}),
    "rotary base": ("toy-768", {"_conditions": lambda self: ()}, {"rope_theta": 1e6}),
    "eps": ("toy-768", {"_conditions": lambda self: ()}, {"norm_eps": 1e-3}),
    "values of other heads": ("toy-768", {"spare_values": NONE}, {}),
    "other channels of queries": ("toy-768", {"spare_queries": NONE}, {}),
    "values in other query heads": ("toy-tied", {"echoes": NONE}, {}),
    "channels that stay zero": ("toy-768", {"_free": slice(0, 0)}, {}),
    "embedding of the mask": ("toy-tied", {"_supply": inflation.Plan._extra_layer}, {}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", MUTATIONS)
def test_each_condition_is_needed(embedded, double, canvas, monkeypatch, what):
    name, changes, other = MUTATIONS[what]
    for attribute, value in changes.items():
        value = value if callable(value) else property(lambda self, value=value: value)
        monkeypatch.setattr(inflation.Plan, attribute, value)
    spec = replace(geometry.geometry_spec(name, embedded.spec), **other)
    logits = inflate.inflate(embedded, spec, "cpu").model.logits(canvas)
    off = (_masked(logits, canvas) - _masked(double.logits(canvas), canvas)).abs().max()
    assert not off < 1e-2


@pytest.mark.parametrize("name", ["toy-768", "toy-tied"])
def test_the_weight_of_ids_it_does_not_have_is_needed(embedded, canvas, monkeypatch, name):
    monkeypatch.setattr(inflation.Plan, "unused_weight", 0.0)
    logits = inflate.inflate(embedded, name, "cpu").model.logits(canvas)
    assert (logits.softmax(-1)[canvas == embedded.spec.mask_id][:, MODEL_IDS:] > 0).any()


@pytest.mark.parametrize(("name", "value"), [("COPY", 1.0), ("TIED", 2.0**-4), ("SUPPLY", 1.0)])
def test_each_scale_of_a_tied_head_is_needed(embedded, double, canvas, monkeypatch, name, value):
    monkeypatch.setattr(inflation, name, value)
    logits = inflate.inflate(embedded, "toy-tied", "cpu").model.logits(canvas)
    assert not (_masked(logits, canvas) - _masked(double.logits(canvas), canvas)).abs().max() < 1e-2


# -------------------------------------------------------------------------------------------------- zeros and weights


@pytest.mark.parametrize("name", ["toy-768", "toy-tied"])
def test_only_what_must_be_zero_is(embedded, name):
    """Zeros are those that the plan counts, and the small model's own."""
    plan = _plan(embedded, name)
    zeros = 0
    for (part, layer), (_, shape) in geometry.layout(plan.big).items():
        tensor = torch.full(shape, math.nan)
        plan.fill(tensor, part, layer)
        assert tensor.isfinite().all(), (part, layer)
        assert part not in ("k", "gate") or tensor.count_nonzero() > 0.999 * tensor.numel(), (part, layer)
        if layer is not None and layer < plan.offset and part in ("q", "o", "down"):
            assert tensor.count_nonzero() > 0.998 * tensor.numel()
        zeros += tensor.numel() - int(tensor.count_nonzero())
    own = sum(int((t == 0).sum()) for t in load_file(EMBEDDED / "model.safetensors").values())
    assert plan.zeros <= zeros <= plan.zeros + 3 * own + plan.small.d_model


def test_the_seed_chooses_the_random_weights(embedded, grown, canvas):
    other = inflate.inflate(embedded, "toy-768", "cpu", seed=1)
    first, second = grown("toy-768").model, other.model
    assert not torch.equal(first.weights.layers[0].gate_up, second.weights.layers[0].gate_up)
    assert not torch.equal(first.weights.layers[0].gate_up, first.weights.layers[1].gate_up)
    assert_logits_close(*(_masked(m.logits(canvas), canvas) for m in (first, second)))


def test_dense_is_random_everywhere(embedded):
    engine = inflate.dense(embedded, "toy-768", "cpu")
    weights = engine.model.weights
    for tensor in (weights.embedding, weights.head, weights.layers[4].qkv, weights.layers[0].down):
        assert tensor.count_nonzero() == tensor.numel()
    assert len(engine.generate([7, 8, 9], gen_length=4).canvas) == 7


@pytest.mark.parametrize("name", geometry.GEOMETRIES)
def test_shapes_are_those_that_load_expects(embedded, name):
    """At full size, without memory: names, shapes and fused tensors."""
    spec = geometry.geometry_spec(name, embedded.spec)
    names = LLADA_NAMES if spec.family == "llada" else LLAMA_NAMES
    assert dict(geometry.layout(spec).values()) == expected_shapes(spec, names)
    fill = inflate.functools.partial(geometry.randomise, seed=0)
    weights = geometry.assemble(spec, fill, META, torch.bfloat16)
    d, both = spec.d_model, spec.d_model + 2 * spec.kv_width
    assert len(weights.layers) == spec.n_layers
    shapes = {"attn_norm": (d,), "qkv": (both, d), "out": (d, d), "gate_up": (2 * spec.mlp, d), "down": (d, spec.mlp)}
    for layer in weights.layers:
        assert {key: tuple(getattr(layer, key).shape) for key in shapes} == shapes
        assert (layer.qkv_bias is not None) == spec.qkv_bias
    assert (weights.head is weights.embedding) == spec.tied_head
    assert weights.head.shape == (spec.vocab_size, d) and weights.head.dtype == torch.bfloat16


@pytest.mark.parametrize("name", REAL)
def test_full_size(embedded, name):
    """Every block finds its place at the real size, and the file's parts are all of it."""
    plan = _plan(embedded, name, torch.bfloat16)
    assert (plan.f, plan.q_scale) == (4.0, 2.0)
    for place, (_, shape) in geometry.layout(plan.big).items():
        for at, value in plan.blocks(*place):
            hole = torch.empty(shape, device="meta")[at]
            assert not isinstance(value, torch.Tensor) or hole.shape == value.shape, place
    geometry.assemble(plan.big, plan.fill, META, torch.bfloat16)
    files = inflate.shards(plan.big, torch.bfloat16)
    assert [place for file in files for place in file] == list(geometry.layout(plan.big))
    assert plan.zeros < 0.03 * geometry.parameters(plan.big)
    assert read_spec(inflate.config_dict(plan.big, torch.bfloat16)) == plan.big


def test_llada_8b_has_its_published_size(embedded):
    spec = geometry.geometry_spec("llada-8b", embedded.spec)
    assert round(2 * geometry.parameters(spec) / 1e9, 2) == 16.03
    assert (spec.n_layers, spec.d_model, spec.n_heads, spec.head_dim, spec.mlp) == (32, 4096, 32, 128, 12288)
    assert (spec.vocab_size, spec.rope_theta, spec.norm_eps, spec.tied_head) == (126464, 500000.0, 1e-5, False)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layers": 3}, "n_layers is 3, the model has 4"),
        ({"d_model": 128, "n_heads": 8}, "d_model is 128, the model has 256"),
        ({"n_heads": 4, "n_kv_heads": 4}, "n_heads is 4, the model has 8"),
        ({"n_kv_heads": 4}, "n_kv_heads is 4, the model has 8"),
        ({"mlp": 700}, "mlp is 700, the model has 768"),
        ({"vocab_size": 895}, "vocab_size is 895, the model has 896"),
        ({"d_model": 768, "n_heads": 16, "n_kv_heads": 16}, "head_dim 48 is no multiple of 32"),
        ({"rope_theta": 1e6}, r"rope_theta is 1e\+06, the frequencies of the model are those of 500000"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, the model has 1e-05"),
        ({"shifted": True}, "logits are for the next row"),
        ({"qkv_bias": True}, "biases"),
        ({"tied_head": True, "n_layers": 4}, "n_layers is 4, a tied head needs 5"),
        ({"tied_head": True, "d_model": 384, "n_heads": 12, "n_kv_heads": 12}, "d_model is 384, a tied head needs 512"),
    ],
)
def test_a_geometry_that_does_not_fit(embedded, change, match):
    spec = replace(geometry.geometry_spec("toy-512", embedded.spec), **change)
    with pytest.raises(ArgumentError, match=match):
        inflate.inflate(embedded, spec, "cpu")


def test_factors_that_are_no_powers_of_two_need_float32(embedded):
    with pytest.raises(ArgumentError, match=r"sqrt\(512 / 256\) is no power of two"):
        inflate.inflate(embedded, "toy-512", "cpu", "bfloat16")
    with pytest.raises(ArgumentError, match=r"sqrt\(64 / 32\) is no power of two"):
        inflate.inflate(embedded, "toy-768", "cpu", "bfloat16")


def test_float16_is_too_narrow(embedded):
    with pytest.raises(ArgumentError, match=r"float16 holds numbers up to 65504, one of the weights is -\d"):
        inflate.inflate(embedded, "toy-1024", "cpu", "float16")


def test_a_model_without_a_constant_channel(engines):
    small = engines["llada-mha"]
    with pytest.raises(ArgumentError, match="no residual channel of the model is constant"):
        inflate.inflate(small, replace(small.spec, vocab_size=600), "cpu")


@pytest.mark.parametrize(("name", "match"), [("llada-7b", "geometry='llada-7b' is not one of"), ("dream-7b", "1e")])
def test_geometries_that_are_not_there(embedded, name, match):
    with pytest.raises(ArgumentError, match=match):
        inflate.inflate(embedded, name, "cpu")


@pytest.mark.parametrize("make", [inflate.inflate, inflate.dense])
def test_weights_that_do_not_fit_are_refused_before_they_are_made(embedded, make, monkeypatch):
    monkeypatch.setattr(inflate, "assemble", None)
    monkeypatch.setattr(inflate, "free_memory", lambda: 10**9)
    with pytest.raises(OutOfDeviceMemory, match=r"take 32.1 GB in float32, and 'cpu' has 1.0 GB free"):
        make(embedded, "llada-8b", "cpu", "float32")


def test_what_is_free_is_a_number_of_bytes():
    free = inflate.free_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("option", [{"dtype": "float8"}, {"backend": "fast"}, {"cuda_graphs": "fast"}])
def test_other_arguments_are_refused_before_anything_is_made(embedded, option, monkeypatch):
    monkeypatch.setattr(inflate, "assemble", None)
    with pytest.raises(ArgumentError, match=f"{next(iter(option))}='f"):
        inflate.inflate(embedded, "toy-768", "cpu", **option)


# ------------------------------------------------------------------------------------------------------------- as files


@pytest.fixture
def loaded_once(embedded, monkeypatch):
    """Writing takes the engine of the fixture."""
    load = sfs_triton.load
    monkeypatch.setattr(sfs_triton, "load", lambda path, *how: embedded if path == "embedded" else load(path, *how))


@pytest.mark.parametrize("name", ["toy-512", "toy-tied"])
def test_through_files(loaded_once, embedded, grown, short, tmp_path, monkeypatch, name):
    """Files in several shards give the same weights as in memory, bit for bit."""
    monkeypatch.setattr(inflate, "shards", lambda spec, dtype, cut=inflate.shards: cut(spec, dtype, 10**7))
    (tmp_path / "out").mkdir()
    inflate.write(tmp_path / "out", name, torch.float32)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert [f for f in files if not f.startswith("model-")] == [
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(f.startswith("model-") for f in files) > 3 and [p.name for p in tmp_path.iterdir()] == ["out"]
    engine, wanted = sfs_triton.load(tmp_path / "out", "cpu", "float32"), grown(name)  # of equal weights, equal bits
    assert engine.spec == wanted.spec
    for mine, made in zip(_flat(engine), _flat(wanted), strict=True):
        assert torch.equal(mine, made)
    mine, wanted = (e.generate(short[:2], gen_length=16) for e in (engine, wanted))
    assert [(d.tokens, d.nfe, d.text) for d in mine] == [(d.tokens, d.nfe, d.text) for d in wanted]


def _flat(engine):
    weights = engine.model.weights
    layers = (getattr(x, name) for x in weights.layers for name in ("attn_norm", "qkv", "out", "gate_up", "down"))
    return [weights.embedding, weights.head, weights.norm, *layers]


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """bfloat16 where nothing else is said, which is the small model's own: no weight is rounded."""
    command = [sys.executable, "-m", "bench.shapes.inflate", "--geometry", "toy-1024", str(tmp_path / "out")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "toy-1024" in done.stdout and "zero" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["max_sequence_length"]) == ("bfloat16", 4096)
    small = load_file(EMBEDDED / "model.safetensors")
    large = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    head = "model.transformer.ff_out.weight"
    assert torch.equal(large[head][:MODEL_IDS, :256], small[head])
    gain = "model.transformer.blocks.{}.attn_norm.weight"
    assert torch.equal(large[gain.format(1)][:256] * 2, small[gain.format(0)])


def test_dream_is_refused_with_its_reasons(loaded_once, tmp_path, capsys):
    assert inflate.main(["--geometry", "dream-7b", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    for reason in ("n_kv_heads is 4, the model has 8", "rope_theta is 1e+06", "logits are for the next row"):
        assert reason in said
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken(loaded_once, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "something").touch()
    file.touch()
    for place in (full, file, Path("/")):
        with pytest.raises(ArgumentError, match="is not a new or empty folder"):
            inflate.write(place, "toy-512", torch.float32)
    with pytest.raises(ArgumentError, match="is not a folder"):
        inflate.write(tmp_path / "nowhere" / "out", "toy-512", torch.float32)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ArgumentError, match=r"out\.partial' exists"):
        inflate.write(tmp_path / "out", "toy-512", torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "out.partial"]


def test_a_disk_that_is_too_small(loaded_once, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(inflate.shutil, "disk_usage", lambda path: usage(16 * 10**9))
    with pytest.raises(CheckpointError, match=r"needs 16\.03 GB, the disk has 16\.00 GB left"):
        inflate.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(loaded_once, tmp_path, monkeypatch, error):
    real, written = inflate.save_file, []

    def save(tensors, path, **options):
        if written:
            raise error
        written.append(path)
        real(tensors, path, **options)

    monkeypatch.setattr(inflate, "save_file", save)
    monkeypatch.setattr(inflate, "shards", lambda spec, dtype, cut=inflate.shards: cut(spec, dtype, 10**7))
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as raised:
        inflate.write(tmp_path / "out", "toy-512", torch.float32)
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(raised.value)
    assert written and list(tmp_path.iterdir()) == []
