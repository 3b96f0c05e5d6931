"""The transformer of the baselines: batch-1, eager PyTorch from the weights of a loaded model, which it shares.

It mirrors the modelling code of the public checkpoints (GSAI-ML/LLaDA, Dream) and of NVlabs/Fast-dLLM, in the weights'
own dtype and on their device: RMSNorm and rotary embedding in float32, each cast back to that dtype; attention by
torch's SDPA without a mask; logits of every row that was forwarded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sfs_triton import Sampler
from sfs_triton.models import Transformer
from sfs_triton.models.weights import LayerWeights

Rows = slice | torch.Tensor  # positions of the canvas: a stretch of it, or int64 [n]


class KVStore(NamedTuple):
    """Rotated keys, and values, of every layer and position: ``[layers, 1, Hkv, L, D]`` each."""

    k: torch.Tensor
    v: torch.Tensor


class PlainModel:
    """Logits of the family's bidirectional transformers."""

    def __init__(self, model: Transformer):
        self.spec, self.weights = model.spec, model.weights.plain("a baseline")
        self._cos = self._sin = torch.empty(0, self.spec.head_dim, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def __call__(self, tokens: torch.Tensor, first: int = 0, store: KVStore | None = None) -> torch.Tensor:
        """Logits ``[n, V]`` of the ids ``[n]`` at positions ``first, first + 1, ...``, shifted where the model's are.

        With ``store``, the rows' keys and values are written into it, and they attend to all that it holds; else they
        attend to one another.
        """
        self.ensure_rope_length(first + len(tokens))
        rows = slice(first, first + len(tokens))
        x = F.embedding(tokens[None], self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            q, k, v = self.project(x, layer, rows)
            if store is not None:
                store.k[index, :, :, rows], store.v[index, :, :, rows] = k, v
                k, v = store.k[index], store.v[index]
            x = x + self.attend(q, k, v, layer)
            x = x + self.mlp(x, layer)
        return self.head(x)

    def store(self, length: int) -> KVStore:
        """Room for the keys and values of a canvas of ``length``."""
        shape = (self.spec.n_layers, 1, self.spec.n_kv_heads, length, self.spec.head_dim)
        return KVStore(*(torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2)))

    def ensure_rope_length(self, length: int) -> None:
        """Extend the float32 rotary tables to ``[length, D]`` or more; they grow by doubling."""
        if length <= len(self._cos):
            return
        length = max(length, 2 * len(self._cos))
        even = torch.arange(0, self.spec.head_dim, 2, device=self.device, dtype=torch.float32)
        place = torch.arange(length, device=self.device, dtype=torch.float32)
        angle = place[:, None] * self.spec.rope_theta ** -(even / self.spec.head_dim)
        self._cos, self._sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))

    def project(self, x: torch.Tensor, layer: LayerWeights, rows: Rows) -> tuple[torch.Tensor, ...]:
        """Norm, then rotated queries, rotated keys and values ``[1, heads, n, D]`` of ``x [1, n, d]`` at ``rows``."""
        spec = self.spec
        projected = F.linear(self.norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias)
        heads = projected.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        q, k, v = heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
        return self._rotate(q, rows), self._rotate(k, rows), v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """Return the residual update ``[1, n, d]``: ``q [1, H, n, D]`` attends to ``k`` and ``v [1, Hkv, L, D]``."""
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return F.linear(mixed.transpose(1, 2).flatten(2), layer.out)

    def mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        """Return the residual update of the MLP, norm included, for ``x [1, n, d]``."""
        gate, up = F.linear(self.norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of the last layer's ``x [1, n, d]``. Dream's row ``i`` is of position ``i + 1``."""
        logits = F.linear(self.norm(x, self.weights.norm), self.weights.head)[0]
        return torch.cat((logits[:1], logits[:-1])) if self.spec.shifted else logits

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm: torch's own reduces in float32 and casts once, whatever the dtype."""
        return F.rms_norm(x, weight.shape, weight, self.spec.norm_eps)

    def _rotate(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        wide = x.float()
        low, high = wide.chunk(2, -1)
        return (wide * self._cos[rows] + torch.cat((-high, low), -1) * self._sin[rows]).to(x.dtype)


class Decoded(NamedTuple):
    """A finished generation.

    ``nfe`` counts forwards, ``full_forwards`` those that put the whole canvas through the layers,
    ``positions_forwarded`` the positions that went through them in all.
    """

    response: list[int]
    nfe: int
    full_forwards: int
    positions_forwarded: int


class Forwards:
    """The forwards of one generation, counted. Called like the model itself.

    Raises:
        RuntimeError: after ``most`` forwards. A model that predicts the mask itself would go on for ever.
    """

    def __init__(self, model: PlainModel, prompt: list[int], gen_length: int, sampler: Sampler):
        self.model, self.spec = model, model.spec
        self.start, self.most = len(prompt), sampler.step_cap(gen_length)
        self.canvas = torch.tensor(prompt + [model.spec.mask_id] * gen_length, device=model.device)
        self.nfe = self.full_forwards = self.positions_forwarded = 0

    def __call__(self, tokens: torch.Tensor, first: int = 0, store: KVStore | None = None) -> torch.Tensor:
        self.count(len(tokens))
        return self.model(tokens, first, store)

    def count(self, rows: int) -> None:
        """Count a forward of ``rows`` positions."""
        if self.nfe == self.most:
            raise RuntimeError(f"not finished after {self.nfe} forwards: the model keeps predicting the mask itself")
        self.nfe += 1
        self.full_forwards += rows == len(self.canvas)
        self.positions_forwarded += rows

    def masked(self, first: int, last: int) -> bool:
        """Return True if any position in ``[first, last)`` is undecided. Reads the device."""
        return bool((self.canvas[first:last] == self.spec.mask_id).any())

    def decoded(self) -> Decoded:
        response = self.canvas[self.start :].tolist()
        return Decoded(response, self.nfe, self.full_forwards, self.positions_forwarded)


WRITTEN_OUT = {"temperature": 0.0, "top_p": None, "top_k": None, "cfg_scale": 0.0, "eos_stop": False}
WRITTEN_OUT |= {"eos": "free", "eos_penalty": 0.0, "end_think_logit_boost": 0.0}


def check_sampler(sampler: Sampler, kinds: tuple[type, ...], gen_length: int, **only: object) -> None:
    """Refuse samplers that a baseline lacks, and settings other than ``only`` and ``WRITTEN_OUT``.

    Raises:
        ValueError: names the sampler, or the setting and its value.
    """
    if not isinstance(sampler, kinds):
        raise ValueError(f"sampler={sampler!r} is not one of {[kind.__name__ for kind in kinds]}")
    for name, value in {**WRITTEN_OUT, **only}.items():
        if getattr(sampler, name) != value:
            raise ValueError(f"{name}={getattr(sampler, name)!r}: this baseline has {name}={value!r} only")
    sampler.check_length(gen_length)
