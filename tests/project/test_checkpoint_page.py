"""docs/checkpoints.md has the table of what is tested, and the tests are there."""

from __future__ import annotations

import ast

import pytest

from tests.support.checkpoint_table import ROWS, table
from tests.support.paths import ROOT


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.checkpoint[:24])
def test_the_tests_of_a_row_are_there(row):
    for name in row.tests:
        file, function = name.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
