"""Copying a volume out: from a reader to a file, a stream or an NBD export, in batches, with nothing written
where there are zeroes."""

import os
from collections.abc import Callable
from typing import BinaryIO, Protocol

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, ints, runs, subtract
from virt_bmap.core.errors import ImageError
from virt_bmap.core.lost import Lost, Missing
from virt_bmap.core.reader import Reader
from virt_bmap.core.salvage import read_known

Ranges = tuple[Int, Int]

BATCH = 8 << 20
"""Bytes read at once."""
LOOK = 1 << 30
"""Bytes of a volume that is not whole whose losses are
looked at together; stripes of a lost member are many."""
GRAIN = 4096
"""Zeroes are left out in pieces of this size, the block
size of nearly all filesystems that may hold the copy."""


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


class StreamTarget:
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
    skip: Ranges = (EMPTY, EMPTY),
    tell: Callable[[int], None] = lambda _: None,
    grain: int = GRAIN,
    partial: bool = False,
) -> Missing:
    """Copy all of a volume, the bytes of `skip` as zeroes without reading them; what is missing from the
    copy. Holes of image files are not read either.

    Zeroes are told from data in pieces of `grain` bytes, which divide BATCH. `tell` is called with the number
    of bytes that are done. Raises ImageError where bytes of the volume can't be had, before anything is
    written where that is known beforehand; `partial`: they are zeroes in the copy.
    """
    if not partial and not reader.whole:
        _refuse_lost(reader, skip)
    wanted, missing = subtract(*reader.stored(), *skip), Missing()
    done = 0
    for low in _batches(wanted):
        if low > done:
            _zero(reader, target, done, low, skip, missing)
        done = min(low + BATCH, reader.size)
        data, lost = _batch(reader, wanted, skip, low, done)
        missing.add(lost)
        if missing and not partial:
            raise ImageError(
                f"{reader.name}: can't be read whole: {missing}; --partial fills them with zeroes"
            )
        _copy(data, low, target, grain)
        tell(done)
    if done < reader.size:
        _zero(reader, target, done, reader.size, skip, missing)
        tell(reader.size)
    return missing


def _refuse_lost(reader: Reader, skip: Ranges) -> None:
    """ImageError where it is known beforehand that bytes can't be had."""
    for low in range(0, reader.size, LOOK):
        missing = Missing()
        missing.add(_lost(reader, skip, low, min(low + LOOK, reader.size)))
        if missing:
            raise ImageError(
                f"{reader.name}: can't be read whole: {missing}; --partial fills them with zeroes"
            )


def _lost(reader: Reader, skip: Ranges, low: int, high: int) -> Lost:
    """What of bytes [low, high) that are wanted can't be had, as far as is known without reading."""
    return reader.lost(*subtract(ints(low), ints(high), *skip))


def _zero(reader: Reader, target: Target, start: int, end: int, skip: Ranges, missing: Missing) -> None:
    """Bytes that are not stored; of a volume that is not whole some may be lost."""
    for low in range(start, end, LOOK) if not reader.whole else ():
        missing.add(_lost(reader, skip, low, min(low + LOOK, end)))
    target.zero(start, end)


def _batches(wanted: Ranges) -> list[int]:
    """Where the batches begin in which something is wanted."""
    first, last = wanted[0] // BATCH, (wanted[1] - 1) // BATCH
    marks = np.zeros(int(last.max(initial=-1)) + 2, np.int64)
    np.add.at(marks, first, 1)
    np.add.at(marks, last + 1, -1)
    found: list[int] = (np.flatnonzero(np.cumsum(marks)) * BATCH).tolist()
    return found


def _batch(reader: Reader, wanted: Ranges, skip: Ranges, low: int, high: int) -> tuple[Bytes, Lost]:
    """Bytes [low, high), read where they are wanted and zero elsewhere, and what of them can't be had."""
    first = np.searchsorted(wanted[1], low, "right")
    last = np.searchsorted(wanted[0], high, "left")
    starts, ends = np.clip(wanted[0][first:last], low, high), np.clip(wanted[1][first:last], low, high)
    data, lost = read_known(reader, starts, ends - starts)
    if not reader.whole:
        lost = Lost.join(
            [lost, _lost(reader, (np.append(skip[0], starts), np.append(skip[1], ends)), low, high)]
        )
    if len(starts) == 1 and ends[0] - starts[0] == high - low:
        return data, lost
    result, at = np.zeros(high - low, np.uint8), 0
    for start, end in zip((starts - low).tolist(), (ends - low).tolist(), strict=True):
        result[start:end] = data[at : at + end - start]
        at += end - start
    return result, lost


def _copy(data: Bytes, offset: int, target: Target, grain: int) -> None:
    """Hand over the pieces of `data`, the bytes from `offset` on: those with something in them, and those
    that are zero."""
    whole = len(data) // grain * grain
    # NumPy's max is some times as fast as its any
    used = data[:whole].reshape(-1, grain).max(axis=1).astype(bool)
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
