"""One virtual machine with an RDMA device, or two with a cable between them, for the time of one command."""

import contextlib
import re
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from tests.softroce import image
from tests.softroce.errors import SoftRoceError

GRACE_S: Final = 30.0
"""How long a node may go on after the other one failed."""

_NODE_SCRIPT: Final = Path(__file__).parent / "guest" / "node.sh"
_MTU: Final = {1: 4200, 2: 1500}
"""Bytes, by the number of nodes: alone, a node's device has RoCE's largest MTU, 4096."""
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1bc")

Listener = Callable[[int, str], None]
"""Is told each line of a node's console, with the node's number, as it comes, from any thread."""


class Outcome(NamedTuple):
    """How the command ended, on each node: its exit status, and all that the console showed."""

    exits: tuple[int, ...]
    consoles: tuple[str, ...]

    def check(self) -> None:
        """Raises SoftRoceError, with the consoles, unless every node's command exited with 0."""
        if any(self.exits):
            raise SoftRoceError(f"exit status {self.exits}\n{_shown(self.consoles)}")


def run(
    command: Sequence[str],
    *,
    nodes: int = 1,
    netem: str = "",
    environment: Mapping[str, str] | None = None,
    out: Path | None = None,
    timeout_s: float = 300.0,
    memory_mib: int = 2048,
    listener: Listener | None = None,
) -> Outcome:
    """Boot the nodes, run the same command on each, in this process's working folder, and power them off.

    The command finds in its environment NODE (0 or 1), ADDR (its own address), PEER (the other one's), OUT
    (a writable folder: the host's `out`, or one that is gone after the run) and what `environment` adds. Its
    device is rxe0, on ADDR. All other files are the host's; what it writes to them is lost.

    `netem` is what tc-netem(8) takes, as in "delay 10ms loss 0.1%"; it holds in each direction, so that
    delay counts twice in a round trip. It needs two nodes.

    Raises SoftRoceError, with the consoles, if there is no image (see `prepare`), or if a node did not reach
    the command's end within `timeout_s`, or within GRACE_S after the other one failed. Whatever happens, no
    virtual machine outlives the call, or this process.
    """
    if nodes not in (1, 2) or (netem and nodes == 1):
        raise ValueError("one node without netem, or two nodes")
    booted = image.cached(image.cache_folder())
    if booted is None:
        raise SoftRoceError("there is no image to boot: python -m tests.softroce prepare")
    with contextlib.ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        cable = [stack.enter_context(end) for end in socket.socketpair()] if nodes == 2 else [None]
        machines: list[_Machine] = []
        for node, end in enumerate(cable):
            (out / f"exit-{node}").unlink(missing_ok=True)
            settings = {"NODE": str(node), "MTU": str(_MTU[nodes]), "NETEM": netem}
            (out / f"node-{node}.sh").write_text(_script(settings, environment or {}, command))
            line = _qemu_line(booted, node, end, out, memory_mib)
            machines.append(stack.enter_context(_Machine(node, line, end, listener)))
        reason = _wait(machines, out, timeout_s)
        exits = tuple(_exit_status(out, machine.node) for machine in machines)
    consoles = tuple(machine.console() for machine in machines)
    ended = tuple(status for status in exits if status is not None)
    if len(ended) < nodes:
        raise SoftRoceError(f"{reason}\n{_shown(consoles)}")
    return Outcome(ended, consoles)


class _Machine:
    """A QEMU process; as a context manager, it is killed at the end of the block."""

    def __init__(
        self, node: int, line: list[str], cable: socket.socket | None, listener: Listener | None
    ) -> None:
        self.node = node
        self.process = subprocess.Popen(
            line,
            pass_fds=[cable.fileno()] if cable else [],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._lines: list[str] = []
        self._listener = listener
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def console(self) -> str:
        return "\n".join(self._lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as console:
            for line in console:
                text = _ESCAPE.sub("", line).rstrip()
                self._lines.append(text)
                if self._listener is not None:
                    self._listener(self.node, text)


def _wait(machines: Sequence[_Machine], out: Path, timeout_s: float) -> str:
    """Until all have powered off, or it makes no sense to wait longer. Returns why one may not have finished."""
    deadline, reason = time.monotonic() + timeout_s, f"not done after {timeout_s:g} s"
    running, has_failed = list(machines), False
    while running and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].process.wait(0.1)
        running = [machine for machine in machines if machine.process.poll() is None]
        if not has_failed and any(_exit_status(out, machine.node) for machine in machines):
            has_failed = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
            reason = f"not done {GRACE_S:g} s after the other node failed"
        if len(running) < len(machines) and None in [_exit_status(out, m.node) for m in machines]:
            return "a machine ended before its command did"
    return reason


def _exit_status(out: Path, node: int) -> int | None:
    """What the node's command exited with; None if it did not."""
    path = out / f"exit-{node}"
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text else None


def _script(
    settings: Mapping[str, str], environment: Mapping[str, str], command: Sequence[str]
) -> str:
    """What a node's shell runs."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    lines += ["export NODE", _NODE_SCRIPT.read_text()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [f"cd {shlex.quote(str(Path.cwd()))} || exit 97", shlex.join(command)]
    return "\n".join(lines) + "\n"


def _qemu_line(
    booted: image.Image, node: int, cable: socket.socket | None, out: Path, memory_mib: int
) -> list[str]:
    """The command line of one machine: software emulation, so that no /dev/kvm is needed."""
    if cable is None:
        nodes, cores = 1, 2
        network = ["-nic", "none"]
    else:
        nodes, cores = 2, 1
        network = ["-netdev", f"socket,id=cable,fd={cable.fileno()}"]
        network += ["-device", f"virtio-net-pci,netdev=cable,romfile=,mac=52:54:00:77:00:0{node}"]
    kernel_line = (
        "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off"
        f" softroce.node={node} softroce.nodes={nodes}"
    )
    share = "security_model=none,multidevs=remap"
    return [
        # However this process ends, its machines end too.
        *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cores), "-m", str(memory_mib)),
        *("-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot"),
        *("-kernel", str(booted.kernel), "-initrd", str(booted.ramdisk), "-append", kernel_line),
        *network,
        *("-virtfs", f"local,path=/,mount_tag=host,readonly=on,{share}"),
        *("-virtfs", f"local,path={_escaped(out)},mount_tag=out,{share}"),
    ]


def _escaped(path: Path) -> str:
    """A path as a value in QEMU's option lists, where commas are written twice."""
    return str(path.resolve()).replace(",", ",,")


def _shown(consoles: Sequence[str]) -> str:
    return "\n".join(
        f"--- console of node {node}\n{text.strip()}" for node, text in enumerate(consoles)
    )
