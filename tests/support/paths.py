"""The repository's root, and the recordings in ``tests/golden`` with their models."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("llada-mha", "llada-gqa", "dream-gqa", "dream-r7")
