"""The operations by plain torch, under one name each."""

from __future__ import annotations

from .torch.attention import attention
from .torch.confidence import confidence
from .torch.cycle import decide_cycle
from .torch.fused_linear import linear_heads, linear_normed, linear_silu_mul
from .torch.gather import compact, embedding
from .torch.linear import linear
from .torch.list_positions import list_positions
from .torch.lm_head import lm_head, lm_head_partials, merge_partials
from .torch.mark_candidates import mark_candidates
from .torch.mlp import silu_mul
from .torch.norm import rms_norm
from .torch.position_ranges import position_ranges
from .torch.publish import publish
from .torch.rope_cache import rope_cache
from .torch.scatter_choices import scatter_choices
from .torch.select import decide_block

__all__ = [
    "attention",
    "compact",
    "confidence",
    "decide_block",
    "decide_cycle",
    "embedding",
    "linear",
    "linear_heads",
    "linear_normed",
    "linear_silu_mul",
    "list_positions",
    "lm_head",
    "lm_head_partials",
    "mark_candidates",
    "merge_partials",
    "position_ranges",
    "publish",
    "rms_norm",
    "rope_cache",
    "scatter_choices",
    "silu_mul",
]
