"""The directory tree of FAT or exFAT, a level a step: all directories of one level are read in one batch.

Neither format has inode numbers. An entry's inode is the number of its 32-byte record on the volume (byte
offset / 32), and the root's, which has no entry, is 0: there the boot sector lies.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, Intervals, expand, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.fat.superblock import ENTRY
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

ROOT = 0
MAX_DEPTH = 1024
"""Levels of directories that are read: as many as get a path (`virt_bmap.model.paths`, whose import would
take a tenth of the time of a map)."""
BATCH = 16 << 20
"""Bytes of directories that are read together."""
PIECE = 2 << 20
"""Bytes of them that are looked at together, in whole directories: their arrays take some ten times as much,
and stay in the cache."""


class DirEntries(NamedTuple):
    """Files and directories as their entries describe them, columns of one length; sizes in bytes."""

    inode: Int
    parent: Int
    directory: Bool
    cluster: Int
    size: Int
    valid: Int
    """How much of `size` was ever written."""
    contiguous: Bool
    """The clusters follow each other on the volume, and the FAT says nothing of them (exFAT)."""
    mtime_ns: Int
    name: Ragged

    def take(self, keep: np.ndarray) -> "DirEntries":
        """The rows that a boolean array asks for, without their names: who looks for clusters has no use for
        them."""
        return DirEntries._make([*(column[keep] for column in self[:-1]), NO_NAMES])


NO = np.zeros(0, bool)
NO_NAMES = Ragged(np.zeros(0, np.uint8), np.zeros(0, np.uint16))
NONE = DirEntries(EMPTY, EMPTY, NO, EMPTY, EMPTY, EMPTY, NO, EMPTY, NO_NAMES)


class DirectoryRanges(NamedTuple):
    """Where directories lie, sorted by directory and place in it: `length` bytes of `inode` from byte
    `offset` of it."""

    inode: Int
    start: Int
    length: Int
    offset: Int

    def take(self, keep: np.ndarray) -> "DirectoryRanges":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


class FileTree(NamedTuple):
    """All that was found below the root."""

    entries: DirEntries
    ranges: DirectoryRanges

    def names(self) -> pa.Table:
        """The table `names`."""
        return tables.make(
            "names",
            volume=0,
            parent=self.entries.parent,
            inode=self.entries.inode,
            name=self.entries.name.arrow(),
        )


Parse = Callable[[Bytes, Int, Int], DirEntries]
"""raw entries (n, 32), the inode of the directory of each, the number of each on the volume -> what they
describe"""


def read_tree(
    reader: Reader,
    root: DirectoryRanges,
    locate: Callable[[DirEntries], DirectoryRanges],
    parse: Parse,
    largest: int,
    damage: Damage,
) -> FileTree:
    """Read all directories from the root's ranges on; `locate` says where directories lie, `largest` how many
    bytes one may have."""
    entries = [NONE]
    ranges: list[DirectoryRanges] = []
    seen = EMPTY, EMPTY
    level = root
    for _ in range(MAX_DEPTH):
        again = _overlapping(level, seen)
        damage.add(
            "twice", "[directory lies|directories lie] on clusters of another directory", again * ENTRY
        )
        level = level.take(~np.isin(level.inode, again)) if len(again) else level
        if len(level.inode) == 0:
            break
        ranges.append(level)
        seen = union(np.append(seen[0], level.start), np.append(seen[1], level.start + level.length))
        large = level.inode[level.offset + level.length > largest] * ENTRY
        damage.add(
            "directory",
            f"[part|parts] of directories [lies|lie] beyond the limit of {largest:,} bytes: not read",
            large,
        )
        found = _read_level(reader, level, parse, largest)
        entries += found
        level = join_ranges([locate(part.take(part.directory)) for part in found])
    what = f"[directory lies|directories lie] more than {MAX_DEPTH} levels deep: not read"
    damage.add("too-deep", what, level.inode * ENTRY)
    return FileTree(join_entries(entries), join_ranges(ranges))


def _read_level(reader: Reader, level: DirectoryRanges, parse: Parse, largest: int) -> list[DirEntries]:
    """The entries of one level, in bounded batches of whole directories."""
    length = (
        np.clip(np.minimum(largest - level.offset, reader.size - level.start), 0, level.length)
        // ENTRY
        * ENTRY
    )
    total = np.cumsum(length)
    same = np.append(False, level.inode[1:] == level.inode[:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
    begin = (total - length)[first]  # of each range's directory, among all that is read
    found = []
    some = np.flatnonzero(length)
    for rows in _cut(some, begin[some] // BATCH):
        raw = reader.read_ranges(level.start[rows], length[rows]).reshape(-1, ENTRY)
        done = 0
        for piece in _cut(rows, begin[rows] // PIECE):
            count = length[piece] // ENTRY
            row, step = expand(count)
            part = raw[done : done + len(row)]
            found.append(parse(part, level.inode[piece][row], (level.start[piece] // ENTRY)[row] + step))
            done += len(row)
    return found


def _cut(rows: Int, piece: Int) -> list[Int]:
    """The rows in lists of those whose `piece` (ascending) is the same."""
    return np.split(rows, np.flatnonzero(np.diff(piece)) + 1)


def _overlapping(level: DirectoryRanges, seen: tuple[Int, Int]) -> Int:
    """Directories that share bytes with one read before, or with another of this level (but the first)."""
    start, end = level.start, level.start + level.length
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(end[order]) if len(order) else EMPTY
    late = order[1:][start[order][1:] < reach[:-1]]
    old = Intervals(*seen).overlaps(start, end)[0] if len(seen[0]) else EMPTY
    both = np.append(late, old)
    return np.unique(level.inode[both]) if len(both) else EMPTY


def join_ranges(parts: Sequence[DirectoryRanges]) -> DirectoryRanges:
    """One after the other."""
    return stack(DirectoryRanges, parts)


def join_entries(parts: Sequence[DirEntries]) -> DirEntries:
    """One after the other; at least one."""
    *columns, names = zip(*parts, strict=True)
    return DirEntries._make([*map(np.concatenate, columns), Ragged.concat(names)])
