"""The repository's root, the recordings in ``tests/golden`` with their models, and files of published checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
REAL = Path(os.environ.get("SFS_REAL_FILES") or ROOT.parent / "shared" / "real")  # not in the repository
MODELS = ("llada-mha", "llada-gqa", "dream-gqa", "dream-r7")
