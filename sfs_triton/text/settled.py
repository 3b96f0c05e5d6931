"""Text of an answer while it is decoded: the part that later steps cannot change."""

from __future__ import annotations

from collections.abc import Sequence

from .codec import UNFINISHED, TextCodec


class SettledText:
    """Text of the leading decided tokens, cut at the first stop: a complete string, or a special token of that name."""

    def __init__(self, codec: TextCodec, stops: Sequence[str] = ()):
        special = codec.special_ids() if stops else {}
        self._codec, self._stops = codec, stops
        self._stop_ids = {special[stop] for stop in stops if stop in special}
        self.text, self.stopped_at = "", None  # so far; number of tokens up to a stop
        self._given = 0  # characters returned

    def take(self, tokens: Sequence[int], final: bool) -> str:
        """Return the new text that can be shown. ``tokens``: all tokens so far; ``final``: no more will follow.

        Text that later tokens could change is held back: an incomplete character, a run of byte tokens, the start of a
        stop string.
        """
        at = next((index for index, token in enumerate(tokens) if token in self._stop_ids), None)
        tokens, final = tokens[:at], final or at is not None
        text = self._decode(tokens, final)
        end = min(((text.find(s) + len(s), text.find(s)) for s in self._stops if s in text), default=None)
        if end is not None:
            self.stopped_at = self._tokens_until(tokens, end[0])
            text = text[: end[1]]
        elif at is not None:
            self.stopped_at = at + 1
        elif not final:
            text = text[: len(text) - self._begun(text)]
        new, self.text, self._given = text[self._given :], text, max(self._given, len(text))
        return new

    def covered(self, tokens: Sequence[int], final: bool) -> int:
        """Count the leading tokens whose text :meth:`take` has returned."""
        if final and self.stopped_at is None:
            return len(tokens)
        return self._tokens_until(tokens, len(self.text)) if self.text else 0

    def _decode(self, tokens: Sequence[int], final: bool) -> str:
        """Decode tokens, without what later ones could change unless they are ``final``."""
        if final:
            return self._codec.decode(tokens)
        return self._codec.decode(tokens[: self._closed(tokens)]).rstrip(UNFINISHED)

    def _closed(self, tokens: Sequence[int]) -> int:
        """Count the tokens before a last run of byte tokens: one invalid byte makes all of a run invalid.

        Tokens without a text, as special ones, do not end a run.
        """
        count = len(tokens)
        if bytes_of := self._codec.byte_ids:
            while count and (tokens[count - 1] in bytes_of or not self._codec.decode(tokens[count - 1 : count])):
                count -= 1
        return count

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
            if len(self._decode(tokens[:middle], False)) >= end:
                high = middle
            else:
                low = middle + 1
        return low
