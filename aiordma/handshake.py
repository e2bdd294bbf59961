"""The handshake's I/O: how two ends that have just connected find out what they can do together.

Nothing is allocated for a peer before it has said something sensible, and everything it may say is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
from collections.abc import Iterator
from typing import Final

import msgspec

from aiordma.config import MAX_LANES, ChannelConfig
from aiordma.errors import (
    ConfigError,
    ConnectError,
    ForeignPeer,
    LaneRefused,
    RemoteProtocolError,
)
from aiordma.ring import Ring
from aiordma.wire import hello
from aiordma.wire.hello import Answer, Body, Hello, LaneProof, Limits, Refusal

KEEPALIVE_PROBES: Final = 4
"""Unanswered ones that end a connection; so many of them take as long again as it was idle before the first."""
MAX_REASON_CHARS: Final = 1000
_HUNG_UP: Final = (
    "the peer hung up without a word: something else than aiordma listens there, or a server that is shutting "
    "down or overloaded; check host and port, and connect again"
)


class Parts(msgspec.Struct, eq=False):
    """What a channel is made of, while it is being made. Closing gives everything back."""

    control: socket.socket
    rings: list[Ring]
    lanes: list[socket.socket] = msgspec.field(default_factory=list)
    peer_limits: Limits | None = None

    def close(self) -> None:
        """Close every socket and ring."""
        for sock in (self.control, *self.lanes):
            hang_up(sock)
        for ring in self.rings:
            ring.close()

    @property
    def limits(self) -> tuple[int, int]:
        """Slots a lane, and their size."""
        return min(ring.slots for ring in self.rings), self.rings[0].slot_bytes


def hang_up(sock: socket.socket) -> None:
    """Close a socket for good: a forked process (a DataLoader's worker) may hold it too, and closing alone would
    neither end a connection nor free a listener's port (shutdown(2))."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def reserve(config: ChannelConfig, lanes: int) -> list[Ring]:
    """A ring for each lane, all of one size. Raises `Busy` beyond the memory budget."""
    rings: list[Ring] = []
    slots = config.slots
    with contextlib.ExitStack() as undo:
        for _ in range(lanes):
            rings.append(Ring(slots, config.slot_bytes))
            undo.callback(rings[-1].close)
            slots = rings[-1].slots
        undo.pop_all()
    return rings


def limits_of(config: ChannelConfig, rings: list[Ring]) -> Limits:
    """What this end accepts from the other."""
    return Limits(
        slots=min(ring.slots for ring in rings),
        slot_bytes=config.slot_bytes,
        messages=config.messages,
        message_bytes=config.message_bytes,
        open_transfers=config.open_transfers,
        manifest_bytes=config.manifest_bytes,
    )


async def dial(host: str, port: int) -> socket.socket:
    """A connected, non-blocking TCP socket. Raises `ConnectError` with the cause."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConnectError(
            f"cannot resolve {host!r} ({reason}): check the name, and this machine's DNS"
        ) from exc
    failure: OSError | None = None
    for family, kind, proto, _, address in found:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, kind, proto))
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
            except OSError as exc:
                failure = exc
                continue
            undo.pop_all()
            return sock
    # asyncio puts words of its own where the system's reason would be.
    cause = os.strerror(failure.errno) if failure and failure.errno else failure or "no address"
    raise ConnectError(
        f"cannot connect to {host}:{port} ({cause}): is the server running, and is the port right?"
    ) from failure


def tune_control(sock: socket.socket, config: ChannelConfig) -> None:
    """Whole frames at once; and notice a peer whose host is gone though the channel is idle (tcp(7))."""
    idle_s = config.keepalive_s
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, idle_s // KEEPALIVE_PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def tune_lane(sock: socket.socket, config: ChannelConfig) -> None:
    """The same, since whatever is between forgets idle lanes as well; and the configured congestion control."""
    tune_control(sock, config)
    if config.congestion is None:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, config.congestion.encode())
    except OSError as exc:
        raise ConfigError(
            f"congestion={config.congestion!r} is not available here ({exc.strerror}): "
            "see /proc/sys/net/ipv4/tcp_available_congestion_control"
        ) from exc


async def say(sock: socket.socket, kind: bytes, body: Body) -> None:
    """Send one handshake message."""
    with _mapped():
        await asyncio.get_running_loop().sock_sendall(sock, hello.encode(kind, body))


async def refuse(sock: socket.socket, reason: str) -> None:
    """Say no, and why; returns when the peer has hung up.

    Closing at once, with bytes of the peer's unread, would reset the connection, and the reason might be lost
    with it (RFC 9293, 3.10.4).
    """
    await say(sock, hello.CONTROL, Refusal(reason[:MAX_REASON_CHARS]))
    with _mapped():
        sock.shutdown(socket.SHUT_WR)
        while await asyncio.get_running_loop().sock_recv(sock, 4096):
            pass


async def hear(sock: socket.socket) -> tuple[bytes, Body]:
    """Receive one handshake message: its kind and body.

    Raises `ForeignPeer` as soon as the first bytes are not ours or if there are none, `VersionMismatch`,
    `RemoteProtocolError`, or `ConnectError` if the peer hangs up later.
    """
    preface = await _read(sock, hello.PREFACE_BYTES, is_preface=True)
    kind, length = hello.decode_preface(preface)
    return kind, hello.decode_body(await _read(sock, length))


async def _read(sock: socket.socket, n: int, *, is_preface: bool = False) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    with _mapped():
        while len(data) < n:
            piece = await loop.sock_recv(sock, n - len(data))
            if not piece:
                if is_preface and not data:
                    raise ForeignPeer(_HUNG_UP)
                raise ConnectError(
                    f"the peer hung up during the handshake, {len(data)} bytes into a message of {n}: see its "
                    "log, and connect again"
                )
            data += piece
            if is_preface:
                hello.check_start(data)
    return data


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except (BrokenPipeError, ConnectionResetError) as exc:  # it closed without reading what we said
        raise ForeignPeer(_HUNG_UP) from exc
    except OSError as exc:
        raise ConnectError(
            f"the connection broke during the handshake ({exc.strerror or exc}): connect again"
        ) from exc


# The connecting end


async def request(
    parts: Parts, config: ChannelConfig, kinds: tuple[str, ...], reason: str
) -> Answer:
    """Say HELLO, and hear what is granted. `reason`: why RDMA lanes are not among the kinds."""
    limits = limits_of(config, parts.rings)
    greeting = Hello(limits, len(parts.rings), kinds, reason[:MAX_REASON_CHARS])
    await say(parts.control, hello.CONTROL, greeting)
    _, answer = await hear(parts.control)
    if isinstance(answer, Refusal):
        raise ConnectError(f"the server refused the channel: {answer.reason}")
    if not isinstance(answer, Answer):
        raise RemoteProtocolError(f"the server answered HELLO with {type(answer).__name__}")
    if not 1 <= answer.lanes <= len(parts.rings):
        raise RemoteProtocolError(
            f"the server grants {answer.lanes} lanes; {len(parts.rings)} were asked for"
        )
    if answer.lane_kind not in kinds:
        raise RemoteProtocolError(
            f"the server grants lanes of kind {answer.lane_kind!r}; {kinds} were asked for"
        )
    hello.check_limits(answer.limits)
    parts.peer_limits = answer.limits
    while len(parts.rings) > answer.lanes:
        parts.rings.pop().close()
    return answer


async def open_lane(sock: socket.socket, answer: Answer, lane: int, config: ChannelConfig) -> None:
    """Prove that this connection is the session's lane, and check the server's proof."""
    tune_lane(sock, config)
    proof = hello.lane_proof(answer.key, answer.session, lane, "client")
    await say(sock, hello.LANE, LaneProof(answer.session, lane, proof))
    _, reply = await hear(sock)
    if isinstance(reply, Refusal):
        raise LaneRefused(f"the server refused lane {lane}: {reply.reason}")
    expected = hello.lane_proof(answer.key, answer.session, lane, "server")
    if not isinstance(reply, LaneProof) or not hmac.compare_digest(reply.proof, expected):
        raise LaneRefused(
            f"the server did not prove that lane {lane} is its own: another server may have taken its port, or "
            "somebody stands between; connect again"
        )


# The listening end


class Pending(msgspec.Struct, eq=False):
    """A session whose lanes are still to come."""

    parts: Parts
    answer: Answer
    joined: dict[int, socket.socket] = msgspec.field(default_factory=dict)
    complete: asyncio.Future[None] = msgspec.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def join(self, sock: socket.socket, proof: LaneProof, config: ChannelConfig) -> None:
        """Take a lane in that proves itself; raises `LaneRefused` otherwise, and the session is none the worse."""
        expected = hello.lane_proof(self.answer.key, self.answer.session, proof.lane, "client")
        if not hmac.compare_digest(proof.proof, expected):
            raise LaneRefused(f"the proof for lane {proof.lane} is wrong: connect again")
        if proof.lane >= self.answer.lanes or proof.lane in self.joined:
            raise LaneRefused(
                f"the proof for lane {proof.lane} was used before, or there is no such lane: connect again"
            )
        self.joined[proof.lane] = sock
        tune_lane(sock, config)
        mine = hello.lane_proof(self.answer.key, self.answer.session, proof.lane, "server")
        await say(sock, hello.LANE, LaneProof(self.answer.session, proof.lane, mine))
        if self.complete.done():
            raise LaneRefused("the session was given up: connect again")
        self.parts.lanes.append(sock)
        if len(self.parts.lanes) == self.answer.lanes:
            self.parts.lanes = [self.joined[i] for i in range(self.answer.lanes)]
            self.complete.set_result(None)

    async def wait(self) -> None:
        """Until all lanes have joined. Raises `ConnectError` as soon as the client hangs up."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.parts.control, self._look)
        try:
            await self.complete
        finally:
            loop.remove_reader(self.parts.control)

    def _look(self) -> None:
        try:
            is_gone = not self.parts.control.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            is_gone = True
        # What has come is for the channel, and what comes behind it cannot be seen from here.
        asyncio.get_running_loop().remove_reader(self.parts.control)
        if is_gone and not self.complete.done():
            self.complete.set_exception(ConnectError("the client hung up before its lanes came"))


async def grant(sock: socket.socket, greeting: Hello, config: ChannelConfig) -> Pending:
    """Answer a HELLO: so many lanes, each with a ring that is reserved now."""
    hello.check_limits(greeting.limits)
    if "tcp" not in greeting.lane_kinds or not 1 <= greeting.lanes <= MAX_LANES:
        raise RemoteProtocolError(
            f"a HELLO that wants {greeting.lanes} lanes of {greeting.lane_kinds}"
        )
    tune_control(sock, config)
    parts = Parts(sock, reserve(config, min(config.lanes, greeting.lanes)))
    parts.peer_limits = greeting.limits
    answer = Answer(
        limits=limits_of(config, parts.rings),
        lanes=len(parts.rings),
        lane_kind="tcp",
        session=os.urandom(16),
        key=os.urandom(32),
    )
    return Pending(parts, answer)
