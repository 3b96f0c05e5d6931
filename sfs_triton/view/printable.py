"""Make text of models, files and errors safe for terminals and pictures."""

from __future__ import annotations

import json
import unicodedata
from typing import Any, NamedTuple

UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
HARMLESS = "\n\t\u200c\u200d"  # the last two join and separate characters, as Persian and emoji need


class Glyphs(NamedTuple):
    """Symbols for positions without text."""

    inside: str = "•"
    outside: str = "·"
    newline: str = "↵"
    ended: str = "∎"
    unknown: str = "\N{REPLACEMENT CHARACTER}"
    opening: str = "⟦"
    closing: str = "⟧"


ASCII = Glyphs("o", ".", "$", "#", "?", "[", ")")


def readable(text: str, glyphs: Glyphs) -> str:
    """Return ``text`` on one line, with newline, control and direction characters replaced."""
    shown = []
    for character in text:
        if character == "\n":
            shown.append(glyphs.newline)
        elif unicodedata.category(character) in UNSAFE:
            shown.append(" " if character == "\t" else glyphs.unknown)
        elif glyphs is ASCII and not character.isascii():
            shown.append(glyphs.unknown)
        else:
            shown.append(character)
    return "".join(shown) or glyphs.unknown


def printable(text: str) -> str:
    """Replace the characters of ``text`` that could control a terminal; newlines and tabs are kept."""
    return "".join(
        c if c in HARMLESS or unicodedata.category(c) not in UNSAFE else "\N{REPLACEMENT CHARACTER}"
        for c in text
        if c != "\r"
    )


def printable_json(value: dict[str, Any]) -> str:
    """Return a JSON object on one line, with escapes for the characters that :func:`printable` replaces."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if unicodedata.category(c) not in UNSAFE else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
