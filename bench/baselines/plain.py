"""What a careful user would write without this package: the samplers in straightforward, batch-1 PyTorch.

They compute the logits of every position at every step, take a softmax over all of them and read results back to the
host where the algorithm branches, as the published scripts do. They have: fused attention (torch SDPA), float32 softmax
(not float64), no gradient bookkeeping, truncated forwards in SlowFast's fast stage, weights fused for q, k, v and for
gate and up. They lack: heads only where a decision looks, a last layer only where a decision looks, caches, early stop.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from sfs_triton import FixedSteps, Sampler, SlowFast, Threshold
from sfs_triton.models import Transformer


class PlainModel:
    """All logits of a canvas, from the weights of a loaded model."""

    def __init__(self, model: Transformer):
        self.spec, self.weights = model.spec, model.weights
        inverse = self.spec.rope_theta ** -(torch.arange(0, self.spec.head_dim, 2).float() / self.spec.head_dim)
        angle = torch.arange(self.spec.max_length).float()[:, None] * inverse
        self.cos, self.sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.norm_eps)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * self.cos[: x.shape[-2]] + torch.cat((-high, low), -1) * self.sin[: x.shape[-2]]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` of token ids ``[L]``, shifted where the model's are."""
        spec = self.spec
        x = F.embedding(tokens[None], self.weights.embedding)
        for layer in self.weights.layers:
            projected = F.linear(self._norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias)
            heads = projected.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
            q, k, v = heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
            mixed = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, enable_gqa=True)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer.out)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        logits = F.linear(self._norm(x, self.weights.norm), self.weights.head)[0]
        return torch.cat((logits[:1], logits[:-1])) if spec.shifted else logits


def _look(model: PlainModel, canvas: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and token of every position; -inf where something is decided already."""
    confidence, token = model(canvas[:length]).softmax(-1).max(-1)
    return confidence.masked_fill(canvas[:length] != model.spec.mask_id, float("-inf")), token


def _commit(canvas: torch.Tensor, token: torch.Tensor, chosen: torch.Tensor) -> None:
    canvas[: len(token)] = torch.where(chosen, token, canvas[: len(token)])


def _fixed_steps(model: PlainModel, canvas: torch.Tensor, start: int, sampler: FixedSteps) -> int:
    length, nfe = len(canvas) - start, 0
    block = sampler.block_length or length
    steps = sampler.block_steps(length)
    for first in range(start, len(canvas), block):
        base, extra = divmod(int((canvas[first : first + block] == model.spec.mask_id).sum()), steps)
        for step in range(steps):
            confidence, token = _look(model, canvas, len(canvas))
            confidence[first + block :] = float("-inf")
            chosen = torch.zeros_like(confidence, dtype=torch.bool)
            chosen[confidence.topk(base + (step < extra)).indices] = True
            _commit(canvas, token, chosen)
            nfe += 1
    return nfe


def _threshold(model: PlainModel, canvas: torch.Tensor, start: int, sampler: Threshold) -> int:
    nfe = 0
    block = sampler.block_length or len(canvas) - start
    for first in range(start, len(canvas), block):
        while (canvas[first : first + block] == model.spec.mask_id).any():
            confidence, token = _look(model, canvas, len(canvas))
            confidence[first + block :] = float("-inf")
            chosen = confidence >= sampler.tau
            chosen[confidence.argmax()] = True
            _commit(canvas, token, chosen)
            nfe += 1
    return nfe


def _parallel(confidence: torch.Tensor, tau: float | None) -> torch.Tensor:
    chosen = torch.zeros_like(confidence, dtype=torch.bool) if tau is None else confidence > tau
    if not chosen.any():
        chosen[confidence.argmax()] = True
    return chosen


def _slowfast(model: PlainModel, canvas: torch.Tensor, start: int, sampler: SlowFast) -> int:
    """The paper's settings: stage and span as its text has them."""
    s, nfe, mask_id = start, 0, model.spec.mask_id
    while (canvas[s:] == mask_id).any():
        horizons: list[int] = []
        for _ in range(sampler.k_max):
            confidence, token = _look(model, canvas, len(canvas))
            confidence[:s] = float("-inf")
            candidates = (confidence > sampler.tau_min).nonzero()
            horizons.append(int(candidates.max()) + 1 if len(candidates) else s + 1)
            _commit(canvas, token, _parallel(confidence, sampler.tau_slow))
            nfe += 1
            window = horizons[-sampler.window :]
            stable = len(window) == sampler.window and statistics.pvariance(window) < sampler.spread_limit
            if stable or not (canvas[s:] == mask_id).any():
                break
        e, length = (horizons[-1] if stable else sum(window) // len(window)), len(canvas)
        while (canvas[s:e] == mask_id).any():
            confidence, token = _look(model, canvas, length)
            confidence[:s] = confidence[e:] = float("-inf")
            _commit(canvas, token, _parallel(confidence, sampler.tau_high))
            nfe, length = nfe + 1, e
        s = e
    return nfe


@torch.inference_mode()
def decode(model: PlainModel, prompt: list[int], gen_length: int, sampler: Sampler) -> tuple[list[int], int]:
    """Response and number of steps. Takes the paper's ``SlowFast``, ``Threshold`` and LLaDA's ``FixedSteps``."""
    canvas = torch.tensor(prompt + [model.spec.mask_id] * gen_length)
    if isinstance(sampler, SlowFast):
        if sampler != SlowFast():
            raise ValueError(f"sampler={sampler!r}: only the paper's settings are written out here")
        nfe = _slowfast(model, canvas, len(prompt), sampler)
    else:
        nfe = (_threshold if isinstance(sampler, Threshold) else _fixed_steps)(model, canvas, len(prompt), sampler)
    return canvas[len(prompt) :].tolist(), nfe
