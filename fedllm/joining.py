"""A silo's way into a run, and back into it when the server was lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from aiordma import Channel, ChannelConfig, ChannelError, VersionMismatch, connect
from fedllm.backoff import Backoff
from fedllm.config import check_seconds
from fedllm.conversation import server_lost
from fedllm.errors import JoinRefused, ServerLost, SettingError
from fedllm.kept import Kept
from fedllm.messages import JOIN_ANSWER, Join, Refused, Shard, Welcome
from fedllm.silo import Silo

__all__ = ["join"]

USUAL: Final = Backoff()


@contextlib.asynccontextmanager
async def join(
    host: str,
    port: int,
    *,
    name: str,
    fingerprint: Mapping[str, str],
    config: ChannelConfig | None = None,
    timeout_s: float = 10.0,
    backoff: Backoff | None = USUAL,
    keep: Path | None = None,
    shard: Shard | None = None,
    on_event: Callable[[str], object] | None = None,
) -> AsyncGenerator[Silo, None]:
    """Connect to a server and be admitted: ``async with join(...) as silo``. Leaving the block says goodbye.

    `name`: 1 to 64 letters, digits and ``_.:@-``, of no other silo of the run. `fingerprint`: digests by what
    they are of ("weights", "tokenizer", "adapter"), which must equal the server's. Connecting and admission
    may take `timeout_s` each.

    A server that is not there yet, or is lost later, is tried again after the pauses of `backoff`, until its patience
    is at its end; with None, once is all. `keep`: a folder for the last update, so that it survives the death of either
    end: a round that comes again has it handed in again, without training; None: the silo trains again. `on_event` is
    told, in words, of each failure and what comes next.

    `shard`: each rank of a sharded silo joins for itself, under the silo's name, and says what it holds. They are
    admitted when all are there, which a rank waits for as long as it takes. Each gets its part of the weights, and
    submits its part of the update, with the weight of the whole silo; the first rank's metrics and norm count. `keep`
    would have one rank hand in what another trains anew: with a shard it is a `SettingError`.

    Raises `SettingError` for a name or fingerprint that is none, `JoinRefused` with the server's reason,
    `ServerLost` if it does not answer, `aiordma.ConnectError` if there is no aiordma server, `CheckpointError` if
    `keep` cannot be used. Cancelled, nothing is left behind.
    """
    check_seconds("timeout_s", timeout_s)
    if shard is not None and keep is not None:
        raise SettingError("the ranks of a sharded silo keep no updates: leave keep= away")
    request = Join(name, dict(fingerprint), secrets.token_hex(16), shard)
    try:
        msgspec.convert(msgspec.to_builtins(request), Join)
    except msgspec.ValidationError as exc:
        raise SettingError(f"no server takes such a request to join: {exc}") from exc
    kept = Kept(keep, name) if keep is not None else None
    if kept is not None:
        request = msgspec.structs.replace(request, key=await asyncio.to_thread(kept.key))
    door = _Door(host, port, request, config, timeout_s, backoff, on_event)
    try:
        channel, welcome = await door.enter()
        async with Silo(
            channel,
            name,
            run=welcome.run,
            total_rounds=welcome.rounds,
            return_to=None if backoff is None else door.enter,
            kept=kept,
            shard=shard,
            on_event=on_event,
        ) as silo:
            yield silo
    finally:
        await door.aclose()


class _Door:
    """Opens the silo's channel, as often as need be; there is one at a time."""

    def __init__(
        self,
        host: str,
        port: int,
        request: Join,
        config: ChannelConfig | None,
        timeout_s: float,
        backoff: Backoff | None,
        on_event: Callable[[str], object] | None,
    ) -> None:
        self._address = host, port
        self._request = request
        self._config = config
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._on_event = on_event
        self._channel: Channel | None = None

    async def enter(self, lost: ServerLost | None = None) -> tuple[Channel, Welcome]:
        """A channel over which the silo is admitted. After a server was `lost`, the pause comes first.

        Raises what the last attempt did; if a server was lost, as `ServerLost`.
        """
        await self.aclose()
        pauses = iter(()) if self._backoff is None else self._backoff.pauses()
        failure: Exception | None = lost
        while True:
            if failure is not None:
                pause = next(pauses, None)
                if self._backoff is None or pause is None:
                    break
                if self._on_event is not None:
                    self._on_event(f"{failure}; trying again in {pause:.1f} s")
                await self._backoff.sleep(pause)
            try:
                return await self._knock()
            except VersionMismatch:
                raise
            except JoinRefused as exc:
                if exc.is_final:
                    raise
                failure = exc
            except (ChannelError, ServerLost) as exc:
                failure = exc
        if lost is not None and not isinstance(failure, ServerLost):
            raise ServerLost(f"the server was lost, and did not come back: {failure}") from failure
        raise failure

    async def aclose(self) -> None:
        """Close the channel, if there is one."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.aclose()

    async def _knock(self) -> tuple[Channel, Welcome]:
        channel = await connect(*self._address, config=self._config, timeout_s=self._timeout_s)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(channel.aclose)
            welcome = await self._be_admitted(channel)
            undo.pop_all()
        self._channel = channel
        return channel, welcome

    async def _be_admitted(self, channel: Channel) -> Welcome:
        try:
            async with asyncio.timeout(self._timeout_s if self._request.shard is None else None):
                with server_lost():
                    await channel.send(self._request)
                    answer: Welcome | Refused = await channel.recv(JOIN_ANSWER)
        except TimeoutError as exc:
            raise ServerLost(
                f"the server did not answer the join within {self._timeout_s:g} s"
            ) from exc
        if isinstance(answer, Refused):
            raise JoinRefused(answer.reason, is_final=answer.is_final)
        return answer
