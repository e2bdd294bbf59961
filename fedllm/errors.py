"""Every error that fedllm raises of its own.

What the network does below it is told by `aiordma.AiordmaError` and its subclasses.

::

    FedError
    ├── SettingError        a setting that cannot work (also a ValueError)
    ├── WeightsError        the global weights cannot be averaged as they are (also a ValueError)
    ├── UpdateError         one silo's update is not accepted; says which tensor, or what else
    ├── RoundError
    │   ├── RoundAbandoned  a round ended without a result; nothing was wrong with this silo
    │   └── QuorumNotReached   too few silos: the old weights stay; carries the outcomes
    ├── JoinRefused         the server does not take this silo, and says why
    ├── ServerLost          the connection to the server is gone
    └── RunFailed           the server gave the whole run up, and says why
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "FedError",
    "JoinRefused",
    "QuorumNotReached",
    "RoundAbandoned",
    "RoundError",
    "RunFailed",
    "ServerLost",
    "SettingError",
    "UpdateError",
    "WeightsError",
]


class FedError(Exception):
    """The root of all errors of this library."""


class SettingError(FedError, ValueError):
    """A setting that cannot work."""


class WeightsError(FedError, ValueError):
    """The global weights cannot be averaged as they are. Names the tensor."""


class UpdateError(FedError):
    """One silo's update is not accepted. The round goes on without it."""


class RoundError(FedError):
    """A round ended without new weights; the old ones stay."""


class RoundAbandoned(RoundError):
    """A round ended without a result, and nothing was wrong with this silo."""


class QuorumNotReached(RoundError):
    """Fewer silos than `min_silos` got through a round, or are there at all."""

    def __init__(self, reason: str, outcomes: Mapping[str, Any] | None = None) -> None:
        """`outcomes` are what became of each silo, by name: `fedllm.rounds.Outcome`s."""
        super().__init__(reason)
        self.outcomes: Mapping[str, Any] = dict(outcomes or {})


class JoinRefused(FedError):
    """The server does not take this silo. `reason` is the server's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ServerLost(FedError):
    """The connection to the server is gone. The cause is the `aiordma` error."""


class RunFailed(FedError):
    """The server gave the run up before its last round. `reason` is the server's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
