"""SlowFast's and LLaDA's samplers over dLLM-Cache's features (arXiv 2506.06295), as LiangrunFlora/Slow-Fast-Sampling
bundles the two.

Of every layer and position, keys, values, attention output and MLP output are kept. The prompt's are computed anew
every ``prompt_interval`` forwards, the response's every ``response_interval``. In between, of the response the values
are computed, and all else where these moved most: in the share ``ratio`` of the positions, by cosine similarity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sfs_triton import FixedSteps, RefreshCache, Sampler, SlowFast
from sfs_triton.models.weights import LayerWeights

from . import slowfast, vanilla
from .model import Decoded, Forwards, PlainModel, Rows


class FeatureForwards(Forwards):
    """Forwards that compute only positions due for refresh. Positions count where a layer computes them in full."""

    def __init__(self, model: PlainModel, prompt: list[int], gen_length: int, sampler: Sampler, cache: RefreshCache):
        super().__init__(model, prompt, gen_length, sampler)
        self.cache, self.kept = cache, model.store(len(self.canvas))
        shape = (model.spec.n_layers, 1, len(self.canvas), model.spec.d_model)
        self.attention, self.mlp = (torch.empty(shape, device=model.device, dtype=model.dtype) for _ in range(2))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of the canvas' first ``n`` ids. A short forward rewrites the front of what is kept."""
        model, stop = self.model, len(tokens)
        prompt, response = (
            self.nfe % every == 0 for every in (self.cache.prompt_interval, self.cache.response_interval)
        )
        due = slice(0 if prompt else self.start, stop if response else self.start)
        moved = 0 if response else int((stop - self.start) * self.cache.ratio)
        recomputed = due.stop - due.start + moved
        self.count(recomputed)
        model.ensure_rope_length(stop)
        x = F.embedding(tokens[None], model.weights.embedding)
        for index, layer in enumerate(model.weights.layers):
            rows: Rows = due
            if moved:
                given = torch.arange(due.start, due.stop, device=model.device)
                rows = torch.cat((given, self._moved(x, index, layer, moved)))
            if recomputed:
                self._recompute(x, index, layer, rows)
            x = x + self.attention[index, :, :stop] + self.mlp[index, :, :stop]
        return model.head(x)

    def _moved(self, x: torch.Tensor, index: int, layer: LayerWeights, count: int) -> torch.Tensor:
        """The ``count`` response positions whose values in ``x [1, n, d]`` are least like those kept. Keeps the new."""
        width = self.spec.kv_width
        bias = None if layer.qkv_bias is None else layer.qkv_bias[-width:]
        normed = self.model.norm(x[:, self.start :], layer.attn_norm)
        fresh = F.linear(normed, layer.qkv[-width:], bias)
        kept = self.kept.v[index, :, :, self.start : x.shape[1]]
        likeness = F.cosine_similarity(fresh, kept.transpose(1, 2).flatten(2), dim=-1)[0]
        kept.copy_(fresh.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2))
        return self.start + likeness.topk(count, largest=False).indices

    def _recompute(self, x: torch.Tensor, index: int, layer: LayerWeights, rows: Rows) -> None:
        """Keys, values, attention and MLP outputs of ``x [1, n, d]`` at ``rows``, in place."""
        stop, own = x.shape[1], x[:, rows]
        q, self.kept.k[index, :, :, rows], self.kept.v[index, :, :, rows] = self.model.project(own, layer, rows)
        attended = self.model.attend(q, self.kept.k[index, :, :, :stop], self.kept.v[index, :, :, :stop], layer)
        self.attention[index, :, rows] = attended
        self.mlp[index, :, rows] = self.model.mlp(own + attended, layer)


@torch.inference_mode()
def decode(
    model: PlainModel,
    prompt: list[int],
    gen_length: int,
    sampler: SlowFast | FixedSteps,
    cache: RefreshCache | None = None,
) -> Decoded:
    """Decode one sequence, with the published intervals and ratio unless ``cache`` has others."""
    inner = vanilla if isinstance(sampler, FixedSteps) else slowfast
    inner.check(sampler, gen_length)
    return inner.run(FeatureForwards(model, prompt, gen_length, sampler, cache or RefreshCache()), sampler)
