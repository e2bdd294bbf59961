"""What the status of a work completion means, in words; ibv_poll_cq(3), InfiniBand specification 11.6.2."""

from __future__ import annotations

from typing import Final

_MEANINGS: Final = {
    1: ("LOC_LEN_ERR", "a message is longer than its buffer: please report it"),
    2: ("LOC_QP_OP_ERR", "the queue pair cannot carry out the request: please report it"),
    4: ("LOC_PROT_ERR", "memory was unregistered, or unmapped, while it was being sent"),
    5: ("WR_FLUSH_ERR", "the queue pair had failed or was closed before"),
    6: ("MW_BIND_ERR", "the memory window could not be bound: please report it"),
    7: ("BAD_RESP_ERR", "the peer answered nonsense: is it another RDMA stack?"),
    8: ("LOC_ACCESS_ERR", "the peer wrote where this end does not allow it"),
    9: ("REM_INV_REQ_ERR", "the peer's device refused the request: do both ends run this version?"),
    10: (
        "REM_ACCESS_ERR",
        "the write was outside of the ring that the peer opened to this queue pair, or its window is closed",
    ),
    11: ("REM_OP_ERR", "the peer's device could not carry the write out: see its log"),
    12: (
        "RETRY_EXC_ERR",
        "the peer's device does not answer: its process died, its link is down, or packets are blocked (UDP 4791)",
    ),
    13: ("RNR_RETRY_EXC_ERR", "the peer was not ready to receive: it posts too few receives"),
    19: ("FATAL_ERR", "the device failed: see dmesg"),
    21: ("GENERAL_ERR", "the device reports a failure of its own: see dmesg"),
}
FLUSHED: Final = 5


def explain(status: int, vendor_error: int) -> str:
    """Name, number, and likely cause."""
    name, cause = _MEANINGS.get(status, ("unknown", "see ibv_wc_status_str(3)"))
    return f"work completion status {status} ({name}, vendor error {vendor_error:#x}): {cause}"
