"""The files of two maps of one disk, matched: which inode of the old map is which of the new one, and what
happened to it by the maps alone.

A file is the same where its inode number and type are, in the same filesystem. A number that is used again
for another file gives itself away: no name is left, the time of the last change is another, and so is the
place of its first byte. What is left over is matched by its name in its directory (replaced: written anew and
renamed over the old one, as editors and package managers do), then by place, size and time (renamed, where
numbers are places of directory entries, as on FAT).
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.paths import positions

EVENTS = ("none", "added", "replaced", "deleted", "renamed", "truncated", "grown", "entries", "attributes")
NONE, ADDED, REPLACED, DELETED, RENAMED, TRUNCATED, GROWN, ENTRIES, ATTRIBUTES = range(len(EVENTS))
"""What happened to a file by the maps alone; entries: the names in a directory changed."""
ROW = ("mode", "uid", "gid", "nlink", "mtime_ns", "flags")
"""What of an inode counts as its attributes, beside its size."""
CONTENT = (tables.DATA, tables.UNWRITTEN, tables.DIRECTORY, tables.SYMLINK)


class MapSide:
    """One of the two maps, with its columns as arrays; derived ones are made once."""

    def __init__(self, bmap: BlockMap) -> None:
        self.bmap = bmap
        self.volume = tables.integers(bmap.inodes, "volume")
        self.inode = tables.integers(bmap.inodes, "inode")
        self.type = tables.codes(bmap.inodes, "type").astype(np.int64)
        self.size = tables.integers(bmap.inodes, "size")
        self.mtime = tables.integers(bmap.inodes, "mtime_ns")
        self.alive = (tables.integers(bmap.inodes, "flags") & tables.I_DELETED) == 0
        self.record_offset = tables.integers(bmap.inodes, "record_offset")

    def rows_of(self, volume: int) -> tuple[int, int]:
        """The inodes of a volume as rows [first, last)."""
        low, high = np.searchsorted(self.volume, [volume, volume + 1])
        return int(low), int(high)

    @cached_property
    def owner(self) -> Int:
        """For each extent the row of the inode that owns it; -1 where none does."""
        inode = tables.integers(self.bmap.extents, "inode")
        volume = tables.integers(self.bmap.extents, "volume")
        owner = np.full(len(inode), -1, np.int64)
        for number in np.unique(volume).tolist():
            first, last = self.rows_of(number)
            low, high = np.searchsorted(volume, [number, number + 1])
            at = positions(self.inode[first:last], inode[low:high])
            owner[low:high] = np.where((at >= 0) & (inode[low:high] >= 0), at + first, -1)
        return owner

    @cached_property
    def content(self) -> Int:
        """The extents that hold content of plain files,
        directories and links, by inode, stream and offset."""
        table = self.bmap.extents
        offset, kind = tables.integers(table, "file_offset"), tables.codes(table, "kind")
        rows = np.flatnonzero((self.owner >= 0) & (offset >= 0) & np.isin(kind, CONTENT))
        ordered: Int = rows[np.lexsort((offset[rows], self.part[rows], self.owner[rows]))]
        return ordered

    @cached_property
    def part(self) -> Int:
        """For each extent the code of its part; -1 for none."""
        return tables.parts(self.bmap.extents)[0]

    @cached_property
    def first_place(self) -> Int:
        """For each inode where its first byte of content lies in the volume; -1 without any."""
        rows = self.content
        place = np.full(len(self.inode), -1, np.int64)
        first = rows[np.diff(self.owner[rows], prepend=-1) != 0]
        place[self.owner[first]] = tables.integers(self.bmap.extents, "volume_offset")[first]
        return place

    @cached_property
    def pieces(self) -> Int:
        """For each inode in how many separate pieces its content lies."""
        rows, owner = self.content, self.owner[self.content]
        start, length = (
            tables.integers(self.bmap.extents, name)[rows] for name in ("volume_offset", "length")
        )
        follows = np.zeros(len(rows), bool)
        follows[1:] = (owner[1:] == owner[:-1]) & (start[1:] == (start + length)[:-1])
        return np.bincount(owner[~follows], minlength=len(self.inode)).astype(np.int64)

    def path(self, row: Int) -> pa.Array:
        """The first path of each inode row, null where it has none, as large_binary."""
        found = pa.nulls(len(row), pa.large_binary())
        paths: list[pa.Array] = []
        at, base = np.full(len(row), -1, np.int64), 0
        for volume in np.unique(self.volume[row[row >= 0]]).tolist():
            mine = np.flatnonzero((row >= 0) & (self.volume[row] == volume))
            known, names = self.bmap.paths(volume)
            first = positions(known, self.inode[row[mine]])
            at[mine] = np.where(first >= 0, base + first, -1)
            paths.append(names)
            base += len(names)
        return pa.concat_arrays(paths).take(pa.array(at, mask=at < 0)) if paths else found


class Objects(NamedTuple):
    """The inodes of two maps as one list: object i is row `new_row`[i] of the new map's inodes and row
    `old_row`[i] of the old one's (-1: in one map only).

    `of_new` and `of_old` go the other way. `event` is what the maps say happened to it, a code of EVENTS;
    `type` a code of tables.TYPES. `row_same`: the maps see no difference at all; `content_same`: the size and
    the time of the last change are the same. `old_volume` is, for each volume of the new map, that of the old
    one (-1: none).
    """

    old: MapSide
    new: MapSide
    old_volume: Int
    of_old: Int
    of_new: Int
    old_row: Int
    new_row: Int
    event: Int
    type: Int
    row_same: Bool
    content_same: Bool

    def old_size(self, objects: Int) -> Int:
        """The size in the old map, 0 without one."""
        return np.where(self.old_row[objects] >= 0, pick(self.old.size, self.old_row[objects]), 0)

    def new_size(self, objects: Int) -> Int:
        """The size in the new map, 0 without one."""
        return np.where(self.new_row[objects] >= 0, pick(self.new.size, self.new_row[objects]), 0)


def pick(values: np.ndarray, rows: Int) -> np.ndarray:
    """The values of these rows; where a row is -1 any value."""
    return values[np.maximum(rows, 0)] if len(values) else np.zeros(len(rows), values.dtype)


def match(old_map: BlockMap, new_map: BlockMap) -> Objects:
    """Match the inodes of two maps, filesystem by filesystem."""
    old, new = MapSide(old_map), MapSide(new_map)
    volumes = match_volumes(old_map, new_map)
    of_new = np.arange(len(new.inode))
    partner = np.full(len(new.inode), -1, np.int64)  # for each new row its old one
    renamed, replaced = np.zeros(len(new.inode), bool), np.zeros(len(new.inode), bool)
    for volume, other in enumerate(volumes.tolist()):
        if other >= 0 and _same_filesystem(old_map, other, new_map, volume):
            _match_volume(old, other, new, volume, partner, renamed, replaced)
    of_old = np.full(len(old.inode), -1, np.int64)
    matched = np.flatnonzero(partner >= 0)
    of_old[partner[matched]] = matched
    alone = np.flatnonzero(of_old < 0)
    of_old[alone] = len(of_new) + np.arange(len(alone))
    old_row, new_row = np.append(partner, alone), np.append(of_new, np.full(len(alone), -1, np.int64))
    return Objects(
        old,
        new,
        volumes,
        of_old,
        of_new,
        old_row,
        new_row,
        *_events(old, new, old_row, new_row, renamed, replaced),
    )


def match_volumes(old: BlockMap, new: BlockMap) -> Int:
    """For each volume of the new map the one of the same kind and name in the old map, -1 for none."""
    keys = zip(old.volumes.column("kind").to_pylist(), old.volumes.column("name").to_pylist(), strict=True)
    known = {key: number for number, key in enumerate(keys)}
    wanted = zip(new.volumes.column("kind").to_pylist(), new.volumes.column("name").to_pylist(), strict=True)
    return np.array([known.get(key, -1) for key in wanted], np.int64)


def _same_filesystem(old: BlockMap, old_volume: int, new: BlockMap, new_volume: int) -> bool:
    """Is it the same filesystem, or was it made anew between?"""
    one, other = (bmap.slice_of("filesystems", volume)[1].select(["type", "uuid"]).to_pylist()
                  for bmap, volume in ((old, old_volume), (new, new_volume)))  # fmt: skip
    return bool(one) and one == other


def _match_volume(
    old: MapSide, old_volume: int, new: MapSide, volume: int, partner: Int, renamed: Bool, replaced: Bool
) -> None:
    """Fill in, for the new rows of one volume, their old rows, and which of them were renamed or replaced."""
    (low, high), (first, last) = old.rows_of(old_volume), new.rows_of(volume)
    names = _Names(old.bmap.slice_of("names", old_volume)[1], new.bmap.slice_of("names", volume)[1])
    rows = np.arange(first, last)
    at = positions(old.inode[low:high], new.inode[first:last])
    rows, at = rows[at >= 0], at[at >= 0] + low
    disjoint = names.disjoint(new.inode[rows])
    same = (new.type[rows] == old.type[at]) & (old.alive[at] | ~new.alive[rows])
    format = formats.filesystem(old.bmap.filesystem_type(old_volume))
    if format is None or format.reuses_numbers:
        suspect = np.flatnonzero(disjoint & (new.mtime[rows] != old.mtime[at]))
        if len(suspect):
            same[suspect] &= new.first_place[rows[suspect]] == old.first_place[at[suspect]]
    alive = same & new.alive[rows]
    partner[rows[alive]], renamed[rows[alive]] = at[alive], disjoint[alive]
    _match_rest(old, new, names, (low, high), (first, last), partner, renamed, replaced)
    # what is gone leaves a record behind in some formats
    buried = same & ~alive & ~np.isin(at, partner[first:last])
    partner[rows[buried]] = at[buried]


def _match_rest(
    old: MapSide,
    new: MapSide,
    names: "_Names",
    old_rows: tuple[int, int],
    new_rows: tuple[int, int],
    partner: Int,
    renamed: Bool,
    replaced: Bool,
) -> None:
    """Match what numbers leave over: by the name in its directory, then by place, size and time."""
    (low, high), (first, last) = old_rows, new_rows
    taken = np.zeros(high - low, bool)
    mine = partner[first:last]
    taken[mine[mine >= 0] - low] = True
    lost = low + np.flatnonzero(~taken & old.alive[low:high])
    fresh = first + np.flatnonzero((mine < 0) & new.alive[first:last])
    if len(lost) and len(fresh):
        found = names.in_place_of(new.inode[fresh], old.inode[lost])
        found = np.where((found >= 0) & (new.type[fresh] == old.type[lost[found]]), found, -1)
        _pair(fresh, lost, found, partner, replaced)
        lost, fresh = lost[~np.isin(lost, partner[fresh])], fresh[partner[fresh] < 0]
    if len(lost) and len(fresh):
        one, other = dense(
            *(
                (getattr(old, name)[lost], getattr(new, name)[fresh])
                for name in ("first_place", "size", "mtime", "type")
            )
        )
        found = np.where(new.first_place[fresh] >= 0, positions(one, other), -1)
        _pair(fresh, lost, found, partner, renamed)


def _pair(fresh: Int, lost: Int, found: Int, partner: Int, marked: Bool) -> None:
    """Make fresh[i] the successor of lost[found[i]], each of the lost once."""
    some = np.flatnonzero(found >= 0)
    _, once = np.unique(found[some], return_index=True)
    some = some[once]
    partner[fresh[some]] = lost[found[some]]
    marked[fresh[some]] = True


def dense(*columns: tuple[Int, Int]) -> tuple[Int, Int]:
    """Rows of two tables as numbers that are equal where all their columns are: of each column the left and
    the right table's values."""
    joined = [np.concatenate(pair) for pair in columns]
    order = np.lexsort(joined)
    new = np.zeros(len(order), bool)
    for values in joined:
        new[1:] |= values[order][1:] != values[order][:-1]
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(new)
    cut = len(columns[0][0])
    return numbers[:cut], numbers[cut:]


class _Names:
    """The names of one filesystem in both maps."""

    def __init__(self, old: pa.Table, new: pa.Table) -> None:
        self.old_inode, self.new_inode = tables.integers(old, "inode"), tables.integers(new, "inode")
        parents = tables.integers(old, "parent"), tables.integers(new, "parent")
        both = pa.concat_arrays(
            [side.column("name").combine_chunks().cast(pa.large_binary()) for side in (old, new)]
        )
        word = both.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self.old_place, self.new_place = dense(parents, (word[: old.num_rows], word[old.num_rows :]))

    def disjoint(self, inodes: Int) -> Bool:
        """Which inodes have names in both maps, and none in common?"""
        left, right = dense((self.old_place, self.new_place), (self.old_inode, self.new_inode))
        kept = self.new_inode[positions(left, right) >= 0]
        here, there = positions(self.new_inode, inodes) >= 0, positions(self.old_inode, inodes) >= 0
        result: Bool = here & there & (positions(kept, inodes) < 0)
        return result

    def in_place_of(self, fresh: Int, lost: Int) -> Int:
        """For each fresh inode the position of the lost one that bore one of its names in the same directory;
        -1 for none."""
        new = np.flatnonzero(np.isin(self.new_inode, fresh))
        old = np.flatnonzero(np.isin(self.old_inode, lost))
        at = positions(self.old_place[old], self.new_place[new])
        row = new[at >= 0]
        which = positions(lost, self.old_inode[old[at[at >= 0]]])
        result = positions(self.new_inode[row], fresh)
        return np.where(result >= 0, pick(which, result), -1)


def _events(
    old: MapSide, new: MapSide, old_row: Int, new_row: Int, renamed: Bool, replaced: Bool
) -> tuple[Int, Int, Bool, Bool]:
    """(event, type, row_same, content_same) of every object."""
    both = (old_row >= 0) & (new_row >= 0)
    here, there = pick(new.alive, new_row) & (new_row >= 0), pick(old.alive, old_row) & (old_row >= 0)
    kind = np.where(new_row >= 0, pick(new.type, new_row), pick(old.type, old_row))
    directory = kind == tables.T_DIRECTORY
    event = np.full(len(old_row), NONE, np.int64)
    differs = np.zeros(len(old_row), bool)
    for name in ROW:
        columns = [tables.integers(side.bmap.inodes, name) for side in (old, new)]
        differs |= both & (pick(columns[0], old_row) != pick(columns[1], new_row))
    event[differs] = ATTRIBUTES
    before, after = pick(old.size, old_row), pick(new.size, new_row)
    same_time = pick(old.mtime, old_row) == pick(new.mtime, new_row)
    event[both & directory & (~same_time | (before != after))] = ENTRIES
    event[both & ~directory & (after > before)] = GROWN
    event[both & ~directory & (after < before)] = TRUNCATED
    row_same, content_same = both & (event == NONE), both & (here == there) & same_time & (before == after)
    padding = np.zeros(len(old_row) - len(renamed), bool)
    event[np.append(renamed, padding)] = RENAMED
    event[there & ~here] = DELETED
    event[here & ~there] = ADDED
    event[np.append(replaced, padding)] = REPLACED
    event[kind == tables.T_METADATA] = NONE
    return event, kind, row_same, content_same & ~np.append(replaced, padding)
