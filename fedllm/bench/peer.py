"""One process of a contender, server or silo: orders on standard input, answers on standard output."""

from __future__ import annotations

import sys
import time
from typing import Literal

import msgspec

from aiordma import AiordmaError
from fedllm.bench import content
from fedllm.bench.contender import ServerSide, Setup, SiloSide, load
from fedllm.bench.content import Arrays
from fedllm.bench.errors import WrongWeights
from fedllm.bench.layouts import layout_of
from fedllm.errors import FedError

__all__ = ["Answer", "Order"]

Order = Literal["listen", "gather", "round", "quit"]
"""A line. "listen" and "gather" are the server's."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an order went. `error` is empty if it went well. The first answer comes unasked, after the imports."""

    error: str = ""
    is_wrong: bool = False
    """Whether the error is that of weights which are not what they must be."""
    port: int = 0
    seconds: float = 0.0
    """Of a round; the server's."""
    cpu_s: float = 0.0
    """User and system seconds of the process, all threads, for a round."""


class Lead:
    """The server's process."""

    def __init__(self, side: ServerSide, setup: Setup) -> None:
        self._side = side
        self._setup = setup
        self._layout = layout_of(setup.layout)
        self._weights: Arrays = {}
        self._rounds = 0

    def obey(self, order: Order) -> Answer:
        """Raises what the side raises, and `WrongWeights`."""
        if order == "listen":
            self._weights = content.empty(self._layout)
            content.fill(self._weights)
            return Answer(port=self._side.listen())
        if order == "gather":
            self._side.gather()
            return Answer()
        content.renew(self._weights)
        cpu_s, started_at_s = time.process_time(), time.monotonic()
        self._weights = self._side.round(self._weights)
        answer = Answer(seconds=time.monotonic() - started_at_s, cpu_s=time.process_time() - cpu_s)
        self._rounds += 1
        content.verify(self._weights, self._layout, self._setup.silos, self._rounds)
        return answer


class Follow:
    """A silo's process."""

    def __init__(self, side: SiloSide, setup: Setup) -> None:
        self._side = side
        self._setup = setup
        side.join()

    def obey(self, order: Order) -> Answer:
        """One round. Raises what the side raises."""
        cpu_s = time.process_time()
        self._side.round(
            lambda arrays: content.train(arrays, self._setup.number, self._setup.silos)
        )
        return Answer(cpu_s=time.process_time() - cpu_s)


def main() -> int:
    """Run the process that its one argument describes, a `Setup` as JSON."""
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    try:
        _run(setup)
    except (AiordmaError, FedError, OSError) as exc:
        who = "the server" if setup.number < 0 else f"silo {setup.number}"
        _say(Answer(error=f"{who}: {exc}", is_wrong=isinstance(exc, WrongWeights)))
        return 1
    return 0


def _run(setup: Setup) -> None:
    if setup.contender.program:
        module = load(setup.contender.program)
    else:
        from fedllm.bench import ours as module
    is_server = setup.number < 0
    side = module.Server(setup) if is_server else module.Silo(setup)
    peer = Lead(side, setup) if is_server else Follow(side, setup)
    _say(Answer())
    for line in sys.stdin.buffer:
        order: Order = msgspec.json.decode(line, type=Order)
        if order == "quit":
            break
        _say(peer.obey(order))
    side.close()


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
