"""Two kinds of tests: those that the plug-in executes, and one that starts the plug-in."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    executing = config.pluginmanager.hasplugin("ptx-execution")
    return (
        True
        if collection_path.name.startswith("test_") and (collection_path.name == "test_slice.py") == executing
        else None
    )
