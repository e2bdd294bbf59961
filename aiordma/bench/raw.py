"""The yardstick: blocking sockets, one `sendall` of everything, `recv_into` the final place."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiordma.bench.errors import BenchError
from aiordma.bench.gauge import clock_s
from aiordma.bench.orders import Setup
from aiordma.bench.payload import MESSAGE_BYTES, Buffer, message, verify_message

HOST = "127.0.0.1"
CONNECTIONS = 2


class RawSide:
    """One end of two connections. The calls block, and nothing else runs in their process."""

    def __init__(self, setup: Setup) -> None:
        self._congestion = setup.congestion
        self._listener: socket.socket | None = None
        self._sockets: list[socket.socket] = []
        self._threads = ThreadPoolExecutor(CONNECTIONS)

    async def listen(self) -> int:
        """The port that `connect` takes."""
        self._listener = socket.create_server((HOST, 0))
        self._tune(self._listener)
        return int(self._listener.getsockname()[1])

    async def accept(self) -> None:
        """Take the connections that `connect` makes."""
        assert self._listener is not None
        for _ in range(CONNECTIONS):
            accepted, _address = self._listener.accept()
            self._tune(accepted)
            self._sockets.append(accepted)

    async def connect(self, port: int) -> None:
        """Make the connections, in the order in which the other end accepts them."""
        for _ in range(CONNECTIONS):
            connected = socket.create_connection((HOST, port))
            self._tune(connected)
            self._sockets.append(connected)

    def _tune(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion.encode())

    async def send(self, source: Buffer, connections: int) -> None:
        """Returns when the kernel has taken all bytes."""
        self._share(_send, source, connections)

    async def receive(
        self, destination: Buffer, connections: int, ready: Callable[[], None]
    ) -> None:
        """Returns when all bytes are in the destination."""
        ready()
        self._share(_receive, destination, connections)

    def _share(
        self, work: Callable[[socket.socket, memoryview], None], buffer: Buffer, connections: int
    ) -> None:
        view = buffer.data
        if connections == 1:
            work(self._sockets[0], view)
            return
        step = -(-view.nbytes // connections)
        shares = [view[start : start + step] for start in range(0, view.nbytes, step)]
        list(self._threads.map(work, self._sockets, shares))

    async def ping(self, count: int) -> list[float]:
        """Seconds of each round trip of a small message."""
        sock, seconds = self._sockets[0], []
        for index in range(count):
            request = message(index)
            start = clock_s()
            sock.sendall(request)
            answer = _receive_message(sock)
            seconds.append(clock_s() - start)
            verify_message(index, answer)
        return seconds

    async def echo(self, count: int, ready: Callable[[], None]) -> None:
        """Send `count` messages back."""
        ready()
        for _ in range(count):
            self._sockets[0].sendall(_receive_message(self._sockets[0]))

    def copied_bytes(self) -> int:
        """The kernel's own two copies are not counted, here as there."""
        return 0

    async def aclose(self) -> None:
        """Close the sockets and end the threads."""
        self._threads.shutdown()
        for sock in (*self._sockets, *([self._listener] if self._listener else [])):
            sock.close()


def _send(sock: socket.socket, view: memoryview) -> None:
    sock.sendall(view)


def _receive(sock: socket.socket, view: memoryview) -> None:
    while view:
        received = sock.recv_into(view)
        if not received:
            raise BenchError(f"the sender closed its connection, {view.nbytes} bytes too early")
        view = view[received:]


def _receive_message(sock: socket.socket) -> bytes:
    received = bytearray(MESSAGE_BYTES)
    _receive(sock, memoryview(received))
    return bytes(received)
