"""The calls of pyverbs that the lanes use, and their errors as ours: the only module that imports it.

Importing pyverbs configures the root logger, which is the program's own affair: that is undone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
from collections.abc import Iterator
from typing import Any

from aiordma.errors import LaneRefused, RegistrationError

_root = logging.getLogger()
_logging_before = _root.handlers[:], _root.level
try:
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.base import inc_rkey
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.device import Context, get_device_list
    from pyverbs.fork import fork_init, is_fork_initialized
    from pyverbs.mr import MR, MW, MWBindInfo
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
    from pyverbs.qp import QPAttr, QPCap, QPEx, QPInitAttrEx
    from pyverbs.wr import SGE, RecvWR

    try:
        from pyverbs import libibverbs_enums as enums
    except ImportError:  # up to version 58
        from pyverbs import enums
finally:
    _root.handlers[:], _root.level = _logging_before

__all__ = [
    "CQ",
    "GID",
    "MR",
    "MTU_BYTES",
    "MW",
    "PD",
    "SGE",
    "AHAttr",
    "CompChannel",
    "Context",
    "GlobalRoute",
    "MWBindInfo",
    "PyverbsError",
    "PyverbsRDMAError",
    "QPAttr",
    "QPCap",
    "QPEx",
    "QPInitAttrEx",
    "RecvWR",
    "as_os_error",
    "enums",
    "fork_init",
    "get_device_list",
    "inc_rkey",
    "is_fork_initialized",
    "pin",
    "refused",
]

MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
"""By enum ibv_mtu."""


def pin(pd: Any, address: int, nbytes: int, access: int) -> Any:
    """Register memory. Raises `RegistrationError` with what stands against it."""
    try:
        return MR(pd, nbytes, access, address=address)
    except PyverbsRDMAError as exc:
        if exc.error_code != errno.ENOMEM:
            raise RegistrationError(
                f"{nbytes} bytes cannot be registered ({os.strerror(exc.error_code)}): it is memory that this device "
                "cannot pin (a file's, or another device's?); send a copy of it"
            ) from exc
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
        raise RegistrationError(
            f"{nbytes} bytes cannot be registered ({os.strerror(exc.error_code)}; RLIMIT_MEMLOCK is {limit}): raise "
            "it (ulimit -l, LimitMEMLOCK= of systemd, --ulimit memlock= of Docker), or use fewer or smaller slots"
        ) from exc


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Setting something up fails."""
    try:
        yield
    except (PyverbsError, OSError) as exc:
        raise LaneRefused(f"{what}: {exc}") from exc


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """The device fails; the lane and the pump know what to make of it."""
    try:
        yield
    except PyverbsRDMAError as exc:
        raise OSError(exc.error_code, str(exc)) from exc
