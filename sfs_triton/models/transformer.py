"""The bidirectional transformer of the family, forwarded over a scope of the canvas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops import Ops, implementation, rope_tables
from .cache import FeatureCache, KVCache, Scope
from .spec import ModelSpec
from .weights import LayerWeights, Weights


class Transformer:
    """RMSNorm, rotary attention (MHA or GQA) and SwiGLU over ``spec.n_layers`` layers.

    :meth:`forward` returns normalised hidden states, :meth:`head` turns rows of them into logits: callers combine and
    select hidden states first, so that no logits are computed that nobody looks at. ``impl`` says what implements the
    operations, ``"torch"`` or ``"triton"``; None takes the defaults for the weights' device.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, impl: str | None = None):
        self.spec, self.weights = spec, weights
        self.ops: Ops = implementation(impl, self.device)
        self._cos, self._sin = rope_tables(0, spec.head_dim, spec.rope_theta, self.device)

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
        x = self.ops.embedding(self.weights.embedding, tokens)
        local = None if select is None else (select - scope.first)[..., None].expand(-1, -1, x.shape[-1])
        if scope.features is not None:
            x = self._forward_features(x, scope, cache, batch_rows, *features)
            x = x if local is None else x.gather(1, local)
        else:
            last = len(self.weights.layers) - 1
            for index, layer in enumerate(self.weights.layers):
                at = local if index == last else None
                x = self._layer(x, index, layer, scope, cache, batch_rows, select if at is not None else None, at)
        return self.ops.rms_norm(x, self.weights.norm, self.spec.norm_eps)

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
        h = self.ops.rms_norm(x, layer.attn_norm, self.spec.norm_eps)
        store = cache.store(index, batch_rows) if scope.store else {}
        q, k, v = self._qkv(h, layer, scope, store, select, local)
        if scope.store:
            k, v = (cached[batch_rows, : scope.keys] for cached in (k, v))
        if local is not None:
            x = x.gather(1, local)
        attended = F.linear(self.ops.attention(q, k, v).flatten(2), layer.out)
        h = self.ops.rms_norm(attended, layer.mlp_norm, self.spec.norm_eps, residual=x)  # x is now x + attended
        return x + self._mlp(h, layer)

    def _qkv(
        self,
        h: torch.Tensor,
        layer: LayerWeights,
        scope: Scope,
        store: dict[str, torch.Tensor],
        select: torch.Tensor | None,
        local: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turned queries of all rows ``[b, rows, d]``, or of those selected, and keys and values of all: those of the
        scope, or with ``store`` the whole cache after theirs have been put there."""
        spec, rotate = self.spec, self.ops.rope_cache
        rows = slice(scope.first, scope.stop)
        where = (self._cos[rows], self._sin[rows], None)
        if store:
            where = (self._cos, self._sin, torch.arange(scope.first, scope.stop, device=h.device))
        if local is not None:
            q = self._heads(self._project(h.gather(1, local), layer, slice(0, spec.d_model)))
            q = rotate(q, None, None, self._cos, self._sin, select)[0]
            k, v = self._heads(self._project(h, layer, slice(spec.d_model, None))).chunk(2, 2)
            return q, *rotate(None, k, v, *where, **store)[1:]
        heads = self._heads(self._project(h, layer))
        if store:
            return rotate(*heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 2), *where, **store)
        qk, v = heads.split((spec.n_heads + spec.n_kv_heads, spec.n_kv_heads), 2)  # turned alike, so at once
        q, k = rotate(qk, None, None, *where)[0].split((spec.n_heads, spec.n_kv_heads), 2)
        return q, k, v

    def _reach(self, length: int) -> None:
        """Have rotary tables for ``length`` positions; a configuration may promise far more than anyone uses."""
        if length > len(self._cos):
            length = min(max(length, 2 * len(self._cos)), self.spec.max_length)
            self._cos, self._sin = rope_tables(length, self.spec.head_dim, self.spec.rope_theta, self.device)

    def _project(self, h: torch.Tensor, layer: LayerWeights, part: slice = slice(None)) -> torch.Tensor:
        return F.linear(h, layer.qkv[part], None if layer.qkv_bias is None else layer.qkv_bias[part])

    def _mlp(self, h: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        return F.linear(self.ops.silu_mul(F.linear(h, layer.gate_up)), layer.down)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, n, H D]`` to ``[b, n, H, D]``."""
        return x.unflatten(-1, (-1, self.spec.head_dim))

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
            h = self.ops.rms_norm(x, layer.attn_norm, self.spec.norm_eps)
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
        keys = self._heads(k.clone())  # rotated in place, and kept unrotated
        q = self.ops.rope_cache(self._heads(q), None, None, self._cos, self._sin, rows)[0]
        stop = k.shape[1]
        _, keys, values = self.ops.rope_cache(None, keys, self._heads(v), self._cos[:stop], self._sin[:stop], None)
        out = F.linear(self.ops.attention(q, keys, values).flatten(2), layer.out)
        mixed.scatter_(1, wide(spec.d_model), out)
        h = self.ops.rms_norm(out, layer.mlp_norm, spec.norm_eps, residual=x.gather(1, wide(spec.d_model)))
        mlp.scatter_(1, wide(spec.d_model), self._mlp(h, layer))
