"""Copies of filesystems that are being written, and what the kernel makes of them when it recovers them.

A filesystem lies in a file on an XFS that can clone files. A process of its own writes to it without a pause;
meanwhile the file is copied: as a clone, which is one moment of the disk, as after a power cut, or by reading
it from its first byte to its last ("torn"), as `cp` and most backups do.

The judge is this kernel: it recovers a copy of the copy (journal, log, orphans), and all that it then shows
is compared with the map of the copy that nobody recovered.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import xfs_images
from support import Extent, fiemap, file_extents, mounted, need, run
from virt_bmap.ask.content import Files
from virt_bmap.core.arrays import ints
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened

MIB = 1 << 20
FICLONE = 0x40049409


# ---- the writer --------------------------------------------------------------------------------------------


class Writer:
    """Everything that programs do to files, at random, without a pause."""

    def __init__(self, top: Path, seed: int, kind: str) -> None:
        self.top, self.rng, self.kind, self.count = top, random.Random(seed), kind, 0
        self.directories, self.files, self.open = [top], list[Path](), list[int]()
        about = os.statvfs(top)
        self.room = about.f_bavail * about.f_frsize // 3
        self.size = dict[Path, int]()

    def step(self) -> None:
        """One act. What a full disk or an older act forbids is left out."""
        acts = ([self.create] * 6 + [self.append] * 6 + [self.overwrite] * 5 + [self.truncate] * 4
                + [self.rename] * 4 + [self.remove] * 3 + [self.link, self.symlink, self.make_directory]
                + [self.move_directory, self.remove_directory, self.punch, self.preallocate, self.clone] * 1
                + [self.fragment, self.hold, self.unnamed, self.replace] + [self.settle] * 3)  # fmt: skip
        if self.kind == "btrfs" and self.rng.random() < 0.004:
            acts = [self.snapshot]
        with contextlib.suppress(FileNotFoundError, FileExistsError, OSError):
            self.rng.choice(acts)()
        if len(self.files) > 300 or sum(self.size.values()) > self.room:
            for _ in range(40):
                with contextlib.suppress(OSError):
                    self.remove()

    def data(self, size: int) -> bytes:
        """Bytes that name who wrote them, and when."""
        self.count += 1
        line = b"%d of %d;" % (self.count, os.getpid())
        return (line * (size // len(line) + 1))[:size]

    def some_size(self) -> int:
        return self.rng.choice([0, 30, 59, 100, 1000, 1500, 3000, 4096, 10000, 40000, 150000, 600000])

    def new(self) -> Path:
        self.count += 1
        return self.rng.choice(self.directories) / f"{self.count:x}{'-long' * self.rng.choice([0, 0, 4])}"

    def one(self) -> Path:
        if not self.files:
            raise FileNotFoundError
        return self.rng.choice(self.files)

    def finish(self, fd: int, path: Path) -> None:
        """Sometimes what was done is asked to be on the disk."""
        self.size[path] = os.fstat(fd).st_size
        if self.rng.random() < 0.3:
            os.fsync(fd)
        elif self.rng.random() < 0.1:
            os.fdatasync(fd)
        os.close(fd)

    def create(self) -> None:
        path = self.new()
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, self.rng.choice([0o644, 0o600, 0o755]))
        self.files.append(path)
        os.write(fd, self.data(self.some_size()))
        self.finish(fd, path)

    def append(self) -> None:
        path = self.one()
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, self.data(self.some_size()))
        self.finish(fd, path)

    def overwrite(self) -> None:
        path = self.one()
        fd = os.open(path, os.O_WRONLY)
        at = self.rng.randrange(os.fstat(fd).st_size + 20000)
        os.pwrite(fd, self.data(self.some_size()), at)
        self.finish(fd, path)

    def truncate(self) -> None:
        path = self.one()
        fd = os.open(path, os.O_WRONLY)
        os.ftruncate(fd, self.rng.choice([0, 100, 5000, self.rng.randrange(os.fstat(fd).st_size + 9000)]))
        self.finish(fd, path)

    def fragment(self) -> None:
        """A file of many extents, whose removal takes long."""
        path = self.new()
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        self.files.append(path)
        for i in self.rng.sample(range(200), 120):
            os.pwrite(fd, self.data(3000), i * 8192)
        self.finish(fd, path)

    def preallocate(self) -> None:
        path = self.one()
        fd = os.open(path, os.O_WRONLY)
        mode = self.rng.choice([0, xfs_images.FALLOC_KEEP_SIZE])
        xfs_images.fallocate(fd, mode, self.rng.randrange(200_000), 100_000)
        self.finish(fd, path)

    def punch(self) -> None:
        path = self.one()
        fd = os.open(path, os.O_WRONLY)
        mode = xfs_images.FALLOC_PUNCH_HOLE | xfs_images.FALLOC_KEEP_SIZE
        xfs_images.fallocate(fd, mode, self.rng.randrange(50_000), 30_000)
        self.finish(fd, path)

    def clone(self) -> None:
        if self.kind == "ext4":
            return
        source, path = self.one(), self.new()
        with open(source, "rb") as from_file:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY)
            self.files.append(path)
            fcntl.ioctl(fd, FICLONE, from_file.fileno())
            self.finish(fd, path)

    def rename(self) -> None:
        path = self.one()
        other = self.one() if self.rng.random() < 0.3 else self.new()
        if other == path:
            return
        os.rename(path, other)
        self.files.remove(path)
        self.size[other] = self.size.pop(path, 0)
        if other not in self.files:
            self.files.append(other)
        if self.rng.random() < 0.3:
            self.sync(other)

    def replace(self) -> None:
        """As editors do: write beside it, fsync, rename over it."""
        path = self.one()
        beside = path.with_name(path.name + "~")
        fd = os.open(beside, os.O_CREAT | os.O_WRONLY)
        os.write(fd, self.data(self.some_size()))
        os.fsync(fd)
        os.close(fd)
        os.rename(beside, path)

    def remove(self) -> None:
        path = self.files.pop(self.rng.randrange(len(self.files))) if self.files else self.one()
        self.size.pop(path, 0)
        os.unlink(path)
        if self.rng.random() < 0.2:
            self.sync(path.parent)

    def hold(self) -> None:
        """Removed while it is open: it goes when it is closed."""
        path = self.one()
        self.open.append(os.open(path, os.O_RDWR))
        os.unlink(path)
        self.files.remove(path)
        self.size.pop(path, 0)
        os.write(self.open[-1], self.data(20000))
        if self.rng.random() < 0.3:
            os.fsync(self.open[-1])
        if len(self.open) > 8:
            os.close(self.open.pop(self.rng.randrange(8)))

    def unnamed(self) -> None:
        """A file without a name, which may get one."""
        fd = os.open(self.top, os.O_TMPFILE | os.O_RDWR)
        os.write(fd, self.data(self.some_size()))
        if self.rng.random() < 0.5:
            os.fsync(fd)
        if self.rng.random() < 0.5:
            path = self.new()
            os.link(f"/proc/self/fd/{fd}", path, follow_symlinks=True)
            self.files.append(path)
            self.finish(fd, path)
        else:
            os.close(fd)

    def link(self) -> None:
        path = self.new()
        os.link(self.one(), path)
        self.files.append(path)
        if self.rng.random() < 0.3:
            self.sync(path)

    def symlink(self) -> None:
        path = self.new()
        os.symlink("to/" * self.rng.choice([1, 10, 30, 500]) + str(self.count), path)
        if self.rng.random() < 0.3:
            self.sync(path.parent)

    def make_directory(self) -> None:
        if len(self.directories) < 40:
            path = self.new()
            path.mkdir()
            self.directories.append(path)
            if self.rng.random() < 0.3:
                self.sync(path)

    def move_directory(self) -> None:
        path, other = self.rng.choice(self.directories[1:] or [self.top]), self.new()
        if path == self.top or other.is_relative_to(path):
            return
        os.rename(path, other)

        def moved(old: Path) -> Path:
            return other / old.relative_to(path) if old.is_relative_to(path) else old

        self.directories = [moved(old) for old in self.directories]
        self.files = [moved(old) for old in self.files]
        self.size = {moved(old): size for old, size in self.size.items()}
        if self.rng.random() < 0.3:
            self.sync(other)

    def remove_directory(self) -> None:
        """With all that is in it."""
        if len(self.directories) < 12:
            return
        path = self.rng.choice(self.directories[1:])
        subprocess.run(["rm", "-rf", path], capture_output=True)
        self.directories = [old for old in self.directories if not old.is_relative_to(path)]
        self.files = [old for old in self.files if not old.is_relative_to(path)]
        self.size = {old: size for old, size in self.size.items() if not old.is_relative_to(path)}
        if self.rng.random() < 0.5:
            self.sync(path.parent)

    def snapshot(self) -> None:
        number = self.rng.randrange(3)
        snap = self.top / f"snap{number}"
        if snap.exists():
            subprocess.run(["btrfs", "-q", "subvolume", "delete", snap], capture_output=True)
        else:
            subprocess.run(["btrfs", "-q", "subvolume", "snapshot", self.top, snap], capture_output=True)

    def settle(self) -> None:
        self.sync(self.rng.choice([self.one(), self.rng.choice(self.directories)]))

    @staticmethod
    def sync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---- copies ------------------------------------------------------------------------------------------------


class Flavour(NamedTuple):
    """`options` are those of the mount; `torn`: read from first byte to last while it is written; `moves`:
    the kernel moves data about meanwhile, and goes on with that when it mounts a copy."""

    kind: str
    options: str = ""
    make: str = ""
    torn: bool = False
    moves: bool = False


FLAVOURS = {
    "ext4": Flavour("ext4", "commit=2"),
    "ext4-torn": Flavour("ext4", "commit=2", torn=True),
    "ext4-orphan-file": Flavour("ext4", "commit=1", "-O orphan_file -b 1024"),
    "xfs": Flavour("xfs"),
    "btrfs": Flavour("btrfs", "commit=10"),
    "btrfs-balance": Flavour("btrfs", "commit=1", moves=True),
}


def make(flavour: Flavour, image: Path) -> None:
    """A new filesystem of this kind in a file."""
    if flavour.kind == "xfs":
        need("mkfs.xfs", "xfsprogs")
        xfs_images.make(image, "--unsupported", size=192 * MIB)
        return
    run("truncate", "-s", "192M", image)
    if flavour.kind == "btrfs":
        run(need("mkfs.btrfs", "btrfs-progs"), "-q", *flavour.make.split(), image)
    else:
        run("mke2fs", "-q", "-F", "-t", "ext4", *flavour.make.split(), image)


@contextlib.contextmanager
def written(flavour: Flavour, image: Path, seed: int) -> Iterator[None]:
    """While this lasts, the filesystem of an image is being written."""
    with mounted(image, ",".join(filter(None, [flavour.options, "noatime"]))) as where:
        command = [sys.executable, __file__, flavour.kind, str(where), str(seed)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(command, env=environment) as writer:
            try:
                with balanced(where) if flavour.moves else contextlib.nullcontext():
                    yield
                assert writer.poll() is None, "the writer ended"
            finally:
                writer.terminate()


@contextlib.contextmanager
def balanced(where: Path) -> Iterator[None]:
    """While this lasts, a btrfs is balanced again and again."""
    loop = 'while btrfs balance start --full-balance "$0"; do :; done'
    command = ["sh", "-c", loop, where]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as balance:
        try:
            yield
        finally:
            while balance.poll() is None:  # between two balances there is nothing to cancel
                subprocess.run(["btrfs", "balance", "cancel", where], capture_output=True)
                time.sleep(0.01)


def copies(flavour: Flavour, folder: Path, count: int, seed: int = 1, pause: float = 1.0) -> Iterator[Path]:
    """Copies of one filesystem that grows old meanwhile.

    They are given when it is unmounted: no kernel is to see two filesystems of one UUID.
    """
    disk = folder / "host.img"
    xfs_images.make(disk, size=16 << 30)
    with mounted(disk) as host:
        image = host / "busy.img"
        make(flavour, image)
        taken = [host / f"taken{number}.img" for number in range(count)]
        with written(flavour, image, seed):
            time.sleep(2 * pause)
            for number, copy in enumerate(taken):
                time.sleep(pause * (1 + number % 3) / 2)
                run("cp", "--reflink=never" if flavour.torn else "--reflink=always", image, copy)
        for copy in taken:
            yield copy
            copy.unlink()
    disk.unlink()


# ---- both sides --------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What is compared of a file: `target` is a link's, `digest` the SHA-256 of a regular file's content."""

    kind: str
    mode: int
    nlink: int
    size: int
    target: bytes | None
    digest: str
    extents: tuple[Extent, ...]


def by_kernel(image: Path, flavour: Flavour) -> dict[bytes, Entry | None]:
    """All files of an image as this kernel shows them after its own recovery; None for those that it can't
    read in a torn copy."""
    found = dict[bytes, Entry | None]()
    with mounted(image, "noatime,skip_balance" if flavour.moves else "noatime") as where:
        top = os.fsencode(where)
        found[b""] = by_kernel_of(top)
        for folder, folders, names in os.walk(top):
            for path in (os.path.join(folder, name) for name in [*folders, *names]):
                try:
                    found[path[len(top) :]] = by_kernel_of(path)
                except OSError as error:
                    if not (flavour.torn and error.errno in UNREADABLE):
                        raise
                    found[path[len(top) :]] = None
    return found


UNREADABLE = (errno.EUCLEAN, errno.EBADMSG, errno.EIO)
"""What the kernel says of what a torn copy has in pieces: nobody can read it."""


def by_kernel_of(path: bytes) -> Entry:
    """One file of a mounted filesystem."""
    about = os.lstat(path)
    regular, link = stat.S_ISREG(about.st_mode), stat.S_ISLNK(about.st_mode)
    name = os.fsdecode(path)
    return Entry(
        stat.filemode(about.st_mode)[0], stat.S_IMODE(about.st_mode), about.st_nlink,
        about.st_size if regular or link or stat.S_ISDIR(about.st_mode) else 0,
        os.readlink(path) if link else None,
        hashlib.sha256(Path(name).read_bytes()).hexdigest() if regular else "",
        tuple(fiemap(name)) if regular else (),
    )  # fmt: skip


KINDS = {"file": "-", "directory": "d", "symlink": "l", "fifo": "p", "socket": "s"}


def by_map(image: Path) -> tuple[BlockMap, dict[bytes, Entry]]:
    """The same by the map of an image as it is."""
    found = dict[bytes, Entry]()
    with opened(Disks([str(image)])) as (bmap, readers):
        volume = int(tables.integers(bmap.filesystems, "volume")[0])
        files = Files(bmap, volume, readers[volume])
        _, table = bmap.slice_of("inodes", volume)
        mode = dict(zip(*(tables.integers(table, name).tolist() for name in ("inode", "mode")), strict=True))
        nlink = dict(
            zip(*(tables.integers(table, name).tolist() for name in ("inode", "nlink")), strict=True)
        )
        inodes, paths = bmap.paths(volume)
        digests, pieces = dict[int, str](), all_extents(bmap, volume)
        for inode, path in zip(inodes.tolist(), paths.to_pylist(), strict=True):
            kind = tables.TYPES[files.kind[files.rows_of(ints(inode))[0]]]
            regular, link = kind == "file", kind == "symlink"
            if regular and inode not in digests:
                digests[inode] = digest(files, inode)
            found[path.rstrip(b"/")] = Entry(
                KINDS.get(kind, kind), mode[inode] & 0o7777, nlink[inode],
                files.length(inode) if regular or link or kind == "directory" else 0,
                files.target(inode) if link else None,
                digests[inode] if regular else "", tuple(pieces.get(inode, ())) if regular else (),
            )  # fmt: skip
    return bmap, found


def all_extents(bmap: BlockMap, volume: int) -> dict[int, list[Extent]]:
    """`file_extents` of each inode that has any."""
    _, table = bmap.slice_of("extents", volume)
    inodes = np.unique(tables.integers(table, "inode")[tables.integers(table, "file_offset") >= 0])
    return {inode: file_extents(bmap, volume, inode) for inode in inodes.tolist()}


def digest(files: Files, inode: int) -> str:
    """The SHA-256 of a file's content by the map, holes as zeroes."""
    if reason := files.refusal(inode):
        return reason
    data = bytearray(files.length(inode))
    for piece in files.pieces([inode]):
        if len(piece.lost.starts):
            return "lost"
        data[piece.offset : piece.offset + len(piece.data)] = piece.data.tobytes()
    return hashlib.sha256(data).hexdigest()


def differences(
    kernel: dict[bytes, Entry | None], bmap: dict[bytes, Entry], moves: bool = False
) -> list[str]:
    """Where both sides differ, a line each; where data `moves`, extents need not be equal."""
    lines = [f"only the kernel has {path!r}" for path in sorted(kernel.keys() - bmap.keys())]
    lines += [f"only the map has {path!r}" for path in sorted(bmap.keys() - kernel.keys())]
    for path in sorted(kernel.keys() & bmap.keys()):
        one, other = kernel[path], bmap[path]
        if one is None:
            continue
        lines += [
            f"{path!r}: {name} is {getattr(one, name)!r} by the kernel, {getattr(other, name)!r} by the map"
            for name in Entry._fields
            if not (moves and name == "extents") and getattr(one, name) != getattr(other, name)
        ]
    return lines


if __name__ == "__main__":
    kind, where, seed = sys.argv[1:]
    writer = Writer(Path(where), int(seed), kind)
    stopped = list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    while not stopped:  # an act ends with all its commands: a killed writer's own would keep the mount busy
        writer.step()
