"""An HTTP proxy that opens tunnels (RFC 9110, 9.3.6), for tests: on asyncio's streams, and with its own mind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class TunnelProxy:
    """What it answers, and what it saw."""

    answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n"
    """To each CONNECT. One that begins otherwise than with 2xx (or 1xx before it) opens no tunnel."""
    opens: bool = True
    url: str = ""
    heads: list[str] = field(default_factory=list)
    """The requests, whole."""
    up_bytes: list[int] = field(default_factory=list)
    """By tunnel, what went to the server so far."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, writer)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            self.heads.append(head)
            writer.write(self.answer)
            if not self.opens:
                return
            host, _, port = head.split()[1].rpartition(":")
            there, back = await asyncio.open_connection(host.strip("[]"), int(port))
            stack.push_async_callback(_close, back)
            self.up_bytes.append(0)
            ways = (
                self._pump(reader, back, len(self.up_bytes) - 1),
                self._pump(there, writer, None),
            )
            await asyncio.gather(*ways)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, tunnel: int | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
                if tunnel is not None:
                    self.up_bytes[tunnel] += len(data)
                    self.moved.set()
        with contextlib.suppress(OSError, RuntimeError):  # uvloop: it is closing already
            sink.write_eof()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def a_proxy(
    answer: bytes | None = None, *, opens: bool = True, host: str = "127.0.0.1"
) -> AsyncIterator[TunnelProxy]:
    """A proxy that runs. It waits, at its end, for its tunnels."""
    proxy = TunnelProxy(opens=opens) if answer is None else TunnelProxy(answer, opens)
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.ensure_future(proxy.serve(reader, writer)))

    server = await asyncio.start_server(accept, host, 0)
    try:
        address = server.sockets[0].getsockname()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        proxy.url = f"http://{name}:{address[1]}"
        yield proxy
    finally:
        server.close()
        async with asyncio.timeout(10):
            await asyncio.gather(*serving, return_exceptions=True)
            await server.wait_closed()
