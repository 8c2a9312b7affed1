"""This machine's kernel as the guest of a judged watch: it does to a filesystem what machines do, and every
block that it writes says whose it is.

    watch_guest.py DISK FOLDER KIND SEED SECONDS [SCENARIO...]       (run by `virt-bmap watch`
    DISK is the watch's socket, or a block device of a machine that has the served disk
    FOLDER gets `names`: JSON lines of what files were called)

Scenarios, one after the other, each a share of the time: stress (anything, at random), mail (SQLite and a
mail folder), short (files whose blocks others take at once), clones (reflinks and snapshots), reuse (discard,
and new files there), grow (the filesystem, while it is written), mkfs (another one over it).
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kernel_guest import sync
from marked_disk import BLOCK, marked

SIZE, GROWN = 400 << 20, 600 << 20
"""Bytes of the filesystem at first, and of the disk."""
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "{disk}", "{size}k"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-d", "size={size}k", "{disk}"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-b", "{size}k", "{disk}"],
}
GROW = {
    "ext4": ["resize2fs", "{disk}"],
    "xfs": ["xfs_growfs", "{top}"],
    "btrfs": ["btrfs", "filesystem", "resize", "max", "{top}"],
}
OPTIONS = {"ext4": "commit=2", "xfs": "defaults", "btrfs": "commit=2"}
SCENARIOS = ("stress", "mail", "short", "clones", "reuse", "grow", "mkfs")
FICLONE = 0x40049409
KEEP_SIZE, PUNCH, ZERO_RANGE = 1, 3, 16
ROOM, SPARE, PER_FOLDER = 4096, 30_000, 1000
"""Bytes of the filesystem for each file that lies there before; inodes beside; files in a folder."""
NO_FILE = 0
"""The number of what may be under any name."""

_libc = ctypes.CDLL(None, use_errno=True)


def make(kind: str, disk: object, size: int, files: int = 0) -> None:
    """A filesystem at the beginning of a disk, with room for so many files beside the guest's."""
    words = [word.format(disk=disk, size=size >> 10) for word in MAKE[kind]]
    if files and kind == "ext4":
        words[1:1] = ["-N", str(files + SPARE)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fill(folder: Path, image: Path, files: int) -> None:
    """Files that the guest leaves alone; every tenth has content."""
    top = folder / "filled"
    top.mkdir()
    subprocess.run(["mount", "-o", "loop", image, top], check=True)
    try:
        for first in range(0, files, PER_FOLDER):
            where = f"{top}/other/{first // PER_FOLDER:05d}"
            os.makedirs(where)
            for number in range(first, min(files, first + PER_FOLDER)):
                fd = os.open(f"{where}/{number:08d}", os.O_WRONLY | os.O_CREAT)
                if number % 10 == 0:
                    os.write(fd, bytes(2 * BLOCK))
                os.close(fd)
    finally:
        subprocess.run(["umount", top], check=True)


class Guest:
    """Files of one mounted filesystem: their numbers, names and sizes in blocks."""

    def __init__(self, folder: Path, kind: str, loop: str, seed: int) -> None:
        self.kind, self.loop, self.chooser = kind, loop, random.Random(seed)
        self.top = folder / "top"
        self.top.mkdir(exist_ok=True)
        self._log = open(folder / "names", "a")  # noqa: SIM115 - until the process ends
        self.count = 0
        self.forget()

    def forget(self) -> None:
        """A new filesystem has no files."""
        self.names: dict[int, list[str]] = {}
        self.size: dict[int, int] = {}
        self.folders = [""]
        self.snapshots = 0

    def say(self, **what: object) -> None:
        """For the judge."""
        self._log.write(json.dumps({"time_ns": time.time_ns(), **what}) + "\n")
        self._log.flush()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        subprocess.run(["mount", "-t", self.kind, "-o", OPTIONS[self.kind], self.loop, self.top], check=True)
        try:
            yield
        finally:
            for _ in range(240):
                if subprocess.run(["umount", self.top]).returncode == 0:
                    break
                time.sleep(0.5)
            self.wait_until_free()

    def wait_until_free(self) -> None:
        """Whoever got a mount namespace of his own meanwhile has the filesystem mounted there still."""
        for _ in range(240):
            with contextlib.suppress(OSError), contextlib.closing(_Fd(self.loop, os.O_RDONLY | os.O_EXCL)):
                return
            time.sleep(0.5)

    # ---- what happens to files -----------------------------------------------------------------------------

    def create(self, name: str | None = None, blocks: int | None = None, fsync: bool | None = None) -> int:
        self.count += 1
        number, name = self.count, name or self.new_name()
        self.names[number], self.size[number] = [name], 0
        with open(f"{self.top}{name}", "xb") as file:
            self.say(file=number, path=name, inode=os.fstat(file.fileno()).st_ino)
        self.write(number, 0, blocks or self.chooser.choice([1, 1, 2, 5, 17, 64, 200]), fsync)
        return number

    def write(self, number: int, first: int, count: int, fsync: bool | None = None, how: str = "") -> None:
        data = b"".join(
            (marked(number, first + step) + self.chooser.randbytes(64)).ljust(BLOCK, b".")
            for step in range(count)
        )
        how = how or self.chooser.choice(["plain", "plain", "direct", "mapped"])
        path = f"{self.top}{self.names[number][0]}"
        with contextlib.closing(_Fd(path, os.O_RDWR | (os.O_DIRECT if how == "direct" else 0))) as fd:
            if how == "mapped" and self.size[number] >= first + count:
                with mmap.mmap(fd.number, self.size[number] * BLOCK) as memory:
                    memory[first * BLOCK : (first + count) * BLOCK] = data
                    memory.flush()
            elif how == "direct":
                with mmap.mmap(-1, len(data)) as memory:
                    memory.write(data)
                    os.pwrite(fd.number, memory, first * BLOCK)
            else:
                os.pwrite(fd.number, data, first * BLOCK)
            if self.chooser.random() < 0.4 if fsync is None else fsync:
                os.fsync(fd.number)
        self.size[number] = max(self.size[number], first + count)

    def unlink(self, number: int) -> None:
        os.unlink(f"{self.top}{self.names[number].pop(self.chooser.randrange(len(self.names[number])))}")
        if not self.names[number]:
            del self.names[number]

    def rename(self, number: int, name: str) -> None:
        at = self.chooser.randrange(len(self.names[number]))
        self.say(file=number, path=name)
        os.rename(f"{self.top}{self.names[number][at]}", f"{self.top}{name}")
        self.names[number][at] = name

    def read(self, number: int) -> None:
        with contextlib.closing(_Fd(f"{self.top}{self.names[number][0]}", os.O_RDONLY)) as fd:
            os.fsync(fd.number)
            os.posix_fadvise(fd.number, 0, 0, os.POSIX_FADV_DONTNEED)
            while os.read(fd.number, 1 << 20):
                pass

    def clone(self, number: int) -> None:
        name = self.new_name()
        self.count += 1
        with open(f"{self.top}{self.names[number][0]}", "rb") as old, open(f"{self.top}{name}", "wb") as new:
            self.say(file=self.count, path=name, clone_of=number, inode=os.fstat(new.fileno()).st_ino)
            fcntl.ioctl(new, FICLONE, old.fileno())
        self.names[self.count], self.size[self.count] = [name], self.size[number]

    def snapshot(self) -> None:
        self.snapshots += 1
        self.say(snapshot=f"/snapshot{self.snapshots}")
        subprocess.run(
            ["btrfs", "-q", "subvolume", "snapshot", self.top, f"{self.top}/snapshot{self.snapshots}"],
            check=True,
        )

    def allocate(self, number: int, mode: int) -> None:
        with contextlib.closing(_Fd(f"{self.top}{self.names[number][0]}", os.O_RDWR)) as fd:
            first, count = self.chooser.randrange(max(1, self.size[number])), self.chooser.choice([1, 8, 64])
            done = (
                _libc.fallocate(fd.number, mode, ctypes.c_long(first * BLOCK), ctypes.c_long(count * BLOCK))
                == 0
            )
        if done and mode in (0, ZERO_RANGE):
            self.size[number] = max(self.size[number], first + count)

    def truncate(self, number: int) -> None:
        self.size[number] = self.chooser.randrange(self.size[number] + 1)
        os.truncate(f"{self.top}{self.names[number][0]}", self.size[number] * BLOCK)

    def link(self, number: int) -> None:
        name = self.new_name()
        self.say(file=number, path=name)
        os.link(f"{self.top}{self.names[number][0]}", f"{self.top}{name}")
        self.names[number].append(name)

    def replace(self, number: int, other: int) -> None:
        name = self.names[other].pop()
        if not self.names[other]:
            del self.names[other]
        self.rename(number, name)

    def folder(self) -> None:
        name = f"{self.chooser.choice(self.folders)}/folder {self.chooser.randrange(10**6)}"
        if name.count("/") < 6:
            os.mkdir(f"{self.top}{name}")
            self.folders.append(name)

    def trim(self) -> None:
        subprocess.run(["fstrim", self.top], check=True)

    def new_name(self) -> str:
        stem = self.chooser.choice(["f", "data ", "log-", "x.tmp."])
        return f"{self.chooser.choice(self.folders)}/{stem}{self.chooser.randrange(10**8)}"

    def any(self) -> int:
        return self.chooser.choice(list(self.names))

    # ---- scenarios -----------------------------------------------------------------------------------------

    def stress(self, end: float, more: "tuple[tuple[Callable[[], object], float], ...]" = ()) -> None:
        rest = (0.01, 0.1, 0.1, 0.5)
        deeds: list[tuple[Callable[[], object], float]] = [
            (self.create, 12), (self._overwrite, 10),
            (lambda: self.write(n := self.any(), self.size[n], 4), 6),
            (lambda: self.rename(self.any(), self.new_name()), 5), (self._replace, 3),
            (lambda: self.link(self.any()), 2), (lambda: self.unlink(self.any()), 7),
            (lambda: self.truncate(self.any()), 3),
            *((lambda mode=mode: self.allocate(self.any(), mode), 2) for mode in (0, KEEP_SIZE, PUNCH,
                    ZERO_RANGE)), (self.folder, 1),
            (lambda: sync(self.top), 0.7), (self.trim, 0.3), (lambda: self.read(self.any()), 6),
            (lambda: time.sleep(self.chooser.choice(rest)), 5), *more,
        ]  # fmt: skip
        what, weights = zip(*deeds, strict=True)
        while time.time() < end:
            deed = self.chooser.choices(what, weights)[0] if self.names else self.create
            with contextlib.suppress(FileExistsError):
                (lambda: self.unlink(self.any()))() if len(self.names) > 400 else deed()

    def _overwrite(self) -> None:
        number = self.any()
        self.write(
            number, self.chooser.randrange(max(1, self.size[number])), self.chooser.choice([1, 1, 3, 16])
        )

    def _replace(self) -> None:
        number, other = self.any(), self.any()
        if number != other:
            self.replace(number, other)

    def mail(self, end: float) -> None:
        """Transactions with a journal that is deleted each time, and letters that are written, moved, and
        deleted."""
        box = f"/mail{self.count}"
        for name in ("", "/tmp", "/new"):
            os.mkdir(f"{self.top}{box}{name}")
        bases = [sqlite3.connect(f"{self.top}{box}/app{number}.db") for number in range(3)]
        for base in bases:
            base.execute("create table t(a integer primary key, b text)")
        letters: list[int] = []
        while time.time() < end:
            base = self.chooser.choice(bases)
            for _ in range(self.chooser.randrange(1, 30)):
                base.execute(
                    "insert or replace into t values(?, ?)",
                    (self.chooser.randrange(5000), "x" * self.chooser.randrange(400)),
                )
            base.commit()
            letter = self.create(f"{box}/tmp/{self.count}", self.chooser.choice([1, 2, 8]), fsync=True)
            self.rename(letter, f"{box}/new/{letter}.host")
            letters.append(letter)
            while len(letters) > 20 or (letters and self.chooser.random() < 0.5):
                self.unlink(letters.pop(self.chooser.randrange(len(letters))))
            time.sleep(self.chooser.choice([0, 0.02, 0.1, 0.3]))
        for base in bases:
            base.close()

    def short(self, end: float) -> None:
        """A file is written and deleted, and another one takes its blocks at once."""
        while time.time() < end:
            secret = self.create(f"/secret {self.count}", 16, fsync=True)
            time.sleep(0.02)
            self.unlink(secret)
            sync(self.top)
            time.sleep(0.02)
            self.create(f"/innocent {self.count}", 16, fsync=True)
            time.sleep(self.chooser.choice([0.3, 1.5]))

    def clones(self, end: float) -> None:
        if self.kind == "ext4":
            return
        more: list[tuple[Callable[[], object], float]] = [(lambda: self.clone(self.any()), 20)]
        if self.kind == "btrfs":
            more.append((lambda: self.snapshot() if self.snapshots < 4 else None, 0.5))
        self.stress(end, tuple(more))

    def reuse(self, end: float) -> None:
        while time.time() < end:
            files = [self.create(blocks=50) for _ in range(6)]
            sync(self.top)
            for number in files:
                self.unlink(number)
            sync(self.top)
            self.trim()
            for _ in range(4):
                self.create(blocks=40)
            time.sleep(0.3)

    def grow(self, end: float) -> None:
        words = [word.format(disk=self.loop, top=self.top) for word in GROW[self.kind]]
        self.stress(time.time() + (end - time.time()) / 3)
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:  # ext4 wants CAP_SYS_RESOURCE, which not every machine gives
            self.say(refused=f"{words[0]}: {done.stderr.strip().splitlines()[-1]}")
        self.stress(end)

    def run(self, scenarios: "list[str]", seconds: float) -> None:
        """One after the other; then all files are read back."""
        inside = [name for name in scenarios if name != "mkfs"]
        share = seconds / len(scenarios)
        with self.mounted():
            for name in inside:
                self.say(scenario=name)
                getattr(self, name)(time.time() + share)
            self.settle()
        if "mkfs" in scenarios:
            self.say(scenario="mkfs", begin=True)
            make(self.kind, self.loop, GROWN)
            self.say(scenario="mkfs", end=True)
            self.forget()
            with self.mounted():
                self.stress(time.time() + share)
                self.settle()

    def settle(self) -> None:
        sync(self.top)
        time.sleep(1)
        for number in self.names:
            self.read(number)


class _Fd:
    """An open file."""

    def __init__(self, path: str, flags: int) -> None:
        self.number = os.open(path, flags)

    def close(self) -> None:
        os.close(self.number)


def main() -> None:
    """Work on the served disk."""
    disk, folder, kind, seed, seconds = sys.argv[1:6]
    with attached(disk, Path(folder)) as device:
        Guest(Path(folder), kind, device, int(seed)).run(sys.argv[6:] or list(SCENARIOS), float(seconds))


@contextlib.contextmanager
def attached(disk: str, folder: Path) -> Iterator[str]:
    """The served disk as a block device."""
    if Path(disk).is_block_device():
        yield disk
        return
    export = folder / "export"
    export.touch()
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=nbd,node-name=disk,server.type=unix,server.path={disk},discard=unmap",
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on",
        ]
    )
    try:
        while export.stat().st_size == 0:
            if daemon.poll() is not None:
                sys.exit("the disk can't be exported")
            time.sleep(0.02)
        loop = subprocess.run(
            ["losetup", "-f", "--show", export], check=True, capture_output=True, text=True
        ).stdout.strip()
        try:
            yield loop
        finally:
            subprocess.run(["losetup", "-d", loop], check=True)
            time.sleep(0.3)
    finally:
        daemon.terminate()
        daemon.wait()


if __name__ == "__main__":
    main()
