"""What two ends say while they find out whether RDMA lanes carry, and what becomes of one that is left alone."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from aiordma import ChannelConfig, ConnectError
from aiordma.handshake import Parts
from aiordma.path import agree_as_client, agree_as_server
from aiordma.wire.hello import Answer
from tests.foreign import LIMITS
from tests.harness import socket_pair

pytestmark = pytest.mark.usefixtures("loop_kind", "no_leaks")

ANSWER = Answer(LIMITS, 1, "verbs", b"s" * 16, b"k" * 32)


class Path:
    """Stands for an `RdmaPath` on which all goes well at this end."""

    addresses = ()

    async def open(self, *_: object) -> None: ...

    async def connect(self, *_: object) -> None: ...


@pytest.fixture(params=[False, True])
def parts(request) -> Any:
    """A control connection whose other end is gone, with a reset or without."""
    near, far = socket_pair()
    if request.param:
        near.send(b"?")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *[0] * 7]))
    far.close()
    parts = Parts(near, [])
    yield parts
    parts.close()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_peer_that_dies_amid_it_is_no_foreigner(parts, side):
    """It has said HELLO, or an ANSWER: "check host and port" would mislead."""
    path: Any = Path()
    if side == "client":
        agreeing = agree_as_client(path, parts, ANSWER, ChannelConfig())
    else:
        agreeing = agree_as_server(path, parts, ChannelConfig())
    with pytest.raises(ConnectError, match=r"hung up while RDMA lanes .* see its log") as caught:
        await agreeing
    assert type(caught.value) is ConnectError
