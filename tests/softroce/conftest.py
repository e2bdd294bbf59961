"""What the tests on a real device have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.softroce.lanes import resources

NODE = Path("/softroce")
"""Is there on a node that the harness has booted."""


@pytest.fixture
async def clean_device() -> AsyncIterator[None]:
    """Every device object that the test made is gone after it."""
    before = resources()
    yield
    assert resources() == before


@pytest.fixture
def node() -> None:
    """For tests that know the device (rxe0), or do to the machine what must not be done to a host."""
    if not NODE.is_dir():
        pytest.skip("only on a machine of its own: make test-rdma")
