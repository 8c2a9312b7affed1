"""Random access to the bytes of a disk or volume, always asked for in batches.

A `Reader` has a size and reads many ranges in one call; the batch is sorted, exact neighbours are merged, and
what is left goes to the backend as one request, which may keep all of it in flight. A format that walks a
tree asks for a whole level at once.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, gather, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.stored import afford
from virt_bmap.core.threads import ahead

HEAD = 128 << 10
"""Bytes at the start of every volume that are read once and
kept: all magic numbers but md's and GPT's copies lie there."""
TAIL = 128 << 10
"""Likewise at the end: the backup GPT's header, md 0.90 (up to 128 KiB from the end) and 1.0."""
SECTORS = (512, 1024, 2048, 4096)
"""Bytes that sectors of disks have."""


class DiscSession(NamedTuple):
    """Which session of a disc that was written in several: the `number`th (0: the last one), or the one that
    begins at this sector of 2,048 bytes."""

    number: int = 0
    sector: int | None = None


class Mark(NamedTuple):
    """What an image says of itself: a code of problems, a sentence, and its severity where the code's own
    does not hold."""

    code: str
    words: str
    severity: str | None = None


class Packed(NamedTuple):
    """The plain content of files that is kept packed, as columns: bytes [file_offset, file_offset + length)
    of a file are bytes [start, start + length) of `reader` (`core/packed.py`)."""

    reader: "Reader"
    inode: Int
    file_offset: Int
    length: Int
    start: Int


class Reader:
    """Bytes [0, size) of something. Subclasses provide `_fetch`. Several threads may read."""

    in_turn = True
    """Must `_fetch` end in one thread before it begins in another?"""
    near = False
    """Is reading no more than a copy, from memory or a kernel's cache?"""
    corrects = False
    """Are these the bytes of the one reader below it, some of them put right: a journal replayed, a copy
    instead of one that is wrong?"""
    stored_most: int | None = None
    """At most so many bytes are stored of it, once that is known: see `core/stored.py`."""
    sector: int | None = None
    """Bytes of a sector, where the device tells them, or the user."""
    is_sector_sure = False
    """Did the user say so?"""
    session: DiscSession | None = None
    """The one that the user wants to see."""
    in_use: str | None = None
    """Who may be changing it while it is read, in a few words."""
    marks: Sequence[Mark] = ()
    """What the files that it comes from say of themselves: that they are damaged, or were not closed."""
    packed: Packed | None = None
    """The content that the filesystem in it keeps compressed, once that was read."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.name = name
        """For messages: which disk, or which volume of which disk."""
        self.rounds = 0
        """How often a batch was waited for, and how many bytes were asked for: what a slow link charges."""
        self.requested = 0
        self.below: Sequence[Reader] = ()
        """The readers whose bytes these are, where they are not its own."""
        self._ends: tuple[Bytes, Bytes, int] | None = None
        self._turn: AbstractContextManager[object] = threading.RLock() if self.in_turn else nullcontext()

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        """The ranges one after the other.

        They are sorted, not empty, inside the volume and never touch or overlap.
        """
        raise NotImplementedError

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`.

        Raises Corrupt where the range leaves the volume, ImageError where reading fails.
        """
        kept = self._kept(offset, offset + length) if 0 <= offset <= offset + length <= self.size else None
        return (self.read_ranges(ints(offset), ints(length)) if kept is None else kept).tobytes()

    def read_clipped(self, offset: int, length: int) -> bytes:
        """Like `read`, but what lies beyond the end reads as zeroes: for probing small volumes."""
        inside = max(0, min(length, self.size - offset))
        return (self.read(offset, inside) if inside else b"").ljust(length, b"\0")

    def read_blocks(self, offsets: Int, size: int) -> Bytes:
        """Blocks of equal size: an array of shape (len(offsets), size)."""
        return self.read_ranges(offsets, np.full(len(offsets), size, np.int64)).reshape(len(offsets), size)

    def batches(self, offsets: Int, size: int, most: int, copied: int = 0) -> Iterator[tuple[slice, Bytes]]:
        """(which of the offsets, their blocks) as `read_blocks` gives them, in batches of up to `most` bytes;
        the next one is read while this one is looked at.

        Who is done with a batch nearly as soon as it is read gives `copied`: so many bytes at a time, one
        batch after the other, where reading is only a copy. They are looked at while the processor's
        own cache holds them, which is worth more than a second thread.
        """
        alone = self.near and copied > 0
        step = max(1, (copied if alone else most) // size)
        parts = [slice(at, at + step) for at in range(0, len(offsets), step)]
        read = partial(self._blocks_of, offsets, size)
        return zip(parts, map(read, parts) if alone else ahead(read, parts), strict=True)

    def _blocks_of(self, offsets: Int, size: int, part: slice) -> Bytes:
        return self.read_blocks(offsets[part], size)

    def read_ranges(self, offsets: Int, lengths: Int) -> Bytes:
        """Any ranges, in any order, one after the other in one flat uint8 array; each byte of the disk is
        asked for once.

        Raises Corrupt where a range leaves the volume: readers check numbers from the disk first if they want
        rows in `problems` instead.
        """
        offsets, lengths = ints(offsets), ints(lengths)
        self.check_inside(offsets, lengths)
        ends = offsets + lengths
        if len(offsets) == 1:
            kept = self._kept(int(offsets[0]), int(ends[0]))
            if kept is not None:
                return kept
        in_order = bool((offsets[1:] >= ends[:-1]).all())
        if len(offsets) and in_order and (lengths > 0).all():
            return self._counted(*_join(offsets, ends))
        order = np.argsort(offsets, kind="stable")
        order = order[lengths[order] > 0]
        starts, reach = offsets[order], np.maximum.accumulate(ends[order])
        if len(order) == 0:
            return np.zeros(0, np.uint8)
        new = np.append(True, starts[1:] > reach[:-1])
        first = np.flatnonzero(new)
        piece_start, piece_end = starts[first], reach[np.append(first[1:], len(order)) - 1]
        data = self._counted(piece_start, piece_end - piece_start)
        base = np.cumsum(piece_end - piece_start) - (piece_end - piece_start)
        where = np.zeros(len(offsets), np.int64)
        piece = np.cumsum(new) - 1
        where[order] = base[piece] + starts - piece_start[piece]
        if len(lengths) and (lengths == lengths[0]).all() and (where % lengths[0] == 0).all():
            size = int(lengths[0])
            if len(data) % size == 0:
                return data.reshape(-1, size)[where // size].reshape(-1)
        return gather(data, where, lengths)

    def check_inside(self, offsets: Int, lengths: Int) -> None:
        """Corrupt where a range leaves the volume."""
        outside = (offsets < 0) | (lengths < 0) | (offsets > self.size - lengths)
        if outside.any():
            bad = int(np.flatnonzero(outside)[0])
            raise Corrupt(
                f"{self.name}: bytes {offsets[bad]:#x}+{lengths[bad]:#x} lie outside the volume, which ends "
                f"at {self.size:#x}: it is truncated, or its metadata is damaged",
                int(offsets[bad]),
                "outside",
            )

    def _counted(self, offsets: Int, lengths: Int) -> Bytes:
        total = int(lengths.sum())
        afford(self, total, "what is read together")
        with self._turn:
            self.rounds += 1
            self.requested += total
            return self._fetch(offsets, lengths)

    def _kept(self, start: int, end: int) -> Bytes | None:
        """The bytes from the head or tail, which are fetched together once; None where they reach further."""
        head, tail = min(HEAD, self.size), max(0, self.size - TAIL)
        if end > head and start < tail:
            return None
        if self._ends is None:
            tail = max(tail, head)
            offsets, lengths = ints([0, tail]), ints([head, self.size - tail])
            both = self._counted(*_join(offsets[lengths > 0], (offsets + lengths)[lengths > 0]))
            self._ends = both[:head], both[head:], tail
        first, last, at = self._ends
        if end <= head:
            return first[start:end]
        if start >= at:
            return last[start - at : end - at]
        return None

    def lost(self, starts: Int, ends: Int) -> Lost:
        """What of these ranges, sorted and apart, can't be had and reads as zeroes, or as the best that there
        is: nothing, where `whole`."""
        return NOTHING

    @property
    def whole(self) -> bool:
        """Is there nothing, as far as can be told without reading, that `lost` could ever tell?"""
        return True

    def forget_ends(self) -> None:
        """Give back the memory of the head and tail; who asks for them again waits again."""
        self._ends = None

    def stored(self) -> tuple[Int, Int]:
        """(starts, ends) of what may hold anything but zeroes, sorted and merged, as far as that can be told
        without reading."""
        return ints(0), ints(self.size)

    def close(self) -> None:
        """Give back what the reader holds open. Reading afterwards is an error."""


def _join(starts: Int, ends: Int) -> tuple[Int, Int]:
    """(offsets, lengths) of sorted ranges that do not overlap, with those that touch made one."""
    if len(starts) > 1:
        new = np.append(True, starts[1:] != ends[:-1])
        first = np.flatnonzero(new)
        starts, ends = starts[first], ends[np.append(first[1:], len(starts)) - 1]
    return starts, ends - starts


class BytesReader(Reader):
    """Bytes in memory."""

    in_turn = False
    near = True

    def __init__(self, data: Bytes, name: str) -> None:
        super().__init__(len(data), name)
        self._data = data

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        return gather(self._data, offsets, lengths)
