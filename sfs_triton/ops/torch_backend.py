"""The operations by plain torch, under one name each."""

from __future__ import annotations

from .torch.attention import attention
from .torch.confidence import confidence
from .torch.cycle import decide as decide_cycle
from .torch.gather import compact, embedding
from .torch.linear import linear
from .torch.lm_head import lm_head, lm_head_partials, merge_partials
from .torch.mlp import silu_mul
from .torch.norm import rms_norm
from .torch.place import place
from .torch.plan import look, plan
from .torch.post import post
from .torch.reach import reach
from .torch.rope_cache import rope_cache
from .torch.select import decide as decide_block

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
