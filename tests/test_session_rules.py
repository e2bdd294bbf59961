"""What a session says to a peer: to one that keeps the rules, and to one that breaks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from aiordma.errors import (
    AiordmaError,
    Busy,
    ChecksumError,
    ManifestError,
    RemoteProtocolError,
    TransferAborted,
    TransferError,
    TransferRefused,
    TransferTimeout,
)
from aiordma.wire import control, manifest as manifests
from aiordma.wire.control import Abort, Acked, Claim, ControlStream, Done, Frame, Open
from aiordma.wire.frames import ChunkHeader
from aiordma.wire.manifest import MAX_META_BYTES
from aiordma.wire.receiving import Incoming, Verdict
from aiordma.wire.session import Refused, error_of
from tests.simulated import CHUNK_BYTES, limits, session

MANIFEST = manifests.encode(manifests.lay_out([("t", "U8", (200,), None)]))
EMPTY = manifests.encode(manifests.lay_out([]))


class Peer:
    """A peer that may say anything: a control stream of its own, and headers by hand."""

    def __init__(self) -> None:
        self.session = session(limits(4), limits(8), 1)
        self._control = ControlStream(1 << 20)

    def says(self, *frames: Frame) -> list[Any]:
        """What the session makes of these frames."""
        for frame in frames:
            self._control.send(frame)
        return list(self.session.receive(self._control.data_to_send()))

    def hears(self) -> list[Frame]:
        """What the session answered."""
        return list(self._control.receive(self.session.data_to_send()))

    def sends(self, transfer: int, offset: int, length: int) -> Incoming | Verdict:
        """What the session makes of a chunk."""
        return self.session.receiver.admit(ChunkHeader(0, length, transfer, offset, None))

    def opens(self, *, claim: bool = True) -> Incoming:
        """Open a transfer of 200 bytes."""
        (incoming,) = self.says(Open(self.session.receiver.last + 1, CHUNK_BYTES, MANIFEST, b""))
        assert isinstance(incoming, Incoming)
        if claim:
            self.session.claim(incoming.id)
        return incoming

    def gets(self, chunks: int) -> int:
        """Let the session send it a transfer of 200 bytes, up to so many chunks."""
        transfer = self.session.open(MANIFEST, b"", 200)
        self.says(Claim(transfer))
        for _ in range(chunks):
            assert self.session.sender.next(0) is not None
        return transfer


WRONG: dict[str, tuple[Callable[[Peer], object], str]] = {
    "OPEN out of order": (
        lambda peer: peer.says(Open(2, CHUNK_BYTES, EMPTY, b"")),
        "OPEN of transfer 1 was due, 2 came",
    ),
    "OPEN twice": (
        lambda peer: peer.says(*[Open(1, CHUNK_BYTES, EMPTY, b"")] * 2),
        "OPEN of transfer 2 was due, 1 came",
    ),
    "OPEN beyond the count": (
        lambda peer: peer.says(*[Open(i, CHUNK_BYTES, EMPTY, b"") for i in range(1, 5)]),
        "OPEN number 4 .* beyond the window of 3",
    ),
    "OPEN beyond the bytes": (
        lambda peer: peer.says(Open(1, CHUNK_BYTES, EMPTY, bytes(119))),
        r"OPEN number 1 \(122 bytes in all\) beyond the window of 3 \(120 bytes\)",
    ),
    "no chunk size": (
        lambda peer: peer.says(Open(1, 0, MANIFEST, b"")),
        "chunks of 0 bytes do not fit slots of 64",
    ),
    "odd chunk size": (
        lambda peer: peer.says(Open(1, 48, MANIFEST, b"")),
        "chunks of 48 bytes do not fit slots of 64",
    ),
    "chunks larger than slots": (
        lambda peer: peer.says(Open(1, 128, MANIFEST, b"")),
        "chunks of 128 bytes do not fit slots of 64",
    ),
    "a chunk twice": (
        lambda peer: [peer.opens(), peer.sends(1, 64, 64), peer.sends(1, 64, 64)],
        "transfer 1: the chunk at 64 came twice",
    ),
    "the first chunk twice": (
        lambda peer: [peer.opens(), peer.sends(1, 0, 64), peer.sends(1, 0, 64)],
        "transfer 1: the chunk at 0 came twice",
    ),
    "a chunk beyond the data": (
        lambda peer: [peer.opens(), peer.sends(1, 256, 64)],
        "transfer 1 of 200 bytes in chunks of 64 has no chunk of 64 bytes at 256",
    ),
    "a chunk of an empty transfer": (
        lambda peer: [peer.says(Open(1, CHUNK_BYTES, EMPTY, b"")), peer.sends(1, 0, 0)],
        "has no chunk of 0 bytes at 0",
    ),
    "a chunk across two": (
        lambda peer: [peer.opens(), peer.sends(1, 32, 64)],
        "has no chunk of 64 bytes at 32",
    ),
    "a short chunk": (
        lambda peer: [peer.opens(), peer.sends(1, 0, 63)],
        "has no chunk of 63 bytes at 0",
    ),
    "a long last chunk": (
        lambda peer: [peer.opens(), peer.sends(1, 192, 9)],
        "has no chunk of 9 bytes at 192",
    ),
    "a second chunk of what nobody claimed": (
        lambda peer: [peer.opens(claim=False), peer.sends(1, 0, 64), peer.sends(1, 64, 64)],
        "a second chunk of transfer 1, which is not claimed",
    ),
    "a second early chunk of what nobody claimed": (
        lambda peer: [peer.sends(2, 0, 64), peer.sends(2, 64, 64)],
        "a second chunk of transfer 2, which is neither open nor claimed",
    ),
    "a chunk of transfer 0": (
        lambda peer: peer.sends(0, 0, 64),
        "a chunk of transfer 0: ids begin",
    ),
    "a chunk beyond the window": (
        lambda peer: peer.sends(4, 0, 64),
        "a chunk of transfer 4, beyond the 3 that may be open",
    ),
    "ACKED of a transfer never opened": (
        lambda peer: peer.says(Acked(1)),
        "acknowledges transfer 1, which was never opened",
    ),
    "ACKED before the last chunk": (
        lambda peer: peer.says(Acked(peer.gets(3))),
        "acknowledges transfer 1 at 192 of 200 bytes",
    ),
    "DONE before ACKED": (
        lambda peer: peer.says(Done(peer.gets(4))),
        "consumed transfer 1, which it never acknowledged",
    ),
    "DONE of a transfer never opened": (
        lambda peer: peer.says(Done(1)),
        "consumed transfer 1, which it never acknowledged",
    ),
    "CLAIM beyond the window": (
        lambda peer: peer.says(Claim(4)),
        "claims transfer 4; it allowed 3 so far",
    ),
    "CREDIT of a slot that it does not hold": (
        lambda peer: [peer.gets(1), peer.session.sender.credited(0, 0b11)],
        "gives back slot 1, which it does not hold",
    ),
    "a message beyond the count": (
        lambda peer: peer.says(*[control.Message(b"")] * 4),
        "message number 4 .* beyond the window of 3",
    ),
    "a message beyond the bytes": (
        lambda peer: peer.says(control.Message(bytes(60)), control.Message(bytes(41))),
        r"message number 2 \(101 bytes in all\)",
    ),
    "more messages allowed than there is room for": (
        lambda peer: peer.says(control.MessageCredit(4, 100)),
        "allows 4 messages of 100 bytes",
    ),
    "more OPENs allowed than there is room for": (
        lambda peer: peer.says(control.OpenCredit(3, 121)),
        "allows 3 OPENs of 121 bytes",
    ),
}


@pytest.mark.parametrize(("act", "text"), WRONG.values(), ids=WRONG)
def test_what_no_peer_does_ends_the_channel(act: Callable[[Peer], object], text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        act(Peer())


def test_up_to_the_borders_all_is_well() -> None:
    peer = Peer()
    assert len(peer.says(Open(1, CHUNK_BYTES, EMPTY, bytes(117)))) == 1
    assert len(peer.says(*[Open(i, CHUNK_BYTES, b"", b"") for i in (2, 3)])) == 2
    assert len(peer.says(control.Message(bytes(100)), *[control.Message(b"")] * 2)) == 3
    assert len(peer.says(Claim(3), control.Unclaim(3), Claim(3))) == 3
    other = Peer()
    assert other.sends(3, 0, 64) is Verdict.EARLY
    incoming = other.opens()
    assert [other.sends(1, offset, min(64, 200 - offset)) for offset in (192, 64, 128, 0)] == [
        incoming
    ] * 4
    assert other.says(Acked(other.gets(4)), Done(1)) == [Acked(1), Done(1)]


@pytest.mark.parametrize(
    ("manifest", "meta", "text"),
    [
        (b"junk", b"", "malformed"),
        (MANIFEST[:-1], b"", "malformed"),
        (manifests.encode(manifests.Manifest((), 7)), b"", "hole"),
        (
            manifests.encode(manifests.lay_out([("t", "U8", (2 << 20,), None)])),
            b"",
            "more than the limit",
        ),
        (EMPTY, bytes(MAX_META_BYTES + 1), "meta of 65537 bytes; 65536 are allowed"),
        (EMPTY, b"\xa1\xff", "`meta` is malformed"),
    ],
    ids=["junk", "cut", "hole", "too large", "meta too large", "meta junk"],
)
def test_a_bad_manifest_is_refused_and_the_session_goes_on(
    manifest: bytes, meta: bytes, text: str
) -> None:
    peer = Peer()
    wide = msgspec.structs.replace(limits(4), manifest_bytes=1 << 20)
    peer.session = session(wide, limits(4), 1)
    assert peer.sends(1, 0, 64) is Verdict.EARLY
    assert peer.says(Open(1, CHUNK_BYTES, manifest, meta)) == [Refused(1)]
    abort, credit = peer.hears()
    assert isinstance(abort, Abort)
    assert (abort.transfer, abort.by_sender, abort.cause) == (1, False, "manifest")
    assert text in abort.reason
    assert isinstance(error_of(abort), TransferRefused)
    assert isinstance(credit, control.OpenCredit)
    assert peer.sends(1, 64, 64) is Verdict.DISCARD
    assert peer.opens().id == 2
    assert isinstance(peer.sends(2, 0, 64), Incoming)


def test_meta_of_64_kib_is_taken() -> None:
    meta = msgspec.msgpack.encode(bytes(MAX_META_BYTES - 3))
    assert len(meta) == MAX_META_BYTES
    peer = Peer()
    peer.session = session(msgspec.structs.replace(limits(4), manifest_bytes=1 << 20), limits(4), 1)
    (incoming,) = peer.says(Open(1, CHUNK_BYTES, EMPTY, meta))
    assert isinstance(incoming, Incoming)
    assert peer.hears() == [Acked(1)]  # it is empty, and so it is complete


def test_words_about_a_transfer_that_is_over_do_no_harm() -> None:
    peer = Peer()
    transfer = peer.gets(2)
    peer.session.abort_sending(transfer, None, "enough")
    assert peer.says(Acked(transfer), Abort(transfer, True, "", ""), Abort(9, True, "", "")) == []
    peer.says(Done(transfer), Claim(transfer), control.Unclaim(transfer), Claim(transfer))
    peer.says(Abort(transfer, False, "", ""))
    assert peer.session.sender.next(0) is None
    assert peer.session.sender.credited(0, 0b11) == [transfer, transfer]


def test_a_claim_is_said_once() -> None:
    peer = Peer()
    incoming = peer.opens(claim=False)
    for _ in range(2):
        peer.session.claim(incoming.id)
    assert peer.hears() == [Claim(1)]
    peer.session.unclaim(incoming.id)
    peer.session.claim(incoming.id)
    peer.session.claim(9)
    assert peer.hears() == [control.Unclaim(1), Claim(1)]
    peer.sends(1, 0, 64)
    peer.sends(1, 64, 64)  # what an older claim let loose is no error
    for length in (64, 64, 64):
        peer.session.chunk_came(incoming, length)
        assert peer.hears() == []
    peer.session.chunk_came(incoming, 8)
    assert peer.hears() == [Acked(1)]


def test_what_is_complete_needs_no_claim() -> None:
    peer = Peer()
    (incoming,) = peer.says(Open(1, CHUNK_BYTES, EMPTY, b""))
    peer.session.claim(1)
    peer.session.done(incoming)
    peer.session.done(incoming)
    peer.session.abort_receiving(incoming, None, "too late")
    assert peer.hears() == [Acked(1), Done(1), control.OpenCredit(4, 123)]


def test_claims_in_advance() -> None:
    peer = Peer()
    peer.session.claim_next(2)
    assert peer.hears() == [Claim(1), Claim(2)]
    peer.session.claim_next(9)
    assert peer.hears() == [Claim(3)]
    peer.session.claim_next(1)
    assert peer.hears() == [control.Unclaim(2), control.Unclaim(3)]
    assert [peer.sends(2, offset, 64) for offset in (0, 64)] == [Verdict.EARLY] * 2
    first, second = peer.opens(claim=False), peer.opens(claim=False)
    assert (first.is_claimed, first.was_claimed) == (True, True)
    assert (second.is_claimed, second.was_claimed) == (False, True)
    assert peer.hears() == []
    peer.session.claim_next(1)
    assert peer.hears() == [Claim(3)]


def test_a_ping_is_answered_and_a_goodbye_is_told() -> None:
    peer = Peer()
    assert peer.says(control.Ping(7), control.Bye("late")) == [control.Ping(7), control.Bye("late")]
    assert peer.hears() == [control.Pong(7)]
    peer.session.ping(8)
    peer.session.bye("x" * 5000)
    assert peer.hears() == [control.Ping(8), control.Bye("x" * 1000)]


@pytest.mark.parametrize(
    ("error", "there"),
    [
        (None, TransferAborted),
        (TransferAborted(""), TransferAborted),
        (TransferRefused(""), TransferRefused),
        (TransferTimeout(""), TransferTimeout),
        (ChecksumError(""), ChecksumError),
        (ManifestError(""), TransferRefused),
        (Busy(""), TransferAborted),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_abort_tells_the_peer_why(
    error: AiordmaError | None, there: type[TransferError]
) -> None:
    peer = Peer()
    peer.session.abort_receiving(peer.opens(claim=False), error, "because " + "x" * 2000)
    peer.session.abort_sending(peer.gets(0), error, "because")
    mine, credit, opened, other = peer.hears()
    assert isinstance(opened, Open)
    assert isinstance(credit, control.OpenCredit)
    assert isinstance(mine, Abort)
    assert isinstance(other, Abort)
    assert (mine.by_sender, other.by_sender) == (False, True)
    assert len(mine.reason) == 1000
    for abort in (mine, other):
        assert type(error_of(abort)) is there
        assert "the peer" in str(error_of(abort))
        assert "because" in str(error_of(abort))


def test_an_unknown_cause_is_an_abort() -> None:
    assert type(error_of(Abort(1, True, "moonlight", "why not"))) is TransferAborted


def test_a_peer_that_never_sends_the_first_chunk_is_stopped(monkeypatch):
    monkeypatch.setattr("aiordma.wire.receiving._MOST_OUT_OF_ORDER", 100)
    nbytes = 1 << 40
    manifest = manifests.Manifest((manifests.TensorSpec("w", "U8", (nbytes,), 0),), nbytes)
    incoming = Incoming(
        id=1,
        manifest=manifest,
        meta=b"",
        chunk_bytes=64,
        open_bytes=1,
        is_claimed=True,
        was_claimed=True,
    )
    for i in range(1, 101):
        incoming.admit(ChunkHeader(0, 64, 1, 64 * i, None))
    with pytest.raises(RemoteProtocolError, match="100 chunks came before the one at 0"):
        incoming.admit(ChunkHeader(0, 64, 1, 64 * 101, None))
