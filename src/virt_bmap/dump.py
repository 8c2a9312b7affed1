"""Copying a volume out: from a reader to a file, a stream or an NBD export, in batches, with nothing written where there are zeroes."""

import os
from collections.abc import Callable
from typing import BinaryIO, Protocol

import numpy as np

from virt_bmap.arrays import EMPTY, Bytes, Int, ints, runs, subtract
from virt_bmap.reader import Reader

BATCH = 8 << 20
"""Bytes read at once."""
GRAIN = 4096
"""Zeroes are left out in pieces of this size, the block size of nearly all filesystems that may hold the copy."""


class Target(Protocol):
    """Where a copy goes. It is told of all bytes, in order: what they are, or that they are zeroes."""

    def write(self, offset: int, data: Bytes) -> None: ...

    def zero(self, start: int, end: int) -> None: ...


class SparseFile:
    """A new file, in which zeroes become holes. `size` is the copy's, in bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._fd = file.fileno()
        os.ftruncate(self._fd, size)

    def write(self, offset: int, data: Bytes) -> None:
        view = memoryview(data.data)
        while len(view):
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def zero(self, start: int, end: int) -> None:
        """A new file holds nothing else."""


class Stream:
    """What takes all bytes in order: a pipe, a device."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, offset: int, data: Bytes) -> None:
        self._file.write(data.data)

    def zero(self, start: int, end: int) -> None:
        nothing = bytes(min(end - start, BATCH))
        for low in range(start, end, BATCH):
            self._file.write(nothing[: end - low])


def dump(
    reader: Reader,
    target: Target,
    skip: tuple[Int, Int] = (EMPTY, EMPTY),
    tell: Callable[[int], None] = lambda _: None,
    grain: int = GRAIN,
) -> int:
    """Copy all of a volume, the bytes of `skip` as zeroes without reading them; how many bytes were read. Holes of image files are not read either.

    Zeroes are told from data in pieces of `grain` bytes, which divide BATCH. `tell` is called with the number of bytes that are done.
    """
    wanted = subtract(*reader.stored(), *skip)
    done = 0
    for low in _batches(wanted):
        if low > done:
            target.zero(done, low)
        done = min(low + BATCH, reader.size)
        _copy(_batch(reader, wanted, low, done), low, target, grain)
        tell(done)
    if done < reader.size:
        target.zero(done, reader.size)
        tell(reader.size)
    return int((wanted[1] - wanted[0]).sum())


def _batches(wanted: tuple[Int, Int]) -> list[int]:
    """Where the batches begin in which something is wanted."""
    first, last = wanted[0] // BATCH, (wanted[1] - 1) // BATCH
    marks = np.zeros(int(last.max(initial=-1)) + 2, np.int64)
    np.add.at(marks, first, 1)
    np.add.at(marks, last + 1, -1)
    found: list[int] = (np.flatnonzero(np.cumsum(marks)) * BATCH).tolist()
    return found


def _batch(reader: Reader, wanted: tuple[Int, Int], low: int, high: int) -> Bytes:
    """Bytes [low, high), read where they are wanted and zero elsewhere."""
    first = np.searchsorted(wanted[1], low, "right")
    last = np.searchsorted(wanted[0], high, "left")
    starts, ends = np.clip(wanted[0][first:last], low, high), np.clip(wanted[1][first:last], low, high)
    if len(starts) == 1 and ends[0] - starts[0] == high - low:
        return reader.read_ranges(ints(low), ints(high - low))
    result = np.zeros(high - low, np.uint8)
    data, at = reader.read_ranges(starts, ends - starts), 0
    for start, end in zip((starts - low).tolist(), (ends - low).tolist(), strict=True):
        result[start:end] = data[at : at + end - start]
        at += end - start
    return result


def _copy(data: Bytes, offset: int, target: Target, grain: int) -> None:
    """Hand over the pieces of `data`, the bytes from `offset` on: those with something in them, and those that are zero."""
    whole = len(data) // grain * grain
    used = data[:whole].reshape(-1, grain).max(axis=1).astype(bool)  # NumPy's max is some times as fast as its any
    if whole < len(data):
        used = np.append(used, data[whole:].any())
    starts, ends = runs(used)
    at = 0
    for start, end in zip((starts * grain).tolist(), (ends * grain).tolist(), strict=True):
        if start > at:
            target.zero(offset + at, offset + start)
        at = min(end, len(data))
        target.write(offset + start, data[start:at])
    if at < len(data):
        target.zero(offset + at, offset + len(data))
