"""Measure how much code one generation enters and how the repository is laid out: ``python -m bench.common.footprint``.

One ``Engine.generate`` of the embedded model runs under a profiler. All else is read from syntax trees; imports by
``importlib`` are not seen. A room of the package is a module or folder at its top, or a folder in ``integrations``;
elsewhere a room is a folder. Floors are the rooms on the longest chain of imports.
"""

from __future__ import annotations

import argparse
import ast
import enum
import importlib
import inspect
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from bench import ROOT

PACKAGE, KERNELS = "sfs_triton", "kernels"  # kernels/triton/ is installed as sfs_triton.kernels
TOPS = (PACKAGE, KERNELS, "bench", "tests")
LONGEST_FUNCTION, LONGEST_PAGE = 60, 1200  # lines, words
ALL, ASKING = "docstrings (tests excluded)", "docstrings that open with a question word"
QUESTION = re.compile(r"(What|Whether|Who|How|Which|Where)\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Graph = dict[str, set[str]]


class Source(NamedTuple):
    """A Python file: its path from the root, its dotted module name, its room and its syntax tree."""

    path: str
    name: str
    room: str
    lines: int
    tree: ast.Module


def sources(root: Path) -> list[Source]:
    """Parse the Python files below the four top folders."""
    found = []
    for path in sorted(path for top in TOPS for path in (root / top).rglob("*.py")):
        *folders, file = path.relative_to(root).parts
        if folders[:2] == [KERNELS, "triton"]:
            folders[:2] = [PACKAGE, KERNELS]
        parts = folders + ([] if file == "__init__.py" else [file.removesuffix(".py")])
        room = "/".join(folders[:2])
        if folders[0] == PACKAGE:
            room = "/".join(folders[1:3] if folders[1:2] == ["integrations"] else parts[1:2]) or "__init__"
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        found.append(Source(name, ".".join(parts), room, len(text.splitlines()), ast.parse(text)))
    return found


def _imports(node: ast.AST, where: str = "module") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Yield every import and where it stands: in a ``module``, a ``function``, or ``typing`` (``if TYPE_CHECKING``)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, where
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(ast.Module(child.body, []), "typing")
            yield from _imports(ast.Module(child.orelse, []), where)
        else:
            yield from _imports(child, "function" if isinstance(child, FUNCTIONS) and where == "module" else where)


def _targets(node: ast.Import | ast.ImportFrom, source: Source) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    up = node.level - source.path.endswith("__init__.py")  # the "." of a package is the package itself
    base = source.name.split(".")[: -up or None] if node.level else []
    return [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]


def edges(package: list[Source], by: str) -> set[tuple[str, str, str]]:
    """Collect (importer, imported, where) triples; ``by`` is the field that names a node, ``"room"`` or ``"name"``."""
    node_of = {source.name: getattr(source, by) for source in package}
    found = set()
    for source in package:
        for node, where in _imports(source.tree):
            for target in _targets(node, source):
                while target and target not in node_of:  # a class or function: its module is imported
                    target = target.rpartition(".")[0]
                if target and node_of[target] != node_of[source.name]:
                    found.add((node_of[source.name], node_of[target], where))
    return found


def _reach(graph: Graph) -> Graph:
    reached = {}
    for start in graph:
        found, left = set(), list(graph[start])
        while left:
            if (node := left.pop()) not in found:
                found.add(node)
                left += graph[node]
        reached[start] = found
    return reached


def circles(graph: Graph) -> list[list[str]]:
    """List the groups of nodes that import each other, directly or through others."""
    reached = _reach(graph)
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def longest_chain(graph: Graph) -> list[str]:
    """List the nodes of a longest chain of imports, the top first. A circle takes one place in it."""
    reached = _reach(graph)

    @cache
    def chain(top: str) -> list[str]:
        lower = (chain(node) for node in sorted(reached[top]) if top not in reached[node])
        return [top, *max(lower, key=len, default=[])]

    return max((chain(node) for node in sorted(graph)), key=len, default=[])


def layout(files: list[Source]) -> dict[str, Any]:
    """List the package's rooms, floors and circles, without and with the imports in functions."""
    package = [source for source in files if source.name.split(".")[0] == PACKAGE]
    record: dict[str, Any] = {"rooms": sorted({source.room for source in package})}
    for by, nodes in (("room", "rooms"), ("name", "modules")):
        found = edges(package, by)
        for places, note in ((("module",), ""), (("module", "function"), ", imports in functions included")):
            graph: Graph = {getattr(source, by): set() for source in package}
            for importer, imported, where in found:
                if where in places:
                    graph[importer].add(imported)
            if by == "room":
                record[f"floors{note}"] = longest_chain(graph)
            record[f"import circles between {nodes}{note}"] = [" <-> ".join(circle) for circle in circles(graph)]
        if by == "room":
            for where, title in (("module", ""), ("function", " in functions"), ("typing", " for types only")):
                pairs = sorted(f"{a} -> {b}" for a, b, at in found if at == where)
                record[f"imports between rooms{title}"] = pairs
    return record


def prose(files: list[Source], docs: Path) -> dict[str, Any]:
    """Find long functions, docstrings that open with a question word and long pages; count lines by room."""
    long, asking, total = [], [], 0
    columns = ("files", "lines", "long functions", "question docstrings")
    rooms = {source.room: dict.fromkeys(columns, 0) for source in files}
    for source in files:
        room = rooms[source.room]
        room["files"] += 1
        room["lines"] += source.lines
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS) and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                room["long functions"] += 1
                long.append(f"{source.path}:{node.lineno} {node.name}, {lines} lines")
            documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node)
            if documented and not source.path.startswith("tests/"):
                total += 1
                if QUESTION.match(documented):
                    room["question docstrings"] += 1
                    asking.append(f"{source.path}:{node.body[0].lineno} {documented.splitlines()[0]}")
    pages = {page.relative_to(docs).as_posix(): len(page.read_text("utf-8").split()) for page in docs.rglob("*.md")}
    ordered = sorted(pages, key=pages.get, reverse=True)
    return {
        f"functions over {LONGEST_FUNCTION} lines": long,
        ALL: total,
        ASKING: asking,
        "longest page in docs, words": max(pages.values(), default=0),
        f"pages over {LONGEST_PAGE:,} words": [f"{p}, {pages[p]:,}" for p in ordered if pages[p] > LONGEST_PAGE],
        "by room": rooms,
    }


class Trace:
    """Record the files, functions and types of a package that a call uses.

    Functions are those with a ``def``: comprehensions are calls up to Python 3.11 only, and class bodies run at import.
    Types are classes defined in the package of which the call makes an instance. Their ``__new__`` stays wrapped, so
    use a process of its own.
    """

    def __init__(self, package: str, folders: Iterable[Path]):
        self._package, self._folders = package, tuple(f"{folder}{os.sep}" for folder in folders)
        self.files: set[str] = set()
        self.functions: set[str] = set()
        self.types: set[str] = set()

    def run(self, call: Callable[[], Any]) -> None:
        """Call once, under the profiler in this thread and in those that it starts."""
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == self._package:
                self._wrap_classes(module)
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            call()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._folders):
            return
        if code.co_name == "<module>":  # imported by the call; its classes exist once its body has run
            if event == "return":
                self._wrap_classes(sys.modules[frame.f_globals["__name__"]])
        elif event == "call" and code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<"):
            self.files.add(code.co_filename)
            self.functions.add(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}")

    def _wrap_classes(self, module: ModuleType) -> None:
        for cls in list(vars(module).values()):
            # calling an enum looks a member up
            if isinstance(cls, type) and cls.__module__ == module.__name__ and not issubclass(cls, enum.Enum):
                cls.__new__ = self._counting(cls.__new__)

    def _counting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def new(cls: type, *args: Any, **options: Any) -> Any:
            self.types.add(f"{cls.__module__}.{cls.__qualname__}")
            return make(cls) if make is object.__new__ else make(cls, *args, **options)

        return new


def generation(root: Path) -> dict[str, Any]:
    """Trace the first generation of an engine. Loading it is not counted."""
    sys.path.insert(0, str(root))
    package = importlib.import_module(PACKAGE)
    if not Path(package.__file__).is_relative_to(root):
        raise RuntimeError(f"{PACKAGE} was imported from {package.__file__}, not from {root}")
    engine = package.load("embedded", "cpu")
    trace = Trace(PACKAGE, (root / PACKAGE, root / KERNELS / "triton"))
    trace.run(lambda: engine.generate("15,44,79,50", gen_length=32))
    below = len(f"{root}{os.sep}")
    return {
        "files entered by one generate": sorted(file[below:] for file in trace.files),
        "functions called": sorted(function[below:] for function in trace.functions),
        "package types built": sorted(trace.types),
    }


def table(record: dict[str, Any], listed: bool) -> str:
    """Format a record; ``listed``: with the members of every count."""
    lines = []
    for title, value in record.items():
        if title == "by room":
            continue
        share = f" ({len(value) / record[ALL]:.1%})" if title == ASKING and record[ALL] else ""
        lines.append(f"{title:<66}{len(value) if isinstance(value, list) else value:>7,}{share}")
        if isinstance(value, list) and (listed or "circle" in title or "pages" in title):
            lines += [f"    {member}" for member in value]
    rooms = record["by room"]
    columns = next(iter(rooms.values()), ())
    lines += ["", f"{'room':<24}" + "".join(f"{column:>21}" for column in columns)]
    lines += [f"{room:<24}" + "".join(f"{rooms[room][column]:>21,}" for column in columns) for room in sorted(rooms)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure; default: this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record, with all members, to FILE")
    parser.add_argument("--list", action="store_true", help="print the members of every count")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    files = sources(root)
    record = {**generation(root), **layout(files), **prose(files, root / "docs")}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record, args.list))


if __name__ == "__main__":
    main()
