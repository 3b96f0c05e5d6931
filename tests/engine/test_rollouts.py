"""Use by trainers: new weights in place, and the probability of each committed token."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfs_triton
from sfs_triton import ArgumentError, CheckpointError, FixedSteps, Threshold
from sfs_triton.models import Weights
from tests.support.paths import GOLDEN

IDS = torch.arange(3, 43)[None]
MODELS = ("llada-gqa", "dream-gqa")


def state_of(model: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state of a golden model after some training: other values, in the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    held = load_file(GOLDEN / "models" / model / "model.safetensors")
    return {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in held.items()}


def as_folder(state: dict[str, torch.Tensor], model: str, folder):
    folder.mkdir()
    shutil.copy(GOLDEN / "models" / model / "config.json", folder)
    save_file(state, folder / "model.safetensors")
    return folder


def tensors(weights: Weights) -> dict[str, torch.Tensor]:
    found = {"embedding": weights.embedding, "norm": weights.norm, "head": weights.head}
    for index, layer in enumerate(weights.layers):
        for name in ("attn_norm", "qkv", "qkv_bias", "out", "mlp_norm", "gate_up", "down"):
            found[f"{index}.{name}"] = getattr(layer, name)
    plain = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
    for name, matrix in found.items():
        if matrix is not None and name not in plain:
            plain |= {f"{name}.codes": matrix.codes.view(torch.uint8), f"{name}.scale": matrix.scale}
    return plain


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("given", ["state", "wrapped state", "folder"])
@pytest.mark.parametrize("model", MODELS)
def test_new_weights_at_the_same_addresses(tmp_path, model, given, quantization):
    state = state_of(model)
    folder = as_folder(state, model, tmp_path / "new")
    engine = sfs_triton.load(GOLDEN / "models" / model, "cpu", "float32", quantization=quantization)
    before = {name: t.data_ptr() for name, t in tensors(engine.model.weights).items()}
    source = {"state": state, "wrapped state": {"module." + name: t for name, t in state.items()}, "folder": folder}
    engine.update_weights(source[given])
    assert {name: t.data_ptr() for name, t in tensors(engine.model.weights).items()} == before
    fresh = sfs_triton.load(folder, "cpu", "float32", quantization=quantization)
    for name, wanted in tensors(fresh.model.weights).items():
        assert torch.equal(tensors(engine.model.weights)[name], wanted), name
    assert engine.generate([3, 4], gen_length=8).canvas == fresh.generate([3, 4], gen_length=8).canvas


def test_the_checkpoint_on_disk_stays_as_it_was(tmp_path):
    folder = shutil.copytree(GOLDEN / "models" / "llada-gqa", tmp_path / "base")
    before = (folder / "model.safetensors").read_bytes()
    engine = sfs_triton.load(folder, "cpu", "float32")
    engine.update_weights(state_of("llada-gqa"))
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_lower_precision_is_rounded_as_in_loading(tmp_path):
    state = state_of("llada-gqa")
    engine = sfs_triton.load(GOLDEN / "models" / "llada-gqa", "cpu", "bfloat16")
    engine.update_weights(state)
    fresh = sfs_triton.load(as_folder(state, "llada-gqa", tmp_path / "new"), "cpu", "bfloat16")
    assert all(torch.equal(t, tensors(fresh.model.weights)[n]) for n, t in tensors(engine.model.weights).items())


def test_weights_shared_with_a_model_change_for_both():
    pytest.importorskip("transformers")
    from transformers import AutoModelForMaskedLM

    import sfs_triton.integrations.transformers  # noqa: F401  registers the classes

    model = AutoModelForMaskedLM.from_pretrained(GOLDEN / "models" / "dream-gqa", dtype=torch.float32)
    engine = sfs_triton.accelerate(model)
    state = state_of("dream-gqa")
    engine.update_weights(state)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    engine.update_weights(model.state_dict())  # its own values change nothing
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())


NAME = "model.transformer.blocks.1.up_proj.weight"
MLP = 256


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({NAME: None}, CheckpointError, f"state_dict: tensors missing: {NAME}"),
        ({"extra": torch.ones(2)}, CheckpointError, "state_dict: tensors the configuration has no place for: extra"),
        ({NAME: torch.ones(3, 64)}, CheckpointError, rf"{NAME} has shape \[3, 64\]"),
        ({NAME: torch.ones(MLP, 128, dtype=torch.int8)}, CheckpointError, f"{NAME} has dtype torch.int8"),
        ({NAME: torch.full((MLP, 128), float("nan"))}, CheckpointError, f"{NAME} has NaN or infinities"),
        ({NAME: torch.empty(MLP, 128, device="meta")}, ArgumentError, f"{NAME}' is on the device 'meta'"),
        ({NAME: [1.0]}, ArgumentError, f"{NAME}' is a list"),
        ({3: torch.ones(2)}, ArgumentError, "3 is a Tensor"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_all_or_nothing(change, kind, match, quantization):
    engine = sfs_triton.load(GOLDEN / "models" / "llada-gqa", "cpu", "float32", quantization=quantization)
    before = {name: t.clone() for name, t in tensors(engine.model.weights).items()}
    state = {name: t for name, t in {**state_of("llada-gqa"), **change}.items() if t is not None}
    with pytest.raises(kind, match=match):
        engine.update_weights(state)
    assert all(torch.equal(t, before[name]) for name, t in tensors(engine.model.weights).items())


def test_a_folder_that_is_broken_changes_nothing(tmp_path, engines):
    folder = as_folder(state_of("llada-gqa"), "llada-gqa", tmp_path / "new")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    engine = sfs_triton.load(GOLDEN / "models" / "llada-gqa", "cpu", "float32")
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        engine.update_weights(folder)
    assert torch.equal(engine.model.logits(IDS), engines["llada-gqa"].model.logits(IDS))
    for source in (3, "", None):
        with pytest.raises(ArgumentError, match="source="):
            engine.update_weights(source)


# ---------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sampler",
    [Threshold(block_length=16), FixedSteps(steps=4, block_length=16), FixedSteps(steps=4, temperature=0.7)],
    ids=["threshold", "fixed", "drawn"],
)
def test_probabilities_are_the_models_at_the_step_of_the_commit(engines, model, sampler):
    """Each canvas is rebuilt as it was before a step, and forwarded as a whole."""
    engine, prompt = engines[model], [3, 14, 15, 92, 65, 35]
    done = engine.generate(prompt, gen_length=32, sampler=sampler, trace=True)  # all of the canvas in each forward
    assert len(done.probabilities) == 32 and None not in done.probabilities
    for step in sorted(set(done.commit_step) - {-1}):
        before = [t if c < step else 500 for t, c in zip(done.canvas, done.commit_step, strict=True)]
        wanted = engine.model.logits(torch.tensor([before]))[0].double().softmax(-1)
        for at in (n for n, c in enumerate(done.commit_step) if c == step):
            row = at - int(engine.spec.shifted)
            assert done.probabilities[at - 6] == pytest.approx(wanted[row, done.canvas[at]].item(), rel=1e-3)


def test_probabilities_only_where_they_are_measured(engines):
    ask = lambda **how: engines["llada-gqa"].generate([3, 4, 5], gen_length=16, **how)  # noqa: E731
    assert ask().probabilities is None
    assert set(ask(sampler=FixedSteps(metric="entropy"), trace=True).probabilities) == {None}
    stopped = ask(sampler=FixedSteps(metric="maskgit_plus", temperature=0.5), trace=True)
    assert all(0 < p <= 1 for p in stopped.probabilities)
    assert "probabilities" not in json.dumps(stopped.as_dict())
