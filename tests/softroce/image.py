"""Debian's kernel and a RAM disk with the modules that a soft-RoCE node needs, made once and cached."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from tests.softroce import debian
from tests.softroce.errors import SoftRoceError

MODULES: Final = (
    "virtio_pci",
    "virtio_net",
    "9pnet_virtio",
    "9p",
    "overlay",
    # rdma_rxe asks the kernel's crypto API for "crc32" by name, so depmod does not list it.
    "crc32_generic",
    "crc32_pclmul",
    "rdma_rxe",
    "rdma_ucm",
    "veth",
    "sch_netem",
    "sch_prio",
    "cls_u32",
)
_HERE: Final = Path(__file__).parent
_INIT: Final = _HERE / "guest" / "init.sh"


class Image(NamedTuple):
    """What a node boots."""

    kernel: Path
    ramdisk: Path


def cache_folder() -> Path:
    """Where images and kernel packages are kept: in XDG_CACHE_HOME, else in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "aiordma-softroce"


def cached(folder: Path) -> Image | None:
    """The image that this very source has made; of several kernels, the newest made."""
    images = sorted(folder.glob(f"*+{_source_hash()}"), key=lambda path: path.stat().st_mtime)
    return _image(images[-1]) if images else None


def build(package: str, folder: Path) -> Image:
    """Make an image of the kernel in this Debian package, downloaded into `folder` if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    release = package.removeprefix("linux-image-")
    archive = debian.download_kernel(package, folder)
    # In the same file system, so that the finished image appears at once, by its name.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree, image = Path(scratch, "kernel"), Path(scratch, "image")
        image.mkdir()
        _run("dpkg-deb", "--extract", str(archive), str(tree))
        shutil.copy(tree / f"boot/vmlinuz-{release}", image / "kernel")
        _write_ramdisk(image / "ramdisk", _module_files(tree, release))
        final = folder / f"{release}+{_source_hash()}"
        if not final.exists():
            image.rename(final)
    _forget_others(final)
    return _image(final)


def _image(folder: Path) -> Image:
    return Image(folder / "kernel", folder / "ramdisk")


def _source_hash() -> str:
    """A name for what `build` would put into an image beside the kernel."""
    digest = hashlib.sha256()
    for path in (Path(__file__), _INIT):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _module_files(tree: Path, release: str) -> list[Path]:
    """The files of MODULES and of what they need, in the order to load them."""
    _run("/sbin/depmod", "--basedir", str(tree), release)
    order: dict[Path, None] = {}
    for module in MODULES:
        lines = _run(
            *("/sbin/modprobe", "--set-version", release, "--dirname", str(tree)),
            *("--show-depends", module),
        ).splitlines()
        order |= {Path(line.split()[1]): None for line in lines if line.startswith("insmod ")}
    return list(order)


def _write_ramdisk(target: Path, modules: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in ("bin", "modules", "proc", "sys", "dev"):
            (root / name).mkdir()
        shutil.copy("/bin/busybox", root / "bin/busybox")
        for path in modules:
            shutil.copy(path, root / "modules")
        (root / "modules/order").write_text("\n".join(path.name for path in modules))
        shutil.copy(_INIT, root / "init")
        (root / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = subprocess.run(
            ["/bin/busybox", "cpio", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            check=True,
            capture_output=True,
        )
        target.write_bytes(gzip.compress(archive.stdout, 1))


def _forget_others(kept: Path) -> None:
    """Remove images that another source or kernel made: nothing asks for them again."""
    for path in kept.parent.glob("*+*"):
        if path.is_dir() and path != kept:
            shutil.rmtree(path)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SoftRoceError(f"`{' '.join(command)}` failed:\n{done.stderr.rstrip()}")
    return done.stdout
