"""Forbidden operations, whatever the input: unpickle, evaluate, run a shell, or run code of a checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

FILES = sorted(p for part in ("sfs_triton", "kernels", "bench") for p in (ROOT / part).rglob("*.py"))

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "os.execv",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pandas.read_pickle",
    "asyncio.create_subprocess_shell",
}
TRUE = {"shell", "trust_remote_code", "allow_pickle", "confirm_run_unsafe_code"}

# What may be done all the same, and why.
ALLOWED = {
    ("bench/eval/inside.py", "exec"): "HumanEval's programs are run to be scored, in a sandbox and only when asked to",
    ("bench/eval/inside.py", "compile"): "the same programs",
    (
        "bench/embedded/train.py",
        "torch.load",
    ): "the trainer's own state; weights_only=True unpickles nothing but tensors",
}


def _name(node: ast.expr) -> str:
    """``a.b.c`` of a name with dots, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := _name(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything forbidden."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in PICKLES or name in CALLS)
        if isinstance(node, ast.Call):
            called = _name(node.func)
            if called in BUILTINS | CALLS:
                yield node.lineno, called
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in TRUE and not off:
                    yield node.lineno, f"{keyword.arg}="


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous(path):
    name = path.relative_to(ROOT).as_posix()
    found = [f"line {line}: {what}" for line, what in findings(path.read_text()) if (name, what) not in ALLOWED]
    assert not found, f"{name}: {found}; mend it, or say in ALLOWED and in SECURITY.md why it must be"


def test_what_is_allowed_is_there():
    for name, what in ALLOWED:
        assert what in {found for _, found in findings((ROOT / name).read_text())}, f"{name} has no {what} any more"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("eval('1')", "eval"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell="),
        ("f(trust_remote_code=given)", "trust_remote_code="),
        ("numpy.load(p, allow_pickle=True)", "numpy.load"),
        ("yaml.load(p)", "yaml.load"),
    ],
)
def test_it_is_found(source, what):
    assert what in {found for _, found in findings(source)}


def test_what_is_harmless_is_not_found():
    assert not list(findings("model.eval()\nre.compile('x')\nrun(shell=False)\nyaml.safe_load(x)\njson.load(f)"))


def test_the_threat_model_names_every_exception():
    text = (ROOT / "SECURITY.md").read_text()
    for name, _ in ALLOWED:
        assert name in text, f"SECURITY.md does not say why {name} may do what it does"
