"""Who turns the crank of a generation. Today: :class:`~sfs_triton.loops.eager.EagerLoop`."""

from .eager import EagerLoop, StepReport

__all__ = ["EagerLoop", "StepReport"]
