"""The check's own process with given times, since an interpreter is always slower: ``python -m ... SECONDS SPREAD``."""

from __future__ import annotations

import sys

from sfs_triton.self_check import __main__ as child
from sfs_triton.self_check import check, steps

triton, spread = map(float, sys.argv[1:])
steps.time_steps = lambda model, cache, sizes: steps.Times(cache.name, 1.0, triton, spread)
check._check_operations = lambda *_: 0

if __name__ == "__main__":
    child.main()
