"""One lane's queue pair on a device, and the memory it may touch."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final

import aiordma.lanes.verbs.api as api
from aiordma.lanes.choice import Choice
from aiordma.lanes.completion import Completion
from aiordma.lanes.outbox import Frame, Piece, Window, WindowWork
from aiordma.lanes.registry import address_of
from aiordma.lanes.statuses import explain
from aiordma.lanes.verbs.api import enums
from aiordma.lanes.verbs.device import Device
from aiordma.ring import Ring, slot_offset
from aiordma.wire.frames import HEADER_BYTES
from aiordma.wire.hello import LaneAddress

_RETRIES: Final = 6
"""7 would be for ever, for soft-RoCE even where the specification says that it is seven times."""
_TIMEOUT_UNIT_S: Final = 4.096e-6
_SLOWEST: Final = 4
"""How many times its timeout a device may take to notice that it is over; InfiniBand specification 9.7.6.1.3."""


class VerbsQueuePair:
    """A reliable connection (RC), the window to its ring, and what else one lane owns on a device."""

    def __init__(
        self, device: Device, choice: Choice, ring: Ring, stages: Ring, depth: int, receives: int
    ) -> None:
        """Raises `LaneRefused`."""
        self._device = device
        self._choice = choice
        self._receives = receives
        self._peer: LaneAddress | None = None
        self._header = (ctypes.c_char * HEADER_BYTES)()
        with (
            contextlib.ExitStack() as owned,
            api.refused(f"{choice.port.name} makes no queue pair"),
        ):
            self.reservation = device.pump.reserve(depth + receives)
            owned.callback(self.reservation.release)
            self._memory = _Memory(device, ring, stages, owned)
            queue = self.reservation.queue.cq
            self._qp = _queue_pair(device, self._memory.pd, queue, depth, receives)
            owned.callback(self._qp.close)
            self._owned = owned.pop_all()
        self.number: int = self._qp.qp_num
        self.address = LaneAddress(
            gid=choice.gid.text,
            lid=choice.port.lid,
            queue_pair=self.number,
            start_psn=random.getrandbits(24),
            mtu_bytes=choice.port.mtu_bytes,
            ring=address_of(ring.memory),
            key=self._memory.key,
        )
        self._sge, self._nothing = api.SGE(0, 0, 0), api.SGE(0, 0, 0)
        # One serves all receives: nothing is ever received into it.
        first_byte = api.SGE(self.address.ring, 1, self._memory.ring.lkey)
        self._receive = api.RecvWR(num_sge=1, sg=[first_byte])

    @property
    def name(self) -> str:
        far = "nobody" if self._peer is None else f"{self._peer.queue_pair} at {self._peer.gid}"
        return f"{self._choice.port.name}, queue pair {self.number} to {far}"

    def connect(self, peer: LaneAddress, rtt_s: float) -> float:
        """Go to "ready to send", and be ready to receive. Raises `LaneRefused`.

        Returns how many seconds the device goes on trying to get a packet through, at most.
        """
        self._peer = peer
        with api.refused(f"{self.name} cannot be connected"):
            self._qp.to_rts(self._attributes(peer, rtt_s))
            self.post_receives(self._receives)
        return _SLOWEST * (_RETRIES + 1) * _TIMEOUT_UNIT_S * 2.0 ** timeout_exponent(rtt_s)

    def expose(self, work_id: int) -> bool:
        """Open the ring to the peer; whether a completion will tell that it is."""
        memory = self._memory
        if memory.window is None:
            return False
        info = api.MWBindInfo(
            memory.ring, self.address.ring, memory.ring.length, enums.IBV_ACCESS_REMOTE_WRITE
        )
        with api.as_os_error(), self._posting() as qp:
            qp.wr_id, qp.wr_flags = work_id, enums.IBV_SEND_SIGNALED
            qp.wr_bind_mw(memory.window, memory.key, info)
        return True

    def stage(self, index: int, length: int) -> Piece:
        """So many bytes of a stage."""
        return self._memory.stage(index, length)

    def find(self, memory: memoryview) -> Piece | None:
        """A piece of registered memory."""
        return self._device.registry.find(memory) if self._device.has_windows else None

    def open_window(self, memory: memoryview) -> Window | None:
        """To registered memory, which it keeps registered. Raises `OSError`."""
        piece = None
        if self._device.has_windows:
            piece = self._device.registry.find(memory, is_to_write=True)
        if piece is None:
            return None
        with api.as_os_error():
            handle = api.MW(self._memory.pd, enums.IBV_MW_TYPE_2)
        return Window(piece, api.inc_rkey(handle.rkey), handle, api.as_os_error()(handle.close))

    def submit(self, batch: Sequence[Frame | WindowWork]) -> None:
        """Post all of it with one doorbell.

        What moves bytes is complete only when these are set, be they none: before, mlx5 has the next one overwrite it.
        """
        assert self._peer is not None
        ring, ring_key, sge = self._peer.ring, self._peer.key, self._sge
        with api.as_os_error(), self._posting() as qp:
            for frame in batch:
                if isinstance(frame, WindowWork):
                    _change(qp, frame)
                    continue
                key, target = frame.key, frame.target
                if key is None:
                    key, target = ring_key, ring + target
                for piece in frame.pieces:
                    qp.wr_id, qp.wr_flags = frame.work_id, 0
                    qp.wr_rdma_write(key, target)
                    sge.addr, sge.length, sge.lkey = piece.address, piece.length, piece.lkey
                    qp.wr_set_sge(sge)
                    target += piece.length
                qp.wr_id = frame.work_id
                # rxe looks at the flag, though ibv_wr_post(3) says that the call is enough.
                flags = enums.IBV_SEND_INLINE if frame.header else 0
                qp.wr_flags = flags | enums.IBV_SEND_SIGNALED if frame.is_signalled else flags
                cell = ring + frame.cell * HEADER_BYTES
                if frame.immediate is None:
                    qp.wr_rdma_write(ring_key, cell)
                else:
                    qp.wr_rdma_write_imm(ring_key, cell, frame.immediate)
                if frame.header:
                    self._header.raw = frame.header
                    qp.wr_set_inline_data(ctypes.addressof(self._header), HEADER_BYTES)
                else:
                    qp.wr_set_sge(self._nothing)

    def post_receives(self, count: int) -> None:
        """Be ready for so many more writes with immediate."""
        with api.as_os_error():
            for _ in range(count):
                self._qp.post_recv(self._receive)

    def fail(self, work_id: int) -> None:
        """To the error state, with a last work request that is flushed after all others."""
        attributes = api.QPAttr(qp_state=enums.IBV_QPS_ERR)
        with api.as_os_error():
            self._qp.modify(attributes, enums.IBV_QP_STATE)
            with self._posting() as qp:
                qp.wr_id, qp.wr_flags = work_id, enums.IBV_SEND_SIGNALED
                qp.wr_send()
                qp.wr_set_sge(self._nothing)

    def explain(self, completion: Completion) -> str:
        """Name, number, and likely cause."""
        return explain(completion.status, completion.vendor_err)

    async def aclose(self) -> None:
        """Destroy the queue pair first: then nothing reads or writes the rest."""
        try:
            self._owned.close()
        except api.PyverbsError as exc:  # a device that is gone has let go of all of it
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"{self.name} could not be destroyed", "exception": exc}
            )
        finally:
            await self._device.release()

    @contextlib.contextmanager
    def _posting(self) -> Iterator[Any]:
        """One batch, one doorbell; nothing is posted if it raises."""
        qp = self._qp
        qp.wr_start()
        try:
            yield qp
        except BaseException:
            qp.wr_abort()
            raise
        qp.wr_complete()

    def _attributes(self, peer: LaneAddress, rtt_s: float) -> Any:
        port = self._choice.port
        attributes = api.QPAttr(port_num=port.number)
        attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_WRITE
        if port.is_ethernet:
            route = api.GlobalRoute(
                dgid=api.GID(peer.gid), sgid_index=self._choice.gid.number, hop_limit=64
            )
            attributes.ah_attr = api.AHAttr(gr=route, is_global=1, port_num=port.number)
        else:
            attributes.ah_attr = api.AHAttr(dlid=peer.lid, is_global=0, port_num=port.number)
        mtu_bytes = min(port.mtu_bytes, peer.mtu_bytes)
        attributes.path_mtu = max(code for code, size in api.MTU_BYTES.items() if size <= mtu_bytes)
        attributes.dest_qp_num = peer.queue_pair
        attributes.rq_psn, attributes.sq_psn = peer.start_psn, self.address.start_psn
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
        attributes.min_rnr_timer, attributes.rnr_retry = 12, _RETRIES
        attributes.timeout, attributes.retry_cnt = timeout_exponent(rtt_s), _RETRIES
        return attributes


class _Memory:
    """The ring that the peer writes to, and the stages that are sent from, registered."""

    def __init__(
        self, device: Device, ring: Ring, stages: Ring, owned: contextlib.ExitStack
    ) -> None:
        """What it makes is closed with `owned`. Closing `stages` is part of that."""
        self._stages, self._stages_at = stages, address_of(stages.memory)
        owned.callback(stages.close)
        self.pd, self.window = device.pd, None
        if device.has_windows:
            access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_MW_BIND
        else:
            self.pd = api.PD(device.context)
            owned.callback(self.pd.close)
            access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        self.ring = device.pin(self.pd, address_of(ring.memory), ring.memory.nbytes, access)
        owned.callback(self.ring.close)
        pinned = device.pin(self.pd, self._stages_at, stages.memory.nbytes, 0)
        owned.callback(pinned.close)
        self._stages_key: int = pinned.lkey
        self.key: int = self.ring.rkey
        if device.has_windows:
            self.window = api.MW(self.pd, enums.IBV_MW_TYPE_2)
            owned.callback(self.window.close)
            self.key = api.inc_rkey(self.window.rkey)  # what it will be once it is bound

    def stage(self, index: int, length: int) -> Piece:
        at = self._stages_at + slot_offset(index, self._stages.slot_bytes)
        return Piece(at, length, self._stages_key)


def timeout_exponent(rtt_s: float) -> int:
    """How long a queue pair waits for an acknowledgement, as ibv_modify_qp(3) has it: _TIMEOUT_UNIT_S << n.

    Four round trips: below one it would send everything several times. At least a quarter of a second: a peer whose
    processors are busy answers late, and all retries together must outlast that.
    """
    wanted_s = max(0.25, 4 * rtt_s)
    return min(21, math.ceil(math.log2(wanted_s / _TIMEOUT_UNIT_S)))


def _change(qp: Any, work: WindowWork) -> None:
    qp.wr_id = work.work_id
    qp.wr_flags = enums.IBV_SEND_SIGNALED if work.is_signalled else 0
    window, piece = work.window, work.window.piece
    if work.is_bind:
        access = enums.IBV_ACCESS_REMOTE_WRITE
        info = api.MWBindInfo(piece.holder, piece.address, piece.length, access)
        qp.wr_bind_mw(window.handle, window.key, info)
    else:
        qp.wr_local_inv(window.key)


def _queue_pair(device: Device, pd: Any, cq: Any, depth: int, receives: int) -> Any:
    operations = enums.IBV_QP_EX_WITH_RDMA_WRITE | enums.IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    operations |= enums.IBV_QP_EX_WITH_SEND
    if device.has_windows:
        operations |= enums.IBV_QP_EX_WITH_BIND_MW | enums.IBV_QP_EX_WITH_LOCAL_INV
    cap = api.QPCap(
        max_send_wr=depth,
        max_recv_wr=receives,
        max_send_sge=1,
        max_recv_sge=1,
        max_inline_data=HEADER_BYTES,
    )
    wanted = api.QPInitAttrEx(
        qp_type=enums.IBV_QPT_RC,
        scq=cq,
        rcq=cq,
        cap=cap,
        pd=pd,
        comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        send_ops_flags=operations,
    )
    return api.QPEx(device.context, wanted)
