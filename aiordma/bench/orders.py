"""What the benchmark tells its processes to do, and what they answer: one line of JSON each."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["raw", "asyncio", "uvloop"]
Role = Literal["sender", "receiver"]


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one process is: given once, on its command line."""

    kind: Kind
    role: Role
    nbytes: int
    lanes: int
    congestion: str
    checksum: bool


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to do. A sender knows connect, send, ping; a receiver listen, accept, receive, echo."""

    do: Literal["listen", "accept", "connect", "send", "receive", "ping", "echo", "memory", "quit"]
    port: int = 0
    connections: int = 1
    digest: int = 0
    count: int = 0


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How it went. `error` is empty if it went well."""

    error: str = ""
    is_corrupt: bool = False
    port: int = 0
    digest: int = 0
    at_s: float = 0.0
    """When a send began, or a receive was complete; see `gauge.clock_s`."""
    cpu_s: float = 0.0
    extra_bytes: int = 0
    """Peak of resident memory beyond what was resident after set-up, with the tensor touched."""
    copied_bytes: int = 0
    round_trips_s: list[float] = []


class Ready(msgspec.Struct, frozen=True):
    """A receiver stands in its receiving call: now the sender may start."""

    ready: bool = True
