"""Where inodes' blocks lie: extent trees and indirect blocks, a level of all trees at a time.

A node that breaks the rules of __ext4_ext_check makes a kernel refuse the whole file; here it is a problem,
and its extents are mapped as far as they go.

Sources: kernel Documentation/filesystems/ext4/{ifork,blockmap}.rst; fs/ext4/ext4_extents.h,
fs/ext4/extents.c, fs/ext4/indirect.c.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, expand, in_order, joined
from virt_bmap.core.columns import take
from virt_bmap.core.layout import lo_hi, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ext.superblock import Superblock
from virt_bmap.model.damage import Damage

HEADER = struct(12, [
    (0x0, "eh_magic", "<u2"),
    (0x2, "eh_entries", "<u2"),
    (0x4, "eh_max", "<u2"),
    (0x6, "eh_depth", "<u2"),
])  # fmt: skip
EXTENT = struct(12, [
    (0x0, "ee_block", "<u4"),
    (0x4, "ee_len", "<u2"),
    (0x6, "ee_start_hi", "<u2"),
    (0x8, "ee_start_lo", "<u4"),
])  # fmt: skip
INDEX = struct(12, [
    (0x0, "ei_block", "<u4"),
    (0x4, "ei_leaf_lo", "<u4"),
    (0x8, "ei_leaf_hi", "<u2"),
])  # fmt: skip
ITEM = np.dtype("V12")
"""Any of these three: what has no fields is copied whole, five times as fast."""
EXTENT_MAGIC = 0xF30A
MAX_DEPTH = 5
"""EXT4_MAX_EXTENT_DEPTH: five levels of nodes with 340 entries hold more blocks than a file can have."""
MAX_INITIALISED = 32768
"""EXT_INIT_MAX_LEN: a greater ee_len means that many less, unwritten."""
DIRECT, LEVELS = 12, 3
"""Block pointers in i_block: 12 direct ones, then one to a tree of each height from 1 to 3."""

BATCH = 16 << 20
"""Bytes of tree nodes read at a time."""
AT_ONCE = 32768
"""Roots that are taken apart at a time: few enough to stay in the processor's own cache."""


@dataclass
class WalkedTrees:
    """What the trees say, in batches: columns owner (row of the inodes), logical, start, count (blocks),
    unwritten."""

    runs: list[tuple[Int, Int, Int, Int, Bool]] = field(default_factory=list)
    nodes: list[tuple[Int, Int]] = field(default_factory=list)

    def add(self, owner: Int, logical: Int, start: Int, count: Int, unwritten: Bool | None = None) -> None:
        self.runs.append(
            (owner, logical, start, count, np.zeros(len(owner), bool) if unwritten is None else unwritten)
        )


@dataclass(frozen=True)
class Runs:
    """Runs of blocks: `count` blocks from `start` hold the file's blocks from `logical`; `owner` is a row of
    the inodes."""

    owner: Int
    logical: Int
    start: Int
    count: Int
    unwritten: Bool

    def take(self, keep: np.ndarray) -> "Runs":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


def read_blocks_of(
    reader: Reader,
    superblock: Superblock,
    block: Bytes,
    extents: Int,
    pointers: Int,
    offsets: Int,
    damage: Damage,
) -> tuple[Runs, tuple[Int, Int]]:
    """All runs of inodes, and their tree nodes as (owner, block).

    `block` holds all inodes' i_block, (n, 60) bytes; `extents` are the rows that are extent trees, `pointers`
    those that are block pointers; `offsets` are where the inodes' records lie, for messages. Runs that reach
    out of the volume are cut, with a problem.
    """
    found = WalkedTrees()
    seen = EMPTY
    if len(extents):
        seen = _extent_trees(reader, superblock, block, extents, offsets, found, damage)
    if len(pointers):
        _indirect(
            reader, superblock, pointers, block[pointers].view("<u4").astype(np.int64), seen, found, damage
        )
    columns = [
        np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*found.runs, strict=True)
    ]
    nodes = [np.concatenate(parts) for parts in zip(*found.nodes, strict=True)] or [EMPTY, EMPTY]
    return _inside(superblock, Runs(*columns or [EMPTY] * 4 + [EMPTY > 0]), offsets, damage), (
        nodes[0],
        nodes[1],
    )


def _inside(superblock: Superblock, runs: Runs, offsets: Int, damage: Damage) -> Runs:
    fits = superblock.inside(runs.start, runs.count) & (runs.count > 0)
    if fits.all():
        return runs
    damage.add(
        "outside",
        "[extent is empty or reaches|extents are empty or reach] out of the volume",
        offsets[runs.owner[~fits]],
    )
    starts = superblock.inside(runs.start, 1) & (runs.count > 0)
    count = np.where(fits, runs.count, np.minimum(runs.count, superblock.readable - runs.start))
    return Runs(runs.owner, runs.logical, runs.start, count, runs.unwritten).take(starts)


def _nodes(superblock: Superblock, block: Int, seen: Int, damage: Damage) -> tuple[Bool, Int]:
    """Which of these tree nodes may be read (in the volume, and for the first time), and all nodes seen until
    now, sorted."""
    fits, offsets = superblock.inside(block, 1), block * superblock.block_size
    damage.add("outside", "tree [node lies|nodes lie] outside the volume", offsets[~fits])
    order = np.argsort(block, kind="stable")
    again = np.zeros(len(block), bool)
    again[order[1:]] = block[order[1:]] == block[order[:-1]]
    if len(seen):
        again |= seen[np.minimum(np.searchsorted(seen, block), len(seen) - 1)] == block
    damage.add("twice", "tree [node is|nodes are] used twice", offsets[fits & again])
    keep = fits & ~again
    return keep, in_order(np.append(seen, block[keep]))


def _batches(reader: Reader, superblock: Superblock, block: Int) -> Iterator[tuple[Int, Bytes]]:
    """(positions in `block`, their contents (n, block size)), in the order of the disk."""
    order = np.argsort(block, kind="stable")
    for part, data in reader.batches(block[order] * superblock.block_size, superblock.block_size, BATCH):
        yield order[part], data


# ---- extent trees ------------------------------------------------------------------------------------------


def _extent_trees(
    reader: Reader,
    superblock: Superblock,
    block_of: Bytes,
    owner: Int,
    offsets: Int,
    found: WalkedTrees,
    damage: Damage,
) -> Int:
    """Walk the extent trees of these owners from their roots in i_block, `block_of`; returns all nodes that
    were read."""
    size = superblock.block_size
    children = [(EMPTY, EMPTY, EMPTY, EMPTY)]
    for at in range(0, len(owner), AT_ONCE):
        some = owner[at : at + AT_ONCE]
        # nearly always all inodes of a stretch have blocks: no need to copy theirs
        together = int(some[-1] - some[0]) == len(some) - 1
        data = block_of[some[0] : some[-1] + 1] if together else block_of[some]
        children.append(
            _node(
                superblock,
                data,
                some,
                data.view("<u2")[:, 3].astype(np.int64),
                None,
                offsets[some],
                found,
                damage,
            )
        )
    owner, block, expected, key = joined(children, 4)
    seen = EMPTY
    for _ in range(MAX_DEPTH):
        if not len(block):
            break
        keep, seen = _nodes(superblock, block, seen, damage)
        owner, block, expected, key = owner[keep], block[keep], expected[keep], key[keep]
        found.nodes.append((owner, block))
        children = [
            _node(superblock, data, owner[at], expected[at], key[at], block[at] * size, found, damage)
            for at, data in _batches(reader, superblock, block)
        ]
        if not children:
            break
        owner, block, expected, key = joined(children, 4)
    return seen


def _node(
    superblock: Superblock,
    data: Bytes,
    owner: Int,
    expected: Int,
    key: Int | None,
    offsets: Int,
    found: WalkedTrees,
    damage: Damage,
) -> tuple[Int, Int, Int, Int]:
    """Take n nodes apart, (n, node size) bytes: extents go to `found`, what is returned are children (owner,
    block, depth, key).

    `expected` is each node's depth, `key` the first block of the file that its parent says is below it; a
    root has none.
    """
    room = data.shape[1] // 12 - 1
    items = np.ascontiguousarray(data[:, : (room + 1) * 12]).view(ITEM)
    header = items[:, 0].view(HEADER)
    entries, depth = header["eh_entries"].astype(np.int64), header["eh_depth"].astype(np.int64)
    most = header["eh_max"]
    good = (
        (header["eh_magic"] == EXTENT_MAGIC)
        & (entries <= most)
        & (most <= room)
        & (depth == expected)
        & (depth <= MAX_DEPTH)
    )
    good &= (most > 0) & ((entries > 0) | (depth == 0))
    if not good.all():
        # an inode without any block may have no header at all
        bad = ~good & (data[:, :60] != 0).any(axis=1) if data.shape[1] == 60 else ~good
        damage.add("tree", "extent tree [node has|nodes have] an impossible header", offsets[bad])
        entries = np.where(good, entries, 0)
    leaf = depth == 0
    row, extent = _entries(items, EXTENT, np.where(leaf, entries, 0))
    unwritten = extent["ee_len"] > MAX_INITIALISED
    count = extent["ee_len"].astype(np.int64)
    count[unwritten] -= MAX_INITIALISED
    logical = extent["ee_block"].astype(np.int64)
    _check_order(row, logical, logical + count, key, offsets, damage)
    found.add(owner[row], logical, lo_hi(extent["ee_start_lo"], extent["ee_start_hi"]), count, unwritten)
    if leaf.all():
        return EMPTY, EMPTY, EMPTY, EMPTY
    row, index = _entries(items, INDEX, np.where(leaf, 0, entries))
    logical = index["ei_block"].astype(np.int64)
    _check_order(row, logical, logical + 1, key, offsets, damage)
    return owner[row], lo_hi(index["ei_leaf_lo"], index["ei_leaf_hi"]), depth[row] - 1, logical


def _check_order(row: Int, logical: Int, end: Int, key: Int | None, offsets: Int, damage: Damage) -> None:
    """In each node `row` entries must not overlap and must grow, from the key that the parent gives."""
    # one entry in each root, as nearly always
    if key is None and (not len(row) or len(row) == int(row[-1]) + 1):
        return
    bad = (row[1:] == row[:-1]) & (logical[1:] < end[:-1])
    if bad.any():
        damage.add(
            "tree",
            "extent tree [node has|nodes have] entries out of order or overlapping",
            offsets[np.unique(row[1:][bad])],
        )
    if key is not None and len(row):
        first = np.append(True, row[1:] != row[:-1])
        at = row[first][logical[first] != key[row[first]]]
        damage.add(
            "tree",
            "extent tree [node does not begin where its|nodes do not begin where their] parent says",
            offsets[at],
        )


def _entries(nodes: NDArray[np.void], dtype: np.dtype[np.void], counts: Int) -> tuple[Int, NDArray[np.void]]:
    """(node, entry) for the first `counts` entries of each node, (n, 1 + entries) ITEMs; the header takes the
    place of one."""
    if len(counts) and counts.max() <= 1:  # nearly all files are empty or in one piece
        row, first = np.flatnonzero(counts), nodes[:, 1]
        found = first if len(row) == len(nodes) else first[row]
    else:
        row, step = expand(counts)
        found = nodes[row, 1 + step]
    return row, found.view(dtype)


# ---- block pointers ----------------------------------------------------------------------------------------


def _indirect(
    reader: Reader,
    superblock: Superblock,
    owner: Int,
    pointers: Int,
    seen: Int,
    found: WalkedTrees,
    damage: Damage,
) -> None:
    """Follow block pointers, (n, 15), of ext2 and ext3."""
    per_block = superblock.block_size // 4
    row, column = np.nonzero(pointers[:, :DIRECT])
    parts = [_joined(owner[row], column.astype(np.int64), pointers[row, column])]
    row, level = np.nonzero(pointers[:, DIRECT:])
    first = DIRECT + np.cumsum([0, per_block, per_block**2])
    node = owner[row]
    block = pointers[row, DIRECT + level]
    height = level.astype(np.int64) + 1
    logical = first[level]
    for _ in range(LEVELS):
        if not len(block):
            break
        keep, seen = _nodes(superblock, block, seen, damage)
        node, block, height, logical = node[keep], block[keep], height[keep], logical[keep]
        found.nodes.append((node, block))
        children = [(EMPTY, EMPTY, EMPTY, EMPTY)]
        for at, data in _batches(reader, superblock, block):
            values = data.view("<u4")
            row, column = np.nonzero(values)
            target, above = values[row, column].astype(np.int64), at[row]
            where = logical[above] + column * per_block ** (height[above] - 1)
            inner = height[above] > 1
            children.append((node[above][inner], target[inner], height[above][inner] - 1, where[inner]))
            parts.append(_joined(node[above][~inner], where[~inner], target[~inner]))
        node, block, height, logical = joined(children, 4)
    found.add(*_joined(*joined(parts, 4)))


def _joined(owner: Int, logical: Int, start: Int, count: Int | None = None) -> tuple[Int, Int, Int, Int]:
    """Runs (single blocks if no `count` is given) by owner and place in the file; those that go on where
    another ends made one."""
    if not len(owner):
        return owner, logical, start, start
    count = np.ones(len(owner), np.int64) if count is None else count
    order = np.lexsort((logical, owner))
    owner, logical, start, count = owner[order], logical[order], start[order], count[order]
    end, stop = logical + count, start + count
    new = np.append(True, (owner[1:] != owner[:-1]) | (logical[1:] != end[:-1]) | (start[1:] != stop[:-1]))
    at = np.flatnonzero(new)
    return owner[at], logical[at], start[at], np.add.reduceat(count, at)
