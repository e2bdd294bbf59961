"""Every error that fedllm raises of its own.

What the network does below it is told by `aiordma.AiordmaError` and its subclasses.

::

    FedError
    ├── SettingError        a setting that cannot work (also a ValueError)
    ├── WeightsError        the global weights cannot be averaged as they are (also a ValueError)
    ├── UpdateError         one silo's update is not accepted; says which tensor, or what else
    ├── StagingError        the server has no room for one silo's update; nothing is wrong with it
    ├── RoundError
    │   ├── RoundAbandoned  a round ended without a result; nothing was wrong with this silo
    │   └── QuorumNotReached   too few silos: the old weights stay; carries the outcomes
    ├── CheckpointError     a checkpoint cannot be written or read; says which, and what to do
    ├── JournalError        the silo's record of what leaves it cannot be written; nothing was sent
    ├── JoinRefused         the server does not take this silo, and says why
    ├── ServerLost          the connection to the server is gone
    └── RunFailed           the server gave the whole run up, and says why
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "CheckpointError",
    "FedError",
    "JoinRefused",
    "JournalError",
    "QuorumNotReached",
    "RoundAbandoned",
    "RoundError",
    "RunFailed",
    "ServerLost",
    "SettingError",
    "StagingError",
    "UpdateError",
    "WeightsError",
]


MAX_LISTED = 5
"""Silos that an error lists."""


class FedError(Exception):
    """The root of all errors of this library."""


class SettingError(FedError, ValueError):
    """A setting that cannot work."""


class WeightsError(FedError, ValueError):
    """The global weights cannot be averaged as they are. Names the tensor."""


class UpdateError(FedError):
    """One silo's update is not accepted. The round goes on without it."""


class StagingError(FedError):
    """The server has no room for one silo's update, in memory or on disk. The round goes on without it."""


class RoundError(FedError):
    """A round ended without new weights; the old ones stay."""


class RoundAbandoned(RoundError):
    """A round ended without a result, and nothing was wrong with this silo."""


class QuorumNotReached(RoundError):
    """Fewer silos than `min_silos` got through a round, or are there at all."""

    def __init__(self, reason: str, outcomes: Mapping[str, Any] | None = None) -> None:
        """`outcomes` are what became of each silo, by name: `fedllm.Outcome`s.

        The text is the reason and what went wrong with which silo; `reason` alone names no silo, so that it can
        be told to all of them.
        """
        self.reason = reason
        self.outcomes: Mapping[str, Any] = dict(outcomes or {})
        causes = [
            f"{name} is {outcome.status}: {outcome.reason}"
            for name, outcome in self.outcomes.items()
            if outcome.reason != reason and not outcome.reason.endswith(f": {reason}")
        ]
        more = f"; and {len(causes) - MAX_LISTED} more" if len(causes) > MAX_LISTED else ""
        super().__init__("; ".join([reason, *causes[:MAX_LISTED]]) + more)


class CheckpointError(FedError):
    """A checkpoint that cannot be written or read. Says which; those before it are whole."""


class JournalError(FedError):
    """The silo's record of what leaves it cannot be written, and so nothing was sent."""


class JoinRefused(FedError):
    """The server does not take this silo. `reason` is the server's; unless it `is_final`, asking again may help."""

    def __init__(self, reason: str, *, is_final: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_final = is_final


class ServerLost(FedError):
    """The connection to the server is gone. The cause is the `aiordma` error."""


class RunFailed(FedError):
    """The server gave the run up before its last round. `reason` is the server's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
