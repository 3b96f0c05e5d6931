"""The text of one PTX kernel as statements, each with its line, its source lines and the registers in its scope."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SHARED_BASE = 1024  # as machine.h has it
BITS = {
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "tf32": 32, "e4m3x2": 16, "pred": 1},
}


class Unsupported(Exception):
    """PTX that the executor does not know."""


@dataclass(frozen=True)
class Register:
    number: int  # among predicates, or among all others
    bits: int

    @property
    def slot_bits(self) -> int:
        return max(self.bits, 32)


@dataclass
class Statement:
    text: str
    guard: str | None  # "%p1" or "!%p1"
    name: str
    arguments: list[str]
    line: int
    source: str  # "innermost.py:3 < caller.py:7"
    scope: Mapping[str, Register]


@dataclass
class Function:
    name: str = ""
    threads: int = 32
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, size
    symbols: dict[str, int] = field(default_factory=dict)  # address in shared memory
    shared_bytes: int = 0
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    n_predicates: int = 2  # number 0 is always false, number 1 always true


def split_arguments(text: str) -> list[str]:
    """Split at commas outside brackets."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(ptx: str) -> Function:
    """Parse the only ``.entry`` of ``ptx``."""
    lines = ptx.splitlines()
    entry = next(number for number, line in enumerate(lines) if ".entry" in line)
    body = next(number for number in range(entry, len(lines)) if lines[number].strip().startswith("{"))
    function = Function(re.search(r"\.entry\s+(\w+)", lines[entry])[1])
    for align, name, size in re.findall(
        r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]", "\n".join(lines[:entry])
    ):
        start = -(-function.shared_bytes // int(align)) * int(align)
        function.symbols[name] = SHARED_BASE + start
        function.shared_bytes = start + int(size or 0)
    head, offset = "\n".join(lines[entry:body]), 0
    for kind, name in re.findall(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.\w+)?(?:\s+\.align\s+\d+)?\s+(\w+)", head):
        size = BITS[kind] // 8
        offset = -(-offset // size) * size
        function.parameters[name] = offset, size
        offset += size
    if threads := re.search(r"\.(?:req|max)ntid\s+(\d+)", head):
        function.threads = int(threads[1])
    _statements(function, lines, body + 1, dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)))
    return function


def _statements(function: Function, lines: list[str], first: int, files: dict[str, str]) -> None:
    scopes: list[dict[str, Register]] = [{}]
    source = Source(files)
    for line, text in _pieces(lines, first):
        if text == "{":
            scopes.append({})
        elif text == "}":
            scopes.pop()
            if not scopes:
                return
        elif text.startswith(".loc"):
            source.move(text)
        elif text.startswith(".reg"):
            _declare(function, text, scopes[-1])
        elif text.endswith(":"):
            function.labels[text[:-1]] = len(function.statements)
        elif not text.startswith("."):
            guard, name, arguments = re.fullmatch(
                r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL
            ).groups()
            scope = ChainMap(*reversed(scopes)) if scopes[1:] else scopes[0]
            statement = Statement(text, guard, name, split_arguments(arguments), line, source.text, scope)
            function.statements.append(statement)


def _pieces(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """Braces, labels, and what ends in a semicolon or is a line of ``.loc``; with the line where it starts."""
    pending = ""
    for number in range(first, len(lines)):
        text = lines[number].split("//")[0].strip()
        if text.startswith(".loc"):
            yield number + 1, text
            continue
        if not pending:
            start = number + 1
        text = f"{pending} {text}".strip()
        while piece := re.match(r"[{}]|[$\w]+:(?!:)|[^;]+;", text):
            yield start, piece[0].rstrip(";").strip()
            text, start = text[piece.end() :].strip(), number + 1
        pending = text


def _declare(function: Function, text: str, scope: dict[str, Register]) -> None:
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
    for name in names.split(","):
        stem, count = re.fullmatch(r"\s*([%\w$]+)(?:<(\d+)>)?\s*", name).groups()
        for each in [stem] if count is None else [f"{stem}{index}" for index in range(int(count))]:
            if kind == "pred":
                scope[each] = Register(function.n_predicates, 1)
                function.n_predicates += 1
            else:
                scope[each] = Register(len(function.registers), BITS[kind])
                function.registers.append(scope[each])


class Source:
    """The source line that ``.loc`` names, and the lines that it was inlined at."""

    def __init__(self, files: dict[str, str]):
        self._files = {number: Path(path).name for number, path in files.items()}
        self._callers: dict[tuple, tuple] = {}
        self.text = ""

    def move(self, loc: str) -> None:
        numbers = re.match(
            r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,\s*function_name\s+\S+,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?", loc
        ).groups()
        place, caller = numbers[:3], numbers[3:]
        if caller[0]:
            self._callers[place] = caller
        else:
            self._callers.pop(place, None)
        chain: dict[str, None] = {}
        seen = set()
        while place and place not in seen:
            seen.add(place)
            chain[f"{self._files.get(place[0], '?')}:{place[1]}"] = None
            place = self._callers.get(place)
        self.text = " < ".join(chain)
