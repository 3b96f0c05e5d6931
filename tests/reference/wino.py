"""Oracle of WINO: a shadow block of masks behind the canvas, in one forward with a mask of attention, as published.

Rules cited as "WINO 1" are in the README of the recorded cases of newer samplers; see ``docs/samplers.md``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfs_triton.decoding.samplers import WINO
from tests.reference.blocks import blocks_of, highest, take_step
from tests.reference.confidence import Ends
from tests.reference.parallel import note_ranks
from tests.reference.slowfast import Logits, Noise, ReferenceRun, Row, passes


def shadow_logits(model: Any, canvas: list[int], begin: int, end: int) -> Tensor:
    """Return logits ``[end - begin, V]`` of masks at the positions of a block, which see all but the token there."""
    spec, weights, n = model.spec, model.weights, len(canvas)
    place = torch.tensor([*range(n), *range(begin, end)])
    shadow = torch.arange(len(place)) >= n
    seen = ~shadow[None] | shadow[:, None]  # nothing in the canvas sees the shadow
    seen &= (place[:, None] != place) | ~shadow[:, None] | shadow[None]
    frequency = spec.rope_theta ** (-torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    angle = torch.cat([place[:, None] * frequency] * 2, 1)[:, None]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], gain, spec.norm_eps)

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-high, low), -1) * angle.sin()

    x = weights.embedding[torch.tensor(canvas + [spec.mask_id] * (end - begin))]
    for layer in weights.layers:
        heads = F.linear(norm(x, layer.attn_norm), layer.qkv, layer.qkv_bias).view(len(x), -1, spec.head_dim)
        q, k, v = heads.split((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
        q, k, v = (each.transpose(0, 1) for each in (rotated(q), rotated(k), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + F.linear(out.transpose(0, 1).flatten(1), layer.out)
        gate, up = F.linear(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer.down)
    return F.linear(norm(x, weights.norm), weights.head)[n:]


def decode(
    model: Any,
    logits_fn: Logits,
    canvas: list[int],
    start: int,
    sampler: WINO,
    mask_id: int,
    eos_id: int,
    noise: Noise | None = None,
) -> ReferenceRun:
    """Decode one sequence. ``logits_fn`` has the logits of the canvas, which sees no shadow."""
    ends = Ends((eos_id,), sampler.eos, sampler.eos_penalty)
    row = Row(logits_fn, canvas, start, mask_id, eos_id, False, noise, ends)
    draw = {"temperature": sampler.temperature, "top_k": sampler.top_k, "top_p": sampler.top_p}
    last = 30  # accepted by the step before (WINO 3)

    def accepted(scores: dict[int, float]) -> list[int]:
        most = min(max(int(0.7 * len(scores)), 5), 20)
        row.note_margin(list(scores.values()), sampler.tau)
        over = {p: score for p, score in scores.items() if passes(score, sampler.tau, strict=True)}
        if len(over) > most:
            note_ranks(row, over, most)
        return highest(over, most) or highest(scores, 1)

    def doubted(begin: int, end: int) -> list[int]:
        probabilities = shadow_logits(model, row.canvas, begin, end).softmax(-1)
        decided = [p for p in range(begin, end) if row.canvas[p] != mask_id and p not in row.given]
        found = {p: -probabilities[p - begin, row.canvas[p]].item() for p in decided}
        row.note_margin(list(found.values()), -sampler.tau_back)
        found = {p: score for p, score in found.items() if not passes(-score, sampler.tau_back, strict=False)}
        if len(found) >= last:
            note_ranks(row, found, last - 1)
        return list(found) if len(found) < last else highest(found, last - 1)

    for block, (begin, end) in enumerate(blocks_of(row.start, len(row.canvas), sampler.block_length)):
        last, k = 30, 0

        def choice(scores: dict[int, float], _: int, begin: int = begin, end: int = end) -> list[int]:
            nonlocal last
            chosen = accepted(scores)
            for position in doubted(begin, end) if len(chosen) > 1 else []:
                row.canvas[position] = mask_id
            last = len(chosen)
            return chosen

        while row.masked(begin, end):
            take_step(row, block, k, end, begin, draw, choice)
            k += 1
    return row.run()
