"""The package: its exports, its imports, and its optional dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sfs_triton
from tests.support.paths import ROOT

PACKAGE = ROOT / "sfs_triton"
BENCH = ROOT / "bench"
KERNELS = ROOT / "kernels" / "triton"

# The house plan: each room of the package, and the rooms that it may import. ``__init__`` is the package's own file.
ROOMS = {
    "errors": (),
    "version": (),
    "kernels": (),
    "files": ("errors",),
    "gguf_file": ("errors",),
    "distributed": ("errors",),
    "text": ("files", "errors"),
    "ops": ("kernels", "distributed", "errors"),
    "models": ("ops", "distributed", "gguf_file", "files", "errors"),
    "decoding": ("models", "ops", "kernels", "errors"),
    "runner": ("decoding", "models", "kernels", "errors"),
    "cards": ("runner", "decoding", "models", "ops"),
    "scheduling": ("runner", "decoding", "models", "text", "kernels", "errors"),
    "self_check": (
        *("scheduling", "runner", "decoding", "models", "ops", "kernels", "distributed", "files", "version", "errors"),
    ),
    "checkpoint": ("models", "text", "gguf_file", "files", "errors"),
    "engine": (
        *("self_check", "checkpoint", "scheduling", "runner", "decoding", "models", "ops", "text", "distributed"),
        "errors",
    ),
    "view": ("engine", "scheduling", "decoding", "files", "errors"),
    "batch": ("engine", "decoding", "text", "files", "errors"),
    "serve": (
        *("engine", "scheduling", "runner", "decoding", "models", "ops", "text", "distributed", "version", "errors"),
    ),
    "chat": ("view", "engine", "scheduling", "decoding", "text", "files", "errors"),
    "integrations": (),
    "integrations/lm_eval": ("engine", "scheduling", "decoding", "text", "distributed", "version", "errors"),
    "integrations/ray": ("batch", "serve", "engine", "errors"),
    "integrations/transformers": (
        *("engine", "self_check", "checkpoint", "scheduling", "runner", "decoding", "models", "ops", "text"),
        *("distributed", "errors"),
    ),
    "__init__": ("integrations", "integrations/transformers", "engine", "scheduling", "decoding", "version", "errors"),
    "cli": (
        *("integrations", "integrations/lm_eval", "integrations/ray"),
        *("chat", "batch", "serve", "view", "engine", "checkpoint", "self_check", "runner", "cards", "decoding"),
        *("models", "ops", "text", "distributed", "files", "version", "errors"),
    ),
}
BENCH_ROOMS = {
    "__init__": (),
    "common": ("__init__",),
    "embedded": ("common", "__init__"),
    "eval": ("embedded",),
    "baselines": (),
    "shapes": ("embedded",),
    "kernels": ("shapes", "common", "__init__"),
    "cost": ("shapes", "baselines", "common", "__init__"),
    "quality": ("cost", "embedded", "common"),
    "server": ("common", "__init__"),
    "gpu": ("quality", "cost", "kernels", "shapes", "common", "__init__"),
    "report": ("gpu", "cost", "shapes", "baselines", "common", "__init__"),
    "throughput": ("quality", "cost", "shapes", "embedded", "common"),
    "test_speed": ("quality", "baselines"),
    "all": ("common", "__init__"),
}
TABLES = {PACKAGE: ROOMS, BENCH: BENCH_ROOMS}


def test_exports_are_pinned():
    assert sorted(sfs_triton.__all__) == [
        "ArgumentError",
        "BackendError",
        "CheckpointError",
        "Credit",
        "DelayedCache",
        "DeviceFault",
        "DualCache",
        "Engine",
        "EntropyBound",
        "FixedSteps",
        "Frame",
        "Generation",
        "Hierarchy",
        "KLASS",
        "Likelihood",
        "LikelihoodParams",
        "LocalLeap",
        "LoopTimeout",
        "MissingDependencyError",
        "MultiBlock",
        "NoCache",
        "NumericalFault",
        "OutOfDeviceMemory",
        "Pending",
        "PrefixCache",
        "RankFailure",
        "RefreshCache",
        "RegionCache",
        "Sampler",
        "SfsError",
        "SlowFast",
        "StepCapExceeded",
        "StepTrace",
        "Stream",
        "Threshold",
        "UnsupportedConfigError",
        "WINO",
        "load",
    ]
    assert all(hasattr(sfs_triton, name) for name in sfs_triton.__all__)


def test_imports_with_neither_triton_nor_transformers():
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'typer', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "import sfs_triton\n"
        "print(sfs_triton.load('embedded', 'cpu').generate('15,44,79,50', gen_length=8).nfe > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_no_top_level_kernels_package():
    """A module named ``kernels`` would shadow the Hugging Face package of that name for all who start Python here."""
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 or done.stdout.strip() == "None"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _imports(path: Path, package: str) -> set[str]:
    """Absolute names of everything a file imports; ``package`` is its own package, for relative imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def _room(module: str, top: Path) -> str | None:
    """Return the room of ``top`` that a module belongs to; None for modules of other packages."""
    parts = module.split(".")
    if parts[0] != top.name:
        return None
    exists = len(parts) > 1 and ((top / parts[1]).is_dir() or (top / f"{parts[1]}.py").exists())
    if not exists:
        return "__init__"
    if parts[1] == "integrations" and len(parts) > 2 and parts[2] != "__init__":
        return "/".join(parts[1:3])
    return parts[1]


def _sources() -> list[tuple[Path, str, str, Path]]:
    """Return the top folder, the room, the package and the path of every file."""
    rows = []
    for top in TABLES:
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            rows.append((top, _room(".".join((top.name, *parts)), top), ".".join((top.name, *parts[:-1])), path))
    return rows


def _imported_rooms(path: Path, package: str, top: Path) -> set[str]:
    """Return the rooms of ``top`` that a file imports from; ``__init__`` where a name is in no module of it."""
    return {_room(module, top) for module in _imports(path, package) if module != top.name} - {None}


@pytest.mark.parametrize(
    ("top", "room", "package", "path"), _sources(), ids=lambda v: v.name if isinstance(v, Path) else ""
)
def test_files_import_only_what_their_room_may(top, room, package, path):
    rooms = TABLES[top]
    assert room in rooms, f"{path.name} is in no room of {top.name}/: add {room!r} to its table"
    wrong = _imported_rooms(path, package, top) - {room, *rooms[room]}
    assert not wrong, f"{path.name} of {room!r} imports {sorted(wrong)}"


@pytest.mark.parametrize("top", TABLES, ids=lambda top: top.name)
def test_imports_point_down(top):
    """A room may import only rooms that stand above it in the table, so there is no circle."""
    rooms = list(TABLES[top])
    for index, (room, below) in enumerate(TABLES[top].items()):
        assert set(below) <= set(rooms[:index]), room


def test_integrations_import_neither_each_other_nor_the_command_line():
    for room, below in ROOMS.items():
        if room.startswith("integrations/"):
            assert not {other for other in below if other == "cli" or other.startswith("integrations")}, room


def test_tests_have_the_folders_of_the_rooms():
    """Test modules are in a folder per room, and import helpers, never each other."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert {path.parent.name for path in paths} <= {*ROOMS, "bench", "fuzz", "project", "ptx"}
    for path in paths:
        imported = _imports(path, f"tests.{path.parent.name}")
        wrong = [name for name in imported if name.startswith("tests.") and ".test_" in name]
        assert not wrong, f"{path} imports {wrong}"


def test_an_unknown_module_has_no_room(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from .engine import load\nfrom .nowhere import x\nimport sfs_triton.decoding.samplers\n")
    assert _imported_rooms(path, "sfs_triton", PACKAGE) == {"engine", "__init__", "decoding"}


def test_each_integration_is_a_room(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from ..integrations import ray\nfrom ..integrations.lm_eval.costs import Costs\n")
    assert _imported_rooms(path, "sfs_triton.cli", PACKAGE) == {
        "integrations",
        "integrations/ray",
        "integrations/lm_eval",
    }


def test_kernels_import_only_torch_triton_and_siblings():
    allowed = {
        "torch",
        "triton",
        "__future__",
        "dataclasses",
        "typing",
        "math",
        "functools",
        "os",
        "contextlib",
        "struct",
        "enum",
        "collections",
        "sfs_triton.kernels",
    }
    for path in KERNELS.glob("*.py"):
        for module in _imports(path, "sfs_triton.kernels"):
            assert module.split(".")[0] in allowed or module.startswith("sfs_triton.kernels"), f"{path.name}: {module}"


def test_every_package_is_installed():
    listed = {
        line.strip().strip('",') for line in (ROOT / "setup.py").read_text().splitlines() if '"sfs_triton' in line
    }
    for path in PACKAGE.rglob("*.py"):
        package = ".".join(("sfs_triton", *path.relative_to(PACKAGE).parent.parts))
        assert package in listed, f"{package} is not in setup.py"
