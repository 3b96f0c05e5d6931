"""An animated picture of canvases that fill: a panel for each sampler, which all advance one step at a time.

Positions stand where the finished text has them, so nothing moves while they fill; their colour says how many steps ago
they were filled. Pictures are drawn as numbers of colours: a cell is drawn once for all frames, and a file stays small.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..engine import Engine, Frame
from ..errors import MissingDependencyError, require
from .pictures import whole_picture
from .printable import Glyphs, readable

try:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise MissingDependencyError(
        f'--record needs Pillow, and matplotlib for its font ({error}): pip install "sfs_triton[cli]"'
    ) from error

SUFFIXES = (".gif",)
MOST_FRAMES = 80  # of the steps that several panels take, and of those that the slowest one takes alone
FIRST, LAST = 1000, 3000  # milliseconds that the empty and the finished canvas are shown
PLAY, FASTEST, SLOWEST = 7000, 70, 400  # milliseconds: of either part of a picture, and the bounds for a step

PANEL, MARGIN, GAP = 500, 12, 24
LINE, HEADER, LEGEND, PAD = 26, 66, 34, 3
SIZE = 15  # of the font
FONT, BOLD = "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf"

# Age of a position in steps up to which it has a colour; then masked ones, and the page.
AGES = (
    (0, "filled now", "#ff9d3c"),
    (2, "1-2 ago", "#ffc680"),
    (6, "3-6 ago", "#ffe6c4"),
    (None, "earlier", "#dcebfa"),
)
MASKED, PAGE = len(AGES), len(AGES) + 1
FILLS = (*(colour for *_, colour in AGES), "#d5dae0", "#ffffff")
INK, SHADES = "#1f2328", 10  # each colour is followed by its way to the ink, for the edges of text


def _palette() -> list[int]:
    found = []
    for fill in FILLS:
        pair = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (fill, INK)]
        found += [round(a + (b - a) * n / (SHADES - 1)) for n in range(SHADES) for a, b in zip(*pair, strict=True)]
    return found


PALETTE = _palette()


class Box(NamedTuple):
    """Place of a piece of a position's text."""

    x: int
    y: int
    width: int


@dataclass(slots=True)
class Recording:
    """The response after each step of one generation; an ``on_step`` callback."""

    title: str
    gen_length: int
    tokens: list[Sequence[int]] = field(default_factory=list)
    commit_step: list[Sequence[int]] = field(default_factory=list)

    def __call__(self, frame: Frame) -> None:
        start = len(frame.tokens[0]) - self.gen_length
        self.tokens.append(array("i", frame.tokens[0][start:]))  # a tenth of a list's memory
        self.commit_step.append(array("i", frame.commit_step[0][start:]))


def shown_steps(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return numbers of steps to show, ascending, with the milliseconds of each; ``counts`` are steps per panel.

    Steps that several panels take are shown at a pace of their own: the fastest has few of them, which would be over
    before anyone has looked. The last step of each panel is among them.
    """
    *_, second, last = sorted([0, *counts])
    found = [(0, FIRST)]
    for start, stop in pairwise((0, second, last)):
        stride = max(1, -(-(stop - start) // MOST_FRAMES))
        steps = {*range(start + stride, stop, stride), *(n for n in counts if start < n <= stop)}
        pace = min(SLOWEST, max(FASTEST, PLAY // max(1, len(steps)))) // 10 * 10  # GIF counts in hundredths
        found += [(step, pace) for step in sorted(steps)]
    return [*found[:-1], (found[-1][0], LAST)]


class Animation:
    """Draws recordings of one engine, two panels beside each other."""

    def __init__(self, engine: Engine, recordings: Sequence[Recording]):
        for each in recordings:
            require(bool(each.tokens), f"{each.title}: nothing was decoded, so there is no step to record")
        self._codec, self._ends, self._mask = engine.text, engine.spec.end_ids, engine.spec.mask_id
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._font, self._bold = (ImageFont.truetype(fonts / name, SIZE) for name in (FONT, BOLD))
        self._tiles: dict[tuple, Image.Image] = {}
        self.recordings = recordings
        self.boxes = [self._layout(each.tokens[-1]) for each in recordings]
        heights = [HEADER + LINE + max(box.y for boxes in panel for box in boxes) for panel in self.boxes]
        self._corners, top = [], MARGIN
        for row in range(0, len(recordings), 2):
            self._corners += [(MARGIN + n * (PANEL + GAP), top) for n in range(len(heights[row : row + 2]))]
            top += max(heights[row : row + 2]) + GAP
        columns = min(2, len(recordings))
        self._size = (2 * MARGIN + columns * PANEL + (columns - 1) * GAP, top - GAP + LEGEND + MARGIN)

    def save(self, path: Path) -> None:
        """Write the animation to ``path``, whole or not at all."""
        steps = shown_steps([len(each.tokens) for each in self.recordings])
        others = (self.frame(step) for step, _ in steps[1:])
        with whole_picture("record", path) as file:
            how = {"save_all": True, "duration": [ms for _, ms in steps], "loop": 0, "optimize": True}
            self.frame(steps[0][0]).save(file, "GIF", append_images=others, **how)

    def frame(self, step: int) -> Image.Image:
        """Draw all panels after ``step`` steps; a panel that has taken fewer is shown finished."""
        picture = Image.new("L", self._size, PAGE * SHADES)
        draw = ImageDraw.Draw(picture)
        for recording, boxes, (left, top) in zip(self.recordings, self.boxes, self._corners, strict=True):
            self._draw_panel(picture, draw, recording, boxes, left, top, step)
        self._draw_legend(picture, draw)
        picture.putpalette(PALETTE)
        return picture

    def _pieces(self, token: int) -> list[str]:
        """Return the text of a token, cut after newlines."""
        glyphs = Glyphs()
        if token in self._ends:
            return [glyphs.ended]
        return [readable(line, glyphs) for line in self._codec.piece(token).splitlines(keepends=True)] or [" "]

    def _layout(self, tokens: Sequence[int]) -> list[list[Box]]:
        """Place the pieces of each position in lines, relative to the panel's text."""
        x = y = 0
        found = []
        for token in tokens:
            boxes = []
            for piece in self._pieces(token):
                width = min(PANEL, 2 * PAD + round(self._font.getlength(piece)))
                if x + width > PANEL:
                    x, y = 0, y + LINE
                boxes.append(Box(x, y, width))
                x += width + 2
                if piece.endswith(Glyphs().newline):
                    x, y = 0, y + LINE
            found.append(boxes)
        return found

    def _draw_panel(self, picture, draw, recording, boxes, left: int, top: int, step: int) -> None:
        total = len(recording.tokens)
        taken = min(step, total)
        tokens, commits = [self._mask] * len(boxes), [-1] * len(boxes)
        if taken:
            tokens, commits = recording.tokens[taken - 1], recording.commit_step[taken - 1]
        looks = [self._look(token, at, step - 1) for token, at in zip(tokens, commits, strict=True)]
        filled = len(looks) - looks.count(MASKED)
        told = f"step {taken} of {total}" if taken < total else f"done in {total} step{'s' * (total > 1)}"
        wide = round(self._bold.getlength(told)) + 2 * PAD
        picture.paste(self._tile(recording.title, PANEL - wide - GAP, PAGE, self._bold), (left, top))
        picture.paste(self._tile(told, wide, PAGE if taken < total else 0, self._bold), (left + PANEL - wide, top))
        bar = (left, top + 34, left + PANEL - 1, top + 43)
        draw.rectangle(bar, fill=MASKED * SHADES)
        if filled:
            done = max(1, PANEL * filled // len(looks))
            draw.rectangle((*bar[:2], left + done - 1, bar[3]), fill=0)
        for token, look, places in zip(tokens, looks, boxes, strict=True):
            pieces = [] if look == MASKED else self._pieces(token)
            for n, box in enumerate(places):
                tile = self._tile(pieces[n] if n < len(pieces) else "", box.width, look, self._font)
                picture.paste(tile, (left + box.x, top + HEADER + box.y))

    def _look(self, token: int, committed: int, now: int) -> int:
        """Return the number of the colour of a position."""
        if committed < 0:
            return MASKED if token == self._mask else len(AGES) - 1  # filled after an end-of-text
        return next(n for n, (age, *_) in enumerate(AGES) if age is None or now - committed <= age)

    def _draw_legend(self, picture, draw) -> None:
        x, y = MARGIN, self._size[1] - LEGEND
        named = [("masked", MASKED), *((name, n) for n, (_, name, _) in enumerate(AGES))]
        for name, look in named:
            draw.rectangle((x, y + 5, x + 15, y + 20), fill=look * SHADES)
            tile = self._tile(name, round(self._font.getlength(name)) + 2 * PAD, PAGE, self._font)
            picture.paste(tile, (x + 18, y))
            x += 26 + tile.width
        ended = f"{Glyphs().ended} end of text"
        if x + self._font.getlength(ended) < self._size[0] - MARGIN:
            picture.paste(self._tile(ended, self._size[0] - MARGIN - x, PAGE, self._font), (x, y))

    def _tile(self, text: str, width: int, look: int, font: ImageFont.FreeTypeFont) -> Image.Image:
        """Draw a piece of text on one colour; drawn once, since most cells look alike in many frames."""
        key = text, width, look, font is self._bold
        if key not in self._tiles:
            drawn = Image.new("L", (width, LINE - 2), 0)
            ImageDraw.Draw(drawn).text((PAD, (LINE - 2) // 2), text, fill=255, font=font, anchor="lm")
            self._tiles[key] = drawn.point([look * SHADES + v * (SHADES - 1) // 255 for v in range(256)])
        return self._tiles[key]
