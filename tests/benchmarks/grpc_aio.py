"""`python -m fedllm bench-round --against tests/benchmarks/grpc_aio.py`: a round over grpc.aio, as it is often written.

Kinder than most: messages of 2 MiB in a stream of raw bytes each way, no pickle, no protobuf, no limit on sizes;
received bytes are weighted and added in place, as in `plain_sockets`. gRPC chooses no congestion control: it gets the
host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from fedllm.bench.contender import Setup, Train
from fedllm.bench.content import Arrays, empty, row_of, weights_of
from fedllm.bench.layouts import layout_of

MESSAGE_BYTES = 2 << 20
NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/round/exchange"
Row = NDArray[np.float32]


class Server:
    """Silos call once for all rounds; the weights go down the stream, the updates come up."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._runner = asyncio.Runner()
        self._server: Any = None
        self._streams: dict[int, tuple[AsyncIterator[bytes], Any]] = {}
        self._changed: asyncio.Event
        self._ended: asyncio.Event

    def listen(self) -> int:
        """The port."""
        return self._runner.run(self._listen())

    def gather(self) -> None:
        """Each silo says its number first."""
        self._runner.run(self._gather())

    def round(self, weights: Arrays) -> Arrays:
        """The arrays are the new weights as well."""
        self._runner.run(self._lead(row_of(weights)))
        return weights

    def close(self) -> None:
        """End the calls."""
        self._runner.run(self._aclose())
        self._runner.close()

    async def _listen(self) -> int:
        self._changed, self._ended = asyncio.Event(), asyncio.Event()
        self._server = grpc.aio.server(options=NO_LIMIT)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("round", {"exchange": handler})]
        )
        port = self._server.add_insecure_port(f"{self._setup.host}:0")
        await self._server.start()
        return int(port)

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        number = (await anext(requests))[0]
        self._streams[number] = requests, context
        self._changed.set()
        await self._ended.wait()

    async def _gather(self) -> None:
        while len(self._streams) < self._setup.silos:
            self._changed.clear()
            await self._changed.wait()

    async def _lead(self, row: Row) -> None:
        parts = weights_of(self._setup.silos)
        await asyncio.gather(*(send(context, row) for _, context in self._streams.values()))
        row.fill(0)
        await asyncio.gather(
            *(
                self._add(requests, row, np.float32(parts[number] / sum(parts)))
                for number, (requests, _) in self._streams.items()
            )
        )

    async def _add(self, requests: AsyncIterator[bytes], sums: Row, share: np.float32) -> None:
        start = 0
        while start < sums.size:
            received = np.frombuffer(await anext(requests), np.float32)
            sums[start : start + received.size] += received * share
            start += received.size

    async def _aclose(self) -> None:
        self._ended.set()
        await self._server.stop(None)


class Silo:
    """One call for all rounds."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._weights = empty(layout_of(setup.layout))
        self._runner = asyncio.Runner()
        self._channel: Any = None
        self._call: Any = None

    def join(self) -> None:
        """Call, and say which silo this is."""
        self._runner.run(self._join())

    def round(self, train: Train) -> None:
        """Receive all, send all."""
        self._runner.run(self._take_part(train))

    def close(self) -> None:
        """End the call."""
        self._runner.run(self._channel.close())
        self._runner.close()

    async def _join(self) -> None:
        target = f"{self._setup.host}:{self._setup.port}"
        self._channel = grpc.aio.insecure_channel(target, options=NO_LIMIT)
        self._call = self._channel.stream_stream(METHOD)()
        await self._call.write(bytes([self._setup.number]))

    async def _take_part(self, train: Train) -> None:
        row, start = row_of(self._weights), 0
        while start < row.size:
            received = np.frombuffer(await self._call.read(), np.float32)
            row[start : start + received.size] = received
            start += received.size
        train(self._weights)
        await send(self._call, row)


async def send(stream: Any, row: Row) -> None:
    """gRPC takes nothing but bytes."""
    view = row.data.cast("B")
    for start in range(0, view.nbytes, MESSAGE_BYTES):
        await stream.write(view[start : start + MESSAGE_BYTES].tobytes())
