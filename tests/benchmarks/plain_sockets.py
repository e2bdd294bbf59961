"""The yardstick of `python -m fedllm bench-round --against tests/benchmarks/plain_sockets.py`: no library, no safety.

One TCP socket a silo. The server has a thread for each: `sendall` of the weights, then `recv_into` a block that stays,
weighted and added in place to the one array that it holds, which are the global weights until all silos have them.
No checks, no names, no flow control but TCP's own; a silo that dies or stalls takes the round with it.
"""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fedllm.bench.contender import Setup, Train
from fedllm.bench.content import Arrays, empty, row_of, weights_of
from fedllm.bench.layouts import layout_of

BLOCK_ITEMS = 1 << 18
Row = NDArray[np.float32]


class Server:
    """Sums in the order of arrival."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._listener = socket.create_server((setup.host, 0))
        self._sockets: list[socket.socket] = []
        self._threads = ThreadPoolExecutor(setup.silos)
        self._blocks = [np.empty(BLOCK_ITEMS, np.float32) for _ in range(setup.silos)]
        self._all_have_them = threading.Barrier(setup.silos)
        self._adding = threading.Lock()

    def listen(self) -> int:
        """The port."""
        return int(self._listener.getsockname()[1])

    def gather(self) -> None:
        """Each silo says its number first."""
        found = {}
        for _ in range(self._setup.silos):
            accepted, _address = self._listener.accept()
            tune(accepted, self._setup.congestion)
            found[accepted.recv(1)[0]] = accepted
        self._sockets = [found[number] for number in sorted(found)]

    def round(self, weights: Arrays) -> Arrays:
        """The arrays are the new weights as well."""
        row, parts = row_of(weights), weights_of(self._setup.silos)

        def exchange(number: int) -> None:
            self._sockets[number].sendall(row.data)
            if self._all_have_them.wait() == 0:
                row.fill(0)
            self._all_have_them.wait()
            self._receive(number, row, np.float32(parts[number] / sum(parts)))

        list(self._threads.map(exchange, range(self._setup.silos)))
        return weights

    def _receive(self, number: int, sums: Row, share: np.float32) -> None:
        for start in range(0, sums.size, BLOCK_ITEMS):
            target = sums[start : start + BLOCK_ITEMS]
            block = self._blocks[number][: target.size]
            receive(self._sockets[number], block)
            np.multiply(block, share, out=block)
            with self._adding:
                np.add(target, block, out=target)

    def close(self) -> None:
        """Close the sockets and end the threads."""
        self._threads.shutdown()
        for sock in (*self._sockets, self._listener):
            sock.close()


class Silo:
    """Receives into one array that stays, and sends from it."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._weights = empty(layout_of(setup.layout))
        self._socket = socket.socket()

    def join(self) -> None:
        """Connect, and say which silo this is."""
        tune(self._socket, self._setup.congestion)
        self._socket.connect((self._setup.host, self._setup.port))
        self._socket.sendall(bytes([self._setup.number]))

    def round(self, train: Train) -> None:
        """One after the other."""
        row = row_of(self._weights)
        receive(self._socket, row)
        train(self._weights)
        self._socket.sendall(row.data)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def tune(sock: socket.socket, congestion: str) -> None:
    """As aiordma does."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if congestion:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())


def receive(sock: socket.socket, row: Row) -> None:
    """Fill the row."""
    view = row.data.cast("B")
    while view:
        received = sock.recv_into(view)
        if not received:
            raise ConnectionError(f"the other end is gone, {view.nbytes} bytes too early")
        view = view[received:]
