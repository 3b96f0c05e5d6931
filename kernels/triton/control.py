"""Columns of the control matrix (progress of each sequence) and of the matrix of per-sequence sampling parameters.

One matrix each, one row per sequence: a host reads or writes all at once and a kernel takes one pointer. Nothing here
needs triton.
"""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """Progress of one sequence, as it is on the device or as the host last read it."""

    start: int  # first position that may be decoded
    end: int  # one past the last one
    limit: int  # positions from here on follow a committed end-of-text
    block: int
    block_start: int
    block_end: int
    span_start: int  # block samplers with a delayed cache: positions before it are cached once the step is done
    span_end: int  # one past the last position of the cycle's span; -1 while it is not known
    stage: int  # SLOW or FAST
    stage_step: int  # steps done in the stage (block samplers: in the block, or since the last of the whole canvas)
    cycle: int
    determined: int
    n_history: int
    estimate: int
    block_steps: int  # fixed schedules: steps of a block
    quota: int  # block samplers: count carried from step to step
    step: int  # forwards done (NFE)
    cap: int  # most steps that the sampler can need
    masks_left: int  # undecided positions
    listed: int  # positions that the last step forwarded
    done: int
    fault: int  # 0, or 1 + the step whose logits held NaN, or -1 - the step at which the cap was reached


CONTROL = Progress._fields
COLUMN = {name: index for index, name in enumerate(CONTROL)}

SLOW, FAST = 0, 1  # values of "stage"

# float32: per-sequence sampling parameters, which may differ within a batch
SAMPLING = (
    "temperature",
    "top_p",
    "tau_min",  # confidence of a candidate for the horizon
    "tau_slow",  # for parallel unmasking in the slow stage
    "tau",  # for parallel unmasking: in the fast stage, or in a block
    "tau_low",  # near an anchor, or for the best of a run
    "bound",  # of a sum of entropies
)
SAMPLING_COLUMN = {name: index for index, name in enumerate(SAMPLING)}
