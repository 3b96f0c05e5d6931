"""The numbers that say where each row of a batch stands, and how it is to be decoded: a row of columns a canvas row.

They live in one matrix each, so that a host can read or write them all at once and a kernel takes one pointer. Nothing
here needs triton.
"""

from __future__ import annotations

CONTROL = (
    "start",  # first position that may be decoded
    "end",  # one past the last one
    "limit",  # positions from here on follow a committed end-of-text
    "block",
    "block_start",
    "block_end",
    "s",
    "e",  # the span of the cycle; e is -1 while it is not known
    "phase",
    "k",  # stage, and steps done in it (block samplers: in the block)
    "cycle",
    "determined",
    "n_history",
    "estimate",
    "block_steps",  # fixed schedules: steps of a block
    "quota",  # block samplers: what the schedule carries from step to step
    "step",  # forwards done (NFE)
    "cap",  # most steps that the sampler can need
    "masks_left",  # undecided positions
    "listed",  # rows that the last step forwarded
    "done",
    "fault",  # 0, or 1 + the step whose logits held NaN, or -1 - the step at which the cap was reached
)
COLUMN = {name: index for index, name in enumerate(CONTROL)}

SLOW, FAST = 0, 1  # values of "phase"

# float32: of a row's sampler, what may differ between rows that are decoded side by side
DIALS = (
    "temperature",
    "top_p",
    "tau_min",  # confidence of a candidate for the horizon
    "tau_slow",  # for parallel unmasking in the slow stage
    "tau",  # for parallel unmasking: in the fast stage, or in a block
)
DIAL = {name: index for index, name in enumerate(DIALS)}
