"""What the harness takes from Debian: installed packages, a kernel that is only unpacked, pyverbs."""

import os
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.softroce.errors import SoftRoceError

PACKAGES: Final = (
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "rdma-core",
    "ibverbs-providers",
    "ibverbs-utils",
    "perftest",
    "iproute2",
    "python3-pyverbs",
)
OS_RELEASE: Final = Path("/etc/os-release")

_KERNEL: Final = "linux-image-amd64"
"""Debian's package that depends on the kernel of the day."""


class Pyverbs(NamedTuple):
    """The distribution's pyverbs: the package's folder, and its version."""

    folder: Path
    version: str

    def share(self, out: Path) -> dict[str, str]:
        """Make it importable on nodes whose OUT is this folder. Returns the environment that does it.

        It alone: beside it lies all else that Debian has packaged for Python.
        """
        packages = out / "python"
        packages.mkdir()
        (packages / "pyverbs").symlink_to(self.folder)
        return {"PYTHONPATH": "/softroce/python", "PYTHONDONTWRITEBYTECODE": "1"}


def require_debian() -> None:
    """Raises SoftRoceError unless this is Debian on amd64, and we are root."""
    release = OS_RELEASE.read_text() if OS_RELEASE.exists() else ""
    if not re.search(r"^ID=debian$", release, re.MULTILINE):
        raise SoftRoceError(
            "the soft-RoCE machine is built from Debian's packages, and this is not Debian:"
            " run it in a container or a virtual machine of Debian 12"
        )
    machine = os.uname().machine
    if machine != "x86_64":
        raise SoftRoceError(f"the soft-RoCE machine emulates x86_64 only; this is {machine}")
    if os.geteuid() != 0:
        raise SoftRoceError(
            "root is needed: packages are installed, and the virtual machine sees all of this"
            " one's files. Run it as root, in a container if you like"
        )


def missing_packages(wanted: Sequence[str] = PACKAGES) -> list[str]:
    """Those that are not installed."""
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *wanted],
        capture_output=True,
        text=True,
        check=False,  # it fails where one of them is unknown, and lists the others
    )
    installed = {
        line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")
    }
    return [name for name in wanted if name not in installed]


def update_lists() -> None:
    """Fetch Debian's lists of packages."""
    _apt("apt-get", "update", "--quiet=2")


def install(packages: list[str]) -> None:
    """Install the packages, with what they depend on."""
    if not packages:
        return
    _apt("apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", *packages)


def kernel_package() -> str | None:
    """The package of Debian's kernel of the day; None while apt has no lists."""
    done = subprocess.run(
        ["apt-cache", "depends", _KERNEL], capture_output=True, text=True, check=False
    )
    found = re.search(r"Depends: (linux-image-\S+)", done.stdout)
    return found[1] if found else None


def download_kernel(package: str, folder: Path) -> Path:
    """The kernel package as a file in the folder, downloaded unless it is there."""
    for _ in range(2):
        found = sorted(folder.glob(f"{package}_*.deb"))
        if found:
            return found[-1]
        # apt drops root for a download, and then may not write to a folder of root's.
        _apt(
            "apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root", package, cwd=folder
        )
    raise SoftRoceError(f"apt-get download {package} succeeded, and left no file in {folder}")


def pyverbs() -> Pyverbs:
    """Debian's pyverbs, if this interpreter can load it: it is built for one minor version of CPython."""
    package = "python3-pyverbs"
    files = _output("dpkg-query", "--listfiles", package).splitlines()
    folder = next(Path(name).parent for name in files if name.endswith("/pyverbs/__init__.py"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not (folder / f"device{suffix}").exists():
        built_for = ", ".join(sorted(path.name for path in folder.glob("device.*.so")))
        raise SoftRoceError(
            f"Debian's pyverbs ({built_for}) does not load into this interpreter ({suffix}):"
            " make PYTHON=/usr/bin/python3 test-rdma"
        )
    version = _output("dpkg-query", "--show", "--showformat", "${Version}", package)
    return Pyverbs(folder, version)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _apt(*command: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SoftRoceError(f"`{' '.join(command)}` failed:\n{done.stdout.rstrip()}")
