"""The counters of the footprint, on small trees whose counts are known."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.common import footprint
from tests.support.paths import ROOT

LONG = "def long():\n" + "    pass\n" * 60

TREE = {
    "sfs_triton/__init__.py": "from .top import run\n\n\ndef __getattr__(name):\n    from .integrations.lib import x\n",
    "sfs_triton/top.py": "from typing import TYPE_CHECKING\nfrom .middle import rules, part\n"
    "if TYPE_CHECKING:\n    from .loose import Type\nelse:\n    import json\n",
    "sfs_triton/middle/__init__.py": "",
    "sfs_triton/middle/rules.py": "from ..kernels.add import add\nfrom . import part\n",
    "sfs_triton/middle/part.py": "def late():\n    from .rules import x\n    import sfs_triton.loose\n",
    "sfs_triton/kernels.py": "",
    "kernels/triton/add.py": "from .mul import mul\n",
    "kernels/triton/mul.py": LONG,
    "sfs_triton/loose.py": "",
    "sfs_triton/integrations/__init__.py": "",
    "sfs_triton/integrations/lib/__init__.py": "from ... import __version__\n",
    "sfs_triton/integrations/lib/deep/__init__.py": "from ....top import run\n",
    "bench/gpu/run.py": "import sfs_triton.top\n",
    "tests/test_x.py": LONG,
}


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_rooms_floors_and_circles(tmp_path):
    found = footprint.layout(footprint.sources(_write(tmp_path, TREE)))
    assert found["rooms"] == ["__init__", "integrations", "integrations/lib", "kernels", "loose", "middle", "top"]
    assert found["imports between rooms"] == [
        "__init__ -> top",
        "integrations/lib -> __init__",
        "integrations/lib -> top",
        "middle -> kernels",
        "top -> middle",
    ]
    assert found["imports between rooms in functions"] == ["__init__ -> integrations/lib", "middle -> loose"]
    assert found["imports between rooms for types only"] == ["top -> loose"]
    assert found["floors"] == ["integrations/lib", "__init__", "top", "middle", "kernels"]
    assert found["import circles between rooms"] == found["import circles between modules"] == []
    wide = ", imports in functions included"
    assert found[f"floors{wide}"] == ["__init__", "top", "middle", "kernels"]  # the circle is one floor
    assert found[f"import circles between rooms{wide}"] == ["__init__ <-> integrations/lib"]
    assert found[f"import circles between modules{wide}"] == [
        "sfs_triton <-> sfs_triton.integrations.lib",
        "sfs_triton.middle.part <-> sfs_triton.middle.rules",
    ]


def test_longest_chain_and_circles_of_a_graph():
    graph = {"a": {"b", "c"}, "b": {"d"}, "c": {"b"}, "d": {"e", "f"}, "e": {"d"}, "f": set(), "g": {"g"}}
    assert footprint.circles(graph) == [["d", "e"], ["g"]]
    assert footprint.longest_chain(graph) == ["a", "c", "b", "d", "f"]
    assert footprint.circles({}) == footprint.longest_chain({}) == []


def test_lengths_docstrings_and_pages(tmp_path):
    asking = """'What it is.'


class A:
    'Whatever.'

    def f(self):
        'Who calls.'
"""
    files = {
        "sfs_triton/a.py": asking,
        "sfs_triton/b.py": LONG.replace("    pass\n", "", 1),
        "tests/test_a.py": '"""How it goes."""\n',
        "docs/long.md": "word " * 1201,
        "docs/sub/short.md": "word " * 1200,
    }
    found = footprint.prose(footprint.sources(_write(tmp_path, {**TREE, **files})), tmp_path / "docs")
    assert found["functions over 60 lines"] == [
        "kernels/triton/mul.py:1 long, 61 lines",
        "tests/test_x.py:1 long, 61 lines",
    ]
    assert found["docstrings (tests excluded)"] == 3
    assert found["docstrings that open with a question word"] == [
        "sfs_triton/a.py:1 What it is.",
        "sfs_triton/a.py:8 Who calls.",
    ]
    assert found["longest page in docs, words"] == 1201 and found["pages over 1,200 words"] == ["long.md, 1,201"]
    assert found["by room"]["kernels"] == {"files": 3, "lines": 62, "long functions": 1, "question docstrings": 0}
    assert found["by room"]["middle"] == {"files": 3, "lines": 5, "long functions": 0, "question docstrings": 0}
    assert found["by room"]["tests"] == {"files": 2, "lines": 62, "long functions": 1, "question docstrings": 0}
    assert found["by room"]["bench/gpu"]["files"] == found["by room"]["a"]["files"] == 1
    assert found["by room"]["a"]["question docstrings"] == 2


TRACED = {
    "__init__.py": "",
    "types.py": """
import enum, threading
from dataclasses import dataclass
from typing import NamedTuple

class Base:
    def __init__(self, x): self.x = x
class Plain: pass
class Child(Base): pass
class Unused: pass
class Pair(NamedTuple):
    x: int
@dataclass(frozen=True, slots=True)
class Frozen:
    x: int
class Level(enum.Enum):
    LOW = 1
class Threaded: pass
EARLY = Base(0)

def work():
    assert Pair(1) == (1,) and Frozen(2).x == 2 and Level(1) is Level.LOW and Child(3).x == 3
    Plain(), [i for i in range(3)], (lambda: 0)()
    thread = threading.Thread(target=other); thread.start(); thread.join()
    from . import late
    return late.Late(EARLY).x.x

def other(): Threaded()
def unused(): Unused()
""",
    "late.py": "from .types import Base\nclass Late(Base):\n    def __init__(self, x): super().__init__(x)\n",
    "unused.py": "",
}


def test_trace_counts_files_functions_and_types(tmp_path, monkeypatch):
    package = _write(tmp_path / "traced_package", TRACED)
    monkeypatch.syspath_prepend(tmp_path)
    types = importlib.import_module("traced_package.types")
    trace = footprint.Trace("traced_package", [package])
    found = []
    trace.run(lambda: found.append(types.work()))
    assert found == [0] and sys.getprofile() is None
    assert {Path(file).name for file in trace.files} == {"types.py", "late.py"}
    assert sorted(function.split(" ")[1] for function in trace.functions) == ["__init__", "__init__", "other", "work"]
    names = {name.rpartition(".")[2] for name in trace.types}
    assert names == {"Plain", "Child", "Pair", "Frozen", "Threaded", "Late"}


ENGINE = """
class Engine:
    def generate(self, prompt, gen_length): return Result(prompt, gen_length)
class Result:
    def __init__(self, *args): assert args == ("15,44,79,50", 32)
def load(name, device):
    assert (name, device) == ("embedded", "cpu")
    return Engine()
"""


def _command(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.common.footprint", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_command_measures_another_checkout(tmp_path):
    _write(tmp_path, {**TREE, "sfs_triton/__init__.py": ENGINE, "docs/a.md": "a b c"})
    done = _command("--root", tmp_path, "--json", tmp_path / "record.json")
    assert not done.returncode, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["files entered by one generate"] == ["sfs_triton/__init__.py"]
    assert record["functions called"] == ["sfs_triton/__init__.py:3 generate", "sfs_triton/__init__.py:5 __init__"]
    assert record["package types built"] == ["sfs_triton.Result"]
    shown = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("package", "rooms")))
    assert shown == {"package types built": "1", "rooms": "7"}
    assert "sfs_triton.Result" not in done.stdout
    assert "sfs_triton.Result" in _command("--root", tmp_path, "--list").stdout


def test_package_of_another_checkout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(RuntimeError, match=f"not from {tmp_path}"):
        footprint.generation(tmp_path)


def test_this_checkout(tmp_path):
    done = _command("--json", tmp_path / "record.json")
    assert not done.returncode, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["package types built"]) > 3 and len(record["rooms"]) > 3
    files = record["files entered by one generate"]
    assert len(files) > 3 and all((ROOT / file).is_file() for file in files)
    assert record["longest page in docs, words"] > 0 and "kernels" in record["by room"]
