"""Tests on a real kernel RDMA device, on a machine that has none.

    make test-rdma                  # asks before it installs anything; YES=1 does not ask

boots Debian's own kernel under QEMU's software emulation (no /dev/kvm, no RDMA hardware), loads the kernel's
soft-RoCE driver `rdma_rxe`, and runs there the tests that are marked `verbs`, with this environment's Python
and Debian's pyverbs. It fails if one of them fails or is skipped, if there is none, or if no lane moved a
byte. Then it runs the tests that are marked `softroce`: they boot machines themselves.

It needs Debian 12 on amd64, root, and a Python of the minor version that Debian's pyverbs is built for
(3.11). It installs the packages of `debian.PACKAGES`, downloads Debian's kernel package without installing
it, and caches that and what it makes of it in ~/.cache/aiordma-softroce.

A node sees all files of the host, read-only below a layer in its memory, so the checkout and its .venv are
there as they are. Emulation is about ten times slower than the machine: keep these tests few, and import
nothing heavy (torch takes minutes). Compare figures within one boot, never absolute ones.

A test for one node is marked `verbs`; where the host itself has an RDMA device and pyverbs, `make test` runs
it there too. It hands what its lane counted to the report: `record_property("lane_bytes", n)`.

A test for two nodes and the network between them is marked `softroce`, runs on the host, and calls

    softroce.run(command, nodes=2, netem="delay 10ms loss 0.1%").check()

By hand, `-h` tells more:

    python -m tests.softroce run -- ibv_devinfo
    python -m tests.softroce run --nodes 2 --netem "delay 10ms" -- ./a_script_that_reads_NODE_and_PEER
"""

from tests.softroce.errors import SoftRoceError
from tests.softroce.machine import Outcome, run

__all__ = ["Outcome", "SoftRoceError", "run"]
