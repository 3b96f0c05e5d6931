"""The package as a package: what it exports, what it imports, and what it does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sfs_triton

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sfs_triton"
KERNELS = ROOT / "kernels" / "triton"

# The house plan: a module may import those below it in this list, never those above.
LAYERS = [
    "cli",
    "chat_terminal",
    "chat_commands",
    "chat",
    "batch_command",
    "integrations",
    "batch",
    "batch_files",
    "serve",
    "render",
    "plot",
    "reference",
    "engine",
    "handles",
    "session",
    "generation",
    "trace",
    "loops",
    "samplers",
    "caching",
    "state",
    "text",
    "templates",
    "template_process",
    "models",
    "ops",
    "torch_impl",
    "triton_impl",
    "torch_ops",
    "parallel",
    "testing",
    "errors",
]


def test_exports_are_pinned():
    assert sorted(sfs_triton.__all__) == [
        "ArgumentError",
        "CheckpointError",
        "DualCache",
        "Engine",
        "FixedSteps",
        "Frame",
        "Generation",
        "LoopTimeout",
        "MissingDependencyError",
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


def _layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sfs_triton" and len(parts) > 1 and parts[1] in LAYERS else None


def _sources() -> list[tuple[str, str, Path]]:
    rows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        layer = parts[0]
        package = ".".join(("sfs_triton", *parts[:-1]))
        if layer in LAYERS:
            rows.append((layer, package, path))
    return rows


@pytest.mark.parametrize(("layer", "package", "path"), _sources(), ids=lambda v: v.name if isinstance(v, Path) else "")
def test_imports_point_down(layer, package, path):
    for module in _imports(path, package):
        below = _layer(module)
        assert below is None or LAYERS.index(below) >= LAYERS.index(layer), f"{path.name} imports {module}"


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
