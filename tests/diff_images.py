"""A filesystem before and after known changes, made by this kernel or by ntfs-3g: what `diff` must report."""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import mounted, need, need_root, run, unmount

Mount = Callable[[Path], "contextlib.AbstractContextManager[Path]"]

CHANGED = {
    "/d/append": "grown", "/d/overwrite": "rewritten", "/d/delete": "deleted", "/d2/renamed": "renamed",
    "/d/create": "added", "/d/touch": "attributes", "/d/sparse": "grown", "/d/holey": "filled",
    "/d/replace": "replaced", "/d/truncate": "truncated",
}  # fmt: skip
"""Every file that is changed, under its last name, and what was done to it."""
DIRECTORIES = {"/d", "/d2"}
"""The directories whose names were changed."""
APPENDED, CREATED, FILLED, SPARSE_AT = 50_000, 70_000, 65_536, 1 << 30


def content(name: str, size: int) -> bytes:
    """Always the same bytes for a name, none of them zero."""
    return random.Random(name).randbytes(size).replace(b"\0", b"\1")


def before(top: Path) -> None:
    """The files as they are at first, and 60 that nobody touches."""
    for folder in ("d", "d2", "keep"):
        (top / folder).mkdir()
    for number in range(60):
        (top / "keep" / f"f{number}").write_bytes(content(f"keep{number}", 100 + 997 * number))
    for name, size in (("append", 10_000), ("overwrite", 200_000), ("delete", 100_000), ("rename", 30_000),
        ("touch", 20_000),
                       ("sparse", 5000), ("replace", 40_000), ("truncate", 200_000)):  # fmt: skip
        (top / "d" / name).write_bytes(content(name, size))
    for number in range(20):  # beside the others, so that they share their blocks of inodes
        (top / "d" / f"link{number}").symlink_to(f"../keep/f{number}")
    with open(top / "d" / "holey", "wb") as file:
        file.truncate(1 << 20)


def after(top: Path) -> None:
    """One change of each sort."""
    with open(top / "d/append", "ab") as file:
        file.write(content("more", APPENDED))
    with open(top / "d/overwrite", "r+b") as file:
        file.seek(8192)
        file.write(content("over", 16_384))
    (top / "d/delete").unlink()
    (top / "d/rename").rename(top / "d2/renamed")
    (top / "d/create").write_bytes(content("create", CREATED))
    os.utime(top / "d/touch", ns=(1_700_000_000_000_000_000, 1_700_000_000_123_456_700))
    for name, at in (("sparse", SPARSE_AT), ("holey", 512 << 10)):
        with open(top / "d" / name, "r+b") as file:
            file.seek(at)
            file.write(content(name * 2, FILLED))
    (top / "d/replace.new").write_bytes(content("replaced", 41_000))
    (top / "d/replace.new").rename(top / "d/replace")
    os.truncate(top / "d/truncate", 1000)


@contextlib.contextmanager
def fuse_ntfs(image: Path) -> Iterator[Path]:
    """NTFS mounted by ntfs-3g straight from a file."""
    need_root()
    need("ntfs-3g", "ntfs-3g")
    where = image.parent / f"mount-{os.urandom(4).hex()}"
    where.mkdir()
    run("ntfs-3g", image, where)
    try:
        yield where
    finally:
        unmount(where)
        where.rmdir()


def _kernel(kind: str) -> Mount:
    def mount(image: Path) -> "contextlib.AbstractContextManager[Path]":
        return mounted(image, kind=kind)

    return mount


FILESYSTEMS: dict[str, tuple[int, list[str], str, Mount]] = {
    "ext4": (64 << 20, ["mkfs.ext4", "-qF"], "e2fsprogs", _kernel("ext4")),
    "xfs": (320 << 20, ["mkfs.xfs", "-q"], "xfsprogs", _kernel("xfs")),
    "btrfs": (128 << 20, ["mkfs.btrfs", "-q"], "btrfs-progs", _kernel("btrfs")),
    "ntfs": (64 << 20, ["mkntfs", "-QFq"], "ntfs-3g", fuse_ntfs),
}
"""Size, the command that makes it, its package, and how it is mounted."""


@dataclass(frozen=True)
class Changed:
    """One disk at two times: `old` raw, `overlay` over it as qcow2 with the bitmap b0 of all that was
    written, `new` raw."""

    kind: str
    old: Path
    overlay: Path
    new: Path


def make(kind: str, folder: Path, cluster: int = 65536) -> Changed:
    """A disk of FILESYSTEMS, and the changes made to it through an overlay."""
    size, command, package, mount = FILESYSTEMS[kind]
    need(command[0], package)
    made = Changed(kind, folder / "old.img", folder / "top.qcow2", folder / "new.img")
    with open(made.old, "wb") as file:
        file.truncate(size)
    run(*command, made.old)
    with mount(made.old) as top:
        before(top)
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"cluster_size={cluster}",
        "-b",
        made.old,
        "-F",
        "raw",
        made.overlay,
    )
    run("qemu-img", "bitmap", "--add", "-g", "4096", made.overlay, "b0")
    with exported(made.overlay) as disk, mount(disk) as top:
        after(top)
    run("qemu-img", "convert", "-O", "raw", made.overlay, made.new)
    return made


@contextlib.contextmanager
def exported(image: Path) -> Iterator[Path]:
    """A qcow2 image as a raw file that can be written, by QEMU through FUSE."""
    need_root()
    disk = image.parent / f"export-{os.urandom(4).hex()}"
    disk.touch()
    server = subprocess.Popen(
        [
            need("qemu-storage-daemon", "qemu-system-common"),
            "--blockdev",
            f"driver=file,node-name=file,filename={image}",
            "--blockdev",
            "driver=qcow2,node-name=disk,file=file",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={disk},writable=on",
        ]
    )
    try:
        until = time.monotonic() + 30
        while not disk.stat().st_size and server.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        if not disk.stat().st_size:
            pytest.skip("QEMU can't export disks through FUSE here")
        yield disk
    finally:
        server.terminate()
        server.wait(30)
        disk.unlink()
