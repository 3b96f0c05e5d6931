"""Tensor names as wrappers write them, and checkpoints that hold something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import CheckpointError, UnsupportedConfigError
from sfs_triton.models import read_spec
from sfs_triton.models.names import LLADA_NAMES, LLAMA_NAMES, expected_shapes
from tests.support.paths import GOLDEN, REAL

Q = "model.transformer.blocks.0.q_proj.weight"


def _rename(checkpoint: Path, rename) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, checkpoint / "model.safetensors")


def _add(checkpoint: Path, **more: torch.Tensor) -> None:
    save_file({**load_file(checkpoint / "model.safetensors"), **more}, checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "base_model.model." + name,
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: name.removeprefix("model."),
        lambda name: "module." + name.removeprefix("model."),
    ],
    ids=["peft", "parallel", "compiled", "both", "compiled layer", "no model", "parallel, no model"],
)
def test_prefixes_of_wrappers_are_stripped(checkpoint, engines, rename):
    _rename(checkpoint, rename)
    ids = torch.arange(40)[None]
    for quantization in (None, "fp8"):
        engine = sfs_triton.load(checkpoint, "cpu", "float32", quantization=quantization)
        plain = engines["llada-mha"] if quantization is None else None
        plain = plain or sfs_triton.load(GOLDEN / "models" / "llada-mha", "cpu", "float32", quantization=quantization)
        torch.testing.assert_close(engine.model.logits(ids), plain.model.logits(ids), atol=0, rtol=0)


def test_a_tower_beside_the_language_model_is_left_alone(checkpoint, engines):
    more = {"model.vision_tower.layers.0.q_proj.weight": torch.zeros(3, 3), "model.mm_projector.0.bias": torch.zeros(2)}
    _add(checkpoint, **more, **{"model.image_newline": torch.zeros(64)})
    engine, ids = sfs_triton.load(checkpoint, "cpu", "float32"), torch.arange(40)[None]
    assert torch.equal(engine.model.logits(ids), engines["llada-mha"].model.logits(ids))
    _add(checkpoint, **{"model.projector.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"has no place for: model\.projector\.weight$"):
        sfs_triton.load(checkpoint, "cpu")


def test_two_names_for_one_tensor(checkpoint):
    _add(checkpoint, **{"module." + Q: torch.zeros(64, 64)})
    with pytest.raises(CheckpointError, match=rf"{Q} and module\.{Q} are both {Q}|module\.{Q} and {Q} are both {Q}"):
        sfs_triton.load(checkpoint, "cpu")


def test_other_names_are_listed_beside_those_of_the_family(checkpoint):
    _rename(checkpoint, lambda name: "strange." + name)
    with pytest.raises(CheckpointError, match=r"missing: model\.transformer\.blocks.*instead it holds strange\.model"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize(
    ("rename", "kind"),
    [
        ({Q: Q.replace("weight", "qweight")}, "GPTQ or AWQ without a quantization_config in config.json that says so"),
        ({Q: Q.replace("weight", "weight_packed")}, "compressed-tensors without a quantization_config .*"),
        ({"x": Q + ".absmax"}, "bitsandbytes"),
        ({"x": Q + ".quant_state.bitsandbytes__nf4"}, "bitsandbytes"),
        ({"x": Q.replace("weight", "SCB")}, "bitsandbytes"),
        ({"x": Q + "_scale_inv"}, "fp8 with scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantised_tensors_are_refused_by_name(checkpoint, rename, kind):
    _add(checkpoint, x=torch.ones(2)) if "x" in rename else None
    _rename(checkpoint, lambda name: rename.get(name, name))
    with pytest.raises(UnsupportedConfigError, match=f"is of {kind}, which is not supported: load the checkpoint"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_codes_without_scales_are_refused(checkpoint, dtype):
    _add(checkpoint, **{Q: torch.zeros(64, 64).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"{Q} has dtype {dtype}.*without scales"):
        sfs_triton.load(checkpoint, "cpu")


def test_an_unmerged_adapter_is_refused(checkpoint):
    _add(checkpoint, **{Q.replace("weight", "lora_A.default.weight"): torch.zeros(4, 64)})
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight is of a LoRA adapter that is not merged"):
        sfs_triton.load(checkpoint, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(checkpoint, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 16030000000\n"
    (checkpoint / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name}.*is a pointer of Git LFS.*git lfs pull"):
        sfs_triton.load(checkpoint, "cpu")


def test_folders_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json: the folder is empty"):
        sfs_triton.load(tmp_path, "cpu")
    (tmp_path / "model.Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF files: give the path of one, as .*model\.Q4_0\.gguf"):
        sfs_triton.load(tmp_path, "cpu")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .*load\(base, adapter=\) takes it"):
        sfs_triton.load(tmp_path, "cpu")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the published files of LLaDA-8B and Dream-7B")
@pytest.mark.parametrize(("name", "names"), [("llada-8b-instruct", LLADA_NAMES), ("dream-v0-instruct-7b", LLAMA_NAMES)])
def test_the_published_indices_hold_what_their_configurations_say(name, names):
    spec = read_spec(json.loads((REAL / name / "config.json").read_text()))
    index = json.loads((REAL / name / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(expected_shapes(spec, names))
