"""The bidirectional transformer of the family, forwarded over a scope of the canvas."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..distributed import ALONE, Group, Vocabulary
from ..ops.dispatch import Choice, Draw, Matrix, Ops, operations, rope_tables
from ..ops.torch import blocks
from ..ops.torch.fused_linear import Heads, Scratch, rotated_heads
from ..ops.torch.norm import rms_norm
from .cache import FeatureCache, Features, KVCache, Scope, Vectors
from .spec import ModelSpec
from .weights import LayerWeights, Weights


class Transformer:
    """RMSNorm, rotary attention (MHA or GQA) and SwiGLU over ``spec.n_layers`` layers.

    :meth:`forward` returns normalised hidden states, :meth:`head` maps rows of them to logits: callers combine and
    select hidden states first, so that no unused logits are computed. ``backend`` selects the implementation of the
    operations, ``"torch"`` or ``"triton"``; None is the default for the weights' device.

    A rank of a ``group`` has the ``weights`` of its part (:func:`~sfs_triton.models.load_weights`), whose sizes are
    ``local``; ``spec`` is the whole model's. Ranks make the same calls; hidden states are whole on each of them.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, backend: str | None = None, group: Group = ALONE):
        self.spec, self.weights = spec, weights.by_row() if backend == "triton" else weights
        self.group, self.local = group, spec.shard(group.size)
        self._vocabulary = Vocabulary(group, spec.vocab_size) if group.size > 1 else None
        self.backend = backend or "torch"
        self.ops: Ops = operations(backend, self.device)
        # of plain torch on a CPU alone: a GPU's memory is kept by torch, and captured steps have their own
        self._own = {"scratch": Scratch()} if self.device.type == "cpu" and backend != "triton" else {}
        self._cos, self._sin = rope_tables(0, spec.head_dim, spec.rope_theta, self.device)
        self._position = torch.arange(0, device=self.device)
        self._outgrown: list[tuple[torch.Tensor, ...]] = []

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def by(self, backend: str) -> Transformer:
        """Return a model of the same weights with the operations of another back end."""
        return Transformer(self.spec, self.weights, backend, self.group)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute raw logits ``[B, L, V]`` of token ids ``[B, L]``, without cache or shift."""
        length = tokens.shape[1]
        return self.head(self.forward(tokens, Scope(0, length, length)))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[..., V]`` of normalised hidden states ``[..., d]``."""
        logits = self._product(hidden, self.weights.head)
        return logits if self._vocabulary is None else self._vocabulary.gather(logits)

    def choose(self, hidden: torch.Tensor, draw: Draw, **options: torch.Tensor | None) -> Choice:
        """Choose and score tokens for rows of normalised hidden states ``[T, d]``; options as for :meth:`Ops.choose`.

        The bits are equal on all ranks, since all merge the same numbers, so ranks never decide differently.
        """
        return self.ops.choose(hidden, self.weights.head, draw, vocabulary=self._vocabulary, **options)

    def cross_entropy(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Compute ``-log_softmax(head(hidden))`` at ``tokens [T]``, float32 ``[T]``, for rows of normalised hidden
        states ``[T, d]``. Logits are made in blocks, so few are in memory at a time."""

        def losses(at: slice) -> tuple[torch.Tensor]:
            return (F.cross_entropy(self.head(hidden[at]).float(), tokens[at], reduction="none"),)

        return blocks.by_rows(losses, hidden.shape[0], self.spec.vocab_size, blocks.LOGITS)[0]

    def forward(
        self,
        tokens: torch.Tensor,
        scope: Scope,
        cache: KVCache | FeatureCache | None = None,
        select: torch.Tensor | None = None,
        vectors: Vectors | None = None,
    ) -> torch.Tensor:
        """Normalised hidden states of the scope's rows, ``[b, n, d]``, or of ``select`` among them, ``[b, m, d]``.

        Args:
            tokens: ids ``[b, L]`` of the canvases.
            scope: positions to forward, and the keys that they attend to.
            cache: store of keys and values (or features); needed when ``scope`` stores or recomputes any.
            select: int64 ``[b, m]``, numbers of rows in the scope. The last layer's queries and MLP run only there.
            vectors: for positions that are no tokens.
        """
        self.ensure_rope_length(scope.keys)
        if scope.features is not None:
            x = self._forward_features(tokens[:, : scope.stop], scope, cache, select, vectors)
            return self.ops.rms_norm(x, self.weights.norm, self.spec.norm_eps)
        if scope.rows is None:
            tokens = tokens[:, scope.first : scope.stop]
        x = self._embed(tokens, scope.rows)
        if vectors is not None:
            x = vectors.replace_in(x, scope.rows, scope.first)
        layers, counters = self.weights.layers, scope.counters
        last = len(layers) - 1
        gains = [*(layer.attn_norm for layer in layers[1:]), self.weights.norm]
        h = self.ops.rms_norm(x, layers[0].attn_norm, self.spec.norm_eps)
        for index, layer in enumerate(layers):
            chosen = select if index == last else None
            attended = self._attend(h, index, layer, scope, cache, chosen)
            if chosen is not None:
                x = _selected(x, chosen)
            h = self._add(attended, layer.out, x, layer.mlp_norm, counters, to_product=True)
            gated = self.ops.linear_silu_mul(h, layer.gate_up, counters=counters, **self._own)
            # the rest is for the caller, or gathered from, or goes to plain products
            to_product = index < last - (select is not None) and layer.q_norm is None
            h = self._add(gated, layer.down, x, gains[index], counters, to_product=to_product)
        return h

    def forward_shadow(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        stop: torch.Tensor,
        cache: KVCache,
        batch: torch.Tensor | None,
        counters: torch.Tensor | None,
    ) -> torch.Tensor:
        """Normalised hidden states ``[b, n, d]`` of ``tokens [b, n]`` that stand at ``position`` int64 ``[b, n]``, -1
        idle, beside the canvases ``batch``, and are in no cache.

        They attend to one another, and to all cached positions before ``stop [b]`` but their own, so that they see
        nothing of the token there (WINO). Attention is plain torch, since no kernel has such a mask.
        """
        spec, live, length = self.local, position >= 0, cache.k.shape[3]
        self.ensure_rope_length(length)
        place, key = position.clamp(min=0), self._position[:length]
        others = (key < stop[:, None, None]) & (key != position[..., None])
        seen = torch.cat((others, live[:, None].expand(-1, position.shape[1], -1)), -1)[:, None]
        counts = {"n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads, "counters": counters}
        gains = [*(layer.attn_norm for layer in self.weights.layers[1:]), self.weights.norm]
        x = self._embed(tokens, None)
        h = self.ops.rms_norm(x, self.weights.layers[0].attn_norm, self.spec.norm_eps)
        for index, layer in enumerate(self.weights.layers):
            tables = self._cos, self._sin, place
            q, *fresh = self._rotated_heads(layer, h, layer.qkv, layer.qkv_bias, *tables, **counts)
            kept = (each if batch is None else each[batch] for each in cache.layer(index))
            k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(kept, fresh, strict=True))
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, enable_gqa=True)
            attended = out.transpose(1, 2).flatten(2)
            h = self._add(attended, layer.out, x, layer.mlp_norm, counters, to_product=False)
            gated = self.ops.linear_silu_mul(h, layer.gate_up, counters=counters, **self._own)
            h = self._add(gated, layer.down, x, gains[index], counters, to_product=False)
        return h

    def _add(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        residual: torch.Tensor,
        gain: torch.Tensor,
        counters: torch.Tensor | None,
        *,
        to_product: bool,
    ) -> Any:
        """``residual += x @ matrix^T`` in place, and its norm: ``linear_normed`` of the operations."""
        if self.group.size > 1:  # the sum over ranks comes before the residual
            return self.ops.rms_norm(self._sum(x, matrix), gain, self.spec.norm_eps, residual=residual)
        options = {"to_product": to_product, "counters": counters, **self._own}
        return self.ops.linear_normed(x, matrix, residual, gain, self.spec.norm_eps, **options)

    def _embed(self, tokens: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        if self._vocabulary is None:
            return self.ops.embedding(self.weights.embedding, tokens, rows)
        start, stop = self.group.share(self.spec.vocab_size)
        mine = torch.where((tokens >= start) & (tokens < stop), tokens - start, stop - start)  # that row is zeros
        return self.group.all_reduce(self.ops.embedding(self.weights.embedding, mine, rows))

    def _attend(
        self,
        h: torch.Tensor,
        index: int,
        layer: LayerWeights,
        scope: Scope,
        cache: KVCache | None,
        select: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention of all heads for the rows of ``h [b, n, d]``, or for those selected: ``[b, n, H D]``."""
        spec, project = self.local, functools.partial(self._rotated_heads, layer)
        tables, position, store = self._places(scope, cache, index)
        store["counters"] = scope.counters
        if select is not None:
            (q_matrix, q_bias), (kv_matrix, kv_bias) = _split(layer, spec.q_width)
            at = scope.first + select if scope.rows is None else scope.rows.gather(1, select)
            some = _selected(h, select)
            counts = {"n_heads": spec.n_heads, "n_kv_heads": 0, "counters": scope.counters}
            q = project(some, q_matrix, q_bias, self._cos, self._sin, at, **counts)[0]
            counts = {"n_heads": 0, "n_kv_heads": spec.n_kv_heads}
            _, k, v = project(h, kv_matrix, kv_bias, *tables, position, **counts, **store)
        else:
            counts = {"n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads}
            q, k, v = project(h, layer.qkv, layer.qkv_bias, *tables, position, **counts, **store)
        ranges = {"key_range": scope.key_range, "counters": scope.counters}
        ranges["count"] = None if select is not None else scope.count
        if scope.store:
            k, v = (stored[:, : scope.keys] for stored in cache.layer(index))
            ranges["cache_row"] = scope.batch
        return self.ops.attention(q, k, v, **ranges).flatten(2)

    def _rotated_heads(
        self,
        layer: LayerWeights,
        x: torch.Tensor,
        matrix: Matrix,
        bias: torch.Tensor | None,
        *places: torch.Tensor | None,
        counters: torch.Tensor | None,
        **counts: Any,
    ) -> Heads:
        """``linear_heads`` of the operations; models that normalise each head (Qwen3) do so before the rotation."""
        if layer.q_norm is None:
            return self.ops.linear_heads(x, matrix, bias, *places, counters=counters, **self._own, **counts)
        projected, n_heads, n_kv_heads = self._product(x, matrix, bias), counts["n_heads"], counts["n_kv_heads"]
        heads = self._heads(projected)
        self._norm_heads(layer, heads[:, :, :n_heads], heads[:, :, n_heads : n_heads + n_kv_heads])
        return rotated_heads(projected, self.ops.rope_cache, *places, **counts)

    def _places(self, scope: Scope, cache: KVCache | None, index: int) -> tuple[tuple, torch.Tensor | None, dict]:
        """Rotary tables, the rows' positions in them (None: row by row), and where keys and values are stored."""
        here = slice(scope.first, scope.stop)
        if not scope.store:
            return (self._cos[here], self._sin[here]), None, {}
        position = self._position[here] if scope.rows is None else scope.rows
        k, v = cache.layer(index)
        return (self._cos, self._sin), position, {"k_cache": k, "v_cache": v, "cache_row": scope.batch}

    def ensure_rope_length(self, length: int) -> None:
        """Grow the rotary tables to ``length`` positions; the limit in a configuration may be far more than is used.

        Old tables are kept: a captured graph or another thread may still read them.
        """
        present = self._cos.shape[0]
        if length > present:
            length = min(max(length, 2 * present), self.spec.max_length)
            self._outgrown.append((self._cos, self._sin, self._position))
            self._position = torch.arange(length, device=self.device)
            cos, self._sin = rope_tables(length, self.spec.head_dim, self.spec.rope_theta, self.device)
            self._cos = cos  # assigned last: its length is read as the tables' length

    def _project(self, h: torch.Tensor, layer: LayerWeights, part: slice | None = None) -> torch.Tensor:
        """Queries, keys and values, or a part of them; with kept memory, valid until the next."""
        return self.ops.product(h, layer.qkv, layer.qkv_bias, part, **self._own, name="projected")

    def _mlp(self, h: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        return self._sum(self.ops.linear_silu_mul(h, layer.gate_up, **self._own), layer.down)

    def _product(
        self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None, rows: slice | None = None
    ) -> torch.Tensor:
        """``x @ matrix^T + bias``, or by ``rows`` of both: every product with weights, plain or quantised."""
        return self.ops.product(x, matrix, bias, rows)

    def _sum(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """``x @ matrix^T`` where each rank holds some columns of both."""
        return self.group.all_reduce(self._product(x, matrix))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[b, n, H D]`` to ``[b, n, H, D]``."""
        return x.unflatten(-1, (-1, self.spec.head_dim))

    def _norm_heads(self, layer: LayerWeights, q: torch.Tensor, k: torch.Tensor) -> None:
        """Normalise each head of fresh ``q`` and ``k [b, n, H, D]`` in place, in models that do (Qwen3)."""
        for heads, weight in ((q, layer.q_norm), (k, layer.k_norm)):
            if weight is not None:
                heads.copy_(rms_norm(heads, weight, self.spec.norm_eps))

    # ---------------------------------------------------------------------------------------- dLLM-Cache features

    def _forward_features(
        self,
        tokens: torch.Tensor,
        scope: Scope,
        cache: FeatureCache,
        select: torch.Tensor | None,
        vectors: Vectors | None,
    ) -> torch.Tensor:
        """Hidden states before the final norm of ``tokens [b, stop]``, recomputing only rows that ``scope.features``
        selects.

        Prompt rows are recomputed or not as a whole. Response rows are, too, or else the share of them whose value
        vectors moved most. All other rows add the attention and MLP outputs they had when last computed to their
        present embeddings. A forward that is shorter than the canvas rewrites the front of the store.

        Where rows are selected, nobody reads a prompt's hidden states but those that its own rows are computed from:
        it is left out unless it is due, and then its last layer has keys and values only.
        """
        due, stop, last = scope.features, tokens.shape[1], self.spec.n_layers - 1
        read = 0 if select is None else max(0, due.shortest - self.spec.shifted)  # the first row that is read
        first = 0 if due.prompt else read
        x = self._embed(tokens[:, first:], None)
        if vectors is not None:
            x = vectors.replace_in(x, None, first)
        width = due.longest * due.prompt + (stop - due.shortest) * due.response
        moves = not due.response and due.moved(stop) > 0
        at_response = moved = None
        if scope.count is None and due.shortest == due.longest:  # one range of positions for all canvases
            rows = slice(0 if due.prompt else due.longest, stop if due.response else due.longest * due.prompt)
            listed = self._position[rows].int().expand(len(tokens), -1)
        else:
            place = self._position[first:stop]
            count = torch.full_like(scope.prompt, stop) if scope.count is None else scope.count
            at_prompt = place < scope.prompt[:, None]
            at_response = ~at_prompt & (place < count[:, None])
            moved = ((count - scope.prompt).double() * due.ratio).long()
            listed, _ = self.ops.compact(
                at_prompt & due.prompt | at_response & due.response, capacity=min(width, stop - first)
            )
            listed = torch.where(listed < 0, -1, listed + first)
            rows = _Listed.of(listed, first, x.shape[1], cache.spare)
        for index, layer in enumerate(self.weights.layers):
            h = self.ops.rms_norm(x, layer.attn_norm, self.spec.norm_eps)
            kept = [t[index] if scope.batch is None else t[index][scope.batch] for t in cache.tensors]
            if moves:
                others = self._moved(h, kept[1], layer, at_response, moved, due, first)
                listed_too = torch.cat((listed, others), 1) if width else others
                rows = _Listed.of(listed_too, first, x.shape[1], cache.spare)
            if width or moves:
                self._recompute(x, h, rows, layer, scope, first, read if index == last else 0, *kept)
            if scope.batch is not None:
                for t, mine in zip(cache.tensors, kept, strict=True):
                    t[index][scope.batch] = mine
            x.add_(kept[2][:, first:stop]).add_(kept[3][:, first:stop])
        return x if select is None else _selected(x, (select - first).clamp_(min=0))

    def _moved(
        self,
        h: torch.Tensor,
        v: torch.Tensor,
        layer: LayerWeights,
        at_response: torch.Tensor | None,
        moved: torch.Tensor | None,
        due: Features,
        first: int,
    ) -> torch.Tensor:
        """List the ``moved [b]`` response rows whose values changed most, then -1. Stores all fresh response values.

        ``h`` has the rows from ``first`` on, ``v`` all. ``at_response`` and ``moved`` are None where all canvases have
        equal ranges of rows.
        """
        stop = first + h.shape[1]
        own, mine = slice(due.shortest, stop), slice(due.shortest - first, None)
        fresh = self._project(h[:, mine].contiguous(), layer, slice(self.local.q_width + self.local.kv_width, None))
        likeness = self._likeness(fresh, v[:, own])
        if at_response is None:
            v[:, own] = fresh
            return (due.shortest + likeness.topk(due.moved(stop), largest=False).indices).int()
        here = at_response[:, mine]
        likeness = likeness.masked_fill(~here, float("inf"))
        rows = due.shortest + likeness.topk(due.moved(stop), largest=False).indices
        v[:, own] = torch.where(here[..., None], fresh, v[:, own])
        return torch.where(self._position[: rows.shape[1]] < moved[:, None], rows, -1).int()

    def _likeness(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Cosine similarity along the last axis, which is split over the ranks; equal bits on all of them."""
        if self.group.size == 1:
            return F.cosine_similarity(a, b, dim=-1)
        a, b = a.float(), b.float()
        sums = self.group.all_gather(torch.stack(((a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)))).sum(0)
        return sums[0] / (sums[1].sqrt().clamp(min=1e-8) * sums[2].sqrt().clamp(min=1e-8))

    def _recompute(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        rows: _Listed | slice,
        layer: LayerWeights,
        scope: Scope,
        first: int,
        read: int,
        k: torch.Tensor,
        v: torch.Tensor,
        mixed: torch.Tensor,
        mlp: torch.Tensor,
    ) -> None:
        """Recompute keys, values, attention and MLP outputs at ``rows``, in place; of a contiguous range, the outputs
        from ``read`` on. ``x`` and ``h`` have the rows from ``first`` on."""
        spec, stop = self.local, first + x.shape[1]
        projected = self._project(_taken(h, rows, first), layer)
        heads = self._heads(projected).split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 2)
        self._norm_heads(layer, *heads[:2])
        if isinstance(rows, slice):
            q, fresh, values = self.ops.rope_cache(*heads, self._cos[rows], self._sin[rows], None)
        else:
            q, fresh, values = self.ops.rope_cache(*heads, self._cos, self._sin, rows.place)
        _put(k, rows, fresh.flatten(2))
        _put(v, rows, values.flatten(2))
        if isinstance(rows, slice) and read > rows.start:
            q, rows = q[:, read - rows.start :], slice(read, rows.stop)
        ranges = {"key_range": scope.key_range, "counters": scope.counters}
        attended = self.ops.attention(q, self._heads(k[:, :stop]), self._heads(v[:, :stop]), **ranges)
        out = self._sum(attended.flatten(2), layer.out)
        _put(mixed, rows, out)
        h = self.ops.rms_norm(_taken(x, rows, first), layer.mlp_norm, spec.norm_eps, residual=out)
        _put(mlp, rows, self._mlp(h, layer))


def _split(layer: LayerWeights, width: int) -> list[tuple[Matrix, torch.Tensor | None]]:
    """Matrix and bias of the queries, and of keys and values."""
    parts = slice(0, width), slice(width, None)
    return [(layer.qkv[part], None if layer.qkv_bias is None else layer.qkv_bias[part]) for part in parts]


class _Listed(NamedTuple):
    """A list of rows per canvas: positions, rows of dense tensors to read from, rows of the store to write to."""

    place: torch.Tensor  # int32 [b, m], -1 idle
    source: torch.Tensor  # int64 [b m]; idle rows read the first
    target: torch.Tensor  # int64 [b m]; and are written to a spare place

    @classmethod
    def of(cls, place: torch.Tensor, first: int, n_rows: int, spare: int) -> _Listed:
        """``first`` is the position of the first of ``n_rows`` rows to read from."""
        wide = place.long()
        source, target = (wide - first).clamp_(min=0), wide.remainder(spare + 1)  # of -1 the remainder is ``spare``
        if len(place) > 1:
            canvas = torch.arange(len(place), device=place.device)[:, None]
            source, target = source + canvas * n_rows, target + canvas * (spare + 1)
        return cls(place, source.flatten(), target.flatten())


def _taken(x: torch.Tensor, rows: _Listed | slice, first: int) -> torch.Tensor:
    """Return the rows of dense ``x [b, n, width]``, which starts with position ``first``."""
    if isinstance(rows, slice):
        return x[:, rows.start - first : rows.stop - first].contiguous()
    return x.flatten(0, 1).index_select(0, rows.source).view(*rows.place.shape, -1)


def _put(x: torch.Tensor, rows: _Listed | slice, values: torch.Tensor) -> None:
    """Write ``values [b, m, width]`` to the rows of dense ``x``, in place."""
    if isinstance(rows, slice):
        x[:, rows] = values
    else:
        x.flatten(0, 1).index_copy_(0, rows.target, values.flatten(0, 1))


def _selected(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows [b, m]`` of ``x [b, n, width]``."""
    if x.shape[0] == 1:  # on a CPU a sixth of the time of a gather with a wide index
        return x[0].index_select(0, rows[0])[None]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
