"""Outputs of a generation: a frame per step while it runs, and its sequences when they are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .trace import StepTrace


@dataclass(frozen=True)
class Frame:
    """The canvases after a step. Lists hold one entry per sequence."""

    step: int
    tokens: list[list[int]]
    commit_step: list[list[int]]
    running: list[bool]
    fast: list[bool]
    span: list[tuple[int, int]]  # [s, e) of each sequence; e is -1 while it is not known
    committed: list[list[int]] = field(default_factory=list)  # the positions that this step filled
    settled: list[int] = field(default_factory=list)  # all from its start to before here is decided


@dataclass(frozen=True)
class Generation:
    """Result of one sequence.

    ``tokens`` is the response up to and including its first end-of-text; ``canvas`` holds prompt and response.
    ``text`` leaves out special tokens and ids that the tokenizer does not define; None without a tokenizer, or where it
    fails.
    ``nfe`` counts steps of the sampler, ``forwards`` calls of the model (two per step under guidance),
    ``positions_forwarded`` positions that went through the layers, ``full_forwards`` steps that covered the whole
    canvas; ``forward_lengths`` is the number of positions that each step's forward covered.

    ``probabilities`` are softmax probabilities as the sampler's confidence measures them: untempered, or after
    temperature and top-p in Dream's own samplers. None at positions that no step committed, at ends of text that
    ``eos="last"`` put last, or where the sampler measures something else (``topk_margin``, ``entropy``).
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    prompt_length: int
    nfe: int
    forwards: int
    positions_forwarded: int
    full_forwards: int
    forward_lengths: list[int]
    commit_step: list[int]  # for each canvas position: the step that filled it, -1 if it was given
    masks_left: int  # 0 but where a sampler's own bounds leave some (``max_cycles``, Dream's one-step blocks)
    seconds: float  # of all steps of its batch while it held a slot, without the time spent in on_step
    trace: list[StepTrace] | None = None
    probabilities: list[float | None] | None = None  # with a trace: of each response token, when it was committed

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per step, end-of-text included."""
        return len(self.tokens) / max(1, self.nfe)

    @property
    def response(self) -> list[int]:
        """The whole response, including padding after the end-of-text."""
        return self.canvas[self.prompt_length :]

    def as_dict(self) -> dict[str, Any]:
        """Return the response and its counters, ready for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_length,
            "response_tokens": len(self.tokens),
            "nfe": self.nfe,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "positions_forwarded": self.positions_forwarded,
            "seconds": self.seconds,
            "tokens_per_second": len(self.tokens) / max(self.seconds, 1e-9),
        }
