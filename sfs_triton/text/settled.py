"""Text of an answer while it is decoded: the part that later steps cannot change."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import UNFINISHED, TextCodec


class SettledText:
    """Text of the leading decided tokens, cut at the first complete stop string."""

    def __init__(self, codec: TextCodec, stops: Sequence[str] = ()):
        self._codec, self._stops = codec, stops
        self.text, self.stopped_at = "", None  # returned so far; number of tokens up to a stop string

    def take(self, tokens: Sequence[int], final: bool) -> str:
        """Return the new text that can be shown. ``tokens``: all tokens so far; ``final``: no more will follow.

        Text that later tokens could change is held back: an incomplete character, the start of a stop string.
        """
        text = self._codec.decode(tokens)
        end = min(((text.find(s) + len(s), text.find(s)) for s in self._stops if s in text), default=None)
        if end is not None:
            self.stopped_at = self._tokens_until(tokens, end[0])
            text = text[: end[1]]
        elif not final:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - self._begun(text)]
        if not text.startswith(self.text):  # bytes that have just proved to be an invalid or incomplete character
            return ""
        new = text[len(self.text) :]
        self.text = text
        return new

    def _begun(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a prefix of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def _tokens_until(self, tokens: Sequence[int], end: int) -> int:
        """Count the tokens that cover the first ``end`` characters."""
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if len(self._codec.decode(tokens[:middle]).rstrip(UNFINISHED)) >= end:
                high = middle
            else:
                low = middle + 1
        return low
