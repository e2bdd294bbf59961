"""The kernel's RDMA device and the installed pyverbs do what the verbs lane is built on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.softroce.endpoint import Endpoint

pytestmark = pytest.mark.verbs

HALF_BYTES = 1 << 20


@pytest.fixture
def connected() -> Iterator[tuple[Endpoint, Endpoint]]:
    """Two endpoints on this machine's device, connected with each other."""
    from pyverbs.device import get_device_list

    from tests.softroce.endpoint import Endpoint

    device = get_device_list()[0].name.decode()
    left, right = Endpoint(device, HALF_BYTES), Endpoint(device, HALF_BYTES)
    left.connect(right.address)
    right.connect(left.address)
    yield left, right
    left.close()
    right.close()


def test_a_write_with_immediate_arrives_whole_and_is_announced(connected, record_property):
    from tests.softroce.endpoint import immediate_of

    left, right = connected
    written = 0
    for immediate, length in enumerate((1, 4096, 4097, HALF_BYTES), start=0xFFFFFFF0):
        left.memory[:length] = bytes([immediate & 0xFF]) * length
        left.write(right.address, length, immediate)
        (sent,) = left.completions(1)
        (arrived,) = right.completions(1)
        assert (sent.status, arrived.status) == (0, 0)
        assert (immediate_of(arrived), arrived.byte_len) == (immediate, length)
        target = right.memory[HALF_BYTES : HALF_BYTES + length]
        assert target == left.memory[:length]
        written += arrived.byte_len
    assert written == 1 + 4096 + 4097 + HALF_BYTES
    record_property("lane_bytes", written)
