"""The canvas of a generation, drawn live in a terminal with rich.

Stages differ in more than hue (slow underlined, fast bold, new tokens in reverse), so the view reads without colour.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..decoding.samplers import Sampler, SlowFast
from ..engine import Engine, Frame
from ..errors import MissingDependencyError
from .printable import ASCII, Glyphs, readable

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
PLAIN_FRAMES = 4  # frames printed if the output cannot be redrawn


@dataclass(slots=True)
class Canvas:
    """State of one response, updated frame by frame.

    A frame shows the sequence after its step, when the stage may have changed: the step's own stage is the one in which
    the previous frame ended.
    """

    gen_length: int
    mask_id: int
    end_ids: tuple[int, ...]
    staged: bool  # SlowFast; other samplers decode block by block
    block_length: int | None
    tokens: list[int] = field(default_factory=list)
    commit_step: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)  # per step
    step: int = -1
    cycle: int = 0  # of the last step
    span: tuple[int, int | None] = (0, None)  # of that cycle; the end is None until it is known
    running: bool = True
    _next: tuple[int, int, bool, int] = (0, -1, False, 0)  # s, e, fast and cycle of the next step

    def update(self, frame: Frame) -> None:
        """Update the state with the frame of the next step."""
        start = len(frame.tokens[0]) - self.gen_length
        self.tokens, self.commit_step = frame.tokens[0][start:], frame.commit_step[0][start:]
        self.step, self.running = frame.step, frame.running[0]
        s, e = frame.span[0][0] - start, max(-1, frame.span[0][1] - start)
        if not self.staged:
            self.phases.append("block")
            length = self.block_length or self.gen_length
            first = self._next[0]
            self.cycle, self.span = first // length, (first, min(self.gen_length, first + length))
            self._next = (s, -1, False, 0)
            return
        before_s, before_e, fast, self.cycle = self._next
        self.phases.append("fast" if fast else "slow")
        over = s != before_s or (before_e >= 0 and e < 0)
        if over:  # the frame already shows the next cycle; this step's tokens belong to the finished span
            self.span = (before_s, before_e if before_e >= 0 else s)
        else:
            self.span = (s, e if e >= 0 else None)
        self._next = (s, e, frame.fast[0], self.cycle + over)

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
        """Response tokens so far per step; tokens after an end-of-text do not count."""
        ends = (n + 1 for n, token in enumerate(self.tokens) if token in self.end_ids)
        stop = next(ends, len(self.tokens))
        return sum(not self.masked(p) for p in range(stop)) / max(1, self.step + 1)

    def inside(self, position: int) -> bool:
        """Return whether the span holds ``position``; a span without an end extends to its block's end."""
        first, end = self.span
        if end is None:
            length = self.block_length or self.gen_length
            end = (first // length + 1) * length
        return first <= position < end


class View:
    """Renders a :class:`Canvas` with rich."""

    def __init__(self, canvas: Canvas, engine: Engine, glyphs: Glyphs):
        self.canvas, self.glyphs, self._codec = canvas, glyphs, engine.text
        self._texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = readable(self._codec.piece(token), self.glyphs)
        return self._texts[token]

    def _cell(self, position: int) -> tuple[str, str]:
        canvas = self.canvas
        token, committed = canvas.tokens[position], canvas.commit_step[position]
        if canvas.masked(position):
            return (self.glyphs.inside, MASKED) if canvas.inside(position) else (self.glyphs.outside, AHEAD)
        text = self.glyphs.ended if token in canvas.end_ids else self._text(token)
        if committed < 0:  # filled after an end-of-text, not decoded
            return text, ENDED
        style = STYLES[canvas.phases[committed]]
        return text, f"{style} {NEW}" if committed == canvas.step else style

    def lines(self, width: int) -> tuple[list[Text], int]:
        """Return the canvas wrapped between tokens, and the line of the first mask (the last line if there is none)."""
        canvas, lines, used, focus = self.canvas, [Text()], 0, None
        first, end = canvas.span if canvas.running else (None, None)
        for position in range(len(canvas.tokens)):
            text, style = self._cell(position)
            room = width - (position == first) - (position + 1 == end)
            text = text if cell_len(text) <= room else set_cell_size(text, max(1, room))
            size = cell_len(text) + width - room
            if used + size > width:
                lines.append(Text())
                used = 0
            if focus is None and canvas.masked(position):
                focus = len(lines) - 1
            if position == first:
                lines[-1].append(self.glyphs.opening, EDGE)
            lines[-1].append(text, style)
            if position + 1 == end:
                lines[-1].append(self.glyphs.closing, EDGE)
            used += size
        return lines, len(lines) - 1 if focus is None else focus

    def body(self, width: int, height: int) -> Text:
        """Return at most ``height`` lines of the canvas; if not all fit, those around the first mask."""
        lines, focus = self.lines(width)
        if len(lines) > height:
            top = max(0, min(focus - height // 3, len(lines) - height))
            lines = lines[top : top + height]
        return Text("\n").join(lines)

    def status(self) -> Text:
        canvas = self.canvas
        first, end = canvas.span
        status = Text(f"step {canvas.step + 1:>3}  ", no_wrap=True, overflow="ellipsis")
        status.append(f"{canvas.phase:<5}", STYLES[canvas.phase])
        status.append(f"  cycle {canvas.cycle}" if canvas.staged else f" {canvas.cycle}")
        status.append(f"  span [{first}, {'?' if end is None else end})")
        status.append(f"  masks left {canvas.masks_left}/{canvas.gen_length}  TPF {canvas.tokens_per_forward:.2f}")
        return status

    def legend(self) -> Text:
        glyphs = self.glyphs
        stages = ("slow", "fast") if self.canvas.staged else ("block",)
        legend = Text(no_wrap=True, overflow="ellipsis")
        legend.append(glyphs.outside, AHEAD).append(" masked  ").append(glyphs.inside, MASKED).append(" in span ")
        legend.append(glyphs.opening + " " + glyphs.closing, EDGE)
        for stage in stages:
            legend.append("  ").append(f"{stage} step" if self.canvas.staged else "committed", STYLES[stage])
        legend.append("  ").append("just now", NEW).append(f"  {glyphs.ended} end  {glyphs.newline} newline")
        return legend

    def panel(self, width: int, height: int, title: str) -> Panel:
        """Return the view in less than ``height`` lines, so that redrawing never scrolls; the legend goes first."""
        parts: list[Text | str] = [self.status(), ""]
        room = height - 5  # border, status, blank line, cursor line
        if room > 5:
            room -= 2
            parts += ["", self.legend()]
        parts.insert(2, self.body(max(1, width - 4), max(1, room)))
        return Panel(Group(*parts), title=Text(title), title_align="left", width=width)


class Watcher:
    """An ``on_step`` callback that shows frames: redrawn in place on a terminal, else a few plain ones."""

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        gen_length: int,
        *,
        delay: float = 0.03,
        title: str = "sfs",
        console: Console | None = None,
    ):
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.canvas = Canvas(
            gen_length,
            engine.spec.mask_id,
            engine.spec.end_ids,
            isinstance(sampler, SlowFast),
            sampler.block_length,
        )
        self.view = View(self.canvas, engine, ASCII if self.console.options.ascii_only else Glyphs())
        self._delay, self._title, self._printed = delay, title, 0
        redrawable = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Live(console=self.console, auto_refresh=False) if redrawable else None

    def __enter__(self) -> Watcher:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, frame: Frame) -> None:
        self.canvas.update(frame)
        if self._live:
            width, height = self.console.size
            self._live.update(self.view.panel(width, height, self._title), refresh=True)
            time.sleep(self._delay)
        else:
            self._print_sometimes()

    def _print_sometimes(self) -> None:
        canvas = self.canvas
        due = PLAIN_FRAMES * (canvas.gen_length - canvas.masks_left) // canvas.gen_length
        if due > self._printed or not canvas.running:
            self._printed = due
            self.console.print(self.view.status(), soft_wrap=True)
            self.console.print(self.view.body(self.console.width, canvas.gen_length))
            self.console.print()
