"""An RDMA endpoint in the plainest use of pyverbs: what the verbs lane is compared with.

One queue pair with a completion channel and one registered page-aligned buffer. The half that is written to
is exposed by a type-2 memory window that only this queue pair's peer can use. Works with pyverbs 44 and later.
"""

import contextlib
import ctypes
import mmap
import os
import random
import select
import socket
from pathlib import Path
from typing import Final, NamedTuple

from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.base import inc_rkey
from pyverbs.cq import CQ, WC, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR, MW, MWBindInfo
from pyverbs.pd import PD
from pyverbs.qp import QPAttr, QPCap, QPEx, QPInitAttrEx
from pyverbs.wr import SGE, RecvWR

try:
    from pyverbs import libibverbs_enums as enums
except ImportError:  # up to version 58
    from pyverbs import enums

PORT: Final = 1
DEPTH: Final = 32
"""Work requests that may be outstanding in each direction."""


class Address(NamedTuple):
    """What a peer must know to write here."""

    gid: str
    queue_pair: int
    start_psn: int
    key: int
    target: int


class Endpoint:
    """The first half of `memory` is the source of what it writes, the second the target of its peer's writes.

    Whoever made one closes it; nothing here is for more than one thread.
    """

    def __init__(self, device: str, half_bytes: int) -> None:
        self.half_bytes = half_bytes
        self.memory = mmap.mmap(-1, 2 * half_bytes)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._context = Context(name=device)
        self._pd = PD(self._context)
        # No remote rights: only the window has them.
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_MW_BIND
        self._region = MR(self._pd, 2 * half_bytes, access, address=self._base)
        self._window = MW(self._pd, enums.IBV_MW_TYPE_2)
        self._channel, self._fd = _completion_channel(self._context)
        self._cq = CQ(self._context, 2 * DEPTH, None, self._channel, 0)
        self._cq.req_notify()
        self._qp = _queue_pair(self._context, self._pd, self._cq)
        self._sge = SGE(self._base, 0, self._region.lkey)
        self._receive = RecvWR(num_sge=1, sg=[SGE(self._base, 1, self._region.lkey)])
        self._gid_index, gid = _ipv4_gid(self._context)
        self.address = Address(
            gid=gid,
            queue_pair=self._qp.qp_num,
            start_psn=random.getrandbits(24),
            # Known before the window is bound; it may be used when `connect` has returned.
            key=inc_rkey(self._window.rkey),
            target=self._base + half_bytes,
        )

    def connect(self, peer: Address) -> None:
        """Be ready for the peer's writes, and for writing to it as soon as it is connected too."""
        mtu = self._context.query_port(PORT).active_mtu
        # By way of INIT and RTR.
        self._qp.to_rts(_attributes(self.address, peer, self._gid_index, mtu))
        for _ in range(DEPTH):
            self._qp.post_recv(self._receive)
        info = MWBindInfo(
            self._region, self.address.target, self.half_bytes, enums.IBV_ACCESS_REMOTE_WRITE
        )
        self._qp.wr_start()
        self._qp.wr_id, self._qp.wr_flags = 0, enums.IBV_SEND_SIGNALED
        self._qp.wr_bind_mw(self._window, self.address.key, info)
        self._qp.wr_complete()
        (bound,) = self.completions(1)
        assert bound.status == enums.IBV_WC_SUCCESS, bound

    def write(self, peer: Address, length: int, immediate: int) -> None:
        """Start to write the first `length` bytes of the source to the start of the peer's target."""
        self._sge.length = length
        self._qp.wr_start()
        self._qp.wr_id, self._qp.wr_flags = immediate, enums.IBV_SEND_SIGNALED
        self._qp.wr_rdma_write_imm(peer.key, peer.target, immediate)
        self._qp.wr_set_sge(self._sge)
        self._qp.wr_complete()

    def post_receive(self) -> None:
        """Take one more write of the peer; `connect` has posted DEPTH."""
        self._qp.post_recv(self._receive)

    def completions(self, count: int, timeout_s: float = 30.0) -> list[WC]:
        """Wait for the next `count` completions, as events of the completion channel announce them."""
        found: list[WC] = []
        while len(found) < count:
            readable, _, _ = select.select([self._fd], [], [], timeout_s)
            assert readable, f"{len(found)} of {count} completions in {timeout_s:g} s"
            self._channel.get_cq_event(self._cq)
            self._cq.ack_events(1)
            # Arm, then poll: a completion from between the two would announce itself to nobody.
            self._cq.req_notify()
            while polled := self._cq.poll(16)[1]:
                found += polled
        assert len(found) == count, found
        return found

    def close(self) -> None:
        """Give the device's objects back. The memory is free to use, or to go, after it."""
        for owned in (self._qp, self._window, self._cq, self._channel, self._region, self._pd):
            owned.close()
        self._context.close()


def immediate_of(completion: WC) -> int:
    """The number that the peer gave to `write`: pyverbs converts it there, but not in a completion."""
    return socket.ntohl(completion.imm_data)


def _completion_channel(context: Context) -> tuple[CompChannel, int]:
    """A completion channel and its file descriptor, which has been CompChannel.fd since version 57."""
    before = _event_files()
    channel = CompChannel(context)
    (fd,) = _event_files() - before
    os.set_blocking(fd, False)  # get_cq_event would block, and hold the GIL
    return channel, fd


def _event_files() -> set[int]:
    """This process's descriptors of RDMA events."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            if os.readlink(entry) == "anon_inode:[infinibandevent]":
                found.add(int(entry.name))
    return found


def _queue_pair(context: Context, pd: PD, cq: CQ) -> QPEx:
    wanted = QPInitAttrEx(
        qp_type=enums.IBV_QPT_RC,
        scq=cq,
        rcq=cq,
        cap=QPCap(max_send_wr=DEPTH, max_recv_wr=DEPTH, max_send_sge=1, max_recv_sge=1),
        pd=pd,
        comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        send_ops_flags=enums.IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | enums.IBV_QP_EX_WITH_BIND_MW,
    )
    return QPEx(context, wanted)


def _ipv4_gid(context: Context) -> tuple[int, str]:
    """Index and text of the port's RoCE v2 GID that stands for an IPv4 address."""
    for entry in context.query_gid_table(context.query_port(PORT).gid_tbl_len):
        is_ipv4 = entry.gid_str().startswith("0000:0000:0000:0000:0000:ffff:")
        if is_ipv4 and (entry.port_num, entry.gid_type) == (PORT, enums.IBV_GID_TYPE_ROCE_V2):
            return entry.gid_index, entry.gid_str()
    raise AssertionError("the port has no RoCE v2 GID for an IPv4 address")


def _attributes(own: Address, peer: Address, gid_index: int, mtu: int) -> QPAttr:
    """All that a queue pair must be told on its way to RTS; see ibv_modify_qp(3)."""
    route = GlobalRoute(dgid=GID(peer.gid), sgid_index=gid_index, hop_limit=64)
    attributes = QPAttr(port_num=PORT)
    attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_WRITE
    attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=PORT)
    attributes.path_mtu = mtu
    attributes.dest_qp_num = peer.queue_pair
    attributes.rq_psn, attributes.sq_psn = peer.start_psn, own.start_psn
    attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
    attributes.min_rnr_timer, attributes.rnr_retry = 12, 6
    attributes.timeout = 17  # 4.096 us << 17 is 0.54 s
    attributes.retry_cnt = 6  # 7 is for ever on rxe
    return attributes
