"""What the tests on a real device have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.softroce.lanes import resources


@pytest.fixture
async def clean_device() -> AsyncIterator[None]:
    """Every device object that the test made is gone after it."""
    before = resources()
    yield
    assert resources() == before
