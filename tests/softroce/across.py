"""Runs on two nodes at once: node 1 writes into node 0's memory, across whatever lies between them.

Node 1 leaves {"bytes": ..., "round_trip_s": ...} in its OUT; node 0 fails unless all arrived.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any, Final

from tests.softroce.endpoint import Address, Endpoint, immediate_of

_WRITES: Final = 16
_WRITE_BYTES: Final = 64 << 10

_TCP_PORT: Final = 7777
_TIMEOUT_S: Final = 60.0


def main(node: int, own: str, peer: str, out: Path) -> None:
    """Exchange addresses over TCP, move the bytes over RDMA."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_accepted(own) if node == 0 else _connected(peer))
        lines = stack.enter_context(sock.makefile("rw"))
        endpoint = stack.enter_context(contextlib.closing(Endpoint("rxe0", _WRITE_BYTES)))
        _tell(lines, endpoint.address)
        remote = Address(*_hear(lines))
        endpoint.connect(remote)
        if node == 0:
            _hear(lines)
            _tell(lines, "connected")
            _receive(endpoint)
            _tell(lines, "received")
        else:
            started = time.monotonic()
            _tell(lines, "connected")
            _hear(lines)
            round_trip_s = time.monotonic() - started
            _send(endpoint, remote)
            _hear(lines)
            result = {"bytes": _WRITES * _WRITE_BYTES, "round_trip_s": round_trip_s}
            (out / "across.json").write_text(json.dumps(result))


def _send(endpoint: Endpoint, remote: Address) -> None:
    for number in range(_WRITES):
        endpoint.memory[:_WRITE_BYTES] = _content(number)
        endpoint.write(remote, _WRITE_BYTES, number)
        (sent,) = endpoint.completions(1)
        assert sent.status == 0, sent


def _receive(endpoint: Endpoint) -> None:
    for number in range(_WRITES):
        (arrived,) = endpoint.completions(1)
        assert arrived.status == 0, arrived
        assert (immediate_of(arrived), arrived.byte_len) == (number, _WRITE_BYTES)
    # Each write replaced the one before it.
    assert endpoint.memory[_WRITE_BYTES:] == _content(_WRITES - 1)


def _content(number: int) -> bytes:
    return number.to_bytes(2, "big") * (_WRITE_BYTES // 2)


def _accepted(own: str) -> socket.socket:
    with socket.create_server((own, _TCP_PORT)) as listener:
        listener.settimeout(_TIMEOUT_S)
        return listener.accept()[0]


def _connected(peer: str) -> socket.socket:
    """The connection to the other node, which may still be booting."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((peer, _TCP_PORT), timeout=_TIMEOUT_S)
        except OSError:
            if time.monotonic() > deadline:
                raise


def _tell(lines: IO[str], what: object) -> None:
    lines.write(json.dumps(what) + "\n")
    lines.flush()


def _hear(lines: IO[str]) -> Any:
    line = lines.readline()
    assert line, "the other node closed the connection"
    return json.loads(line)


if __name__ == "__main__":
    env = os.environ
    main(int(env["NODE"]), env["ADDR"], env["PEER"], Path(env["OUT"]))
