"""Each byte of some ranges of a disk with exactly one owner:
the sums of a report must be the bytes that it reports on.

Precedence, where a byte has several owners: the innermost layer; inline data before
the block that it lies in; what owns before what is only called free; a volume's own
bytes before copies and parity; and of files that share their bytes on purpose the
one with the lowest inode number, so that both sides of a comparison choose alike.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bool, Int, Intervals, first_covers, union
from virt_bmap.core.columns import take
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners


class Tiles(NamedTuple):
    """Pieces [start, end) of a disk, sorted, as columns: each belongs to row `extent` of `extents`, or to
    what `record` names; both -1: to nothing.

    `volume` is where the owner is, `inside` the piece's first byte there.
    """

    start: Int
    end: Int
    volume: Int
    inside: Int
    extent: Int
    record: Int

    def take(self, keep: np.ndarray) -> "Tiles":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)

    def cut(self, bounds: Int) -> "Tiles":
        """The same tiles, cut at these sorted bytes of the disk."""
        low, high = np.searchsorted(bounds, self.start, "right"), np.searchsorted(bounds, self.end, "left")
        counts = np.maximum(0, high - low)
        row = np.repeat(np.arange(len(self.start)), counts + 1)
        first = np.cumsum(counts + 1) - (counts + 1)
        start = self.start[row]
        later = np.ones(len(row), bool)
        later[first] = False
        start[later] = bounds[(low[row] + np.arange(len(row)) - first[row] - 1)[later]]
        end = np.roll(start, -1)
        end[first + counts] = self.end
        moved = self.inside[row] + start - self.start[row]
        return Tiles(start, end, self.volume[row], moved, self.extent[row], self.record[row])


class InodeRecords(NamedTuple):
    """Inodes' own records that deserve to be told from what they lie in, as columns: `record` is any number
    (from 0) that the tiles give back."""

    volume: Int
    start: Int
    end: Int
    record: Int

    def take(self, keep: np.ndarray) -> "InodeRecords":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


def tiles(bmap: BlockMap, disk: int, starts: Int, ends: Int, records: InodeRecords | None = None) -> Tiles:
    """The ranges of disk number `disk` (from 1), each byte once.

    What the map does not reach (beyond its disk's end) belongs to nothing.
    """
    starts, ends = union(starts, ends)
    size = bmap.size_of(bmap.disk(disk))
    inside = starts < size
    owners = bmap.owners(disk, starts[inside], np.minimum(ends[inside], size))
    found = owners.take(owners.extent >= 0)
    record = np.full(len(found.query), -1, np.int64)
    if records is not None and len(records.record):
        extra, numbers = _records(owners.take(owners.extent < 0), records)
        found, record = Owners.concat([found, extra]), np.append(record, numbers)
    order = _precedence(bmap, found, record)
    bounds = np.unique(np.concatenate([starts, ends, found.start, found.end]))
    low, high = np.searchsorted(bounds, found.start[order]), np.searchsorted(bounds, found.end[order])
    best = first_covers(low, high, max(0, len(bounds) - 1))
    start, end = bounds[:-1], bounds[1:]
    wanted = _covered(start, starts, ends)
    start, end, best = start[wanted], end[wanted], best[wanted]
    owner = np.append(order, -1)[best]
    return _joined(found, record, start, end, owner)


def touched(bmap: BlockMap, disk: int, starts: Int, ends: Int, records: InodeRecords) -> Int:
    """The positions of the records that share a byte with these ranges of a disk."""
    size = bmap.size_of(bmap.disk(disk))
    inside = starts < size
    owners = bmap.owners(disk, starts[inside], np.minimum(ends[inside], size))
    numbered = InodeRecords(records.volume, records.start, records.end, np.arange(len(records.record)))
    return (
        np.unique(_records(owners.take(owners.extent < 0), numbered)[1])
        if len(records.record)
        else records.record
    )


def _covered(points: Int, starts: Int, ends: Int) -> Bool:
    """Which points lie in the ranges (sorted, merged)?"""
    at = np.searchsorted(starts, points, "right") - 1
    result: Bool = (at >= 0) & (points < ends[at]) if len(starts) else np.zeros(len(points), bool)
    return result


def _joined(found: Owners, record: Int, start: Int, end: Int, owner: Int) -> Tiles:
    """Tiles by owner (-1: none), neighbours of one owner joined."""
    new = np.ones(len(start), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (start[1:] != end[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(start)) - 1 if len(first) else first
    start, end, owner = start[first], end[last], owner[first]

    def of(column: Int, otherwise: int) -> Int:
        return (
            np.where(owner >= 0, column[owner], otherwise)
            if len(column)
            else np.full(len(owner), otherwise, np.int64)
        )

    inside = of(found.inside, 0) + np.where(owner >= 0, start - of(found.start, 0), 0)
    return Tiles(start, end, of(found.volume, -1), inside, of(found.extent, -1), of(record, -1))


def _records(volumes: Owners, records: InodeRecords) -> tuple[Owners, Int]:
    """The records as further owners, and their numbers."""
    parts, numbers = [], []
    for volume in np.unique(records.volume).tolist():
        here, mine = volumes.take(volumes.volume == volume), records.take(records.volume == volume)
        at, row = Intervals(mine.start, mine.end).overlaps(here.inside, here.inside + here.length)
        low = np.maximum(here.inside[at], mine.start[row])
        high = np.minimum(here.inside[at] + here.length[at], mine.end[row])
        start = here.start[at] + low - here.inside[at]
        parts.append(Owners(here.query[at], here.volume[at], np.full(len(at), -1, np.int64), start,
                start + high - low, low,
                            here.depth[at], here.role[at], high - low))  # fmt: skip
        numbers.append(mine.record[row])
    return Owners.concat(parts), np.concatenate(numbers)


def _precedence(bmap: BlockMap, owners: Owners, record: Int) -> Int:
    """The order of owners, first the one that gets the byte."""
    at = np.maximum(owners.extent, 0)

    def column(values: np.ndarray) -> np.ndarray:
        return values[at] if len(values) else np.zeros(len(at), np.int64)

    inline = (column(tables.integers(bmap.extents, "flags")) & tables.INLINE) != 0
    kind = column(tables.codes(bmap.extents, "kind").astype(np.int64))
    weak = np.isin(kind, (*tables.IDLE, tables.UNKNOWN))
    inode = column(tables.integers(bmap.extents, "inode"))
    offset = column(tables.integers(bmap.extents, "file_offset"))
    return np.lexsort(
        (
            owners.extent,
            offset,
            inode,
            owners.volume,
            owners.role,
            weak & (record < 0),
            ~inline,
            record < 0,
            -owners.depth,
        )
    )
