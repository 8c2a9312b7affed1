"""What a mount makes of the log trees: inodes, names and extents as they are when all that fsync wrote since
the last commit is in its place.

A log tree holds copies of items of its subvolume. Recovery takes them in three stages, and so do we, each for
all trees at once:

1. Inodes are overwritten or made, files are cut at their new size. A directory's log says for which ranges of
   its indexes it has every entry there is: others in them are unlinked.
2. Entries of directories are added where their inode exists, in place of others of that name.
3. What an inode says of its names in a directory is all that it has there. File extents take the place of
   what lies in their range, holes too.

Then links are counted anew. What has none is deleted, with all that is in it.

An inode that was logged without links was deleted while it was open: nothing of it is replayed. One that was
logged with generation 0 is only known to exist, and has at most a new size.

Sources: fs/btrfs/tree-log.c replay_one_buffer(), replay_dir_deletes(), replay_one_name(), add_inode_ref(),
replay_one_extent(), fixup_inode_link_count() (v6.18).
"""

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import EMPTY, Bool, Int, Intervals, complement, in_order
from virt_bmap.core.columns import stack, take
from virt_bmap.core.layout import INT64_MAX
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk
from virt_bmap.formats.filesystems.btrfs.inodes import Entries, Inline, Inodes, Subvolumes
from virt_bmap.formats.filesystems.btrfs.owners import FileExtents
from virt_bmap.formats.filesystems.btrfs.trees import Log
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions


def replay(log: Log, committed: Subvolumes, damage: Damage) -> Subvolumes:
    """Inodes and names of all subvolumes, with what the logs say of them."""
    told = files.inodes(items.join(log.found.inodes), log.links, damage)
    told = take(told, told.nlink > 0)
    inodes = _inodes(committed.inodes, told)
    entries, names, changed = _names(log, committed._replace(inodes=inodes, logged=told.inode), damage)
    inodes, entries = _counted(_grown(inodes, changed), entries, np.union1d(told.inode, changed.inode))
    damage.add(
        "journal-replayed",
        "[inode is|inodes are] as the log tree has [it|them], as after a mount; the image is unchanged",
        count=len(told.inode),
    )
    return Subvolumes(inodes, entries, names, told.inode, told.inode[told.type == tables.T_FILE])


class Changed(NamedTuple):
    """Entries that came or went, as columns: by how much their directory's size grew."""

    parent: Int
    inode: Int
    growth: Int


# ---- inodes ------------------------------------------------------------------------------------------------


def _inodes(base: Inodes, told: Inodes) -> Inodes:
    """Overwritten where they were, new ones behind them. A directory's size follows from its names."""
    at = positions(base.inode, told.inode)
    there, slot = at >= 0, np.maximum(at, 0)
    folder = told.type == tables.T_DIRECTORY
    exists = there & (told.generation == 0)
    if len(base.inode):
        known, kind = base.size[slot], base.type[slot]
        keep = there & folder & (kind == tables.T_DIRECTORY)
        keep |= exists & ((told.size == 0) | (told.type != tables.T_FILE) | (kind != tables.T_FILE))
        size = np.where(keep, known, np.where(folder, 0, told.size))
    else:
        size = np.where(folder, 0, told.size)
    told, full = told._replace(size=size), there & ~exists
    columns = {}
    for name, column in base._asdict().items():
        column = column.copy()
        rows = there if name == "size" else full
        column[slot[rows]] = getattr(told, name)[rows]
        columns[name] = np.append(column, getattr(told, name)[~there])
    return Inodes(**columns)


# ---- names -------------------------------------------------------------------------------------------------


def _names(log: Log, base: Subvolumes, damage: Damage) -> tuple[Entries, list[pa.Array], Changed]:
    """(entries, the names that they count, which of them came or went)."""
    inodes, entries, name_bytes, logged, _ = base
    count = sum(len(part) for part in name_bytes)
    added = files.entries(items.join(log.found.names), log.links, damage)
    told = sum(len(part) for part in log.found.name_bytes)
    said = _refs(items.join(log.found.refs), log)
    added = added._replace(name=added.name + count)
    said = said._replace(name=said.name + count + told)
    name_bytes = [*name_bytes, *log.found.name_bytes, *log.found.ref_bytes]
    ranges = _ranges(log, logged)
    mine = np.isin(entries.parent, np.concatenate([added.parent, said.parent, ranges[0]]))
    near = take(entries, mine)
    rows = stack(Entries, [near, added, said])
    code = pa.chunked_array(name_bytes, pa.binary()).take(pa.array(rows.name)).combine_chunks()
    name = code.dictionary_encode().indices.to_numpy().astype(np.int64)
    key, link = _group(rows.parent, name), _group(rows.parent, name, rows.inode)
    entry, whole = _group(rows.parent, rows.place, name), _group(rows.parent, rows.place, name, rows.inode)
    owner = _group(rows.parent, rows.inode)
    number = np.arange(len(rows.parent))
    is_added = (number >= len(near.parent)) & (number < len(near.parent) + len(added.parent))
    is_said = number >= len(near.parent) + len(added.parent)
    alive = ~is_added & ~is_said
    known = np.isin(rows.parent, inodes.inode) & np.isin(rows.inode, inodes.inode)
    known &= (rows.inode != rows.parent) & ~rows.subvolume
    # 1: where a directory's log has every entry, others are gone
    alive &= ~(_within(rows, ranges) & ~np.isin(entry, entry[is_added]) & ~rows.subvolume)
    # 2: entries of directories
    new = is_added & known & np.isin(rows.parent, logged)
    alive &= ~(np.isin(key, key[new]) & ~np.isin(link, link[new]))
    alive |= new & ~np.isin(link, link[alive]) & ~np.isin(link, link[is_said])
    # 3: names of inodes; of two that claim one, the last
    new = is_said & known & np.isin(rows.inode, logged)
    claims = np.flatnonzero(new)[np.lexsort((rows.inode[new], key[new]))]
    new[claims[np.append(key[claims][1:] == key[claims][:-1], False)[: len(claims)]]] = False
    alive &= ~(np.isin(owner, owner[new]) & ~np.isin(whole, whole[new]))
    alive &= ~(np.isin(key, key[new]) & ~np.isin(link, link[new]))
    alive |= new & ~np.isin(whole, whole[alive])
    length = pc.binary_length(code).to_numpy(zero_copy_only=False).astype(np.int64)
    changed = Changed(rows.parent, rows.inode, np.where(alive, 2, -2) * length)
    changed = take(changed, alive != (~is_added & ~is_said))
    return stack(Entries, [take(entries, ~mine), take(rows, alive)]), name_bytes, changed


def _refs(rows: items.Columns, log: Log) -> Entries:
    """What inodes say of their names, as entries of their directories."""
    row, tree = log.links.spread(rows)
    tree_id, none = log.links.tree_id[tree], np.zeros(len(row), bool)
    parent, inode = (files.number(tree_id, rows[name][row]) for name in ("objectid", "target"))
    return Entries(parent, inode, rows["index"][row], row, none, none)


def _ranges(log: Log, logged: Int) -> tuple[Int, Int, Int]:
    """(directory, first index, last index) of which a log has every entry, by directory and index."""
    rows = items.join(log.found.ranges)
    row, tree = log.links.spread(rows)
    folder = files.number(log.links.tree_id[tree], rows["objectid"][row])
    mine = np.isin(folder, logged)
    folder, start, end = folder[mine], rows["start"][row][mine], rows["end"][row][mine]
    order = np.lexsort((start, folder))
    folder, start, end = folder[order], start[order], end[order]
    kept = _reached(folder, start, end)
    return folder[kept], start[kept], end[kept]


def _reached(folder: Int, start: Int, end: Int) -> Bool:
    """Which ranges recovery comes to, as it goes through a directory's indexes upwards (find_dir_range()): a
    name that is moved after its directory was logged leaves a range inside of another, which is passed over.
    """
    kept = np.zeros(len(folder), bool)
    edges = np.append(np.flatnonzero(np.diff(folder, prepend=-1)), len(folder)).tolist()
    for low, high in pairwise(edges):
        starts, ends, position = start[low:high].tolist(), end[low:high].tolist(), 0
        while True:
            at = max(bisect_right(starts, position) - 1, 0)
            at += ends[at] < position
            if at == len(starts):
                break
            kept[low + at], position = True, ends[at] + 1
    return kept


def _within(rows: Entries, ranges: tuple[Int, Int, Int]) -> Bool:
    """Which entries lie in a range of their directory: in the last that begins at them or before."""
    folder, start, end = ranges
    every = np.lexsort(
        (
            np.append(np.zeros(len(folder)), np.ones(len(rows.parent))),
            np.append(start, rows.place),
            np.append(folder, rows.parent),
        )
    )
    last = np.maximum.accumulate(np.where(every < len(folder), every, -1))
    found = np.zeros(len(rows.parent), bool)
    at = np.flatnonzero((every >= len(folder)) & (last >= 0))
    row, which = every[at] - len(folder), last[at]
    found[row] = (folder[which] == rows.parent[row]) & (rows.place[row] <= end[which])
    return found


def _group(*columns: Int) -> Int:
    """A number for each row, the same where all columns are the same."""
    order = np.lexsort(columns)
    fresh = np.zeros(len(order), bool)
    for column in columns:
        fresh[1:] |= column[order][1:] != column[order][:-1]
    number = np.zeros(len(order), np.int64)
    number[order] = np.cumsum(fresh)
    return number


def _grown(inodes: Inodes, changed: Changed) -> Inodes:
    """Sizes of directories: two bytes for each of their names (btrfs_add_link, btrfs_unlink_inode)."""
    at, size = positions(inodes.inode, changed.parent), inodes.size.copy()
    np.add.at(size, at[at >= 0], changed.growth[at >= 0])
    return inodes._replace(size=np.maximum(size, 0))


def _counted(inodes: Inodes, entries: Entries, changed: Int) -> tuple[Inodes, Entries]:
    """Links counted anew; what has no name is deleted, and all that is in it: a level a step."""
    changed = changed[changed & ((1 << files.OBJECT_BITS) - 1) != ondisk.FIRST_FREE]  # no name leads there
    gone = EMPTY
    while True:
        links = in_order(entries.inode[np.isin(entries.inode, changed)])
        count = np.searchsorted(links, changed, "right") - np.searchsorted(links, changed, "left")
        dead = np.setdiff1d(changed[count == 0], gone)
        inside = np.isin(entries.parent, dead) & ~entries.subvolume
        if not inside.any():
            break
        gone = np.union1d(gone, dead)
        changed = np.union1d(changed, entries.inode[inside])
        entries = take(entries, ~inside)
    at = positions(inodes.inode, changed)
    at, count = at[at >= 0], count[at >= 0]
    nlink, flags = inodes.nlink.copy(), inodes.flags.copy()
    nlink[at] = count
    flags[at] = np.where(count == 0, flags[at] | tables.I_DELETED, flags[at] & ~tables.I_DELETED)
    return inodes._replace(nlink=nlink, flags=flags), entries


# ---- extents -----------------------------------------------------------------------------------------------


def content(
    done: Subvolumes, sectorsize: int, old: tuple[FileExtents, Inline], told: tuple[FileExtents, Inline]
) -> tuple[FileExtents, Inline, Int]:
    """The extents of the last commit with those that the logs have (`told`, with holes: extents at 0) in
    their places; and the starts of extents that nobody refers to any more."""
    (regular, inline), new, small = old, _of(done, told[0]), _of(done, told[1])
    at = positions(done.inodes.inode, done.cut)
    size = np.minimum(done.inodes.size[at], INT64_MAX - sectorsize)
    gone = _Ranges(
        np.concatenate([new.inode, small.inode, done.cut]),
        np.concatenate([new.file_offset, small.file_offset, -(-size // sectorsize) * sectorsize]),
        np.concatenate([_ends(new), _ends(small, sectorsize), np.full(len(size), INT64_MAX)]),
    )
    mine = np.isin(regular.inode, gone.inode)
    touched = take(regular, mine)
    left = _left(touched, gone)
    regular = stack(FileExtents, [take(regular, ~mine), left, take(new, new.base > 0)])
    near = np.isin(inline.inode, gone.inode)
    kept = take(inline, near)
    row, begin, end = _without(_Ranges(kept.inode, kept.file_offset, _ends(kept, sectorsize)), gone)
    whole = (begin == kept.file_offset[row]) & (end == _ends(kept, sectorsize)[row])
    inline = stack(Inline, [take(inline, ~near), take(kept, row[whole]), small])
    return regular, inline, np.setdiff1d(touched.base, regular.base)


T = TypeVar("T", FileExtents, Inline)


def _of(done: Subvolumes, part: T) -> T:
    """Without what can't be, and what is of inodes that are not replayed."""
    sound = (part.file_offset >= 0) & (part.file_length > 0)
    return take(part, np.isin(part.inode, done.logged) & sound)


def _ends(rows: FileExtents | Inline, unit: int = 1) -> Int:
    """Where in their file rows end, rounded up to whole units."""
    length = np.minimum(rows.file_length, INT64_MAX - unit - rows.file_offset)
    found: Int = -(-(rows.file_offset + length) // unit) * unit
    return found


class _Ranges(NamedTuple):
    """Bytes [start, end) of files, as columns."""

    inode: Int
    start: Int
    end: Int


def _left(rows: FileExtents, gone: _Ranges) -> FileExtents:
    """What of extents is left without ranges of their files."""
    row, begin, end = _without(_Ranges(rows.inode, rows.file_offset, _ends(rows)), gone)
    pieces = take(rows, row)
    compressed = (pieces.flags & tables.COMPRESSED) != 0
    return pieces._replace(
        file_offset=begin, file_length=end - begin,
        start=np.where(compressed, pieces.start, pieces.start + begin - pieces.file_offset),
        length=np.where(compressed, pieces.length, end - begin),
    )  # fmt: skip


def _without(rows: _Ranges, gone: _Ranges) -> tuple[Int, Int, Int]:
    """(row, start, end) of the pieces of ranges that others of the same file leave.

    Offsets are replaced by their ranks among all of their file, files one after the other: so one subtraction
    serves them all.
    """
    n, m = len(rows.inode), len(gone.inode)
    inode = np.concatenate([rows.inode, rows.inode, gone.inode, gone.inode])
    offset = np.concatenate([rows.start, rows.end, gone.start, gone.end])
    rank = _group(offset, inode)
    value = np.zeros(int(rank.max(initial=-1)) + 1, np.int64)
    value[rank] = offset
    start, end, low, high = np.split(rank, [n, 2 * n, 2 * n + m])
    row, piece = Intervals(*(holes := complement(low, high, 0, len(value)))).overlaps(start, end)
    return row, value[np.maximum(start[row], holes[0][piece])], value[np.minimum(end[row], holes[1][piece])]
