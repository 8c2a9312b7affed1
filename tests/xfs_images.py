"""XFS images for tests: made by mkfs.xfs, filled through the running kernel with everything that has a place
of its own on the disk."""

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

import numpy as np

from support import run, sync

SIZE = 320 << 20
"""mkfs.xfs refuses less than 300 MB; the files are sparse."""

RICH = {
    "default": ("-m", "rmapbt=1,reflink=1"),
    "small-blocks": (
        "-b",
        "size=1024",
        "-n",
        "size=8192",
        "-i",
        "size=512",
        "-m",
        "rmapbt=1,reflink=1",
        "-s",
        "size=512",
    ),
    "nrext64": ("-i", "nrext64=1", "-m", "rmapbt=1,reflink=1", "-s", "size=4096"),
    "old-v5": ("-m", "finobt=0,reflink=0,bigtime=0,inobtcount=0", "-i", "sparse=0"),
    "large-blocks": ("-b", "size=16384", "-m", "rmapbt=1,reflink=1", "-n", "size=65536"),
}
"""Name: options of mkfs.xfs. The kernel mounts blocks larger than its pages from Linux 6.12 on."""

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
FICLONE = 0x40049409


def make(image: Path, *options: str, size: int = SIZE) -> Path:
    """An empty filesystem."""
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.xfs", "-q", "-f", *options, image)
    return image


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): os.posix_fallocate has no modes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def populate(root: Path, part: int = 1) -> None:
    """Fill a mounted filesystem: every kind of inode, fork and directory.

    `part` makes large things that many times smaller.
    """
    _files(root / "files", part)
    _directories(root / "directories", part)
    _others(root / "others")
    _attributes(root / "attributes", part)
    _reflinks(root / "reflinks")


def _files(where: Path, part: int) -> None:
    where.mkdir()
    for size in (0, 1, 511, 4096, 100_000, 3_000_000 // part):
        (where / f"plain-{size}").write_bytes(os.urandom(size))
    with open(where / "holes", "wb") as file:  # hundreds of extents: a B-tree
        for number in range(400 // part):
            file.seek(number * 131072)
            file.write(bytes([number % 251 + 1]) * 4096)
    with open(where / "preallocated", "wb") as file:
        fallocate(file.fileno(), 0, 0, 1 << 20)
        file.seek(300_000)
        file.write(b"x" * 5000)
        fallocate(file.fileno(), FALLOC_KEEP_SIZE, 1 << 20, 1 << 20)
    with open(where / "punched", "wb") as file:
        file.write(os.urandom(500_000))
        file.flush()
        os.fsync(file.fileno())
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 65536, 131072)
    with open(where / "beyond-4g", "wb") as file:
        file.seek(5 << 30)
        file.write(b"far away")


def _directories(where: Path, part: int) -> None:
    """By their size: in the inode, one block, leaf, node, and a B-tree of extents."""
    where.mkdir()
    for count in (0, 3, 30, 400, 6000 // part):
        folder = where / f"with-{count}"
        folder.mkdir()
        for number in range(count):
            os.link(where.parent / "files/plain-1", folder / f"name-{number:06d}{'-long' * (number % 40)}")
    for number in range(0, 6000 // part, 3):
        (where / f"with-{6000 // part}" / f"name-{number:06d}{'-long' * (number % 40)}").unlink()
    deep = where / "deep"
    for number in range(60):
        deep = deep / f"level-{number}"
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("bottom")


def _others(where: Path) -> None:
    where.mkdir()
    os.mkfifo(where / "fifo")
    os.mknod(where / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(where / "block", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(where / "socket"))
    for length in (1, 40, 300, 1000):
        os.symlink("t" * length, where / f"symlink-{length}")
    with open(os.fsencode(where) + b"/not utf-8 \xff\xfe", "wb") as file:
        file.write(b"hello")
    (where / "odd\nname\x1b").write_text("odd")
    old = where / "from-1931"
    old.write_text("old")
    os.utime(old, ns=(-(1 << 30) * 10**9 + 5,) * 2)
    os.chown(old, 70000, 80000)


def _attributes(where: Path, part: int) -> None:
    """Small ones in the inode, many in leaves, large ones in blocks of their own."""
    where.mkdir()
    for name, count, size in (
        ("few", 2, 20),
        ("leaf", 30, 60),
        ("remote", 3, 60000),
        ("many", 900 // part, 200),
    ):
        path = where / name
        path.write_text(name)
        try:
            for number in range(count):
                os.setxattr(path, f"user.{name}-{number}", os.urandom(size))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    os.setxattr(where, "user.on-a-directory", b"d" * 3000)


def _reflinks(where: Path) -> None:
    """Copies that share blocks, wholly and in part; nothing where the filesystem can't share."""
    where.mkdir()
    (where / "original").write_bytes(os.urandom(600_000))
    sync(where)
    for name in ("whole", "changed"):
        with open(where / "original", "rb") as source, open(where / name, "wb") as target:
            try:
                fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                return
    with open(where / "changed", "r+b") as file:
        file.seek(131072)
        file.write(b"c" * 70_000)


def churn(root: Path, seed: int, rounds: int) -> None:
    """Random work: files made, grown, cut, renamed, linked and removed, now and then fsynced, so that the log
    goes around."""
    random = np.random.default_rng(seed)
    folders, files = [root], []
    for number in range(rounds):
        choice = int(random.integers(10))
        if choice == 0 and len(folders) < 40:
            folders.append(folders[int(random.integers(len(folders)))] / f"folder-{number}")
            folders[-1].mkdir()
        elif choice < 5 or len(files) < 10:
            files.append(
                folders[int(random.integers(len(folders)))]
                / f"{'file' * int(random.integers(1, 20))}-{number}"
            )
            files[-1].write_bytes(b"x" * int(random.integers(0, 30000)))
        else:
            at = int(random.integers(len(files)))
            _change(
                files, at, choice, folders[int(random.integers(len(folders)))] / f"other-{number}", random
            )
        if number % 20 == 0:
            fd = os.open(root, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    if files:
        with open(files[-1], "ab") as file:
            os.fsync(file.fileno())


def _change(files: list[Path], at: int, choice: int, other: Path, random: np.random.Generator) -> None:
    if choice == 5:
        files.pop(at).unlink()
    elif choice == 6:
        os.rename(files[at], other)
        files[at] = other
    elif choice == 7:
        os.link(files[at], other)
        files.append(other)
    elif choice == 8:
        os.truncate(files[at], int(random.integers(0, 60000)))
    else:
        os.setxattr(files[at], f"user.a{random.integers(5)}", b"v" * int(random.integers(10, 3000)))


def shut_down(root: Path, log_too: bool = True) -> None:
    """XFS_IOC_GOINGDOWN: stop at once, as after a power cut, with the log written or not."""
    fd = os.open(root, os.O_RDONLY)
    fcntl.ioctl(fd, 0x8004587D, struct.pack("=I", 1 if log_too else 2))
    os.close(fd)
