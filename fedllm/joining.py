"""A silo's way into a run, and back into it when the server was lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

import msgspec

from aiordma import (
    Channel,
    ChannelConfig,
    ChannelError,
    ProxyRefused,
    VersionMismatch,
    connect,
)
from fedllm.backoff import Backoff
from fedllm.config import check_seconds
from fedllm.conversation import server_lost
from fedllm.errors import JoinRefused, ServerLost, SettingError
from fedllm.journal import Journal
from fedllm.kept import Kept
from fedllm.messages import JOIN_ANSWER, Join, Refused, Shard, Welcome
from fedllm.policy import Policy
from fedllm.silo import OPEN, Silo
from fedllm.threads import finish_in_thread

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
    policy: Policy = OPEN,
    journal: Path | None = None,
    proxy: str | None = None,
    on_event: Callable[[str], object] | None = None,
) -> AsyncGenerator[Silo, None]:
    """Connect to a server and be admitted: ``async with join(...) as silo``. Leaving the block says goodbye.

    `name`: 1 to 64 letters, digits and ``_.:@-``, of no other silo of the run. `fingerprint`: digests by what they are
    of ("weights", "tokenizer"), which must equal the server's. Connecting and admission may take `timeout_s` each.

    A server that is not there, or is lost, is tried again after the pauses of `backoff`, while it has patience; with
    None, or if a proxy wants another password, once is all. `keep`: a folder for the last update, which survives the
    death of either end: a round that comes again has it handed in again, untrained. `on_event` hears of failures.

    `shard`: each rank of a sharded silo joins for itself, under the silo's name, and says what it holds. It waits until
    all are there, gets its part of the weights, and submits its part of the update, with the weight of the whole silo;
    the first rank's metrics and norm count. A rank cannot `keep`: another might train anew what it hands in.

    `policy`: what the server may ask, and what it is told. `journal`: a file for a record of what left the silo, of
    which each line is on the disk before that is sent. `proxy`: the HTTP proxy on the way, see `aiordma.connect`.

    Raises `SettingError` for a name or fingerprint that is none, `JoinRefused` with the server's reason,
    `ServerLost` if it does not answer, `aiordma.ConnectError` if there is no aiordma server, `CheckpointError` if
    `keep` cannot be used, `JournalError` if the journal cannot. Cancelled, nothing is left behind.
    """
    check_seconds("timeout_s", timeout_s)
    kept = Kept(keep, name) if keep is not None else None
    request = await _request(name, fingerprint, kept, shard)
    rank = None if shard is None else shard.rank
    record = Journal(journal, name, rank) if journal is not None else None
    dial = partial(connect, host, port, config=config, proxy=proxy, timeout_s=timeout_s)
    door = _Door(dial, f"{host}:{port}", request, timeout_s, backoff, record, on_event)
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
            policy=policy,
            journal=record,
            on_event=on_event,
        ) as silo:
            yield silo
    finally:
        await door.aclose()


async def _request(
    name: str, fingerprint: Mapping[str, str], kept: Kept | None, shard: Shard | None
) -> Join:
    if shard is not None and kept is not None:
        raise SettingError("the ranks of a sharded silo keep no updates: leave keep= away")
    request = Join(name, dict(fingerprint), secrets.token_hex(16), shard)
    try:
        msgspec.convert(msgspec.to_builtins(request), Join)
    except msgspec.ValidationError as exc:
        raise SettingError(f"no server takes such a request to join: {exc}") from exc
    if kept is not None:
        request = msgspec.structs.replace(request, key=await finish_in_thread(kept.key))
    return request


class _Door:
    """Opens the silo's channel, as often as need be; there is one at a time."""

    def __init__(
        self,
        dial: Callable[[], Awaitable[Channel]],
        address: str,
        request: Join,
        timeout_s: float,
        backoff: Backoff | None,
        journal: Journal | None,
        on_event: Callable[[str], object] | None,
    ) -> None:
        self._dial = dial
        self._address = address
        self._request = request
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._journal = journal
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
            except (JoinRefused, ChannelError, ServerLost) as exc:
                if _is_final(exc):
                    raise
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
        channel = await self._dial()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(channel.aclose)
            request = self._request
            facts = {"name": request.name, "fingerprint": request.fingerprint}
            await self._note("join", server=self._address, **facts)
            welcome = await self._be_admitted(channel)
            await self._note("welcome", **msgspec.structs.asdict(welcome))
            undo.pop_all()
        self._channel = channel
        return channel, welcome

    async def _note(self, event: str, **facts: object) -> None:
        if self._journal is not None:
            await asyncio.to_thread(self._journal.write, event, **facts)

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
            await self._note("refused", **msgspec.structs.asdict(answer))
            raise JoinRefused(answer.reason, is_final=answer.is_final)
        return answer


def _is_final(failure: Exception) -> bool:
    """Whether to ask again is of no use, or does harm: a wrong password, sent often, locks the account."""
    match failure:
        case JoinRefused():
            return failure.is_final
        case ProxyRefused():
            return failure.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
    return isinstance(failure, VersionMismatch)
