"""One name an operation, whatever implements it. Models, samplers and loops call these and nothing below.

Today every operation is plain torch (:mod:`sfs_triton.torch_ops`). Triton kernels join one by one in
:data:`IMPLEMENTATIONS`; an entry becomes a default only with a record of it passing and being faster on a GPU.
"""

from __future__ import annotations

from .errors import require
from .torch_ops.confidence import Draw, confidence
from .torch_ops.cycle import CycleRules
from .torch_ops.cycle import decide as decide_cycle
from .torch_ops.cycle import plan as plan_cycle
from .torch_ops.layers import attention, rope, rope_tables, silu_mul
from .torch_ops.norm import rms_norm
from .torch_ops.select import BlockRules
from .torch_ops.select import decide as decide_block
from .torch_ops.select import plan as plan_block

IMPLEMENTATIONS = ("torch",)


def check_implementation(impl: str) -> None:
    """Raise :class:`~sfs_triton.errors.ArgumentError` unless ``impl`` is one of :data:`IMPLEMENTATIONS`."""
    require(impl in IMPLEMENTATIONS, f"impl={impl!r} is not one of {IMPLEMENTATIONS}")


__all__ = [
    "BlockRules",
    "CycleRules",
    "Draw",
    "attention",
    "check_implementation",
    "confidence",
    "decide_block",
    "decide_cycle",
    "plan_block",
    "plan_cycle",
    "rms_norm",
    "rope",
    "rope_tables",
    "silu_mul",
]
