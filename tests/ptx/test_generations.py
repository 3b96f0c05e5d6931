"""Whole generations of the embedded model, every kernel executed as PTX: the tokens of plain torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
import torch

import sfs_triton
from sfs_triton import DualCache, Engine, FixedSteps, NoCache, RegionCache, SlowFast, Threshold
from sfs_triton.ops import dispatch
from sfs_triton.ops.torch.philox import philox
from tests.support.paths import GOLDEN

PROMPTS = [[15, 44, 79, 50], [7, 8, 9, 10, 11, 12, 13]]
COMBINATIONS = {
    "slow-fast": (SlowFast(), NoCache()),
    "slow-fast-region": (SlowFast(), RegionCache(capacity=24, refresh_every=5)),
    "slow-fast-look-ahead": (
        SlowFast(block_length=8, strict=False),
        RegionCache(capacity=12, span_cap=8, look_ahead=4),
    ),
    "threshold-dual": (Threshold(block_length=8), DualCache()),
    "noise-region": (FixedSteps(steps=8, block_length=8, temperature=0.7), RegionCache()),
}


@pytest.fixture(scope="module", autouse=True)
def kernels_on_a_cpu():
    """Loading asks for a GPU, or the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dispatch, "_module", lambda name, device: importlib.import_module(f"sfs_triton.ops.{name}_backend")
        )
        yield


@pytest.fixture(scope="module")
def executed() -> Engine:
    return sfs_triton.load("embedded", "cpu", "float32", backend="triton")


@pytest.mark.whole_generation
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_tokens_are_those_of_torch(executed, embedded, combination):
    sampler, cache = COMBINATIONS[combination]
    how = {"gen_length": 16, "sampler": sampler, "cache": cache, "seed": 3}
    wanted = embedded.generate(PROMPTS, **how)
    found = executed.generate(PROMPTS, **how)
    assert [list(each.tokens) for each in found] == [list(each.tokens) for each in wanted]
    assert [each.nfe for each in found] == [each.nfe for each in wanted]


def scores(hidden: torch.Tensor, head: torch.Tensor, noise: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits with their noise, in float64."""
    keys = (noise[name][:, None] for name in ("position", "step"))
    word = philox(noise["seed"][:, None], torch.arange(len(head))[None], *keys)
    uniform = (((word >> 8).double() + 0.5) * 2.0**-24).clamp(max=1 - 2.0**-24)
    return hidden.double() @ head.double().T - noise["temperature"].double()[:, None] * (-uniform.log()).log()


@pytest.mark.whole_generation
def test_choices_with_noise_in_bfloat16_are_those_of_float64():
    """Noise may turn rounding into other tokens than torch's, which rounds logits too. But each choice is float64's for
    its hidden state, and the first step's states are as far from float32's as torch's are."""
    calls: list[tuple] = []

    def noting(real):
        def lm_head(hidden, head, *, rows=None, count=None, **noise):
            out = real(hidden, head, rows=rows, count=count, **noise)
            n = len(out[0]) if count is None else int(count)
            chosen = hidden if rows is None else hidden[rows.clamp(min=0)]
            calls.append((chosen[:n].clone(), head, {name: key[:n].clone() for name, key in noise.items()}, out[0][:n]))
            return out

        return lm_head

    first = {}
    for backend, dtype in (("triton", "bfloat16"), ("torch", "bfloat16"), ("torch", "float32")):
        module = importlib.import_module(f"sfs_triton.ops.{backend}_backend")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "lm_head", noting(module.lm_head))
            engine = sfs_triton.load(GOLDEN / "models" / "llada-mha", "cpu", dtype, backend=backend)
        if dtype == "float32":  # of the same weights
            for tensor in tensors_of(engine.model.weights):
                tensor.copy_(tensor.bfloat16())
        calls.clear()
        engine.generate(PROMPTS, gen_length=16, sampler=FixedSteps(steps=8, block_length=8, temperature=0.7), seed=3)
        first[backend, dtype] = scores(*calls[0][:3])
        for hidden, head, noise, token in calls if (backend, dtype) != ("torch", "bfloat16") else ():
            score = scores(hidden, head, noise)
            assert (score.max(-1).values - score.gather(-1, token.long()[:, None])[:, 0]).max() < 1e-4
    error = {name: (score - first["torch", "float32"]).abs().max() for name, score in first.items()}
    assert 0 < error["triton", "bfloat16"] <= 2 * error["torch", "bfloat16"]


def tensors_of(weights) -> Iterator[torch.Tensor]:
    if isinstance(weights, torch.Tensor):
        yield weights
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from tensors_of(getattr(weights, field.name))
    elif isinstance(weights, (list, tuple)):
        for each in weights:
            yield from tensors_of(each)
