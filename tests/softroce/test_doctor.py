"""`python -m aiordma doctor` where there is a device."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys

import pytest

import aiordma
from tests.softroce.lanes import CONFIG

pytestmark = [pytest.mark.verbs, pytest.mark.usefixtures("node", "clean_device")]


async def doctor(*arguments: str, **environment: str) -> tuple[int | None, str]:
    """Exit status and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "aiordma", "doctor", *arguments),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_all_is_well_here_and_on_the_way_to_a_peer(record_property):
    async with aiordma.listen(config=CONFIG) as listener:
        host, port = listener.address
        accepting = asyncio.create_task(listener.accept())
        status, output = await doctor(f"{host}:{port}")
        async with await accepting:
            pass
    assert status == 0, output
    lane = r"verbs: rxe0/1, RoCE v2 10\.77\.0\.1, MTU \d+"
    for line in (
        r"ok     rdma-core +\d+\.\d, /.+/libibverbs\.so\.1\.\S+",
        r"(ok|note)   +pyverbs +.*; it fits rdma-core \d+\.\d.*",
        r"ok     permissions +/dev/infiniband/uverbs0 \(rxe0\) may be opened",
        r"ok     memlock +unlimited.*; a lane of the default settings registers 20\.1 MiB",
        r"ok     fork +the kernel copies registered memory at a fork, and a child may use its copy",
        r"ok     rxe0 +firmware .*; regions of .*, \d+ queue pairs of \d+ work requests, .*",
        r"ok     rxe0 +memory windows of type 2: .*",
        r"ok     rxe0/1 +ACTIVE, Ethernet, MTU \d+",
        r"ok     rxe0/1 GID \d +RoCE v2, 10\.77\.0\.1",
        rf"ok     rxe0/1 self-test +1 MiB over {lane}; every byte is right; .* MB/s",
        rf"ok     to {host}:{port} +answers; round trip [\d.]+ ms",
        rf"ok     to {host}:{port}, path +{lane}; small packets and full ones get through, both ways",
        r"Nothing is wrong: channels can use RDMA here\.",
    ):
        assert re.search(f"^{line}$", output, re.MULTILINE), line
    record_property("lane_bytes", 1 << 20)


async def test_a_peer_that_uses_no_rdma_is_wrong_where_this_host_could():
    config = aiordma.ChannelConfig(verbs=False)
    async with aiordma.listen(config=config) as listener:
        status, output = await doctor("--json", f"127.0.0.1:{listener.address[1]}")
    report = json.loads(output)
    assert (status, report["is_well"]) == (1, False)
    [wrong] = [found for found in report["findings"] if found["level"] == "wrong"]
    assert wrong["text"] == "no RDMA, so channels use tcp: the server: ChannelConfig(verbs=False)"


async def test_a_device_without_pyverbs(tmp_path):
    """Something of its name comes first on the path, and has no modules."""
    (tmp_path / "pyverbs").mkdir()
    (tmp_path / "pyverbs" / "__init__.py").touch()
    status, output = await doctor(PYTHONPATH=str(tmp_path))
    assert status == 1
    line = r"WRONG  pyverbs +in \S+/pyverbs cannot be imported \(.*pyverbs.*\): take pyverbs and libibverbs from one .*"
    assert re.search(f"^{line}$", output, re.MULTILINE), output
    assert output.endswith("\n1 thing wrong; the remedy stands after the colon.\n")
