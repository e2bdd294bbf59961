"""The public face of one end of a channel."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, overload

import msgspec

from aiordma.errors import Busy, ChannelClosed, ChannelError, MessageError, TensorError
from aiordma.lanes.registry import Registry
from aiordma.link import Link
from aiordma.outgoing import Outgoing, prepare
from aiordma.registration import Registration
from aiordma.stats import ChannelStats, LaneInfo, total
from aiordma.tensors import Array, Destination, Framework, allocate, destination, require_mapping
from aiordma.transfer import Send, Transfer
from aiordma.wire.credit import Lent
from aiordma.wire.session import open_cost

T = TypeVar("T")


class Received(NamedTuple):
    """What `recv_tensors` returns."""

    arrays: dict[str, Array]
    """By name, in the sender's order."""
    meta: object
    """What the sender gave as `meta`; None if it gave none."""


class Channel:
    """One end of a duplex channel: small messages, and transfers of tensors.

    Messages and transfers are two queues. Each keeps the order of the calls that sent; nothing is promised
    between the two. Any number of coroutines may send and receive at once. All calls must come from the event
    loop that made the channel. After a `TransferError`, a timeout or a cancellation the channel stays usable;
    after a `ChannelError` it does not. Use as ``async with channel:`` or call `aclose`.
    """

    def __init__(
        self,
        link: Link,
        *,
        peer: str,
        lanes: tuple[LaneInfo, ...],
        registry: Registry | None = None,
    ) -> None:
        """Channels are made by `connect`, `listen` and `serve`."""
        self._link = link
        self._peer = peer
        self._lanes = lanes
        self._registry = registry
        # Weak: an iterator that was left by `break` is gone at once, and must not keep others out.
        self._consumer: weakref.ref[Transfers] | None = None

    @property
    def peer(self) -> str:
        """The other end, "host:port"."""
        return self._peer

    @property
    def lanes(self) -> tuple[LaneInfo, ...]:
        """The lanes that the channel got, and why they are of this kind."""
        return self._lanes

    @property
    def is_closed(self) -> bool:
        """Whether the channel is over, closed or broken."""
        return self._link.error is not None

    def __repr__(self) -> str:
        state = "open" if self._link.error is None else f"over: {self._link.error}"
        return f"<aiordma.Channel to {self._peer}, {len(self._lanes)} {self._lanes[0].kind} lane(s), {state}>"

    # Messages

    async def send(self, obj: object) -> None:
        """Send a small message: anything that msgspec encodes, up to three quarters of the peer's
        `message_bytes`.

        Returns when the message is on its way. Waits, in order, while the peer has too many that nobody
        received. Cancelled while it waits, nothing is sent. Raises `MessageError` for what cannot be encoded or
        is too large.
        """
        try:
            payload = msgspec.msgpack.encode(obj)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise MessageError(f"the message cannot be encoded by msgspec: {exc}") from exc
        limit = self._link.session.messages_out.capacity_bytes
        if len(payload) > limit:
            raise MessageError(
                f"the message has {len(payload)} bytes, and the peer takes {limit}: send tensors with send_tensor"
            )
        self._link.check()
        await self._link.gates.messages.enter(len(payload))
        self._link.message(payload)

    @overload
    async def recv(self) -> Any: ...
    @overload
    async def recv(self, type: type[T]) -> T: ...
    async def recv(self, type: Any = Any) -> Any:
        """The next message, decoded into `type` (msgspec.msgpack.decode); builtins if none is given.

        Cancelling loses no message. Messages that came before the channel was closed can still be received;
        then raises `ChannelClosed` or `ChannelBroken`. A message that is not of the `type` raises
        `MessageError`, and is gone.
        """
        payload = await self._link.messages.take()
        self._link.message_taken(payload)
        try:
            return msgspec.msgpack.decode(payload, type=type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise MessageError(
                f"the message is not of the type that recv() was asked for ({exc}): it is gone; ask for the type "
                "that the peer sends"
            ) from exc

    async def ping(self) -> float:
        """One round trip over the control connection, in seconds; the peer's loop answers by itself."""
        return await self._link.ping()

    # Sending transfers

    async def send_tensor(
        self, t: object, *, name: str = "tensor", meta: object = None, confirm: bool = False
    ) -> None:
        """Send one tensor; see `send_tensors`."""
        await self.send_tensors({name: t}, meta=meta, confirm=confirm)

    async def send_tensors(
        self,
        tensors_by_name: Mapping[str, object] | Outgoing,
        *,
        meta: object = None,
        confirm: bool = False,
    ) -> None:
        """Send tensors as one transfer: without a copy over TCP from host memory, over RDMA from what is registered.

        Takes contiguous numpy arrays, torch tensors, or objects with the buffer protocol or `__dlpack__`, of any
        safetensors dtype; or what `prepare` made of them. `meta` (at most 64 KiB as msgpack) arrives with them.
        Returns when the peer has acknowledged every chunk: the memory is the caller's again. With `confirm`
        it also waits until the peer has consumed the transfer.

        Raises `TensorError` for what cannot travel, `TransferRefused`, `TransferAborted`, `ChecksumError` or
        `TransferTimeout` if the transfer fails, `ChannelError` if the channel is over. Cancelled, the transfer
        is aborted, and no byte of the memory is read after this returns; the channel stays usable.
        """
        if isinstance(tensors_by_name, Outgoing):
            outgoing = tensors_by_name
            if meta is not None:
                outgoing = outgoing.with_meta(meta)
        else:
            outgoing = prepare(tensors_by_name, meta=meta)
        link = self._link
        link.check()
        cost = open_cost(outgoing.manifest_bytes, outgoing.meta_bytes)
        limit = link.session.opens_out.capacity_bytes
        if cost > limit:
            raise TensorError(
                f"the manifest of these {len(outgoing.manifest.tensors)} tensors has {cost} bytes, and the peer "
                f"takes {limit}: send them in several transfers, or raise its manifest_bytes"
            )
        await link.gates.opens.enter(cost)
        await self._wait(link.send(outgoing), confirm=confirm)

    def register(self, t: object) -> Registration:
        """Let RDMA devices read and write a tensor where it lies: it is sent, and received into, without a copy.

        Pins its memory, at a few gigabytes a second, until the tensor goes, `Registration.release`, the end of
        the last channel on that device, or others past `registered_bytes` need the room. Once is enough for all
        channels of one event loop on one device, and for whatever views of it are sent or received into. A peer may
        write there only while such a receive lasts, through a window that our device closes before it returns. Over
        other lanes, which need no such thing, it does nothing. A fork copies it for the child, from Linux 5.13 on;
        see `doctor`.

        Raises `TensorError` for what cannot travel or is not in host memory, `RegistrationError` if the memory
        cannot be pinned (RLIMIT_MEMLOCK, most likely). ibv_reg_mr(3).
        """
        self._link.check()
        outgoing = prepare({"tensor": t})
        nbytes = outgoing.manifest.total_bytes
        if not outgoing.is_host:
            raise TensorError("only host memory is registered: send it as it is, or a copy of it")
        if self._registry is None or not nbytes:
            return Registration(nbytes, None)
        (memory,) = outgoing.views(0, nbytes)
        return Registration(nbytes, self._registry.add(t, memory))

    async def _wait(self, send: Send, *, confirm: bool) -> None:
        try:
            await send.acknowledged
            if confirm:
                await send.consumed
        except asyncio.CancelledError:
            self._link.stop_sending(send, None, "the sender was cancelled")
            raise
        finally:
            self._link.sends.pop(send.id, None)
            await self._link.loans.returned(send.id)

    # Receiving transfers

    async def recv_tensor(
        self, *, into: Array | None = None, framework: Framework = "numpy"
    ) -> Array:
        """Receive the next transfer, which must be of one tensor, and return it.

        `into`: an array of the same dtype and shape to receive into, zero-copy over TCP, and over RDMA if it is
        registered; it is what is returned. `framework`: what to return without `into`: "numpy" or "torch".

        Raises `TensorError` if the transfer does not fit the request; it then stays the next one. Raises
        `TransferError` if the transfer fails, `Busy` while `incoming()` is iterated. Cancelled before its
        first chunk came, the transfer stays the next one; later, it is aborted. Either way no byte of `into` is
        written after this returns, and the channel stays usable. Where a device writes to `into`, that is when the
        peer has stopped it: a round trip later, or when the lane is destroyed, if it does not within 10 s.
        """
        _check_request(None, framework)
        arrays: dict[str, Array] = {}

        def begin(transfer: Transfer) -> None:
            names = [spec.name for spec in transfer.manifest.tensors]
            if len(names) != 1:
                raise TensorError(
                    f"the next transfer has {len(names)} tensors: receive it with recv_tensors()"
                )
            wanted = None if into is None else {names[0]: into}
            arrays.update(_begin(transfer, wanted, framework))

        await self._receive(begin)
        return next(iter(arrays.values()))

    async def recv_tensors(
        self, *, into: Mapping[str, Array] | None = None, framework: Framework = "numpy"
    ) -> Received:
        """Receive the next transfer whole: arrays by name, and `meta`.

        `into`: arrays of exactly the transfer's names, dtypes and shapes to receive into. Otherwise like
        `recv_tensor`.
        """
        _check_request(into, framework)
        arrays: dict[str, Array] = {}

        def accept(transfer: Transfer) -> None:
            arrays.update(_begin(transfer, into, framework))

        transfer = await self._receive(accept)
        return Received(arrays, transfer.meta)

    async def _receive(self, accept: Any) -> Transfer:
        if self._consumed_by() is not None:
            raise Busy("incoming() is being iterated: it gets every transfer until it ends")
        transfer = await self._link.transfers.take(accept)
        try:
            await transfer.reception.complete()
        except asyncio.CancelledError:
            if transfer.reception.is_offered:
                self._link.transfers.put_back(transfer)
            raise
        return transfer

    def incoming(self) -> Transfers:
        """The transfers that the peer opens, each to be claimed, refused or set aside by the caller.

        One consumer at a time: meanwhile a second one, and `recv_tensor` and `recv_tensors`, raise `Busy`. It is
        one from its first step until it is closed or dropped, as leaving an ``async for`` does. A step that is
        cancelled or times out loses no transfer, and the next one goes on. Ends when the peer has closed the
        channel in order; raises `ChannelBroken` when it is lost.
        """
        return Transfers(self)

    def _consumed_by(self) -> Transfers | None:
        return None if self._consumer is None else self._consumer()

    # State

    def stats(self) -> ChannelStats:
        """A snapshot of what the channel did so far, and of what is under way."""
        link, counters = self._link, self._link.counters
        ledgers = link.session.sender.ledgers
        lanes = tuple(port.stats(ledgers[port.index].count(Lent.POSTED)) for port in link.ports)
        return ChannelStats(
            sent_bytes=total(lanes, "sent_bytes"),
            sent_chunks=total(lanes, "sent_chunks"),
            received_bytes=total(lanes, "received_bytes"),
            received_chunks=total(lanes, "received_chunks"),
            in_flight_chunks=total(lanes, "in_flight_chunks"),
            copied_bytes=counters.copied_bytes,
            discarded_chunks=counters.discarded_chunks,
            credit_waits=counters.credit_waits,
            sent_messages=counters.sent_messages,
            received_messages=counters.received_messages,
            unread_messages=len(link.messages),
            open_sends=len(link.sends),
            open_receives=len(link.receptions),
            kept_frames=link.session.kept_frames,
            rtt_s=counters.rtt_s,
            lanes=lanes,
        )

    async def aclose(self) -> None:
        """Close the channel: whoever waits on it gets `ChannelClosed`, open transfers are aborted.

        Messages that were sent arrive before the goodbye. Waits at most `close_timeout_s` for the peer to
        answer. When this returns, no socket, task or slot is left; cancelled, they go a little later.
        """
        await self._link.aclose("goodbye")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()


class Transfers:
    """The async iterator that `Channel.incoming` returns."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Transfer:
        if self._is_over:
            raise StopAsyncIteration
        channel = self._channel
        if channel._consumed_by() is not self:
            if channel._consumed_by() is not None or channel._link.transfers.waiting:
                raise Busy("somebody else receives transfers from this channel already")
            channel._consumer = weakref.ref(self)
        try:
            return await channel._link.transfers.take()
        except ChannelClosed:
            await self.aclose()
            raise StopAsyncIteration from None
        except ChannelError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End it: others may receive from the channel now."""
        self._is_over = True
        if self._channel._consumed_by() is self:
            self._channel._consumer = None


def _begin(
    transfer: Transfer, into: Mapping[str, Array] | None, framework: Framework
) -> dict[str, Array]:
    if into is None:
        buffer, arrays = allocate(transfer.manifest, framework)
        transfer.reception.begin(Destination(transfer.manifest, buffer))
        return arrays
    transfer.reception.begin(destination(transfer.manifest, into))
    return dict(into)


def _check_request(into: object, framework: object) -> None:
    """What is wrong whatever comes is told at once, and not when something comes."""
    if framework not in ("numpy", "torch"):
        raise TensorError(f"unknown framework {framework!r}: use 'numpy' or 'torch'")
    if into is not None:
        require_mapping("into", into)
