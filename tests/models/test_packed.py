"""Checkpoints in 4 bits: GPTQ, AWQ and compressed-tensors, packed here number by number, and hostile ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, UnsupportedConfigError
from sfs_triton.models import load_weights, read_spec
from sfs_triton.models import weights as module
from sfs_triton.models.packed import read_packing
from sfs_triton.ops.dispatch import Quantised
from tests.support.paths import GOLDEN
from tests.support.rank import Rank

PLAIN = GOLDEN / "models" / "llada-gqa"  # 128 channels, 256 of the MLP
CPU = torch.device("cpu")
Q = "model.transformer.blocks.0.q_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of eight, from the lowest four bits of an int32 up
KINDS = ("gptq", "gptq_v2", "awq", "pack-quantized", "pack-quantized, symmetric")


def config_of(kind: str, group: int) -> dict:
    if kind.startswith("gptq"):
        return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "checkpoint_format": kind}
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    how = {"num_bits": 4, "type": "int", "symmetric": "symmetric" in kind, "dynamic": False, **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": how, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def words(numbers: list[list[int]]) -> torch.Tensor:
    """Put eight numbers each into an int32, the first into the lowest bits."""
    rows = []
    for row in numbers:
        row = [sum(value << 4 * place for place, value in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        rows.append([value - 2**32 if value >= 2**31 else value for value in row])
    return torch.tensor(rows, dtype=torch.int32)


def packed(kind: str, codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, group: int) -> dict:
    """The tensors of one matrix: ``codes [N, K]``; ``zero`` and ``scale [N, groups]``."""
    n_out, n_in = codes.shape
    if kind.startswith("gptq"):
        less = 1 if kind == "gptq" else 0
        return {
            "qweight": words(codes.tolist()).T.contiguous(),
            "qzeros": words((zero - less).T.tolist()),
            "scales": scale.T.contiguous(),
            "g_idx": torch.tensor([k // group for k in range(n_in)], dtype=torch.int32),
        }
    if kind == "awq":
        order = [8 * at + column for at in range(n_out // 8) for column in AWQ_ORDER]
        return {
            "qweight": words(codes.T[:, order].tolist()),
            "qzeros": words(zero.T[:, order].tolist()),
            "scales": scale.T.contiguous(),
        }
    found = {
        "weight_packed": words(codes.tolist()),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor([n_out, n_in]),
    }
    if "symmetric" not in kind:
        found["weight_zero_point"] = words(zero.T.tolist()).T.contiguous()
    return found


def write(folder: Path, kind: str, group: int = 64, **changes: object) -> Path:
    """Write a checkpoint in 4 bits to ``folder``/packed, and the same numbers in float32 to ``folder``/plain."""
    generator = torch.Generator().manual_seed(group)
    tensors, plain = {}, {}
    for name, given in load_file(PLAIN / "model.safetensors").items():
        plain[name] = tensors[name] = given
        if given.dim() == 1 or "blocks" not in name:
            continue
        (n_out, n_in), size = given.shape, given.shape[1] if group == -1 else group
        shape = n_out, n_in // size
        codes = torch.randint(0, 16, (n_out, n_in), generator=generator)
        zero = torch.randint(1, 16, shape, generator=generator)
        if "symmetric" in kind:
            zero.fill_(8)
        # in bfloat16 as well as in float16
        scale = ((1 + torch.rand(shape, generator=generator)) * 0.005).bfloat16().half()
        values = (codes - zero.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)
        plain[name] = values
        del tensors[name]
        tensors |= {f"{name.removesuffix('.weight')}.{k}": v for k, v in packed(kind, codes, zero, scale, size).items()}
    config = json.loads((PLAIN / "config.json").read_text())
    for name, content, more in (("plain", plain, {}), ("packed", tensors, config_of(kind, group) | changes)):
        (folder / name).mkdir()
        save_file(content, folder / name / "model.safetensors")
        more = {"quantization_config": more} if more else {}
        (folder / name / "config.json").write_text(json.dumps(config | more))
    return folder / "packed"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the first layer's queries; None removes one."""
    file = folder / "model.safetensors"
    found = load_file(file) | {f"{Q}.{name}": value for name, value in tensors.items()}
    save_file({name: value for name, value in found.items() if value is not None}, file)


def same_values(engine: sfs_triton.Engine, plain: sfs_triton.Engine) -> None:
    for got, wanted in zip(engine.model.weights.matrices(), plain.model.weights.matrices(), strict=True):
        got = got.values(torch.float32) if isinstance(got, Quantised) else got
        assert torch.equal(got, wanted)


# -------------------------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize(
    ("kind", "group"), [*((kind, 64) for kind in KINDS), ("gptq", 128), ("awq", 32), ("gptq", -1), (KINDS[4], -1)]
)
def test_values_are_those_that_were_packed(monkeypatch, tmp_path, kind, group):
    monkeypatch.setattr(module, "AT_ONCE", 128 * 37)  # rows that are no multiple of eight
    folder = write(tmp_path, kind, group)
    engine, plain = (sfs_triton.load(path, "cpu", "float32") for path in (folder, tmp_path / "plain"))
    same_values(engine, plain)
    layers = list(engine.model.weights.matrices())[:-1]
    assert all(x.codes.dtype == torch.uint8 and x.group == (128 if group == -1 else group) for x in layers)
    assert all((x.zero is None) == ("symmetric" in kind) for x in layers)
    assert isinstance(engine.model.weights.head, torch.Tensor), "the head stays as it is stored"
    ids = torch.arange(30)[None]
    torch.testing.assert_close(engine.model.logits(ids), plain.model.logits(ids), rtol=1e-5, atol=1e-5)
    assert engine.generate([3, 4, 5], gen_length=8).canvas == plain.generate([3, 4, 5], gen_length=8).canvas


def test_quantization_says_what_becomes_of_it(tmp_path):
    folder = write(tmp_path, "gptq")
    small, plain = (sfs_triton.load(path, "cpu", quantization="int4") for path in (folder, tmp_path / "plain"))
    assert small.model.weights.head.form == "fp8" and small.model.weights.quantization == "int4-64"
    assert torch.equal(
        small.model.weights.layers[0].out.values(torch.float32),
        load_file(tmp_path / "plain" / "model.safetensors")["model.transformer.blocks.0.attn_out.weight"],
    )
    assert plain.model.weights.layers[0].out.zero is None
    eight = [sfs_triton.load(path, "cpu", quantization="fp8").model.weights for path in (folder, tmp_path / "plain")]
    for got, wanted in zip(*(each.matrices() for each in eight), strict=True):
        assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
        assert torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_have_parts_of_the_codes(tmp_path, kind, rank):
    folder = write(tmp_path, kind)
    spec = read_spec(json.loads((folder / "config.json").read_text()))
    mine = load_weights(folder, spec, CPU, torch.float32, Rank(rank)).layers[1]
    plain = load_weights(tmp_path / "plain", spec, CPU, torch.float32, Rank(rank)).layers[1]
    for name in ("qkv", "out", "gate_up", "down"):
        assert torch.equal(getattr(mine, name).values(torch.float32), getattr(plain, name)), name


def test_symmetric_zero_points_are_not_kept(tmp_path):
    folder = write(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name].fill_(0x77777777)
    save_file(tensors, folder / "model.safetensors")
    weights = sfs_triton.load(folder, "cpu").model.weights
    assert all(x.zero is None for x in list(weights.matrices())[:-1])


def test_new_values_are_refused(tmp_path):
    folder = write(tmp_path, "gptq")
    before = sfs_triton.load(folder, "cpu")
    with pytest.raises(ArgumentError, match="weights that a checkpoint had in 4 bits take no new values"):
        before.update_weights(tmp_path / "plain")
    with pytest.raises(ArgumentError, match="new values in 4 bits are not taken"):
        sfs_triton.load(tmp_path / "plain", "cpu", quantization="int4-64").update_weights(folder)


# -------------------------------------------------------------------------------------------------- hostile checkpoints


@pytest.mark.parametrize("given", ["gptq", ["gptq"], {}, 4], ids=str)
def test_a_configuration_that_names_no_method_is_refused(given):
    with pytest.raises(UnsupportedConfigError, match="quantization_config says that the weights are quantised"):
        read_packing({"quantization_config": given})


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("gptq", {"bits": 8}, "bits=8 is not supported"),
        ("gptq", {"bits": None}, "bits=None is not supported"),
        ("gptq", {"bits": True}, "bits=True is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format=True is not supported"),
        ("gptq", {"dynamic": {"-:.*down.*": {}}}, "dynamic={.*} is not supported"),
        ("gptq", {"group_size": 48}, "group_size=48 is not a multiple of 32"),
        ("gptq", {"group_size": 0}, "group_size=0 is not a multiple of 32"),
        ("gptq", {"group_size": None}, "group_size=None is not a multiple of 32"),
        ("gptq", {"group_size": "64"}, "group_size='64' is not a multiple of 32"),
        ("awq", {"bits": 3}, "bits=3 is not supported"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported"),
        ("awq", {"zero_point": False}, "zero_point=False is not supported"),
        ("pack-quantized", {"format": "int-quantized"}, "format='int-quantized' is not supported"),
        ("pack-quantized", {"config_groups": {}}, "config_groups={} is not one group"),
        ("pack-quantized", {"config_groups": {"a": ["Linear"]}}, "config_groups=.* is not one group"),
        ("pack-quantized", {"transform_config": {"x": 1}}, "transform_config={'x': 1} is not supported"),
        ("pack-quantized", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme=.* is not supported"),
        ("gptq", {"quant_method": "hqq"}, "quantised .'hqq'., which is not supported: load the checkpoint"),
        ("gptq", {"quant_method": ["gptq"]}, "which is not supported: load the checkpoint"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_configurations_are_refused_by_key(kind, changes, match):
    config = json.loads((PLAIN / "config.json").read_text()) | {"quantization_config": config_of(kind, 64) | changes}
    with pytest.raises(UnsupportedConfigError, match=rf"quantization_config.*{match}"):
        read_spec(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_bits", 8), ("num_bits", None), ("type", "float"), ("strategy", "tensor"), ("actorder", "group"),
     ("dynamic", True), ("group_size", 16)],
)  # fmt: skip
def test_schemes_of_compressed_tensors_are_refused_by_key(key, value):
    given = config_of("pack-quantized", 64)
    given["config_groups"]["group_0"]["weights"][key] = value
    config = json.loads((PLAIN / "config.json").read_text()) | {"quantization_config": given}
    with pytest.raises(UnsupportedConfigError, match=f"weights: {key}={value!r} is not"):
        read_spec(config)


@pytest.mark.parametrize(
    ("kind", "tensors", "match"),
    [
        ("gptq", {"scales": None}, f"{Q}.g_idx has no {Q}.scales beside it"),
        ("gptq", {"qzeros": None}, f"has no {Q}.qzeros beside it"),
        ("gptq", {"qweight": None}, f"has no {Q}.qweight beside it"),
        ("gptq", {"weight": torch.zeros(128, 128)}, f"{Q}.weight and {Q}.g_idx are both there"),
        ("gptq", {"qweight": torch.zeros(16, 120, dtype=torch.int32)}, "and its scales [2, 128], which is not"),
        ("gptq", {"qweight": torch.zeros(16, dtype=torch.int32)}, f"{Q}.qweight has shape [16], not two dimensions"),
        ("gptq", {"qweight": torch.zeros(16, 128)}, f"{Q}.qweight has dtype torch.float32"),
        ("gptq", {"scales": torch.ones(4, 128)}, f"{Q}.scales has shape [4, 128], the codes and config"),
        ("gptq", {"scales": torch.ones(2, 128, dtype=torch.int32)}, f"{Q}.scales has dtype torch.int32"),
        ("gptq", {"scales": torch.full((2, 128), torch.nan)}, f"{Q}.scales has NaN or infinities"),
        ("gptq", {"qzeros": torch.zeros(2, 15, dtype=torch.int32)}, f"{Q}.qzeros has shape [2, 15]"),
        ("gptq", {"qzeros": torch.full((2, 16), -1, dtype=torch.int32)}, f"{Q}.qzeros has zero points of 15 plus one"),
        ("gptq", {"g_idx": torch.arange(128, dtype=torch.int32).flip(0) // 64}, f"{Q}.g_idx puts columns into groups"),
        ("gptq", {"g_idx": torch.zeros(64, dtype=torch.int32)}, f"{Q}.g_idx has shape [64]"),
        ("awq", {"scales": None}, f"has no {Q}.scales beside it"),
        ("awq", {"qweight": torch.zeros(128, 15, dtype=torch.int32)}, "is not how awq stores them"),
        ("pack-quantized", {"weight_zero_point": None}, f"{Q}.weight_zero_point is missing"),
        ("pack-quantized", {"weight_scale": None}, f"has no {Q}.weight_scale beside it"),
        ("pack-quantized", {"weight_shape": torch.tensor([128, 127])}, f"{Q}.weight_shape is [128, 127]"),
        ("pack-quantized", {"weight_g_idx": torch.arange(128, dtype=torch.int32) % 2}, f"{Q}.weight_g_idx puts"),
        (KINDS[4], {"weight_zero_point": torch.zeros(16, 2, dtype=torch.int32)}, "is there, though weights are"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_tensors_are_refused_by_name(tmp_path, kind, tensors, match):
    folder = write(tmp_path, kind)
    change(folder, **tensors)
    with pytest.raises(CheckpointError, match=re.escape(match)):
        sfs_triton.load(folder, "cpu")


def test_groups_that_do_not_divide(tmp_path):
    folder = write(tmp_path, "gptq", 64, group_size=96)
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight has 128 columns, which are no groups of 96"):
        sfs_triton.load(folder, "cpu")


def test_an_order_that_is_not_there(tmp_path):
    folder = write(tmp_path, "gptq", desc_act=True)
    sfs_triton.load(folder, "cpu")
    change(folder, g_idx=None)
    with pytest.raises(CheckpointError, match=r"q_proj\.g_idx is missing, and config\.json says desc_act"):
        sfs_triton.load(folder, "cpu")


def test_a_configuration_of_other_tensors(tmp_path):
    folder = write(tmp_path, "gptq", 64, group_size=32)
    with pytest.raises(CheckpointError, match=r"scales has shape \[2, 128\], the codes and config.json say \[4, 128\]"):
        sfs_triton.load(folder, "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config_of("awq", 64)}))
    with pytest.raises(CheckpointError, match="which is not how awq stores them"):
        sfs_triton.load(folder, "cpu")
    (tmp_path / "plain" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"config.json says awq, but no tensor is named \*\.qweight"):
        sfs_triton.load(tmp_path / "plain", "cpu")


def test_matrices_that_belong_together(tmp_path):
    folder = write(tmp_path, "gptq")
    change(folder, weight=torch.zeros(128, 128), **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx")))
    with pytest.raises(UnsupportedConfigError, match=r"q_proj\.weight, .*k_proj\.weight, .* some are in 4 bits and"):
        sfs_triton.load(folder, "cpu")


def test_an_embedding_in_4_bits_is_refused(tmp_path):
    folder = write(tmp_path, "gptq")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.transformer.wte.weight"]
    tensors |= {f"model.transformer.wte.{name}": torch.ones(2, 512) for name in ("qzeros", "scales")}
    tensors["model.transformer.wte.qweight"] = torch.zeros(16, 512, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedConfigError, match=r"wte\.qweight is in 4 bits, which is supported for matr"):
        sfs_triton.load(folder, "cpu")


def test_an_adapter_is_refused(tmp_path):
    folder = write(tmp_path, "gptq")
    with pytest.raises(UnsupportedConfigError, match="an adapter cannot be merged into weights in 4 bits"):
        sfs_triton.load(folder, "cpu", adapter=tmp_path / "plain")
