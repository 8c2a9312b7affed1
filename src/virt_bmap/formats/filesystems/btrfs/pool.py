"""The logical address space of a btrfs, as `devices` hands it to who reads the filesystem in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.lost import Lost
from virt_bmap.core.reader import Reader


class LogicalRanges(NamedTuple):
    """Sorted ranges that do not overlap, in bytes."""

    starts: Int
    ends: Int

    def contain(self, starts: Int, lengths: Int) -> np.ndarray:
        """Which of the ranges [starts, +lengths) lie wholly inside one of these."""
        if len(self.starts) == 0:
            return np.zeros(len(starts), bool)
        at = np.searchsorted(self.starts, starts, "right") - 1
        room = self.ends[np.maximum(at, 0)] - starts
        inside: np.ndarray = (at >= 0) & (lengths >= 0) & (lengths <= room)
        return inside


class WaysToRead(Protocol):
    """The logical bytes in every way in which they can be read: from a copy, or from parity.

    Bytes that have no such way are lost in that reader.
    """

    first: Reader

    def others(self) -> Iterator[Reader]:
        """The second way, the third, ..."""


@dataclass(frozen=True)
class Pool:
    """What the devices tell of a filesystem: its superblock, its chunks and which logical bytes
    superblocks take up."""

    superblock: np.void
    chunks: LogicalRanges
    reserved: LogicalRanges
    copies: WaysToRead


class PoolReader(Reader):
    """Logical bytes of one btrfs."""

    def __init__(self, base: Reader, pool: Pool) -> None:
        super().__init__(base.size, base.name)
        self.below = [base]
        self.pool = pool
        self.near = pool.copies.first.near

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        return self.pool.copies.first.read_ranges(offsets, lengths)

    @property
    def whole(self) -> bool:
        return False

    def lost(self, starts: Int, ends: Int) -> Lost:
        return self.pool.copies.first.lost(starts, ends)


def pool_of(reader: Reader) -> Pool:
    """The pool whose bytes a reader gives. Corrupt where it is of something else."""
    if not isinstance(reader, PoolReader):
        raise Corrupt(f"{reader.name}: not a btrfs pool")
    return reader.pool
