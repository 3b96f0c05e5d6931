"""Calls that run code of others and that bandit (``tests/audit.py``) does not report."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

UNSAFE = re.compile(
    r"\b(trust_remote_code|allow_pickle)\s*=(?!=|\s*False\b)"
    r"|\btorch\.(hub|jit)\.load\b|\byaml\.(unsafe|full)_load\b"
    r"|\b(joblib|cloudpickle)\b|\bcreate_subprocess_shell\b|\b__import__\("
)


def test_no_code_of_others_is_run():
    files = [path for part in ("sfs_triton", "kernels", "bench") for path in (ROOT / part).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): match[0] for path in files if (match := UNSAFE.search(path.read_text()))}
    assert len(files) > 100 and not found


@pytest.mark.parametrize(
    "source",
    ["f(trust_remote_code=given)", "np.load(p, allow_pickle = True)", "torch.hub.load(x)", "import joblib"],
)
def test_unsafe_calls_are_found(source):
    assert UNSAFE.search(source) and not UNSAFE.search("f(trust_remote_code=False, allow_pickle=False)")
