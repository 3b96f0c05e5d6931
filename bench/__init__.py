"""Benchmarks, a room for each concern. Commands are ``python -m bench.<room>.<module>`` from the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
