"""Runs whose server and silos are killed (SIGKILL) at random moments, and started again, in processes of their own.

``python -m tests.killing 50`` plays the seeds 0 to 49 and prints what became of each. No torch: a silo's training
is a function of round, silo and weights.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
import zlib
from asyncio.subprocess import Process
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from aiordma import ChannelConfig
from fedllm import (
    Backoff,
    Checkpoints,
    Federation,
    RunConfig,
    join,
)

ROOT: Final = Path(__file__).parents[1]
CONFIG: Final = ChannelConfig(slot_bytes=1 << 14, slots=4, close_timeout_s=1.0)
BACKOFF: Final = Backoff(first_s=0.02, most_s=0.2, patience_s=30.0)
FINGERPRINT: Final = {"weights": "1"}
SILOS: Final = ("a", "b", "c")
ROUNDS: Final = 12
TYPED: Final = 3
"""Exit code of a part that ends with an error of aiordma's or fedllm's own."""
ACCEPTED: Final = "accepted in round "
LIMIT_S: Final = 90.0
"""A run that takes longer hangs."""

Weights = dict[str, np.ndarray[Any, Any]]


def first() -> Weights:
    return {"w": np.zeros((512, 512), np.float32), "b": np.ones(3, np.float16)}


def fit(weights: Weights, silo: str, round: int) -> Weights:
    """Work for some ten milliseconds; the same update for the same arguments."""
    rng = np.random.default_rng((round, zlib.crc32(silo.encode())))
    w = weights["w"]
    for _ in range(8):
        w = w + rng.standard_normal(w.shape, np.float32)
        w = w - np.float32(0.001) * np.tanh(w)
    return {"w": w, "b": (weights["b"] * 0.9 + rng.random(3)).astype(np.float16)}


def digest(weights: Any) -> str:
    return f"{zlib.crc32(b''.join(weights[name].tobytes() for name in sorted(weights))):08x}"


# The parts


def log(what: str) -> None:
    sys.stderr.write(f"{time.time():.3f} {what}\n")


async def serve(port: int, folder: Path, quorum: int) -> str:
    settings = RunConfig(min_silos=quorum, expect=len(SILOS), rounds=ROUNDS, farewell_s=4.0)
    checkpoints = Checkpoints(folder / "server", keep=ROUNDS + 1)
    async with Federation(
        first(),
        settings,
        fingerprint=FINGERPRINT,
        checkpoints=checkpoints,
        on_silo=lambda silo, what: log(f"{silo} {what}"),
        on_round=lambda result: log(f"round {result.round}"),
        config=CONFIG,
    ) as server:
        await server.resume()
        return digest((await server.run(port=port)).weights)


async def take_part(port: int, name: str, keep: Path | None) -> str:
    async with join(
        "127.0.0.1",
        port,
        name=name,
        fingerprint=FINGERPRINT,
        config=CONFIG,
        backoff=BACKOFF,
        keep=keep,
        on_event=log,
    ) as silo:
        async for task in silo.rounds():
            update = await asyncio.to_thread(fit, task.weights, name, task.round)
            if (await task.submit(update, weight=1)).accepted:
                log(f"{ACCEPTED}{task.round}")
        assert silo.final is not None
        return digest(silo.final)


# The play


@dataclass
class Ending:
    """What a run has come to."""

    server: str
    """The digest of the final weights, or the typed error."""
    silos: dict[str, str]
    killed: list[str]
    seconds: float


@dataclass
class Cast:
    """The processes of one run, by role."""

    port: int
    folder: Path
    quorum: int
    keeps: bool
    playing: dict[str, Process] = field(default_factory=dict)

    async def start(self, role: str) -> None:
        word = str(self.quorum) if role == "server" else "keep" if self.keeps else "train"
        words = ("-m", "tests.killing", role, str(self.port), str(self.folder), word)
        with (self.folder / f"{role}.log").open("ab") as log:
            self.playing[role] = await asyncio.create_subprocess_exec(
                sys.executable, *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=log
            )

    async def kill(self, role: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.playing[role].send_signal(signal.SIGKILL)
        await self.playing[role].wait()

    async def end(self, role: str) -> str:
        """What a part printed, once it has ended by itself."""
        process = self.playing[role]
        assert process.stdout is not None
        said = (await process.stdout.read()).decode().strip()
        code = await process.wait()
        if code not in (0, TYPED):
            log = (self.folder / f"{role}.log").read_text()
            raise AssertionError(f"{role} ended with {code}: {said}\n{log}")
        return said


async def play(folder: Path, seed: int | None, *, quorum: int, keeps: bool) -> Ending:
    """One run; `seed` says who is killed when, None that nobody is."""
    rng = random.Random(seed)
    cast = Cast(free_port(rng), folder, quorum, keeps)
    roles = ("server", *SILOS)
    killed: list[str] = []
    started = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT_S):
            for role in roles:
                await cast.start(role)
            for _ in range(rng.randint(6, 16) if seed is not None else 0):
                if await ends_within(cast.playing["server"], rng.uniform(0.0, 1.0)):
                    break
                victims = rng.sample(roles, rng.choice((1, 1, 1, 2, len(roles))))
                victims = [role for role in victims if cast.playing[role].returncode is None]
                for role in victims:
                    await cast.kill(role)
                    killed.append(role)
                await ends_within(cast.playing["server"], rng.choice((0.0, 0.3)))
                for role in victims:
                    await cast.start(role)
            said = {role: await cast.end(role) for role in roles}
    finally:
        for role in cast.playing:
            await cast.kill(role)
    return Ending(said.pop("server"), said, killed, time.monotonic() - started)


async def ends_within(process: Process, seconds: float) -> bool:
    """Whether a process ends by itself meanwhile."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
    return process.returncode == 0


def free_port(rng: random.Random) -> int:
    """One below those that the kernel gives to outgoing connections: silos that call a server which is not there
    must not take its place."""
    low = 0
    while not low:
        port = random.Random(f"{rng.random()}{os.getpid()}").randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            low = port
    return low


def check_rounds(folder: Path, quorum: int) -> int:
    """Every round on disk is the mean of what a quorum makes of the one before it; how many there are."""
    checkpoints = Checkpoints(folder / "server")
    before, _ = checkpoints.load(0, first())
    for round in checkpoints.rounds()[1:]:
        after, state = checkpoints.load(round, first())
        cohort = state["progress"]["cohort"]
        assert quorum <= len(cohort) <= len(SILOS), (round, cohort)
        updates = [fit(before, silo, round) for silo in cohort]
        for name, array in after.items():
            mean = np.mean([update[name].astype(np.float64) for update in updates], axis=0)
            np.testing.assert_allclose(array.astype(np.float64), mean, rtol=2e-3, atol=1e-5)
        before = after
    return len(checkpoints.rounds()) - 1


def check(ending: Ending, folder: Path, quorum: int, undisturbed: str) -> None:
    """What must be true of a run, whoever was killed when."""
    rounds = check_rounds(folder, quorum)
    for silo in SILOS:
        lines = (folder / f"{silo}.log").read_text().splitlines()
        accepted = [line.partition(ACCEPTED)[2] for line in lines if ACCEPTED in line]
        assert len(accepted) == len(set(accepted)), (silo, accepted)
    is_whole = len(ending.server) == 8
    if quorum == len(SILOS):
        assert ending.server == undisturbed, ending
    if is_whole:
        assert rounds == ROUNDS, ending
    else:
        assert ending.server.startswith("QuorumNotReached: "), ending
    for said in ending.silos.values():
        # A silo that was killed in the last moment may come back when the server has gone.
        assert said == ending.server or said.startswith(("ServerLost: ", "Conn")) or not is_whole, (
            ending
        )
