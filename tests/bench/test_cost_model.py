"""The cost model: its counts, its predictions, and that its document is current."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from bench.cost import cost_model, step_count  # noqa: E402
from bench.cost.cost_model import CEILINGS, Cycle, forecast, shares  # noqa: E402
from bench.cost.step_count import (  # noqa: E402
    META,
    NAMES,
    Meter,
    Setting,
    count_vanilla,
    kinds,
    steps_of,
)
from bench.shapes.geometry import REAL  # noqa: E402
from sfs_triton.decoding.step_plan import Positions  # noqa: E402
from sfs_triton.ops.dispatch import BACKENDS  # noqa: E402
from sfs_triton.runner import CudaGraphs  # noqa: E402

SETTING, H200 = Setting(), CEILINGS["h200"]
STEPS = [(backend, name, kind) for backend in BACKENDS for name in NAMES for kind in kinds(SETTING, name)]


def _id(value) -> str:
    return getattr(value, "name", value)


def _metered(run, *shape: int, dtype: torch.dtype = torch.float32) -> step_count.Count:
    meter = Meter()
    x = torch.empty(shape, dtype=dtype, device=META)
    with torch.inference_mode(), meter:
        run(x)
    return meter.take()


@pytest.mark.slow
def test_the_document_has_the_tables_that_the_code_now_gives():
    text = cost_model.DOC.read_text()
    if f"Counted with torch {cost_model.minor(torch.__version__)}." not in text:
        pytest.skip("the document was counted with another release of torch")
    assert cost_model.rendered(text, cost_model.doc_tables()) == text, "run python -m bench.cost.cost_model --write-doc"


def test_tables_are_renewed(tmp_path, monkeypatch):
    copy = tmp_path / "cost-model.md"
    copy.write_text(cost_model.rendered(cost_model.DOC.read_text(), {"winners": "| old |", "batches": "| older |"}))
    monkeypatch.setattr(cost_model, "DOC", copy)
    assert cost_model.main(["--write-doc"]) == 0
    text = copy.read_text()
    assert cost_model.rendered(text, cost_model.doc_tables()) == text and "| old" not in text


def test_a_document_without_a_place_for_a_table():
    with pytest.raises(ValueError, match="'steps'"):
        cost_model.rendered("text", {"steps": "| a |"})


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("backend", "name", "kind"), STEPS, ids=_id)
def test_a_padded_step_takes_nothing_from_the_host(backend, name, kind):
    """A padded step reads nothing on the host either: meta tensors have no values."""
    step = steps_of(SETTING, backend, name).count(kind)
    assert step.host_copies == 0
    assert sum(part.launches for part in step.parts.values()) == step.total.launches
    assert sum(part.bytes for part in step.parts.values()) == step.total.bytes
    assert all(kernel.bytes > 0 for kernel in step.kernels if kernel.name != "publish.publish")


def test_products_of_a_region_step_by_hand():
    """All positions in 31 layers; in the last, queries and everything after attention only for the head's positions."""
    spec, positions, targets = REAL["llada-8b"], 128, 64
    d, after = spec.d_model, spec.d_model**2 + 3 * spec.d_model * spec.mlp
    each = 3 * d * d + after
    flops = 2 * (31 * positions * each + positions * 2 * d * d + targets * (d * d + after))
    assert 32 * each + spec.vocab_size * d == pytest.approx(6.98e9 + 0.52e9, rel=2e-3)  # layers, head
    _, kind = kinds(SETTING, "region")
    for backend in BACKENDS:
        parts = steps_of(SETTING, backend, "region").count(kind).parts
        assert parts["products"].flops == flops
        assert 2 * 32 * each < parts["products"].bytes < 1.05 * 2 * 32 * each
        assert parts["head"].flops == pytest.approx(2 * targets * spec.vocab_size * d, rel=1e-3)
        keys = CudaGraphs().canvas_length(SETTING.prompt + SETTING.response, spec.max_length)
        assert parts["attention"].flops == 4 * (31 * positions + targets) * keys * d


@pytest.mark.parametrize(("backend", "name", "kind"), [step for step in STEPS if step[0] == "triton"], ids=_id)
def test_launches_have_the_costs_of_their_own_files(backend, name, kind):
    step = steps_of(SETTING, backend, name).count(kind)
    launched = {kernel.name for kernel in step.kernels if "." in kernel.name}
    assert launched <= step_count.COSTS.keys()
    wanted = {"attention.attention", "lm_head.lm_head", "norm.rms_norm", "publish.publish"}
    assert wanted | {"scatter_choices.scatter_choices"} <= launched
    attention = sum(kernel.name == "attention.attention" for kernel in step.kernels)
    assert attention == REAL["llada-8b"].n_layers


def test_a_launch_without_a_cost_counts_its_tensors(monkeypatch):
    from sfs_triton.kernels.gather import embedding

    monkeypatch.delitem(step_count.COSTS, "gather.embedding")
    meter = Meter()
    table = torch.empty(10, 8, device=META)
    meter.wrap(embedding, "elementwise")(table, torch.zeros(1, 3, dtype=torch.int64, device=META))
    (kernel,) = meter.take().kernels
    assert kernel == ("elementwise", "gather.embedding", 4 * 10 * 8 + 8 * 3 + 4 * 3 * 8, 0)


OPERATIONS = {
    "view": (lambda x: x.view(-1)[1:].t().expand(2, -1), []),
    "allocation": (lambda x: (torch.empty_like(x), x.new_empty(3)), []),
    "add": (lambda x: x + 1, [2 * 96]),
    "in place": (lambda x: x.add_(x), [3 * 96]),
    "copy": (lambda x: x.copy_(x[:1]), [96 + 32]),
    "fill": (lambda x: x.zero_(), [96]),
    "repeated": (lambda x: x[:1].expand(3, -1) + 1, [32 + 96]),
    "rows": (lambda x: x[torch.empty(2, dtype=torch.int64, device=META)], [16 + 2 * 64]),
    "rows put": (lambda x: x.index_copy_(0, torch.empty(1, dtype=torch.int64, device=META), x[:1]), [8 + 32 + 32]),
    "product": (lambda x: torch.nn.functional.linear(x, x), [96 + 96 + 36]),
    "cast": (lambda x: x.to(torch.float16).to(torch.float16), [96 + 48]),
    "nothing": (lambda x: x[:0] + 1, []),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_of_operations(name):
    """A float32 ``[3, 8]`` has 96 bytes."""
    run, moved = OPERATIONS[name]
    assert [kernel.bytes for kernel in _metered(run, 3, 8).kernels] == moved


def test_operations_of_products():
    (product,) = _metered(lambda x: x @ x.t(), 3, 8).kernels
    assert (product.flops, product.part) == (2 * 3 * 3 * 8, "head")  # outside a forward
    q = torch.empty(1, 2, 5, 4, device=META)
    k = torch.empty(1, 1, 7, 4, device=META)
    attend = torch.nn.functional.scaled_dot_product_attention
    (kernel,) = _metered(lambda _: attend(q, k, k, enable_gqa=True)).kernels
    assert (kernel.bytes, kernel.flops) == (4 * (2 * 40 + 2 * 28), 4 * 40 * 7)


READS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.cpu(),
    "flags as index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_by_the_host_is_an_error(name):
    with pytest.raises((RuntimeError, NotImplementedError)):
        _metered(READS[name], 3)


def test_tensors_that_come_from_the_host_are_seen():
    assert _metered(lambda x: x.copy_(torch.ones(3)), 3).host_copies == 1
    assert _metered(lambda x: torch.tensor([1, 2], device=META), 3).host_copies == 1
    assert _metered(lambda x: x + torch.ones(3, device=META), 3).host_copies == 0


def test_what_a_gpu_would_refuse_is_refused():
    with pytest.raises(TypeError, match="float16"):
        _metered(lambda x: torch.nn.functional.linear(x, torch.empty(2, 8, dtype=torch.float16, device=META)), 3, 8)


@pytest.mark.parametrize("geometry", ["illada-8b", "dream-7b"])
def test_other_geometries_and_batches(geometry):
    setting = Setting(geometry, prompt=200, response=64, batch=2, style="exact")
    for name in ("region", "dual"):
        for kind in kinds(setting, name):
            steps = [steps_of(setting, backend, name).count(kind) for backend in BACKENDS]
            one, other = (step.parts["products"] for step in steps)
            # bytes differ: with a kernel's products go those of what is next to them
            assert (one.launches, one.flops) == (other.launches, other.flops)
            assert steps[1].total.launches < steps[0].total.launches


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_layer_of_a_region_step_is_five_launches(quantization):
    setting = Setting(quantization=quantization)  # LLaDA-8B, 128 positions
    listed = next(kind for kind in kinds(setting, "region") if kind.name == "list")
    step = steps_of(setting, "triton", "region").count(listed)
    n_layers, names = 32, Counter(kernel.name for kernel in step.kernels)
    assert names["linear.linear"] == 4 * n_layers + 1  # the last layer has queries of other positions
    assert names["attention.attention"] == n_layers
    assert names["norm.rms_norm"] == 3 and "rope_cache.rope_cache" not in names and "mm" not in names
    assert step.total.launches <= 200


def test_shapes_follow_the_policy():
    exact = Setting(style="exact")
    each = [(name, kind) for name in NAMES for kind in kinds(exact, name)]
    sizes = {(name, kind.name): steps_of(exact, "triton", name).shapes(kind)[0] for name, kind in each}
    middle = 1100 + 512
    assert sizes["none", "full"][1:5] == (0, 2124, 2124, 512)
    assert sizes["none", "later fast"][1:5] == (0, middle + 20, middle + 20, 20)
    assert sizes["region", "list"][:5] == (Positions.LIST, 0, 128, 2124, 64)
    assert sizes["prefix", "block"][1:5] == (middle, 512, 2124, 32)
    assert sizes["dual", "block"][1:5] == (middle, 32, 2124, 32)
    due = [sizes["refresh", kind.name].features[:2] for kind in kinds(exact, "refresh")]
    assert due == [(True, True), (False, False), (False, True)]


def test_shares_are_the_steps_of_a_generation():
    cycle = Cycle(slow=3, fast=2, tokens=16, refresh_cycles=8)  # 64 cycles of 5 steps
    for name in NAMES:
        assert sum(shares(SETTING, name, cycle).values()) == pytest.approx(320)
    assert list(shares(SETTING, "none", cycle).values()) == [256, 64]
    assert list(shares(SETTING, "region", cycle).values()) == [8, 312]
    assert list(shares(SETTING, "dual", cycle).values()) == [32, 288]
    assert list(shares(SETTING, "refresh", cycle).values()) == pytest.approx([320 / 25, 320 * 20 / 25, 320 * 4 / 25])
    assert list(shares(SETTING, "region", Cycle(3, 2, 16, None)).values()) == [1, 319]
    assert list(shares(SETTING, "dual", Cycle(1, 0, 64)).values()) == [32, 32]  # a block takes two forwards


def test_ceilings_agree_with_what_they_are_from():
    rows = H200.flops_per_second / H200.bytes_per_second
    assert rows == pytest.approx(184)
    vanilla = count_vanilla(SETTING)
    products = H200.part_seconds(vanilla.parts["products"]) + H200.part_seconds(vanilla.parts["attention"])
    assert products == pytest.approx(44e-3, rel=0.03)


def test_forecasts_order_as_they_must():
    def speedups(cycle: Cycle) -> dict[str, float]:
        return {row.policy: row.speedup for row in forecast(SETTING, "triton", cycle, H200)}

    few, many = speedups(Cycle(3, 2, 8)), speedups(Cycle(3, 2, 32))
    assert all(many[name] > few[name] for name in NAMES)
    often, never = speedups(Cycle(3, 2, 20, 1)), speedups(Cycle(3, 2, 20, None))
    assert never["region"] > often["region"] and never["dual"] == often["dual"]
    rows = forecast(SETTING, "triton", Cycle(), H200)
    assert rows[0].policy == "vanilla" and rows[0].speedup == 1
    assert [row.seconds for row in rows[1:]] == sorted(row.seconds for row in rows[1:])
    assert rows[0].tokens_per_second == pytest.approx(1 / H200.seconds(count_vanilla(SETTING)))


def test_command_line(tmp_path, capsys):
    out = tmp_path / "model.json"
    arguments = ["--policy", "dual", "--backend", "triton", "--prompt", "100", "--response", "64", "--tokens", "70"]
    assert cost_model.main([*arguments, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "nothing here was measured" in shown and "ASSUMED" in shown and "winner: " in shown
    record = json.loads(out.read_text())
    assert record["setting"]["span_cap"] == 70 and record["ceilings"]["source"] == H200.source
    assert [(step["policy"], step["step"]) for step in record["steps"]] == [("dual", "opening"), ("dual", "block")]
    assert all(step["measured_milliseconds"] is None and step["host_copies"] == 0 for step in record["steps"])
    assert record["winner"]["triton"] in NAMES
    assert sum(record["steps"][0]["kernels"].values()) == record["steps"][0]["total"]["launches"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "0"], "prompt=0"),
        (["--response", "4000"], "response=4000"),
        (["--slow", "0"], "slow=0"),
        (["--fast", "-1"], "fast=-1"),
        (["--tokens", "nan"], "tokens=nan"),
        (["--geometry", "gpt"], "gpt"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        cost_model.main(arguments)
    assert named in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_refused_before_the_tables(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cost_model.main(["--policy", "none", "--backend", "torch", "--json", str(tmp_path / "nowhere" / "model.json")])
    told = capsys.readouterr()
    assert "nowhere" in told.err and "No such file" in told.err and not told.out
