"""The canvas of a generation, drawn live in a terminal with rich.

Stages differ in more than hue (slow underlined, fast bold, new tokens in reverse), so the view reads without colour.
"""

from __future__ import annotations

import time
import unicodedata
from dataclasses import dataclass, field
from typing import NamedTuple

from .engine import Engine, Frame
from .errors import MissingDependencyError
from .samplers import Sampler, SlowFast

try:
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text
except ImportError as error:
    raise MissingDependencyError(f'--watch needs rich ({error}): pip install "sfs_triton[cli]"') from error

STYLES = {"slow": "magenta underline", "fast": "cyan bold", "block": "cyan bold"}
EDGE, NEW, MASKED, AHEAD, ENDED = "yellow bold", "reverse", "bold", "dim", "dim"
PLAIN_FRAMES = 4  # frames printed where nothing can be redrawn


class Glyphs(NamedTuple):
    """What stands for things that are no text."""

    inside: str = "•"
    outside: str = "·"
    newline: str = "↵"
    ended: str = "∎"
    unknown: str = "\N{REPLACEMENT CHARACTER}"
    opening: str = "⟦"
    closing: str = "⟧"


ASCII = Glyphs("o", ".", "$", "#", "?", "[", ")")


def readable(text: str, glyphs: Glyphs) -> str:
    """``text`` on one line: no newline, control or direction character of a token may reach the terminal."""
    shown = []
    for character in text:
        if character == "\n":
            shown.append(glyphs.newline)
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(" " if character == "\t" else glyphs.unknown)
        elif glyphs is ASCII and not character.isascii():
            shown.append(glyphs.unknown)
        else:
            shown.append(character)
    return "".join(shown) or glyphs.unknown


@dataclass(slots=True)
class Canvas:
    """Follows one response through its frames.

    A frame shows the row after its step, when the stage may have moved on already: the stage of the step itself is the
    one the frame before ended in.
    """

    gen_length: int
    mask_id: int
    eos_id: int
    staged: bool  # SlowFast; other samplers go block by block
    block_length: int | None
    tokens: list[int] = field(default_factory=list)
    commit_step: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)  # of each step
    step: int = -1
    cycle: int = 0
    span: tuple[int, int | None] = (0, None)  # from the response's start; the end is None while it is not known
    running: bool = True
    _fast: bool = False
    _cycle_over: bool = False

    def update(self, frame: Frame) -> None:
        """Take in the frame of the next step."""
        start = len(frame.tokens[0]) - self.gen_length
        self.tokens, self.commit_step = frame.tokens[0][start:], frame.commit_step[0][start:]
        self.step, self.running = frame.step, frame.running[0]
        if not self.staged:
            first = frame.span[0][0] - start
            self.phases.append("block")
            self.span = (first, min(self.gen_length, first + (self.block_length or self.gen_length)))
            return
        self.phases.append("fast" if self._fast else "slow")
        self.cycle += self._cycle_over
        first, end = frame.span[0]
        # the span of a cycle that just ended stays marked for this frame, where its last tokens appear
        self._cycle_over = first - start != self.span[0] or (end < 0 and self.span[1] is not None)
        if self._cycle_over and self._fast and self.step > 0:
            shown = self.span
        else:
            shown = (first - start, end - start if end >= 0 else None)
        self.span, self._fast = shown, frame.fast[0]

    @property
    def phase(self) -> str:
        return self.phases[-1] if self.phases else "slow"

    def masked(self, position: int) -> bool:
        return self.tokens[position] == self.mask_id and self.commit_step[position] < 0

    @property
    def masks_left(self) -> int:
        return sum(map(self.masked, range(len(self.tokens))))

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens so far for each step; what follows an end-of-text does not count."""
        stop = self.tokens.index(self.eos_id) + 1 if self.eos_id in self.tokens else len(self.tokens)
        return sum(not self.masked(p) for p in range(stop)) / max(1, self.step + 1)
