"""A scratch copy of a disk that remembers what was overwritten, so that damage is undone in a few writes."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

Patch = list[tuple[int, str]]
"""(offset, bytes in hexadecimal)"""
PIECE = 1 << 20


def scratch() -> str | None:
    """Where damaged copies lie: in memory, where they are quick and of any size."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


class Disk:
    """A file under damage. `size` is what it has now, `touched` the ranges that were written since it was
    whole."""

    def __init__(self, source: Path, path: Path) -> None:
        subprocess.run(["cp", "--sparse=always", source, path], check=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR)
        self.size = self._whole = os.fstat(self._fd).st_size
        self.touched: list[tuple[int, int]] = []
        self._undo: list[tuple[int, bytes]] = []

    def close(self) -> None:
        """Also removes the copy."""
        os.close(self._fd)
        self.path.unlink()

    def read(self, at: int, length: int) -> bytes:
        """What is there of the range; less behind the end, nothing before the start."""
        return (
            os.pread(self._fd, min(length, self.size - at), at) if 0 <= at < self.size and length > 0 else b""
        )

    def write(self, at: int, data: bytes) -> bool:
        """Overwrite what is there of the range; does that change anything?"""
        data = bytes(data[: max(0, self.size - at)])
        if at < 0 or not data or (old := os.pread(self._fd, len(data), at)) == data:
            return False
        self._undo.append((at, old))
        self.touched.append((at, at + len(data)))
        os.pwrite(self._fd, data, at)
        return True

    def resize(self, size: int) -> None:
        """Cut the disk off, or let it grow by a hole."""
        at = max(1, size)
        while at < self.size and (at := self._next(at)) < self.size:
            self._undo.append((at, self.read(at, PIECE)))
            at += PIECE
        os.ftruncate(self._fd, max(1, size))
        self.size = max(1, size)

    def _next(self, at: int) -> int:
        """Where something is stored, from this byte on: holes can be larger than any time suffices to
        read."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError:  # nothing
            return self.size

    def restore(self) -> None:
        """As the disk was made."""
        if self.size != self._whole:
            os.ftruncate(self._fd, self._whole)
            self.size = self._whole
        for at, old in reversed(self._undo):
            os.pwrite(self._fd, old[: max(0, self._whole - at)], at)
        self._undo, self.touched = [], []

    def patch(self) -> Patch:
        """The damage, as what differs from the whole disk, byte for byte; but the size."""
        old: dict[int, int] = {}
        for at, data in reversed(self._undo):
            old.update(enumerate(data, at))
        new = {
            at: self.read(at, 1)[:1]
            for at in sorted(old)
            if at < min(self.size, self._whole) or self.size > self._whole
        }
        runs: list[tuple[int, bytearray]] = []
        for at, byte in new.items():
            if byte and byte[0] != old[at]:
                if runs and runs[-1][0] + len(runs[-1][1]) == at:
                    runs[-1][1].append(byte[0])
                else:
                    runs.append((at, bytearray(byte)))
        return [(at, bytes(data).hex()) for at, data in runs]

    def smaller(self, size: int, patch: Patch) -> Iterator[tuple[int, Patch]]:
        """Damages that are less than this one, the large steps first."""
        if size != self._whole:
            yield self._whole, patch
        if len(patch) > 3:
            yield size, patch[: len(patch) // 2]
            yield size, patch[len(patch) // 2 :]
        for row in range(len(patch)):
            yield size, patch[:row] + patch[row + 1 :]
        for row, (at, data) in enumerate(patch):
            if half := len(data) // 4:
                yield size, [*patch[:row], (at, data[: 2 * half]), *patch[row + 1 :]]
                yield size, [*patch[:row], (at + half, data[2 * half :]), *patch[row + 1 :]]

    def apply(self, patch: Sequence[tuple[int, str]], size: int) -> None:
        """The damage of a patch, on a whole disk."""
        if size != self.size:
            self.resize(size)
        for at, data in patch:
            self.write(at, bytes.fromhex(data))
