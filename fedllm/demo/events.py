"""What a command has to tell, as values: drawn by `screen`, or sent on as JSON lines by a child."""

from collections.abc import Callable
from typing import TextIO

import msgspec


class Step(msgspec.Struct, frozen=True, tag=True):
    """One step of training (or of judging, then without a loss) is done."""

    stage: str
    step: int
    steps: int
    loss: float | None = None


class Listening(msgspec.Struct, frozen=True, tag=True):
    """The server can be joined."""

    host: str
    port: int


class SiloRow(msgspec.Struct, frozen=True):
    """What one silo did in one round. `bytes` were uploaded in `seconds`."""

    silo: str
    status: str
    bytes: int
    seconds: float
    loss: float | None = None

    @property
    def gb_per_s(self) -> float:
        """Upload rate in 10^9 bytes a second; 0.0 where nothing was measured."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class RoundDone(msgspec.Struct, frozen=True, tag=True):
    """A round has ended, with these silos."""

    round: int
    rounds: int
    seconds: float
    silos: tuple[SiloRow, ...]


class Judged(msgspec.Struct, frozen=True, tag=True):
    """How one model does on one silo's held-out text: nats, summed over so many tokens.

    `nats` is None for a model that has diverged: JSON has no other word for what is no number.
    """

    model: str
    text: str
    nats: float | None
    tokens: int


class Wrote(msgspec.Struct, frozen=True, tag=True):
    """Something stands whole on disk now."""

    what: str
    path: str


class Said(msgspec.Struct, frozen=True, tag=True):
    """A remark for whoever watches."""

    text: str


Event = Step | Listening | RoundDone | Judged | Wrote | Said
Report = Callable[[Event], None]


def json_lines(stream: TextIO) -> Report:
    """Report each event as one line of JSON, written by one call and flushed; from any thread."""

    def report(event: Event) -> None:
        stream.write(msgspec.json.encode(event).decode() + "\n")
        stream.flush()

    return report


def read_event(line: bytes) -> Event:
    """The event of one line; `msgspec.DecodeError` for anything else."""
    event: Event = msgspec.json.decode(line, type=Event)
    return event
