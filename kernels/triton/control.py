"""Columns of the control matrix (progress of each sequence) and of the matrix of per-sequence sampling parameters.

One matrix each, one row per sequence: a host reads or writes all at once and a kernel takes one pointer. Nothing here
needs triton.
"""

from __future__ import annotations

CONTROL = (
    "start",  # first position that may be decoded
    "end",  # one past the last one
    "limit",  # positions from here on follow a committed end-of-text
    "block",
    "block_start",
    "block_end",
    "span_start",
    "span_end",  # one past the last position of the cycle's span; -1 while it is not known
    "stage",  # SLOW or FAST
    "stage_step",  # steps done in the stage (block samplers: in the block)
    "cycle",
    "determined",
    "n_history",
    "estimate",
    "block_steps",  # fixed schedules: steps of a block
    "quota",  # block samplers: count carried from step to step
    "step",  # forwards done (NFE)
    "cap",  # most steps that the sampler can need
    "masks_left",  # undecided positions
    "listed",  # positions that the last step forwarded
    "done",
    "fault",  # 0, or 1 + the step whose logits held NaN, or -1 - the step at which the cap was reached
)
COLUMN = {name: index for index, name in enumerate(CONTROL)}

SLOW, FAST = 0, 1  # values of "stage"

# float32: per-sequence sampling parameters, which may differ within a batch
SAMPLING = (
    "temperature",
    "top_p",
    "tau_min",  # confidence of a candidate for the horizon
    "tau_slow",  # for parallel unmasking in the slow stage
    "tau",  # for parallel unmasking: in the fast stage, or in a block
)
SAMPLING_COLUMN = {name: index for index, name in enumerate(SAMPLING)}
