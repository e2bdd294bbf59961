"""`python -m aiordma doctor`: what it says of each thing, and that nothing that is missing stops it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import aiordma
import aiordma.__main__
from aiordma import LaneRefused
from aiordma.__main__ import main
from aiordma.doctor import report
from aiordma.doctor.checks import check, usable_ports
from aiordma.doctor.facts import Facts, Library, LockLimit, Node, Pyverbs, gather
from aiordma.doctor.findings import Finding, is_well
from aiordma.doctor.trial import path_test, self_test
from aiordma.lanes.choice import SOFT_ROCE, DeviceFacts, Gid, Port

pytestmark = pytest.mark.usefixtures("no_leaks")

TAG = sys.implementation.cache_tag
GIDS = (Gid(0, "RoCE v2", "fe80::1"), Gid(1, "RoCE v2", "::ffff:10.0.0.1"))
PORT = Port("mlx5_0", 1, "ACTIVE", True, 0, 1024, GIDS)
DEVICE = DeviceFacts("mlx5_0", "16.35", (PORT,), True, 1 << 40, 1000, 16384, 65535)
LIBRARY = Library("/lib/libibverbs.so.1.14.44.0", "44.0", frozenset({34}))
PYVERBS = Pyverbs("/lib/pyverbs", "", frozenset({34}), (TAG,), "")
NODE = Node("mlx5_0", "/dev/infiniband/uverbs0", True, True)
WELL = Facts(
    devices=("mlx5_0",),
    nodes=(NODE,),
    library=LIBRARY,
    pyverbs=PYVERBS,
    lock_limit=LockLimit(None, False),
    fork="unneeded",
    described=(DEVICE,),
    driverless=(),
    failures={},
)

PAIR = (
    "take pyverbs and libibverbs from one rdma-core, best the distribution's (Debian, Ubuntu: apt install "
    "python3-pyverbs ibverbs-providers; RHEL, Fedora: dnf install python3-pyverbs libibverbs)"
)
DRIVERS = (
    "install libibverbs with its drivers (Debian, Ubuntu: apt install ibverbs-providers; RHEL, Fedora: dnf install "
    "libibverbs)"
)


def port(**settings):
    return {"described": (DEVICE._replace(ports=(PORT._replace(**settings),)),)}


def device(**settings):
    return {"described": (DEVICE._replace(**settings),)}


def test_a_host_on_which_all_is_well():
    assert report.text(check(WELL)).splitlines() == [
        "ok     rdma-core       44.0, /lib/libibverbs.so.1.14.44.0",
        (
            "ok     pyverbs         the distribution's, /lib/pyverbs; it fits rdma-core 44.0, a pair that aiordma "
            "is run on"
        ),
        "ok     permissions     /dev/infiniband/uverbs0 (mlx5_0) may be opened",
        "ok     memlock         unlimited; a lane of the default settings registers 20.1 MiB",
        "ok     fork            the kernel copies registered memory at a fork, and a child may use its copy",
        (
            "ok     mlx5_0          firmware 16.35; regions of 1 TiB, 1000 queue pairs of 16384 work requests, "
            "completion queues of 65535"
        ),
        "ok     mlx5_0          memory windows of type 2: a ring is open to its own peer alone",
        "ok     mlx5_0/1        ACTIVE, Ethernet, MTU 1024",
        "ok     mlx5_0/1 GID 0  RoCE v2, fe80::1",
        "ok     mlx5_0/1 GID 1  RoCE v2, 10.0.0.1",
        "",
        "Nothing is wrong: channels can use RDMA here.",
    ]


WRONG = {
    "no libibverbs": (
        {"library": None},
        f"rdma-core  libibverbs.so.1 cannot be loaded: {DRIVERS}",
    ),
    "no pyverbs": (
        {"pyverbs": None, "fork": "", "described": ()},
        (
            "pyverbs  not installed for this Python: install the distribution's (Debian, Ubuntu: apt install "
            "python3-pyverbs ibverbs-providers; RHEL, Fedora: dnf install python3-pyverbs) for its own Python "
            "or a venv made with "
            "--system-site-packages; pip install 'aiordma[verbs]' builds one for rdma-core 59 alone"
        ),
    ),
    "pyverbs of another Python": (
        {
            "pyverbs": PYVERBS._replace(
                built_for=("cpython-27",), error="No module named 'pyverbs.addr'"
            )
        },
        f"pyverbs  in /lib/pyverbs is built for cpython-27, and this is {TAG}: run the Python that it is built for",
    ),
    "pyverbs of another rdma-core": (
        {"pyverbs": PYVERBS._replace(interfaces=frozenset({59}), error="undefined symbol")},
        "pyverbs  in /lib/pyverbs needs libibverbs' private interface 59, and rdma-core 44.0 has 34: "
        + PAIR,
    ),
    "pyverbs that is broken": (
        {"pyverbs": PYVERBS._replace(error="No module named 'pyverbs.qp'")},
        f"pyverbs  in /lib/pyverbs cannot be imported (No module named 'pyverbs.qp'): {PAIR}",
    ),
    "ib_uverbs not loaded": (
        {"nodes": (), "described": (), "failures": {"mlx5_0": "cannot look at the RDMA devices"}},
        "permissions  the kernel offers mlx5_0 to no program: load the module that does: modprobe ib_uverbs",
    ),
    "a container without the file": (
        {"nodes": (NODE._replace(is_there=False, is_ours=False),), "described": ()},
        (
            "permissions  /dev/infiniband/uverbs0 (mlx5_0) is not there: in a container: "
            "--device=/dev/infiniband/uverbs0; "
            "else let udev make it (rdma-core)"
        ),
    ),
    "a file that is somebody else's": (
        {"nodes": (NODE._replace(is_ours=False),), "failures": {"mlx5_0": "cannot open it"}},
        (
            "permissions  /dev/infiniband/uverbs0 (mlx5_0) may not be opened by this user: chmod 666 "
            "/dev/infiniband/uverbs0, or a udev rule that does (rdma-core has one)"
        ),
    ),
    "little lockable memory": (
        {"lock_limit": LockLimit(8 << 20, False)},
        (
            "memlock  RLIMIT_MEMLOCK is 8 MiB, and a lane of the default settings registers 20.1 MiB: raise it "
            "(ulimit -l "
            "unlimited; memlock in /etc/security/limits.conf; LimitMEMLOCK=infinity of systemd; --ulimit memlock=-1 of "
            "Docker), or use fewer or smaller slots"
        ),
    ),
    "no fork support": (
        {"fork": "disabled"},
        (
            "fork  after a fork a device may go on with pages that the program no longer has: use Linux 5.13 or "
            "later, which copies registered memory at a fork; or fork before"
        ),
    ),
    "no driver": (
        {"described": (), "driverless": ("mlx5_0",)},
        f"mlx5_0  libibverbs has no driver for it, or one that it cannot load: {DRIVERS}",
    ),
    "a device that vanished": (
        {
            "described": (),
            "failures": {"mlx5_0": "cannot open the RDMA device mlx5_0: no such device"},
        },
        "mlx5_0  cannot open the RDMA device mlx5_0: no such device: see dmesg, and whether `rdma dev` still shows it",
    ),
    "small regions": (
        device(max_region_bytes=1 << 20),
        (
            "mlx5_0  the largest region: 1048576, and a lane of the default settings needs 12619776: lower "
            "slots or slot_bytes"
        ),
    ),
    "short queues": (
        device(max_work_requests=100),
        "mlx5_0  queues of work requests: 100, and a lane of the default settings needs 256: lower slots",
    ),
    "short completion queues": (
        device(max_completions=1000),
        "mlx5_0  completion queues: 1000, and a lane of the default settings needs 4096: use another device",
    ),
    "no queue pairs": (
        device(max_queue_pairs=0),
        "mlx5_0  queue pairs: 0, and a lane of the default settings needs 1: use another device",
    ),
    "a port that is down": (
        port(state="DOWN"),
        "mlx5_0/1  DOWN, Ethernet, MTU 1024: bring its link up (rdma link; ip link set ... up)",
    ),
    "InfiniBand without a subnet manager": (
        port(state="INIT", is_ethernet=False),
        "mlx5_0/1  INIT, InfiniBand, LID 0, MTU 1024: look at its cable, and whether a subnet manager runs (opensm)",
    ),
    "no address": (
        port(gids=()),
        (
            "mlx5_0/1  ACTIVE, Ethernet, MTU 1024, without a RoCE v2 address (none at all): give its network "
            "interface an IP address (ip address add "
            "...), and the port RoCE v2"
        ),
    ),
    "addresses of the wrong type": (
        port(gids=(Gid(0, "RoCE v1", "fe80::1"),)),
        (
            "mlx5_0/1  ACTIVE, Ethernet, MTU 1024, without a RoCE v2 address (RoCE v1): give its network "
            "interface an IP address (ip address "
            "add ...), "
            "and the port RoCE v2"
        ),
    ),
}


@pytest.mark.parametrize(("change", "line"), WRONG.values(), ids=WRONG)
def test_each_thing_wrong_has_one_line_with_its_remedy(change, line):
    [wrong] = [found for found in check(WELL._replace(**change)) if found.level == "wrong"]
    assert report.line(wrong) == f"WRONG  {line}"


NOTED = {
    "versions that were not run": (
        {"library": LIBRARY._replace(version="50.0")},
        (
            "pyverbs  the distribution's, /lib/pyverbs; it fits rdma-core 50.0, untested: aiordma is run on 44 and 59, "
            "each with its own pyverbs"
        ),
    ),
    "versions that differ": (
        {"pyverbs": PYVERBS._replace(version="59.0")},
        (
            "pyverbs  59.0, /lib/pyverbs; it fits rdma-core 44.0, untested: aiordma is run on 44 and 59, each "
            "with its own "
            "pyverbs"
        ),
    ),
    "forks that copy nothing": (
        {"fork": "enabled"},
        (
            "fork  a forked child has no registered memory, nor what else lies on its pages (SIGSEGV): use Linux 5.13 "
            "or later, which copies registered memory at a fork; or fork before"
        ),
    ),
    "no windows": (
        device(has_windows=False),
        "mlx5_0  no memory windows of type 2: each lane has a protection domain of its own, and all is sent by copy",
    ),
    "one port of two is down": (
        device(ports=(PORT, PORT._replace(number=2, state="DOWN"))),
        "mlx5_0/2  DOWN, Ethernet, MTU 1024: bring its link up (rdma link; ip link set ... up)",
    ),
}


@pytest.mark.parametrize(("change", "line"), NOTED.values(), ids=NOTED)
def test_what_is_worth_knowing_is_not_wrong(change, line):
    findings = check(WELL._replace(**change))
    assert is_well(findings)
    assert f"note   {line}" in [report.line(found) for found in findings]


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (LockLimit(8 << 20, True), "unlimited by CAP_IPC_LOCK; "),
        (LockLimit(64 << 20, False), "64 MiB, enough for 3 lanes; "),
    ],
)
def test_enough_lockable_memory(limit, text):
    lines = [report.line(found) for found in check(WELL._replace(lock_limit=limit))]
    assert f"ok     memlock  {text}a lane of the default settings registers 20.1 MiB" in lines


def test_a_port_that_cannot_be_used_is_not_tried():
    ports = (PORT, PORT._replace(number=2, state="DOWN"), PORT._replace(number=3, gids=()))
    assert usable_ports(WELL._replace(**device(ports=ports))) == [PORT]


# Hosts where things are missing


def test_a_host_without_rdma_is_told_kindly_what_is_used_instead(tmp_path, monkeypatch, capsys):
    bare = gather(tmp_path)._replace(library=None, pyverbs=None)
    monkeypatch.setattr(aiordma.__main__, "gather", lambda: bare)
    assert main(["doctor"]) == 0
    device_line, *lines = capsys.readouterr().out.splitlines()
    assert device_line == (
        "note   device     no RDMA device here: channels use TCP, with the same calls and the same guarantees: "
        + SOFT_ROCE
    )
    assert lines == [
        "note   rdma-core  libibverbs.so.1 cannot be loaded (and without a device, no need for it)",
        "note   pyverbs    not installed for this Python (and without a device, no need for it)",
        "",
        "Nothing is wrong: channels use TCP here.",
    ]


def test_json_says_the_same(monkeypatch, capsys):
    facts = WELL._replace(**WRONG["a port that is down"][0])
    monkeypatch.setattr(aiordma.__main__, "gather", lambda: facts)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["is_well"]
    assert {
        "level": "wrong",
        "subject": "mlx5_0/1",
        "text": "DOWN, Ethernet, MTU 1024",
        "remedy": "bring its link up (rdma link; ip link set ... up)",
    } in found["findings"]


def test_this_host_as_it_is(capsys):
    status = main(["doctor"])
    summary = capsys.readouterr().out.splitlines()[-1]
    assert re.match(["Nothing is wrong", r"\d+ things? wrong"][status], summary)


def test_facts_of_a_host_with_a_device(tmp_path):
    for number, name in enumerate(("mlx5_0", "mlx5_1")):
        (tmp_path / "sys/class/infiniband" / name).mkdir(parents=True)
        folder = tmp_path / f"sys/class/infiniband_verbs/uverbs{number}"
        folder.mkdir(parents=True)
        (folder / "ibdev").write_text(f"{name}\n")
    (tmp_path / "sys/class/infiniband_verbs/abi_version").write_text("6\n")
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    (tmp_path / "dev/infiniband/uverbs0").touch()
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("CapInh:\t0\nCapEff:\t0000000000004000\n")
    (tmp_path / "proc/self/uid_map").write_text("         0          0 4294967295\n")
    facts = gather(tmp_path)
    assert facts.devices == ("mlx5_0", "mlx5_1")
    assert facts.nodes == (
        Node("mlx5_0", "/dev/infiniband/uverbs0", True, True),
        Node("mlx5_1", "/dev/infiniband/uverbs1", False, False),
    )
    assert facts.lock_limit.is_exempt
    (tmp_path / "proc/self/uid_map").write_text("         0       1000          1\n")
    assert not gather(tmp_path).lock_limit.is_exempt
    assert not is_well(check(facts))


def test_a_pyverbs_that_cannot_be_imported(tmp_path):
    (tmp_path / "pyverbs").mkdir()
    (tmp_path / "pyverbs/__init__.py").touch()
    suffix = f"{TAG}-x86_64-linux-gnu.so"
    (tmp_path / f"pyverbs/device.{suffix}").write_bytes(b"\0IBVERBS_PRIVATE_61\0IBVERBS_1.1\0")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from aiordma.doctor.facts import gather; print(gather().pyverbs[:4])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    expected = (str(tmp_path / "pyverbs"), "", frozenset({61}), (TAG,))
    assert done.stdout == f"{expected}\n"


# Trials


async def test_a_device_that_vanishes_before_it_is_tried(monkeypatch):
    fake = SimpleNamespace(refused=lambda what: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "aiordma.lanes.verbs", fake)

    def gone(*_, **__):
        raise LaneRefused("cannot look at the RDMA devices: none")

    monkeypatch.setattr("aiordma.endpoint.local_choice", gone)
    found = await self_test("mlx5_0/1")
    assert found == Finding(
        "wrong",
        "mlx5_0/1 self-test",
        "cannot look at the RDMA devices: none",
        "mend what is found above it first; then see dmesg, and ibv_rc_pingpong of the ibverbs-utils",
    )


@pytest.mark.parametrize(("is_able", "level"), [(True, "wrong"), (False, "note")])
async def test_a_path_without_rdma_is_wrong_where_this_host_has_it(is_able, level):
    async with aiordma.listen(config=aiordma.ChannelConfig(verbs=False)) as listener:
        host, port = listener.address
        control, path = await path_test(host, port, is_able=is_able)
        async with await listener.accept():
            pass
    assert control.level == "ok"
    assert control.text.startswith("answers; round trip ")
    assert (path.level, path.subject) == (level, f"to {host}:{port}, path")
    assert path.text.startswith("no RDMA, so channels use tcp: the ")


async def test_a_peer_that_is_not_there_and_one_that_is_not_aiordma():
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.org ready\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    [foreign] = await path_test(host, port, is_able=False)
    server.close()
    await server.wait_closed()
    [absent] = await path_test(host, port, is_able=False)
    for found, cause in (
        (foreign, "else than aiordma answers there"),
        (absent, "is the server running"),
    ):
        assert (found.level, found.subject) == ("wrong", f"to {host}:{port}")
        assert cause in found.text


def test_the_peer_is_host_and_port(monkeypatch, capsys):
    asked = []

    async def examine(_, peer):
        asked.append(peer)
        return []

    monkeypatch.setattr(aiordma.__main__, "examine", examine)
    for text in ("silo-a:7000", "[::1]:7000"):
        assert main(["doctor", text]) == 0
    assert asked == [("silo-a", 7000), ("::1", 7000)]
    for text in ("silo-a", "silo-a:", ":7000", "::1:7000", "silo-a:0", "silo-a:70000"):
        with pytest.raises(SystemExit, match="2"):
            main(["doctor", text])
        assert "is not HOST:PORT" in capsys.readouterr().err
