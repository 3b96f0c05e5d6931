"""Map the embedded model's weights into the shapes of a large model, with the same function.

The large model computes what the small one does, so a benchmark at its size has a trained model's slow and fast stages,
and answers that can be checked. With d and D for the two widths and f = sqrt(D / d):

* The model's residual channels are the first d of D; the others hold zeros. What is written to them (embedding,
  ``attn_out``, ``ff_out``) is scaled by f and every norm's gain by 1 / f, so mean squares over D channels, eps and all
  that follows a norm come out as they were.
* Rotary pair i of a head is pair k i of a head that is k times as wide, which turns at the same rate. Queries are
  scaled by sqrt(k), the ratio of the softmax scales, and are zero in all other channels.
* Key/value head j stays head j. Number r of the queries that share it stays number r of those that share it now.
* The last layers are the model's. All others, and all heads and MLP units that it does not have, add exact zeros: their
  rows of ``v`` and ``up`` read only residual channels that hold zeros. (Zero columns of ``attn_out`` and ``ff_out``
  would do as well, but that is a quarter of all weights; and dLLM-Cache compares values, which must stay as they are.)
* Ids that the model does not have get a logit far below all others by the residual channel that was kept constant in
  training: of the model's channels their rows of the head read only that one, with a weight from the largest rms seen
  over real generations.

All other weights meet only zeros, and are random; ``docs/inflation.md`` says what is still zero. In float32 the two
models differ by rounding alone, as sums are taken in another order. Below float32 all factors must be powers of two, so
that no weight is rounded a second time.

**A tied head** (``illada-8b``) works for the logits of masked positions, which are all that decoding reads. One matrix
holds embeddings in d channels and head rows in the next d. The head rows are scaled down until what they put into the
residual stream is lost in rounding, and the final norm's gain there makes up for it; it is zero where embeddings are.
What layers add is written to both places, to the second scaled by 2^-12, which leaves every mean square as it was. Only
the token's own embedding is missing there, and no layer can copy it, because layers see it after a norm. But at a mask
it is always the same: the MLP of an extra first layer writes it.

**Left out: ``dream-7b``.** Its rotary base has none of the frequencies the model has learned to use, its 4 key/value
heads cannot hold the model's 8, and it wants a position's logits from the row before, where the model has none. A model
for it would have to be trained. :func:`bench.shapes.inflate.dense` has its shapes with random weights, for times alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch

from bench.embedded import problems
from sfs_triton import ArgumentError, Engine
from sfs_triton.models import ModelSpec, Weights
from sfs_triton.models.cache import Scope
from sfs_triton.models.weights import LayerWeights

from .geometry import layout, randomise

UNUSED_LOGIT = -200.0  # or less, of ids that the model does not have: float32 has no smaller exponential than of -104
RMS_HEADROOM = 4.0  # it holds up to so many times the largest rms seen

# A tied head: what layers add is written a second time, times COPY; head rows are scaled by TIED.
COPY, TIED = 2.0**-12, 2.0**-40
SUPPLY = 32.0  # silu(32) is 32, in float32 and below

Index = torch.Tensor | slice | int
ALL = slice(None)


class Block(NamedTuple):
    """Values that replace random numbers at some rows (and columns) of a tensor."""

    at: tuple[Index, ...]
    value: torch.Tensor | float


class Plan:
    """Mapping of the weights of ``source`` into the tensors of the spec ``big``, in ``dtype``.

    Raises:
        ArgumentError: they do not fit; lists every mismatch, with both numbers.
    """

    def __init__(self, source: Engine, big: ModelSpec, dtype: torch.dtype, seed: int = 0):
        self.source, self.small, self.big, self.dtype, self.seed = source, source.spec, big, dtype, seed
        reasons = [reason for holds, reason in self._conditions() if not holds]
        if reasons:
            raise ArgumentError(f"the model does not fit the geometry: {'; '.join(reasons)}")
        most = torch.finfo(dtype).max
        if self._needs_constant and -self.unused_weight > most:
            raise ArgumentError(f"{dtype} holds numbers up to {most:g}, one of the weights is {self.unused_weight:.4g}")

    @property
    def _needs_constant(self) -> bool:
        return self.big.tied_head or self.big.vocab_size > self.small.vocab_size

    def _conditions(self) -> Iterator[tuple[bool, str]]:
        """List all conditions, each with the message for its violation."""
        small, big = self.small, self.big
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp", "vocab_size"):
            mine, room = getattr(small, name), getattr(big, name)
            yield mine <= room, f"{name} is {room}, the model has {mine}"
        mine, room = (spec.n_heads // spec.n_kv_heads for spec in (small, big))
        yield mine <= room, f"{room} query heads share a key/value head, in the model {mine}"
        yield big.head_dim % small.head_dim == 0, f"head_dim {big.head_dim} is no multiple of {small.head_dim}"
        yield (
            big.rope_theta == small.rope_theta,
            f"rope_theta is {big.rope_theta:g}, the frequencies of the model are those of {small.rope_theta:g}",
        )
        yield big.norm_eps == small.norm_eps, f"norm_eps is {big.norm_eps:g}, the model has {small.norm_eps:g}"
        yield not (big.qkv_bias or small.qkv_bias), "qkv biases are not handled"
        yield big.shifted == small.shifted, "logits are for the next row, those of the model for their own"
        if self.dtype.itemsize < 4:
            for what in ("d_model", "head_dim"):
                mine, room = getattr(small, what), getattr(big, what)
                yield (
                    math.log2(room / mine) % 2 == 0,
                    f"{what}: sqrt({room} / {mine}) is no power of two, which would round weights of {self.dtype} "
                    "again (float32 will do)",
                )
        if big.tied_head:
            layers, width = small.n_layers + 1, 2 * small.d_model
            yield big.n_layers >= layers, f"n_layers is {big.n_layers}, a tied head needs {layers}"
            yield big.d_model >= width, f"d_model is {big.d_model}, a tied head needs {width}"
        if self._needs_constant:
            yield self.constant is not None, "no residual channel of the model is constant"
            yield self.source.text is not None, "the model has no tokenizer for the problems that its rms is taken from"

    # ------------------------------------------------------------------------------------------------ numbers to apply

    @property
    def f(self) -> float:
        """Scale of the residual stream."""
        return math.sqrt(self.big.d_model / self.small.d_model)

    @property
    def q_scale(self) -> float:
        """The ratio of the softmax scales."""
        return math.sqrt(self.big.head_dim / self.small.head_dim)

    @property
    def offset(self) -> int:
        """The layer that is the model's first."""
        return self.big.n_layers - self.small.n_layers

    @functools.cached_property
    def weights(self) -> Weights:
        """The model's, in float64 on the host, so that factors and weights are rounded once, together."""

        def host(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.detach().to("cpu", torch.float64)

        given = self.source.model.weights.plain("inflating a model")
        layers = (LayerWeights(*(host(getattr(x, f.name)) for f in fields(x))) for x in given.layers)
        return Weights(host(given.embedding), tuple(layers), host(given.norm), host(given.head))

    @functools.cached_property
    def constant(self) -> int | None:
        """The residual channel that holds the same positive number at every token, after every layer."""
        rows = self.weights.embedding
        fine = (rows == rows[:1]).all(0) & (rows[0] > 0) & (self.weights.norm > 0)
        for layer in self.weights.layers:
            fine &= (layer.out == 0).all(1) & (layer.down == 0).all(1)
        return int(fine.byte().argmax()) if fine.any() else None

    @functools.cached_property
    def unused_weight(self) -> float:
        """Weight on the constant channel in the head's rows of ids that the model does not have."""
        at = self.constant
        value = float(self.weights.embedding[0, at] * self.weights.norm[at])
        return UNUSED_LOGIT * RMS_HEADROOM * largest_rms(self.source, at) / value

    # ------------------------------------------------------------------------------------------------- rows and columns

    @property
    def channels(self) -> torch.Tensor:
        """Target channel in a wider head of every channel of a head: rotary pair i is pair k i."""
        pairs = torch.arange(self.small.head_dim // 2) * (self.big.head_dim // self.small.head_dim)
        return torch.cat((pairs, self.big.head_dim // 2 + pairs))

    @property
    def q_rows(self) -> torch.Tensor:
        """Target index of every row of the model's ``q``, and of every column of its ``attn_out``."""
        own, wide = (spec.n_heads // spec.n_kv_heads for spec in (self.small, self.big))
        head = torch.arange(self.small.n_heads)
        return self._rows(head // own * wide + head % own, self.channels)

    @property
    def kv_rows(self) -> torch.Tensor:
        """Target index of every row of the model's ``k`` and ``v``."""
        return self._rows(torch.arange(self.small.n_kv_heads), self.channels)

    @property
    def spare_queries(self) -> torch.Tensor:
        """Rows of ``q`` in heads of the model, but not among its channels: zero, since ``k`` is random there."""
        heads = (self.q_rows // self.big.head_dim).unique()
        return _without(self._rows(heads, torch.arange(self.big.head_dim)), self.q_rows)

    @property
    def spare_values(self) -> torch.Tensor:
        """Rows of ``v`` that the model does not have: zero, since ``attn_out`` is random there."""
        return _without(torch.arange(self.big.kv_width), self.kv_rows)

    @property
    def echoes(self) -> torch.Tensor:
        """Columns of ``attn_out`` that get the model's values from query heads that it does not have."""
        sharing = self.small.n_kv_heads * self.big.n_heads // self.big.n_kv_heads
        return _without(self._rows(torch.arange(sharing), self.channels), self.q_rows)

    def _rows(self, heads: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        return (heads[:, None] * self.big.head_dim + channels).flatten()

    # ---------------------------------------------------------------------------------------------------------- blocks

    def fill(self, out: torch.Tensor, part: str, layer: int | None) -> None:
        """Write one tensor, in place."""
        randomise(out, part, layer, self.seed)
        for at, value in self.blocks(part, layer):
            at = tuple(i.to(out.device) if isinstance(i, torch.Tensor) else i for i in at)
            out[at] = value.to(device=out.device, dtype=out.dtype) if isinstance(value, torch.Tensor) else value

    def blocks(self, part: str, layer: int | None) -> Iterator[Block]:
        """List the blocks of a tensor that are not random. Blocks do not overlap."""
        if layer is None:
            return getattr(self, f"_{part}")()
        if layer >= self.offset:
            return self._own_layer(part, self.weights.layers[layer - self.offset])
        return self._supply(part) if layer == 0 and self.big.tied_head else self._extra_layer(part)

    @property
    def zeros(self) -> int:
        """Count the zero weights that separate the model from the random weights."""
        count = 0
        for place, (_, shape) in layout(self.big).items():
            blank = torch.empty(shape, device="meta")
            count += sum(blank[b.at].numel() for b in self.blocks(*place) if isinstance(b.value, float) and not b.value)
        return count

    @property
    def _model(self) -> slice:
        """Residual channels of the model."""
        return slice(self.small.d_model)

    @property
    def _copy(self) -> slice:
        """Residual channels of a tied head's rows, to which layers write a second time."""
        return slice(self.small.d_model, 2 * self.small.d_model)

    @property
    def _free(self) -> slice:
        """Residual channels that are zero throughout."""
        return slice((1 + self.big.tied_head) * self.small.d_model, None)

    def _embedding(self) -> Iterator[Block]:
        used = slice(self.small.vocab_size)
        yield Block((used, self._model), self.f * self.weights.embedding)
        yield Block((used, self._free), 0.0)
        if self.big.tied_head:
            yield Block((used, self._copy), TIED * self.weights.head)
            yield from self._unused_ids(self._copy.start, TIED)

    def _head(self) -> Iterator[Block]:
        yield Block((slice(self.small.vocab_size), self._model), self.weights.head)
        yield from self._unused_ids(0, 1.0)

    def _unused_ids(self, first: int, scale: float) -> Iterator[Block]:
        if self.big.vocab_size > self.small.vocab_size:
            unused, at = slice(self.small.vocab_size, None), first + self.constant
            yield Block((unused, slice(first, at)), 0.0)
            yield Block((unused, at), scale * self.unused_weight)
            yield Block((unused, slice(at + 1, first + self.small.d_model)), 0.0)

    def _norm(self) -> Iterator[Block]:
        gain = self.weights.norm / self.f
        if self.big.tied_head:
            gain = gain / (COPY * TIED)
            yield Block((self._model,), 0.0)
        yield Block((self._copy if self.big.tied_head else self._model,), gain)

    def _own_layer(self, part: str, own: LayerWeights) -> Iterator[Block]:
        small = self.small
        q, k, v = own.qkv.split((small.d_model, small.kv_width, small.kv_width))
        gate, up = own.gate_up.chunk(2)
        units, spare_units = slice(small.mlp), slice(small.mlp, None)
        if part in ("attn_norm", "mlp_norm"):
            yield Block((self._model,), getattr(own, part) / self.f)
            if self.big.tied_head:
                yield Block((self._copy,), 0.0)
        elif part == "q":
            yield Block((self.q_rows, self._model), self.q_scale * q)
            yield Block((self.spare_queries, self._model), 0.0)
        elif part == "k":
            yield Block((self.kv_rows, self._model), k)
        elif part == "v":
            yield Block((self.kv_rows, self._model), v)
            yield Block((self.spare_values, self._model), 0.0)
        elif part == "o":
            yield from self._written(self.q_rows, own.out)
            yield Block((ALL, self.echoes), 0.0)
        elif part == "gate":
            yield Block((units, self._model), gate)
        elif part == "up":
            yield Block((units, self._model), up)
            yield Block((spare_units, self._model), 0.0)
        elif part == "down":
            yield from self._written(units, own.down)

    def _written(self, columns: Index, weight: torch.Tensor) -> Iterator[Block]:
        """Yield the blocks of a weight that writes to the residual stream."""
        yield Block((self._model, columns), self.f * weight)
        if self.big.tied_head:
            yield Block((self._copy, columns), self.f * COPY * weight)
        yield Block((self._free, columns), 0.0)

    def _extra_layer(self, part: str) -> Iterator[Block]:
        """Values and MLP units are zero; the rest is random."""
        if part in ("v", "up"):
            yield Block((ALL, self._model), 0.0)
        elif part in ("attn_norm", "mlp_norm") and self.big.tied_head:
            yield Block((self._copy,), 0.0)

    def _supply(self, part: str) -> Iterator[Block]:
        """An extra layer whose first MLP unit adds, at a mask, the embedding of the mask to the copy."""
        mask, at = self.weights.embedding[self.small.mask_id], self.constant
        value = float(mask[at])
        if part in ("gate", "up"):  # the constant channel, normalised, is 1 at a mask, and the unit's output too
            reads = torch.zeros(1, self.small.d_model)
            reads[0, at] = SUPPLY if part == "gate" else 1 / SUPPLY
            yield Block((slice(1), self._model), reads)
            if part == "up":
                yield Block((slice(1, None), self._model), 0.0)
        elif part == "down":
            yield Block((self._model, 0), 0.0)
            yield Block((self._copy, 0), self.f * COPY * mask)
            yield Block((self._free, 0), 0.0)
        else:
            yield from self._extra_layer(part)
            if part == "mlp_norm":
                rms = math.sqrt(float(mask.square().mean()) + self.small.norm_eps)
                yield Block((at,), rms / (self.f * value))


def _without(these: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
    return these[~torch.isin(these, those)]


@functools.lru_cache(maxsize=4)
def largest_rms(source: Engine, constant: int) -> float:
    """Measure the largest rms of the residual stream before the final norm, over every canvas of a few generations.

    It follows from the constant channel: after the norm that is its value times its gain over the rms.
    """
    model, smallest = source.model, math.inf
    for kind in problems.DIFFICULTY:
        chosen = problems.held_out(kind, 2, source.text, seed=1)
        for done in source.generate([p.question for p in chosen], gen_length=128):
            canvas, filled = torch.tensor(done.canvas), torch.tensor(done.commit_step)
            at_step = torch.arange(done.nfe)[:, None]
            canvases = canvas.where(filled < at_step, source.spec.mask_id).to(model.device)
            hidden = model.forward(canvases, Scope(0, len(canvas), len(canvas)))
            smallest = min(smallest, hidden[..., constant].min().item())
    weights = model.weights
    return float(weights.embedding[0, constant] * weights.norm[constant]) / smallest
