"""What a forked process has of the memory that its parent has registered.

A device keeps to the pages that were pinned. Linux says since version 5.13 that a fork copies such pages for the child
(RDMA_NLDEV_SYS_ATTR_COPY_ON_FORK). On older ones the first to write after a fork gets a new page, and if that is the
parent, the device goes on with the old one; there libibverbs can keep whole pages out of children (MADV_DONTFORK).
Touching them is SIGSEGV, whatever else lies on them. Up to version 50 it does so whenever it is asked to, even where
the kernel copies. ibv_fork_init(3), ibv_is_fork_initialized(3), madvise(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Literal

import aiordma.lanes.verbs.api as api
from aiordma.errors import RegistrationError
from aiordma.lanes.verbs.api import enums

ForkSupport = Literal["unneeded", "enabled", "disabled"]
"""The kernel copies registered memory for children; they go without; a fork may part the device from the program."""


def fork_support() -> ForkSupport:
    """Turn libibverbs' support on where it is needed, before a device is opened, and tell what came of it."""
    if api.is_fork_initialized() == enums.IBV_FORK_DISABLED:
        with contextlib.suppress(api.PyverbsRDMAError):  # too late: it stays disabled
            api.fork_init()
    kinds: dict[int, ForkSupport] = {
        enums.IBV_FORK_UNNEEDED: "unneeded",
        enums.IBV_FORK_ENABLED: "enabled",
    }
    return kinds.get(api.is_fork_initialized(), "disabled")


def leave_to_children(address: int, nbytes: int) -> None:
    """Take back that registered memory is kept out of children, where the kernel copies it for them.

    Another library may have called ibv_fork_init (NCCL does), or IBV_FORK_SAFE may be set. Raises
    `RegistrationError`.
    """
    first = address - address % mmap.PAGESIZE
    start, length = ctypes.c_void_p(first), ctypes.c_size_t(address + nbytes - first)
    if ctypes.CDLL(None, use_errno=True).madvise(start, length, mmap.MADV_DOFORK):
        reason = os.strerror(ctypes.get_errno())
        raise RegistrationError(
            f"{nbytes} bytes at {address:#x} cannot be left to forked processes ({reason}): unset IBV_FORK_SAFE and "
            "RDMAV_FORK_SAFE, or use rdma-core 51 or later, which ignores them where the kernel copies"
        )
