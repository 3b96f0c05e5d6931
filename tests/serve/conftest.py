"""Fixture of a server with its default settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.server import Running


@pytest.fixture(scope="module")
def server(embedded) -> Iterator[Running]:
    from tests.support.server import serving  # needs extras, for want of which test modules are skipped

    with serving(embedded) as running:
        yield running
