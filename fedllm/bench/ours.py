"""fedllm as a contender: `run_round`, and silos that hand back what they were sent."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import aiordma
from aiordma import Channel, ChannelConfig
from fedllm import Aligned, FedAvg, Memory, Silo as Member, Staged, Status, run_round
from fedllm.bench.contender import Setup, Train
from fedllm.bench.content import Arrays, weights_of
from fedllm.bench.errors import BenchError

__all__ = ["Server", "Silo"]

_IDLE_TIMEOUT_S = 120.0


class Server:
    """Leads the rounds."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._runner = asyncio.Runner()
        # Not Runner.run, which sets a signal handler each time, and signal() formats it: the weights, among others.
        self._run = self._runner.get_loop().run_until_complete
        self._listener: aiordma.Listener | None = None
        self._channels: dict[str, Channel] = {}
        self._round = 0
        memory = Memory()
        staged = partial(Staged, memory=memory)
        aligned = partial(Aligned, memory=memory, idle_timeout_s=_IDLE_TIMEOUT_S)
        self._strategy = FedAvg(
            aggregate=staged if setup.contender.aggregate == "staged" else aligned
        )

    def listen(self) -> int:
        """See `ServerSide`."""
        return self._run(self._listen())

    def gather(self) -> None:
        """See `ServerSide`."""
        self._run(self._gather())

    def round(self, weights: Arrays) -> Arrays:
        """See `ServerSide`."""
        return self._run(self._lead(weights))

    def close(self) -> None:
        """See `ServerSide`."""
        self._run(self._aclose())
        self._runner.close()

    async def _listen(self) -> int:
        # Whoever has the link between namespaces has chosen it, and nobody else is there.
        self._listener = await aiordma.listen(
            self._setup.host, 0, config=_config(self._setup), insecure=True
        )
        return self._listener.address[1]

    async def _gather(self) -> None:
        assert self._listener is not None
        while len(self._channels) < self._setup.silos:
            channel = await self._listener.accept()
            self._channels[await channel.recv(str)] = channel

    async def _lead(self, weights: Arrays) -> Arrays:
        self._round += 1
        result = await run_round(
            self._channels,
            weights,
            round=self._round,
            strategy=self._strategy,
            min_silos=self._setup.silos,
        )
        for name, outcome in result.outcomes.items():
            if outcome.status is not Status.COMMITTED:
                raise BenchError(f"{name} is {outcome.status.value}: {outcome.reason}")
        return result.weights

    async def _aclose(self) -> None:
        await asyncio.gather(*(channel.aclose() for channel in self._channels.values()))
        if self._listener is not None:
            await self._listener.aclose()


class Silo:
    """Hands back what it was sent."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._runner = asyncio.Runner()
        # Not Runner.run, which sets a signal handler each time, and signal() formats it: the weights, among others.
        self._run = self._runner.get_loop().run_until_complete
        self._channel: Channel | None = None
        self._member: Member | None = None

    def join(self) -> None:
        """See `SiloSide`."""
        self._run(self._join())

    def round(self, train: Train) -> None:
        """See `SiloSide`."""
        self._run(self._take_part(train))

    def close(self) -> None:
        """See `SiloSide`."""
        self._run(self._aclose())
        self._runner.close()

    async def _join(self) -> None:
        setup = self._setup
        name = f"silo-{setup.number:02}"
        self._channel = await aiordma.connect(setup.host, setup.port, config=_config(setup))
        await self._channel.send(name)
        self._member = Member(self._channel, name)
        self._member.memory = Memory()

    async def _take_part(self, train: Train) -> None:
        assert self._member is not None
        weight = weights_of(self._setup.silos)[self._setup.number]
        async with contextlib.aclosing(self._member.rounds()) as rounds:
            task = await anext(rounds)
            train(task.weights)
            report = await task.submit(task.weights, weight=weight)
        if not report.accepted:
            raise BenchError(f"the update was not taken: {report.reason}")

    async def _aclose(self) -> None:
        if self._member is not None:
            await self._member.aclose()
        if self._channel is not None:
            await self._channel.aclose()


def _config(setup: Setup) -> ChannelConfig:
    return ChannelConfig(
        lanes=setup.contender.lanes,
        slot_bytes=setup.contender.slot_bytes,
        congestion=setup.congestion or None,
        idle_timeout_s=2 * _IDLE_TIMEOUT_S,
        verbs=False,
    )
