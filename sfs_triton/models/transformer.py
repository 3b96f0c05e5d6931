"""The bidirectional transformer of the family, forwarded over a scope of the canvas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from .cache import FeatureCache, KVCache, Scope
from .spec import ModelSpec
from .weights import LayerWeights, Weights


class Transformer:
    """RMSNorm, rotary attention (MHA or GQA) and SwiGLU over ``spec.n_layers`` layers.

    :meth:`forward` returns normalised hidden states, :meth:`head` turns rows of them into logits: callers combine and
    select hidden states first, so that no logits are computed that nobody looks at.
    """

    def __init__(self, spec: ModelSpec, weights: Weights):
        self.spec, self.weights = spec, weights
        self._cos, self._sin = ops.rope_tables(0, spec.head_dim, spec.rope_theta, self.device)

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Raw logits ``[B, L, V]`` of token ids ``[B, L]``: nothing cached, nothing shifted."""
        length = tokens.shape[1]
        return self.head(self.forward(tokens, Scope(0, length, length)))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]`` of normalised hidden states ``[..., d]``."""
        return F.linear(hidden, self.weights.head)

    def forward(
        self,
        tokens: torch.Tensor,
        scope: Scope,
        cache: KVCache | FeatureCache | None = None,
        batch_rows: torch.Tensor | None = None,
        select: torch.Tensor | None = None,
        features: tuple[int, float] | None = None,
    ) -> torch.Tensor:
        """Normalised hidden states of the scope's rows, ``[b, rows, d]``, or of ``select`` among them, ``[b, m, d]``.

        Args:
            tokens: ids ``[b, rows]`` of the scope's rows.
            scope: which rows of the canvas these are, and which keys they attend to.
            cache: where keys and values (or features) live; needed when ``scope`` stores or reads any.
            batch_rows: index ``[b]`` of these rows in the cache's batch.
            select: canvas positions ``[b, m]`` inside the scope. The last layer's queries and MLP run only there.
            features: prompt length and refresh ratio; needed when ``scope.features`` is set.
        """
        self._reach(scope.keys)
        x = F.embedding(tokens, self.weights.embedding)
        local = None if select is None else (select - scope.first)[..., None].expand(-1, -1, x.shape[-1])
        if scope.features is not None:
            x = self._forward_features(x, scope, cache, batch_rows, *features)
            x = x if local is None else x.gather(1, local)
        else:
            last = len(self.weights.layers) - 1
            for index, layer in enumerate(self.weights.layers):
                at = local if index == last else None
                x = self._layer(x, index, layer, scope, cache, batch_rows, select if at is not None else None, at)
        return ops.rms_norm(x, self.weights.norm, self.spec.norm_eps)

    def _layer(
        self,
        x: torch.Tensor,
        index: int,
        layer: LayerWeights,
        scope: Scope,
        cache: KVCache | None,
        batch_rows: torch.Tensor | None,
        select: torch.Tensor | None,
        local: torch.Tensor | None,
    ) -> torch.Tensor:
        spec = self.spec
        h = ops.rms_norm(x, layer.attn_norm, spec.norm_eps)
        rows = slice(scope.first, scope.stop)
        if local is None:
            qk, v = self._heads(self._project(h, layer)).split((spec.n_heads + spec.n_kv_heads, spec.n_kv_heads), 1)
            q, k = self._rotate(qk, rows).split((spec.n_heads, spec.n_kv_heads), 1)
        else:
            x = x.gather(1, local)
            q = self._rotate(self._heads(self._project(h.gather(1, local), layer, slice(0, spec.d_model))), select)
            k, v = self._heads(self._project(h, layer, slice(spec.d_model, None))).chunk(2, 1)
            k = self._rotate(k, rows)
        if scope.store:
            k, v = cache.exchange(index, batch_rows, scope, k, v)
        x = x + F.linear(self._merge(ops.attention(q, k, v)), layer.out)
        return x + self._mlp(x, layer)

    def _reach(self, length: int) -> None:
        """Have rotary tables for ``length`` positions; a configuration may promise far more than anyone uses."""
        if length > len(self._cos):
            length = min(max(length, 2 * len(self._cos)), self.spec.max_length)
            self._cos, self._sin = ops.rope_tables(length, self.spec.head_dim, self.spec.rope_theta, self.device)

    def _project(self, h: torch.Tensor, layer: LayerWeights, part: slice = slice(None)) -> torch.Tensor:
        return F.linear(h, layer.qkv[part], None if layer.qkv_bias is None else layer.qkv_bias[part])

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        h = ops.rms_norm(x, layer.mlp_norm, self.spec.norm_eps)
        return F.linear(ops.silu_mul(F.linear(h, layer.gate_up)), layer.down)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, n, H D]`` to ``[b, H, n, D]``."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _merge(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    def _rotate(self, x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``x [b, H, n, D]`` at a range of positions, or at ``[b, n]`` of them."""
        cos, sin = self._cos[positions], self._sin[positions]
        if isinstance(positions, torch.Tensor):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return ops.rope(x, cos, sin)

    # ---------------------------------------------------------------------------------------- dLLM-Cache features

    def _forward_features(
        self, x: torch.Tensor, scope: Scope, cache: FeatureCache, batch_rows: torch.Tensor, prompt: int, ratio: float
    ) -> torch.Tensor:
        """Hidden states ``[b, stop, d]`` before the final norm, recomputing only what ``scope.features`` asks for.

        Prompt rows are recomputed or not as a whole. Response rows are, too, or else the ``ratio`` of them whose value
        vectors moved most. All other rows add the attention and MLP outputs they had when last computed to their
        present embeddings. A forward that is shorter than the canvas rewrites the front of what is kept.
        """
        batch, stop, _ = x.shape
        at_prompt = torch.arange(prompt if scope.features[0] else 0, device=x.device).expand(batch, -1)
        response = torch.arange(prompt, stop, device=x.device).expand(batch, -1)
        moved = int((stop - prompt) * ratio)
        for index, layer in enumerate(self.weights.layers):
            h = ops.rms_norm(x, layer.attn_norm, self.spec.norm_eps)
            k, v, mixed, mlp = (t[index][batch_rows, :stop] for t in (cache.k, cache.v, cache.attention, cache.mlp))
            rows = at_prompt
            if scope.features[1]:
                rows = torch.cat((at_prompt, response), 1)
            elif moved:
                d_kv = self.spec.d_model + self.spec.kv_width
                fresh = self._project(h[:, prompt:], layer, slice(d_kv, None))
                likeness = F.cosine_similarity(fresh, v[:, prompt:], dim=-1)
                rows = torch.cat((at_prompt, prompt + likeness.topk(moved, largest=False).indices), 1)
                v[:, prompt:] = fresh
            if rows.shape[1]:
                self._recompute(x, h, rows, layer, k, v, mixed, mlp)
                for store, kept in ((cache.k, k), (cache.v, v), (cache.attention, mixed), (cache.mlp, mlp)):
                    store[index][batch_rows, :stop] = kept
            x = x + mixed + mlp
        return x

    def _recompute(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        rows: torch.Tensor,
        layer: LayerWeights,
        k: torch.Tensor,
        v: torch.Tensor,
        mixed: torch.Tensor,
        mlp: torch.Tensor,
    ) -> None:
        """Recompute keys, values, attention and MLP outputs at ``rows [b, m]``, in place."""
        spec = self.spec

        def wide(width: int) -> torch.Tensor:
            return rows[..., None].expand(-1, -1, width)

        projected = self._project(h.gather(1, wide(spec.d_model)), layer)
        q, k_new, v_new = projected.split((spec.d_model, spec.kv_width, spec.kv_width), -1)
        k.scatter_(1, wide(spec.kv_width), k_new)
        v.scatter_(1, wide(spec.kv_width), v_new)
        keys = self._rotate(self._heads(k), slice(0, k.shape[1]))
        attended = ops.attention(self._rotate(self._heads(q), rows), keys, self._heads(v))
        out = F.linear(self._merge(attended), layer.out)
        mixed.scatter_(1, wide(spec.d_model), out)
        mlp.scatter_(1, wide(spec.d_model), self._mlp(x.gather(1, wide(spec.d_model)) + out, layer))
