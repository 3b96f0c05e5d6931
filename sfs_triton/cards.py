"""Cards by name, and what a step needs at least on one: a prediction from bytes and operations, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from .decoding.caching import CachePolicy
from .models import ModelSpec
from .ops.dispatch import GROUPS
from .runner.model_runner import CANVAS_BYTES

# bytes per weight of a layer's matrix and of the head, with the scales of groups; the rest stays in 16 bits
WEIGHT_BYTES = {None: (2.0, 2.0), "fp8": (1.0, 1.0), **{name: (0.5 + 4 / group, 1.0) for name, group in GROUPS.items()}}
QUANTIZATIONS = tuple(name for name in WEIGHT_BYTES if name is not None)  # that a card can multiply
RESERVED = 2 * 2**30  # of a card, for the driver's context, workspaces and captured graphs


@dataclass(frozen=True)
class Card:
    """Memory and peak rates of a card. ``bandwidth`` is what a copy is taken to reach: bytes read and written per
    second."""

    memory: int
    bandwidth: float
    flops: float  # of products in bfloat16, dense, with float32 sums
    source: str

    def floor(self, bytes_: float, flops: float) -> float:
        """Return the seconds that this much memory traffic or arithmetic needs, whichever is more."""
        return max(bytes_ / self.bandwidth, flops / self.flops)


_GB = 10**9
_SHEET = "memory and arithmetic from the data sheet, bandwidth at 90% of it"
# h200: products are taken to be bound by memory up to 184 rows, since
# n rows with W weights read 2 W bytes and do 2 W n operations; 791 TFLOP/s follow.
CARDS = {
    "rtx3090": Card(24 * _GB, 0.84e12, 71e12, _SHEET),
    "rtx4090": Card(24 * _GB, 0.95e12, 165e12, _SHEET),
    "rtx5090": Card(32 * _GB, 1.6e12, 209e12, _SHEET),
    "l4": Card(24 * _GB, 0.27e12, 121e12, _SHEET),
    "l40s": Card(48 * _GB, 0.78e12, 362e12, _SHEET),
    "a100-40gb": Card(40 * _GB, 1.4e12, 312e12, _SHEET),
    "a100": Card(80 * _GB, 1.8e12, 312e12, _SHEET),
    "h100": Card(80 * _GB, 3.0e12, 798e12, "3.0 TB/s and 798 TFLOP/s, assumed: 90% and 81% of the data sheet"),
    "h200": Card(
        141 * _GB,
        4.3e12,
        184 * 4.3e12,
        "one H200, taken to copy 4.3 TB/s and to be bound by weights up to 184 rows of a product (so 791 TFLOP/s)",
    ),
    "b200": Card(180 * _GB, 7.2e12, 2250e12, _SHEET),
}


def layer_weights(spec: ModelSpec) -> int:
    """Count the weights of all layers' matrices."""
    attention = 2 * spec.d_model * (spec.q_width + spec.kv_width)
    return spec.n_layers * (attention + 3 * spec.d_model * spec.mlp)


def model_bytes(spec: ModelSpec, quantization: str | None) -> float:
    """Return the memory of a model's weights. A quantised head is a copy even where it is tied to the embedding."""
    (per, per_head), head = WEIGHT_BYTES[quantization], spec.vocab_size * spec.d_model
    embedding = 2.0 * head
    return per * layer_weights(spec) + embedding + (0 if spec.tied_head and quantization is None else per_head * head)


def step_seconds(
    card: Card, spec: ModelSpec, quantization: str | None, positions: int, keys: int, chosen: int
) -> float:
    """Return the least time of a step that forwards ``positions``, attends to ``keys`` and decides ``chosen``."""
    (per, per_head), head = WEIGHT_BYTES[quantization], spec.vocab_size * spec.d_model
    layers = layer_weights(spec)
    attention = 4 * spec.n_layers * positions * keys * spec.q_width
    cache = 4 * spec.n_layers * keys * spec.kv_width  # keys and values in 16 bits
    body = card.floor(per * layers + cache, 2 * layers * positions + attention)
    return body + card.floor(per_head * head, 2 * head * chosen)


def canvases_that_fit(memory: float, spec: ModelSpec, quantization: str | None, cache: CachePolicy, length: int) -> int:
    """Return how many canvases of ``length`` positions fit beside the weights, in ``memory`` bytes."""
    left = memory - RESERVED - model_bytes(spec, quantization)
    values = 0 if cache.store is None else cache.store.values(spec, length)
    # the first step of every policy forwards whole canvases: what is alive of a layer, with its MLP
    alive = length * (2 * spec.d_model + spec.q_width + 2 * spec.kv_width + 3 * spec.mlp)
    return max(0, int(left / (2 * values + 2 * alive + CANVAS_BYTES * length)))
