"""What the tests on a real device have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiordma.lanes.outbox import Window
from tests.softroce.lanes import resources

NODE = Path("/softroce")
"""Is there on a node that the harness has booted."""


@pytest.fixture
async def clean_device(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Every device object that the test made is gone after it.

    rdma-resource(8) does not show memory windows: those to tensors are counted where they are opened and closed.
    """
    from aiordma.lanes.verbs import VerbsQueuePair

    before, windows = resources(), list[Window]()
    open_window = VerbsQueuePair.open_window

    def opened(pair: VerbsQueuePair, memory: memoryview) -> Window | None:
        window = open_window(pair, memory)
        if window is None:
            return None
        windows.append(window)

        def close() -> None:
            window.close()
            windows.remove(window)

        return window._replace(close=close)

    monkeypatch.setattr(VerbsQueuePair, "open_window", opened)
    yield
    assert resources() == before
    assert not windows


@pytest.fixture
def node() -> None:
    """For tests that know the device (rxe0), or do to the machine what must not be done to a host."""
    if not NODE.is_dir():
        pytest.skip("only on a machine of its own: make test-rdma")
