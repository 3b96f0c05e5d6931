"""A request for the check that an interpreter can serve."""

from __future__ import annotations

from sfs_triton.models import ModelSpec
from sfs_triton.self_check.check import Request
from sfs_triton.self_check.steps import Sizes

SPEC = ModelSpec("llada", 2, 32, 2, 1, 48, 97, 64, 1e4, 1e-5, 96, 95, 95)
SIZES = Sizes(rows=(6,), canvas=20, timed_canvas=16, warm_up=1, repeats=2)
REQUEST = Request(SPEC, "cpu", "float32", None, SIZES)
