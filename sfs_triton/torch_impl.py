"""The operations by plain torch, under one name each."""

from __future__ import annotations

from .torch_ops.attention import attention
from .torch_ops.confidence import confidence
from .torch_ops.cycle import decide as decide_cycle
from .torch_ops.gather import compact, embedding
from .torch_ops.linear import linear
from .torch_ops.lm_head import lm_head, lm_head_partials, merge_partials
from .torch_ops.mlp import silu_mul
from .torch_ops.norm import rms_norm
from .torch_ops.place import place
from .torch_ops.plan import look, plan
from .torch_ops.post import post
from .torch_ops.reach import reach
from .torch_ops.rope_cache import rope_cache
from .torch_ops.select import decide as decide_block

__all__ = [
    "attention",
    "compact",
    "confidence",
    "decide_block",
    "decide_cycle",
    "embedding",
    "linear",
    "lm_head",
    "lm_head_partials",
    "look",
    "merge_partials",
    "place",
    "plan",
    "post",
    "reach",
    "rms_norm",
    "rope_cache",
    "silu_mul",
]
