"""LoRA adapters: merged while loading, equal to a merge written out here and to peft's own, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, UnsupportedConfigError
from sfs_triton.models import load_weights
from tests.support.paths import GOLDEN
from tests.support.rank import Rank

BLOCK = "model.transformer.blocks.0."
LAYERS = {
    BLOCK + "q_proj": (64, 64),
    BLOCK + "ff_proj": (176, 64),
    BLOCK + "ff_out": (64, 176),
    "model.transformer.ff_out": (512, 64),
}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], "use_dora": False}


def write(
    folder: Path, name: str = "base_model.model.{module}.lora_{part}.weight", **changes
) -> dict[str, torch.Tensor]:
    """Write an adapter; return what it adds to each matrix, without the scale."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    config = {**CONFIG, **changes}
    rank = config["r"] if isinstance(config["r"], int) and 0 < config["r"] < 100 else 4
    tensors, added = {}, {}
    for module, (out, width) in LAYERS.items():
        a, b = torch.randn(rank, width, generator=generator) * 0.1, torch.randn(out, rank, generator=generator) * 0.1
        tensors[name.format(module=module, part="A")], tensors[name.format(module=module, part="B")] = a, b
        added[module + ".weight"] = b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def merged(checkpoint: Path, added: dict[str, torch.Tensor], scale: float) -> Path:
    """A copy of the checkpoint with the adapter added in float64."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name, change in added.items():
        tensors[name] = (tensors[name].double() + scale * change).to(tensors[name].dtype)
    folder = checkpoint.parent / "merged"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "scale"),
    [
        ("base_model.model.{module}.lora_{part}.weight", {}, 2.0),
        ("base_model.model.{module}.lora_{part}.default.weight", {"lora_alpha": 2}, 0.5),
        ("{module}.lora_{part}.weight", {"use_rslora": True}, 4.0),
        ("module.base_model.model.{module}.lora_{part}.weight", {"r": 2, "init_lora_weights": "gaussian"}, 4.0),
    ],
)
def test_an_adapter_is_merged(checkpoint, tmp_path, name, changes, scale):
    added = write(tmp_path / "adapter", name, **changes)
    mine = sfs_triton.load(checkpoint, "cpu", "float32", adapter=tmp_path / "adapter")
    base, ids = sfs_triton.load(checkpoint, "cpu", "float32"), torch.arange(40)[None]
    theirs = sfs_triton.load(merged(checkpoint, added, scale), "cpu", "float32")
    torch.testing.assert_close(mine.model.logits(ids), theirs.model.logits(ids), atol=1e-5, rtol=1e-5)
    assert (mine.model.logits(ids) - base.model.logits(ids)).abs().max() > 0.1, "the adapter changes nothing"


def test_an_adapter_beside_its_base(checkpoint):
    """It is never ignored: it is refused, or merged when asked for."""
    write(checkpoint)
    with pytest.raises(CheckpointError, match=r"holds an adapter .*adapter="):
        sfs_triton.load(checkpoint, "cpu")
    assert sfs_triton.load(checkpoint, "cpu", adapter=checkpoint).generate([1, 2], gen_length=4).nfe > 0


@pytest.mark.parametrize("quantised", [None, "fp8"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_merge_their_parts(checkpoint, tmp_path, engines, rank, quantised):
    added, spec = write(tmp_path / "adapter"), engines["llada-mha"].spec
    how = (spec, torch.device("cpu"), torch.float32, Rank(rank))
    mine = load_weights(checkpoint, *how, quantization=quantised, adapter=tmp_path / "adapter")
    theirs = load_weights(merged(checkpoint, added, 2.0), *how, quantization=quantised)
    for got, wanted in zip(mine.layers, theirs.layers, strict=True):
        for part in ("qkv", "out", "gate_up", "down"):
            x, y = getattr(got, part), getattr(wanted, part)
            if quantised:
                x, y = (m.codes.float() * m.scale[:, None] for m in (x, y))
            torch.testing.assert_close(x, y, atol=0.07 if quantised else 1e-6, rtol=0.07 if quantised else 1e-5)


def test_half_precision_is_rounded_once(checkpoint, tmp_path, engines):
    """The sum is made in float32 and rounded once, also where base and result are bfloat16."""
    added = write(tmp_path / "adapter")
    tensors = {name: t.bfloat16() for name, t in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors")
    got = sfs_triton.load(checkpoint, "cpu", "bfloat16", adapter=tmp_path / "adapter").model.weights.layers[0].down
    wanted = tensors[BLOCK + "ff_out.weight"].double() + 2 * added[BLOCK + "ff_out.weight"]
    assert (got.double() - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_pefts_own_merge(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForMaskedLM

    import sfs_triton.integrations.transformers  # noqa: F401  registers the classes

    folder, adapter = GOLDEN / "models" / "dream-gqa", tmp_path / "adapter"
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(adapter)
    whole = wrapped.merge_and_unload()
    mine = sfs_triton.load(folder, "cpu", "float32", adapter=adapter)
    ids = torch.arange(40)[None]
    theirs = sfs_triton.accelerate(whole)
    torch.testing.assert_close(mine.model.logits(ids), theirs.model.logits(ids), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"peft_type": "IA3"}, UnsupportedConfigError),
        ({"peft_type": None}, UnsupportedConfigError),
        ({"use_dora": True}, UnsupportedConfigError),
        ({"modules_to_save": ["embed_tokens"]}, UnsupportedConfigError),
        ({"trainable_token_indices": [1]}, UnsupportedConfigError),
        ({"rank_pattern": {"q_proj": 8}}, UnsupportedConfigError),
        ({"alpha_pattern": {"q_proj": 8}}, UnsupportedConfigError),
        ({"lora_bias": True}, UnsupportedConfigError),
        ({"bias": "all"}, UnsupportedConfigError),
        ({"fan_in_fan_out": True}, UnsupportedConfigError),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedConfigError),
        ({"r": 0}, CheckpointError),
        ({"r": "4"}, CheckpointError),
        ({"r": 10**9}, CheckpointError),
        ({"lora_alpha": None}, CheckpointError),
        ({"lora_alpha": float("nan")}, CheckpointError),
        ({"lora_alpha": -1}, CheckpointError),
        ({"use_rslora": "yes"}, CheckpointError),
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(checkpoint, tmp_path, change, kind):
    write(tmp_path / "adapter", **change)
    with pytest.raises(kind, match=rf"adapter_config\.json: {next(iter(change))}"):
        sfs_triton.load(checkpoint, "cpu", adapter=tmp_path / "adapter")


def _changed(folder: Path, change) -> None:
    write(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A, B = (f"base_model.model.{BLOCK}q_proj.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(B), f"{A} has no partner"),
        (lambda t: t.update({A: torch.zeros(5, 64)}), rf"{A} has shape \[5, 64\]; r=4 .* need \[4, 64\]"),
        (lambda t: t.update({A: torch.zeros(4, 128)}), rf"{A} has shape \[4, 128\]"),
        (lambda t: t.update({B: torch.zeros(128, 4)}), rf"{B} has shape \[128, 4\]"),
        (lambda t: t.update({B: torch.zeros(64)}), rf"{B} has shape \[64\]"),
        (lambda t: t.update({A: torch.zeros(4, 64, dtype=torch.int8)}), "dtype torch.int8"),
        (
            lambda t: t.update({A.replace("q_proj", "c_attn"): torch.zeros(4, 64)}),
            "a layer that the base does not have",
        ),
        (lambda t: t.update({A.replace("lora_A", "lora_A.x"): torch.zeros(4, 64)}), "are for the same layer"),
        (lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): torch.zeros(64)}), "lora_magnitude_vector"),
        (lambda t: t.update({"base_model.model.model.transformer.wte.lora_embedding_A": torch.zeros(4, 9)}), "wte"),
        (lambda t: t.clear(), "holds no LoRA tensors"),
    ],
    ids=range(11),
)
def test_tensors_that_do_not_go_with_the_base(checkpoint, tmp_path, change, match):
    _changed(tmp_path / "adapter", change)
    with pytest.raises(CheckpointError, match=match):
        sfs_triton.load(checkpoint, "cpu", adapter=tmp_path / "adapter")


def test_an_adapter_of_another_base(tmp_path):
    write(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="a layer that the base does not have"):
        sfs_triton.load(GOLDEN / "models" / "dream-gqa", "cpu", adapter=tmp_path / "adapter")


def test_an_adapter_from_the_hub(checkpoint, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path / "adapter")

    write(tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert sfs_triton.load(checkpoint, "cpu", adapter="some/lora@v2").spec.n_layers > 0
    assert asked == [("some/lora", "v2")]


def test_what_is_no_adapter(checkpoint, tmp_path):
    for value in ("", 3):
        with pytest.raises(ArgumentError, match=f"adapter={value!r}"):
            sfs_triton.load(checkpoint, "cpu", adapter=value)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        sfs_triton.load(checkpoint, "cpu", adapter=checkpoint)
    write(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors; adapter_model\.bin is a pickle"):
        sfs_triton.load(checkpoint, "cpu", adapter=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"holds an adapter .*load\(base, adapter=\) takes it"):
        sfs_triton.load(tmp_path / "adapter", "cpu")
