"""Files that are written whole or not at all, tables in Markdown, and parts of pages between markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def marked(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between its markers of ``name``.

    Raises:
        ValueError: it has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not closed:
        raise ValueError(f"no marker {begin!r} with {end!r} after it")
    return head + begin + "\n" + part + end + tail


def write_doc(page: Path, name: str, render: Callable[[], str]) -> None:
    """Replace the text between the page's markers of ``name`` by the result of ``render``."""
    try:
        marked(page.read_text(encoding="utf-8"), name, "")  # refused before anything is rendered
        replace_file(page, marked(page.read_text(encoding="utf-8"), name, render()))
    except OSError as error:
        raise SystemExit(f"error: --write-doc {page}: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"error: --write-doc {page}: {error}") from None
