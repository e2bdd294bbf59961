"""The shell that joins a session, its lanes and the memory: everything that happens on a channel's loop.

Chunks to send wait in one place only, `Sender.next`: for a claim and a credit. What frees one ends in `_post`.
"""

from __future__ import annotations

from aiordma.chunk import Chunk
from aiordma.config import ChannelConfig
from aiordma.control import Control
from aiordma.early import EarlyChunks
from aiordma.ending import Ending
from aiordma.errors import (
    AiordmaError,
    ChannelBroken,
    ChannelClosed,
    ChecksumError,
    RemoteProtocolError,
    again,
)
from aiordma.loans import Loans
from aiordma.outgoing import Outgoing
from aiordma.port import Port, Subject
from aiordma.pulse import Pulse
from aiordma.queues import Fifo, Gate, Gates
from aiordma.stats import Counters
from aiordma.transfer import Reception, Send, Stage, Transfer
from aiordma.wire import control as wire, frames
from aiordma.wire.frames import ChunkHeader
from aiordma.wire.receiving import Incoming, Verdict
from aiordma.wire.session import Event, Refused, Session, error_of


class Link:
    """One end of a channel, without its public face."""

    def __init__(self, session: Session, control: Control, config: ChannelConfig) -> None:
        self.session = session
        self.config = config
        self.counters = Counters()
        self.ports: list[Port] = []
        self.error: ChannelBroken | ChannelClosed | None = None
        self.transfers: Fifo[Transfer] = Fifo(
            undo=lambda t: t.reception.let_go(), on_waiting=self._claim_ahead, order=lambda t: t.id
        )
        self.messages: Fifo[bytes] = Fifo()
        self.gates = Gates(Gate(session.opens_out), Gate(session.messages_out))
        self.sends: dict[int, Send] = {}
        self.receptions: dict[int, Reception] = {}
        self.loans = Loans(lambda transfer: self._recall(transfer, is_sending=True))
        self._early = EarlyChunks()
        self._control = control
        self._pulse = Pulse(self, config.idle_timeout_s, config.heartbeat_s)
        self._ending = Ending(control, self.loans, config.close_timeout_s)

    def start(self, ports: list[Port]) -> None:
        """Begin to move, once every lane is there."""
        self.ports = ports
        self.loans.windows = [port.windows for port in ports if port.windows is not None]
        for port in ports:
            port.lane.start(port)
        self._control.start(self)

    def check(self) -> None:
        """Raise if the channel is over."""
        if self.error is not None:
            raise again(self.error)

    # Sending

    def send(self, outgoing: Outgoing) -> Send:
        """Open a transfer, whose cost was spent already, and start to send it."""
        self.check()
        transfer = self.session.open(
            outgoing.manifest_bytes, outgoing.meta_bytes, outgoing.manifest.total_bytes
        )
        send = self.sends[transfer] = Send(transfer, outgoing, self._pulse.now())
        self.flush()
        self._fill_all()
        self._watch()
        return send

    def stop_sending(self, send: Send, error: AiordmaError | None, reason: str) -> None:
        """Abort a transfer of ours, unless it is over; its memory is the caller's again."""
        if self.sends.pop(send.id, None) is None:
            return
        self._recall(send.id, is_sending=True)
        if self.error is None:
            self.session.abort_sending(send.id, error, reason)
            self.flush()
            self._fill_all()

    def message(self, payload: bytes) -> None:
        """Send a message, whose cost was spent already."""
        self.check()
        self.session.message(payload)
        self.counters.sent_messages += 1
        self.flush()

    def message_taken(self, payload: bytes) -> None:
        """The user has the message."""
        self.counters.received_messages += 1
        if self.error is None:
            self.session.message_taken(len(payload))
            self.flush()

    async def ping(self) -> float:
        """One round trip over the control connection, in seconds."""
        self.check()
        return await self._pulse.ping()

    def flush(self) -> None:
        """Hand the session's control bytes to the connection."""
        data = self.session.data_to_send()
        if data:
            self._control.write(data)
            if self._control.backlog_bytes > self.session.most_unread_bytes:
                self.fail(RemoteProtocolError("the peer sends, and does not read what we send"))

    def _fill_all(self) -> None:
        """Post what may go, each time on the lane with most credits, so that all lanes carry their part."""
        ledgers = self.session.sender.ledgers
        while ports := [port for port in self.ports if port.lane.room]:
            if not self._post(max(ports, key=lambda port: ledgers[port.index].free)):
                return

    def _post(self, port: Port) -> bool:
        plan = None if self.error is not None else self.session.sender.next(port.index)
        if plan is None:
            self.counters.credit_waits += self.session.sender.has_waiting
            return False
        port.post(plan, self.sends[plan.transfer].outgoing, checksum=self.config.checksum)
        return True

    def sent(self, port: Port, transfers: list[int]) -> None:
        for transfer in transfers:
            self.moved(transfer)
            self.loans.settle(transfer)
        while port.lane.room and self._post(port):
            pass

    def moved(self, transfer: int) -> None:
        if transfer in self.sends:
            self.sends[transfer].moved_at = self._pulse.now()

    def credited(self, port: Port, slots: int) -> None:
        self._pulse.heard()
        for transfer in self.session.sender.credited(port.index, slots):
            self.moved(transfer)
        self._fill_all()

    # Receiving

    def admit(self, header: ChunkHeader) -> Subject:
        verdict = self.session.receiver.admit(header)
        if isinstance(verdict, Incoming):  # which may cross this end's goodbye
            return self.receptions.get(verdict.id, Verdict.DISCARD)
        return verdict

    def came(self, header: ChunkHeader, chunk: Chunk, subject: Subject) -> None:
        """A chunk is here, whole: check it, and hand it to its transfer."""
        self._pulse.heard()
        if subject is Verdict.EARLY:
            if header.transfer > self.session.receiver.last:
                self._early.add(header, chunk, self._pulse.now())
                self._watch()
                return
            subject = self.admit(header)
        if not isinstance(subject, Reception) or subject.is_over:
            self.counters.discarded_chunks += 1
            chunk.release()
            return
        if header.check is not None and header.check != frames.xxh3(chunk.view):
            chunk.release()
            error = ChecksumError(
                f"transfer {header.transfer}: the chunk at byte {header.offset} is damaged; send it again"
            )
            subject.give_up(error, str(error))
            return
        subject.moved_at = self._pulse.now()
        self.session.chunk_came(subject.incoming, chunk.nbytes)
        subject.take(chunk)
        if subject.stage is Stage.OFFERED and subject.incoming.was_claimed:
            subject.move_aside(sum(port.ring.nbytes for port in self.ports))
        self.flush()

    def claim(self, reception: Reception) -> None:
        if self.error is None:
            self.session.claim(reception.incoming.id)
            self.flush()
            self._watch()

    def unclaim(self, reception: Reception) -> None:
        if self.error is None:
            self.session.unclaim(reception.incoming.id)
            self.flush()

    def done(self, reception: Reception) -> None:
        self.receptions.pop(reception.incoming.id, None)
        if self.error is None:
            self.session.done(reception.incoming)
            self.flush()

    def abort(self, reception: Reception, error: AiordmaError | None, reason: str) -> None:
        self.receptions.pop(reception.incoming.id, None)
        self._untake(reception)
        if self.error is None:
            self.session.abort_receiving(reception.incoming, error, reason)
            self.flush()

    def recall(self, reception: Reception) -> None:
        self._recall(reception.incoming.id, is_sending=False)

    def _untake(self, reception: Reception) -> None:
        self.transfers.discard(lambda transfer: transfer.reception is reception)

    def copied(self, nbytes: int) -> None:
        self.counters.copied_bytes += nbytes

    def _recall(self, transfer: int, *, is_sending: bool) -> bool:
        is_free = [port.lane.recall(transfer, is_sending=is_sending) for port in self.ports]
        return all(is_free)

    def _claim_ahead(self, waiting: int) -> None:
        # Takers wait: claim what the peer opens next, so that its chunks need not wait for a round trip.
        if self.error is None:
            self.session.claim_next(waiting)
            self.flush()

    # Control connection

    def control_received(self, data: bytes) -> None:
        """Control bytes came."""
        self._pulse.heard()
        try:
            for event in self.session.receive(data):
                if self.error is not None:
                    return
                self._handle(event)
            if self.error is None:
                self.flush()
                self.session.check_backlog(self._control.unsent_bytes)
        except RemoteProtocolError as exc:
            self.fail(exc)

    def control_lost(self, exc: Exception | None) -> None:
        """The control connection ended, which a lane's loss may have led to at the peer's."""
        broken = ChannelBroken(
            "the peer ended the connection without a goodbye: it died, or was cut off; see its log, and connect again"
            + "".join(port.whereabouts for port in self.ports)
        )
        broken.__cause__ = exc
        self.fail(next((port.loss for port in self.ports if port.loss), broken))

    def _handle(self, event: Event) -> None:
        match event:
            case Incoming():
                self._opened(event)
            case Refused():
                self._refused(event.transfer)
            case wire.Message():
                self.messages.put(event.payload)
            case wire.Acked():
                self._acknowledged(event.transfer)
            case wire.Done():
                if (send := self.sends.pop(event.transfer, None)) and not send.consumed.done():
                    send.consumed.set_result(None)
            case wire.Abort():
                self._aborted(event)
            case wire.Claim():
                self.moved(event.transfer)
                self._fill_all()
            case wire.MessageCredit():
                self.gates.messages.open()
            case wire.OpenCredit():
                self.gates.opens.open()
            case wire.Pong():
                self.counters.rtt_s = self._pulse.answered(event.token) or self.counters.rtt_s
            case wire.Bye():
                ending = ChannelBroken if event.is_fault else ChannelClosed
                self.fail(ending(f"the peer closed the channel: {event.reason}"))

    def _opened(self, incoming: Incoming) -> None:
        reception = self.receptions[incoming.id] = Reception(incoming, self, self._pulse.now())
        self.transfers.put(Transfer(reception))
        for header, chunk in self._early.take(incoming.id):
            self.came(header, chunk, self.admit(header))

    def _refused(self, transfer: int) -> None:
        for _, chunk in self._early.take(transfer):
            self.counters.discarded_chunks += 1
            chunk.release()
        self._claim_ahead(self.transfers.accepting)

    def _acknowledged(self, transfer: int) -> None:
        send = self.sends.get(transfer)
        if send is not None and not send.acknowledged.done():
            # By the peer's word alone no lane would have let go of the memory yet.
            self._recall(transfer, is_sending=True)
            send.acknowledged.set_result(None)

    def _aborted(self, abort: wire.Abort) -> None:
        error = error_of(abort)
        if abort.by_sender:
            if (reception := self.receptions.pop(abort.transfer, None)) is not None:
                self._untake(reception)
                reception.fail(error)
                self.recall(reception)
            return
        if (send := self.sends.pop(abort.transfer, None)) is not None:
            self._recall(abort.transfer, is_sending=True)
            send.fail(error)
            self._fill_all()

    # Time

    @property
    def is_busy(self) -> bool:
        return self.error is None and bool(self.sends or self.receptions or self._early)

    def _watch(self) -> None:
        self._pulse.start()
        for port in self.ports:
            port.watch()

    def send_ping(self, token: int) -> None:
        self.session.ping(token)
        self.flush()

    def judge(self, now: float) -> None:
        """Fail the transfers that made no progress for `idle_timeout_s`."""
        idle_s = self.config.idle_timeout_s
        for send in list(self.sends.values()):
            if now - send.moved_at > idle_s and self.session.sender.is_claimed(send.id):
                timeout = send.stalled(idle_s)
                self.stop_sending(send, timeout, str(timeout))
                send.fail(timeout)
        for reception in list(self.receptions.values()):
            if reception.is_waiting and now - reception.moved_at > idle_s:
                timeout = reception.stalled(idle_s)
                reception.give_up(timeout, str(timeout))
        if (overdue := self._early.overdue(now - idle_s)) is not None:
            self.fail(RemoteProtocolError(f"a chunk of transfer {overdue}, which was never opened"))

    # Ends

    def fail(self, error: ChannelBroken | ChannelClosed) -> None:
        """The channel is over; everybody who waits is told. What came whole can still be received."""
        if self.error is not None:
            return
        self.error = error
        if isinstance(error, RemoteProtocolError):
            # The peer hears why, if it still reads; nobody waits for that.
            self.session.bye(f"what came breaks the protocol: {error.args[0]}", is_fault=True)
            self.flush()
        self._pulse.stop(error)
        for send in list(self.sends.values()):
            self._recall(send.id, is_sending=True)
            send.fail(again(error))
        self.sends.clear()
        for reception in list(self.receptions.values()):
            if not reception.incoming.is_complete:
                self._untake(reception)
                reception.fail(again(error))
                self.recall(reception)
        self._early.clear()
        for ending in (*self.gates, self.transfers, self.messages):
            ending.fail(error)
        self._ending.begin(self.ports, is_orderly=isinstance(error, ChannelClosed))

    async def aclose(self, reason: str) -> None:
        """Say goodbye, wait up to `close_timeout_s` for the peer's, then let go of everything."""
        if self.error is None:
            self.session.bye(reason)
            self.flush()
            self.fail(ChannelClosed("this end closed the channel"))
        await self._ending.over(self.ports)
