"""Who owns the logical bytes of a btrfs: tree blocks, file extents, what is shared, what is left of
overwritten extents, free space.

Sources: fs/btrfs/{block-group,extent-tree,free-space-tree,file-item}.c (v6.12); "bookend extents" in the
btrfs wiki's design notes.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import (
    Int,
    complement,
    covered_twice,
    expand,
    in_order,
    intersect,
    subtract,
    total,
    union,
)
from virt_bmap.core.columns import take
from virt_bmap.formats.filesystems.btrfs import ondisk
from virt_bmap.formats.filesystems.btrfs.items import Columns
from virt_bmap.formats.filesystems.btrfs.pool import Pool
from virt_bmap.formats.filesystems.btrfs.tree import Forest, TreeRoots
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR, NOTE, WARNING
from virt_bmap.model.tables import ExtentRows


class FileExtents(NamedTuple):
    """Extents of files, a row for each file that refers to them, as columns.

    `part` numbers PARTS, 0 for plain content.

    [start, start + length) are the bytes the file uses; `base` and `whole` are the extent as it was
    allocated, and `origin` is where in the file its first byte would be.
    """

    inode: Int
    kind: Int
    part: Int
    file_offset: Int
    file_length: Int
    start: Int
    length: Int
    flags: Int
    base: Int
    whole: Int
    origin: Int

    def select(self, keep: np.ndarray) -> "FileExtents":
        """Those for which the boolean or index array asks."""
        return take(self, keep)


PARTS = (None, "free space cache", "data relocation", "data relocation", "log")
"""What file extents are that belong to no file of a subvolume. "data relocation": where data that is moved
goes, or where it came from, as long as only the tree of a relocation refers to it. "log": written by fsync
after the last commit, and not replayed."""
CACHE, RELOCATION, MOVED, LOG = 1, 2, 3, 4


class Allocated(NamedTuple):
    """What the extent tree says is used, sorted by start: `data` is 1 for file extents, 0 for tree blocks."""

    start: Int
    length: Int
    data: Int

    def find(self, starts: Int) -> Int:
        """For each address the number of the extent that begins there, -1 where none does."""
        if len(self.start) == 0:
            return np.full(len(starts), -1, np.int64)
        at = np.minimum(np.searchsorted(self.start, starts), len(self.start) - 1)
        return np.where(self.start[at] == starts, at, -1)

    def ranges(self, starts: Int) -> tuple[Int, Int]:
        """(starts, ends) of the extents that begin at these addresses, as far as there are any."""
        at = self.find(starts)
        at = at[at >= 0]
        return self.start[at], self.start[at] + self.length[at]


def allocated(items: Columns, nodesize: int, pool: Pool, damage: Damage) -> Allocated:
    """Extent items as ranges. Those that lie in no chunk or in each other are damage."""
    start = items["start"]
    length = np.where(items["length"] < 0, nodesize, items["length"])
    inside = pool.chunks.contain(start, length) & (length > 0)
    damage.add("allocator", "extent [item lies|items lie] outside all chunks", np.maximum(start[~inside], -1))
    order = np.flatnonzero(inside)[np.argsort(start[inside], kind="stable")]
    start, length = start[order], length[order]
    overlap = np.flatnonzero(start[1:] < (start + length)[:-1]) + 1
    damage.add("two-owners", "extent [item overlaps|items overlap] the one before", start[overlap])
    return Allocated(start, length, items["data"][order])


def add_trees(
    out: ExtentRows, roots: TreeRoots, forest: Forest, used: Allocated, nodesize: int, damage: Damage
) -> tuple[Int, Int]:
    """Rows of the tree blocks, those that lie together as one.

    Returns the ranges of log trees, which have no extent items.
    """
    logs = np.zeros(0, np.int64), np.zeros(0, np.int64)
    parts = np.array([_tree_name(tree) for tree in roots.id.tolist()])[forest.tree]
    subvolumes = np.unique(forest.address[parts == ondisk.TREE_NAMES[ondisk.FS_TREE]])
    for part in np.unique(parts).tolist():
        address = np.unique(forest.address[parts == part])
        # a snapshot, in all but name, of the subvolume that is being moved
        if part == ondisk.TREE_NAMES[ondisk.TREE_RELOC]:
            address = np.setdiff1d(address, subvolumes)
        starts, ends = union(address, address + nodesize)
        out.add(tables.METADATA, starts, ends - starts, part=part)
        if part == ondisk.TREE_NAMES[ondisk.TREE_LOG]:
            logs = starts, ends
            continue
        at = used.find(address)
        missing = (at < 0) | (used.data[at] != 0) if len(used.start) else np.ones(len(address), bool)
        damage.add("allocator", "tree [block has|blocks have] no extent item", address[missing])
    return logs


def _tree_name(tree: int) -> str:
    return ondisk.TREE_NAMES.get(tree, "fs tree" if tree >= ondisk.FIRST_FREE else f"tree {tree}")


# ---- file extents ------------------------------------------------------------------------------------------


def sound(extents: FileExtents, pool: Pool, damage: Damage) -> FileExtents:
    """Without impossible extents: outside all chunks, or using more than was allocated."""
    compressed = (extents.flags & tables.COMPRESSED) != 0
    fits = (
        pool.chunks.contain(extents.base, extents.whole)
        & (extents.length > 0)
        & (extents.file_offset >= 0)
        & (extents.file_length > 0)
    )
    fits &= compressed | (
        (extents.start >= extents.base) & (extents.length <= extents.whole - (extents.start - extents.base))
    )
    damage.add(
        "extents", "file [extent has|extents have] impossible numbers", np.maximum(extents.base[~fits], -1)
    )
    return extents if fits.all() else extents.select(fits)


def check_allocated(extents: FileExtents, used: Allocated, damage: Damage) -> None:
    """Every extent of a file must be one of the extent tree's."""
    at = used.find(extents.base)
    wrong = at < 0
    if len(used.start):
        wrong |= (used.length[at] != extents.whole) | (used.data[at] == 0)
    damage.add(
        "allocator",
        "file [extent has no extent item of its|extents have no extent item of their] size",
        extents.base[wrong],
    )


def share(extents: FileExtents) -> FileExtents:
    """The same rows, cut where sharing begins or ends, those with several owners flagged."""
    order = np.argsort(extents.start, kind="stable")
    start, end = extents.start[order], (extents.start + extents.length)[order]
    if len(start) < 2 or not (start[1:] < np.maximum.accumulate(end)[:-1]).any():
        return extents
    shared = covered_twice(start, end)
    start, end = extents.start, extents.start + extents.length
    compressed = (extents.flags & tables.COMPRESSED) != 0
    # stored compressed, an extent can't be cut: every owner uses all its bytes
    row, begin, stop = _cut(start, end, in_order(np.concatenate(shared)), ~compressed)
    at = np.searchsorted(shared[0], begin, "right") - 1
    several = (at >= 0) & (shared[1][np.maximum(at, 0)] > begin)
    pieces = extents.select(row)
    return FileExtents(
        pieces.inode, pieces.kind, pieces.part, pieces.file_offset + (begin - pieces.start),
        np.where(compressed[row], pieces.file_length, stop - begin), begin, stop - begin,
        pieces.flags | np.where(several, tables.SHARED, 0), pieces.base, pieces.whole, pieces.origin,
    )  # fmt: skip


def _cut(starts: Int, ends: Int, points: Int, divisible: np.ndarray) -> tuple[Int, Int, Int]:
    """Cut ranges at the sorted points that lie inside them: (range, start, end) of every piece."""
    low = np.searchsorted(points, starts, "right")
    inner = np.where(divisible, np.maximum(np.searchsorted(points, ends, "left") - low, 0), 0)
    row, step = expand(inner + 1)
    bounds, at = np.append(points, 0), low[row] + step
    begin = np.where(step == 0, starts[row], bounds[at - 1])
    stop = np.where(step == inner[row], ends[row], bounds[np.minimum(at, len(points))])
    return row, begin, stop


def add_files(out: ExtentRows, extents: FileExtents) -> None:
    """Rows of the file extents."""
    for number in np.unique(extents.part).tolist():
        mine = extents.select(extents.part == number) if extents.part.any() else extents
        out.add(
            mine.kind, mine.start, mine.length, part=PARTS[number], inode=mine.inode,
            file_offset=mine.file_offset, file_length=mine.file_length, flags=mine.flags,
        )  # fmt: skip


def only_moved(extents: FileExtents) -> FileExtents:
    """Without what the tree of a relocation refers to and others as well: it is a copy of a subvolume's tree,
    in all but name, until the two are merged block by block."""
    moved = extents.part == MOVED
    if not moved.any():
        return extents
    return extents.select(~moved | ~np.isin(extents.base, extents.base[~moved]))


def add_bookends(out: ExtentRows, extents: FileExtents, held: int) -> None:
    """What of an allocated extent no file refers to any more since it was overwritten: it stays used as long
    as any part of it is. `held`: bytes of all extents of data.

    Part "bookend", with the inode of one of the files that keep it.
    """
    if len(extents.start) == 0 or total(extents.start, extents.start + extents.length) == held:
        return
    keeper, first = np.unique(extents.base, return_index=True)
    whole = extents.whole[first]
    starts, ends = subtract(keeper, keeper + whole, extents.start, extents.start + extents.length)
    # what lies together can belong to two extents
    _, begin, stop = _cut(starts, ends, keeper, np.ones(len(starts), bool))
    owner = first[np.maximum(np.searchsorted(keeper, begin, "right") - 1, 0)]
    kind = np.where(extents.part[owner] != 0, tables.METADATA, tables.DATA)
    out.add(kind, begin, stop - begin, part="bookend", inode=extents.inode[owner])


# ---- free space --------------------------------------------------------------------------------------------


def add_space(
    out: ExtentRows,
    pool: Pool,
    used: Allocated,
    freed: tuple[Int, Int],
    logged: tuple[Int, Int],
    groups: Columns,
    damage: Damage,
) -> tuple[Int, Int]:
    """Rows of what is free, reserved for superblocks, or in no chunk; a log has `freed` and taken (`logged`)
    what extent items do not know of.

    Returns what of the chunks has no extent item.
    """
    chunks = pool.chunks
    trusted = _trusted(pool, used, groups, damage)
    gaps = complement(chunks.starts, chunks.ends, 0, int(chunks.ends[-1]))
    out.add(tables.GAP, gaps[0], gaps[1] - gaps[0], part="not in any chunk")
    reserved = subtract(pool.reserved.starts, pool.reserved.ends, used.start, used.start + used.length)
    out.add(tables.METADATA, reserved[0], reserved[1] - reserved[0], part="superblock")
    free = subtract(chunks.starts, chunks.ends, used.start, used.start + used.length)
    left = np.append(free[0], freed[0]), np.append(free[1], freed[1])
    left = subtract(*left, np.append(reserved[0], logged[0]), np.append(reserved[1], logged[1]))
    left = intersect(*left, chunks.starts[trusted], chunks.ends[trusted])
    out.add(tables.FREE, left[0], left[1] - left[0])
    return free


def _trusted(pool: Pool, used: Allocated, groups: Columns, damage: Damage) -> np.ndarray:
    """Of which chunks all extent items were found: their block group says how many bytes it gave away.

    In others nothing is called free: a part of the extent tree is lost, and what it said was used is not
    known.
    """
    chunks = pool.chunks
    at = np.clip(np.searchsorted(chunks.starts, groups["start"]), 0, len(chunks.starts) - 1)
    fits = (chunks.starts[at] == groups["start"]) & (chunks.ends[at] - chunks.starts[at] == groups["length"])
    damage.add(
        "allocator", "block [group belongs|groups belong] to no chunk", np.maximum(groups["start"][~fits], -1)
    )
    damage.add(
        "allocator", "[chunk has|chunks have] no block group", np.setdiff1d(chunks.starts, groups["start"])
    )
    found = np.zeros(len(chunks.starts), np.int64)
    np.add.at(found, np.searchsorted(chunks.starts, used.start, "right") - 1, used.length)
    exact = fits & (found[at] == groups["used"])
    damage.add(
        "count",
        "block [group|groups] gave away more or less than there are extent items",
        groups["start"][fits & ~exact],
        severity=ERROR,
    )
    trusted = np.zeros(len(chunks.starts), bool)
    trusted[at[exact]] = True
    return trusted


def check_free_space(
    free: tuple[Int, Int], rows: Columns, accounts: Columns, pool: Pool, damage: Damage
) -> None:
    """The free space tree is the allocator's second account of the same; where it is valid, it must agree
    with the extent tree.

    Accounts of groups that no longer exist count for nothing: mkfs.btrfs leaves those of chunks it began
    with, and neither the kernel nor `btrfs check`, which go by the groups there are, ever look at them.
    """
    told = union(rows["start"], rows["start"] + np.clip(rows["length"], 0, ondisk.MAX_END))
    gone = ~np.isin(accounts["start"], pool.chunks.starts)
    start, length = (accounts[name][gone] for name in ("start", "length"))
    left = subtract(*told, start, start + np.clip(length, 0, ondisk.MAX_END))
    outside = subtract(*left, pool.chunks.starts, pool.chunks.ends)[0]
    damage.add(
        "allocator",
        "[range|ranges] of the free space tree [lies|lie] in no chunk",
        np.maximum(outside, -1),
        severity=NOTE,
    )
    told = intersect(*told, pool.chunks.starts, pool.chunks.ends)
    for only, other, ranges in (
        ("extent tree", "free space tree", subtract(*free, *told)),
        ("free space tree", "extent tree", subtract(*told, *free)),
    ):
        damage.add(
            "allocator",
            f"[range is|ranges are] free by the {only}, but not by the {other}",
            ranges[0],
            severity=WARNING,
        )
