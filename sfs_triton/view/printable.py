"""Make text of models, files and errors safe for terminals."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
HARMLESS = "\n\t\u200c\u200d"  # the last two join and separate characters, as Persian and emoji need


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
