"""btrfs B-trees: all trees together, one level a step, and the items of their leaves as arrays.

Snapshots share blocks, so trees form one graph: a pair (tree, block) says which tree reaches which block, and
a block is read once whatever the number of its trees.

Sources: fs/btrfs/ctree.h, fs/btrfs/tree-checker.c, walk_down_tree() in fs/btrfs/extent-tree.c (v6.12).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs import ondisk
from virt_bmap.formats.filesystems.btrfs.ondisk import HEADER_SIZE, ITEM_SIZE, KEY_PTR_SIZE
from virt_bmap.formats.filesystems.btrfs.pool import LogicalRanges, WaysToRead
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

BATCH = 16 << 20
"""Bytes of tree blocks that are in memory at once."""
MAX_SHARED = 1 << 19
"""Pairs (tree, block) of one level beyond the first for each block: fifty snapshots of a million files.

A small hostile image could have a tree for every leaf and all leaves in every tree."""


class TreeSource(NamedTuple):
    """Where tree blocks are read, and what each must say of itself."""

    reader: Reader
    copies: WaysToRead
    chunks: LogicalRanges
    nodesize: int
    sectorsize: int
    fsid: Bytes
    csum_type: int

    @staticmethod
    def of(superblock: np.void, reader: Reader, copies: WaysToRead, chunks: LogicalRanges) -> "TreeSource":
        """By what the superblock says of its filesystem."""
        nodesize, sectorsize, csum_type = (
            int(superblock[name]) for name in ("nodesize", "sectorsize", "csum_type")
        )
        return TreeSource(
            reader, copies, chunks, nodesize, sectorsize, ondisk.metadata_fsid(superblock), csum_type
        )


class TreeRoots(NamedTuple):
    """Trees to walk, as columns.

    `offset` tells trees of one id apart; `wanted`: leaves are to be read, not only named.

    `drop_*` are of a subvolume that is being deleted: what lies before this key, in blocks from `drop_level`
    up, is gone already.
    """

    id: Int
    offset: Int
    bytenr: Int
    level: Int
    generation: Int
    refs: Int
    wanted: np.ndarray
    drop_key: np.ndarray
    drop_level: Int

    @staticmethod
    def single(tree: int, bytenr: int, level: int, generation: int) -> "TreeRoots":
        """One tree that the superblock names."""
        zero = np.zeros(1, np.int64)
        return TreeRoots(
            zero + tree,
            zero,
            zero + bytenr,
            zero + level,
            zero + generation,
            zero + 1,
            np.ones(1, bool),
            np.zeros(1, DROP_KEY),
            zero,
        )

    def select(self, keep: np.ndarray) -> "TreeRoots":
        """Those trees for which the boolean or index array asks."""
        return take(self, keep)

    @staticmethod
    def join(parts: "list[TreeRoots]") -> "TreeRoots":
        """One after the other."""
        return stack(TreeRoots, parts)


DROP_KEY = np.dtype([("objectid", "<u8"), ("type", "u1"), ("offset", "<u8")])


@dataclass(frozen=True)
class Forest:
    """What a walk reached: pairs (tree, block) of all levels, and the leaves whose items are wanted.

    Trees are numbered as in the roots. Leaves are numbered by address; leaf i belongs to
    trees[first[i]:first[i] + count[i]].
    """

    tree: Int
    address: Int
    leaf_address: Int
    leaf_generation: Int
    first: Int
    count: Int
    trees: Int

    def spread(self, leaf: Int) -> tuple[Int, Int]:
        """For rows that lie in leaves `leaf`: (row, tree), a row for every tree that the leaf belongs to."""
        if len(self.trees) == len(self.leaf_address):  # the common case: no leaf is shared
            return np.arange(len(leaf), dtype=np.int64), self.trees[leaf]
        row, step = expand(self.count[leaf])
        return row, self.trees[self.first[leaf][row] + step]


def walk(source: TreeSource, roots: TreeRoots, damage: Damage) -> Forest:
    """Every block of every tree, breadth first. Levels only fall, so no loop of pointers is endless."""
    reached: list[tuple[Int, Int]] = []
    tree, address, generation = EMPTY, EMPTY, EMPTY
    for level in range(ondisk.MAX_LEVEL - 1, -1, -1):
        top = np.flatnonzero(roots.level == level)
        tree, address = np.append(tree, top), np.append(address, roots.bytenr[top])
        generation = np.append(generation, roots.generation[top])
        sound = source.chunks.contain(address, np.full(len(address), source.nodesize, np.int64)) & (
            address % source.sectorsize == 0
        )
        damage.add("tree", "[pointer leads|pointers lead] to tree blocks outside all chunks", address[~sound])
        tree, address, generation = _once(tree[sound], address[sound], generation[sound], damage)
        reached.append((tree, address))
        if level and len(address):
            tree, address, generation = _step(source, roots, level, (tree, address, generation), damage)
    return _forest(roots, reached, generation)


def _once(tree: Int, address: Int, generation: Int, damage: Damage) -> tuple[Int, Int, Int]:
    """The pairs sorted by address and tree; a block that a tree reaches twice is damage, and kept once."""
    order = np.lexsort((tree, address))
    tree, address, generation = tree[order], address[order], generation[order]
    again = np.zeros(len(tree), bool)
    again[1:] = (tree[1:] == tree[:-1]) & (address[1:] == address[:-1])
    damage.add("twice", "tree [block is|blocks are] referred to twice by one tree", address[again])
    tree, address, generation = tree[~again], address[~again], generation[~again]
    told = _bounded(address, np.ones(len(address), np.int64), damage)
    return tree[told], address[told], generation[told]


def _bounded(address: Int, weight: Int, damage: Damage) -> np.ndarray:
    """Of pairs sorted by address, all that are the first of their block, and of the others as many as
    MAX_SHARED allows."""
    again = np.zeros(len(address), bool)
    again[1:] = address[1:] == address[:-1]
    told: np.ndarray = ~again | (np.cumsum(np.where(again, weight, 0)) <= MAX_SHARED)
    damage.add(
        "simplified",
        "tree [block is|blocks are] shared by too many snapshots: not all of these are told",
        address[~told],
        severity=WARNING,
    )
    return told


def _step(
    source: TreeSource, roots: TreeRoots, level: int, pairs: tuple[Int, Int, Int], damage: Damage
) -> tuple[Int, Int, Int]:
    """The pairs one level below: the pointers of these blocks, for each tree that the block belongs to."""
    tree, address, generation = pairs
    blocks, first, block = np.unique(address, return_index=True, return_inverse=True)
    found, counts = [], []
    for _, data, nritems in node_batches(source, blocks, generation[first], level, damage):
        room = (source.nodesize - HEADER_SIZE) // KEY_PTR_SIZE
        slots = np.ndarray(
            (len(data), room),
            np.dtype(("V", KEY_PTR_SIZE)),
            data.data,
            HEADER_SIZE,
            (source.nodesize, KEY_PTR_SIZE),
        )
        found.append(slots[np.arange(room) < nritems[:, None]].view(ondisk.KEY_PTR))
        counts.append(nritems)
    pointers, count = np.concatenate(found), np.concatenate(counts)
    told = _bounded(address, count[block], damage)
    tree, block = tree[told], block[told]
    pair, step = expand(count[block])
    child = (np.cumsum(count) - count)[block][pair] + step
    keep = ~_dropped(roots, level, tree[pair], pointers, child, step == count[block][pair] - 1)
    pair, child = pair[keep], child[keep]
    return tree[pair], pointers["blockptr"][child], pointers["generation"][child]


def _dropped(
    roots: TreeRoots, level: int, tree: Int, pointers: np.ndarray, child: Int, last: np.ndarray
) -> np.ndarray:
    """Which children are gone from a subvolume that is being deleted: those whose next sibling is not beyond
    the progress key."""
    gone = np.zeros(len(child), bool)
    dropping = (roots.refs == 0) & (roots.drop_key["objectid"] > 0) & (level >= roots.drop_level)
    rows = np.flatnonzero(dropping[tree] & ~last)
    sibling, limit = pointers[child[rows] + 1], roots.drop_key[tree[rows]]
    before = np.zeros(len(rows), bool)
    for name in ("offset", "type", "objectid"):  # the most significant last
        before = np.where(
            sibling[name] == limit[name], before if name != "offset" else True, sibling[name] < limit[name]
        )
    gone[rows] = before
    return gone


def _forest(roots: TreeRoots, reached: list[tuple[Int, Int]], generation: Int) -> Forest:
    tree, address = reached[-1]
    wanted = roots.wanted[tree]
    leaf_address, first, count = np.unique(address[wanted], return_index=True, return_counts=True)
    return Forest(
        np.concatenate([pair[0] for pair in reached]), np.concatenate([pair[1] for pair in reached]),
        leaf_address, generation[wanted][first], first.astype(np.int64), count.astype(np.int64), tree[wanted],
    )  # fmt: skip


def node_batches(
    source: TreeSource, address: Int, generation: Int, level: int, damage: Damage
) -> Iterator[tuple[int, Bytes, Int]]:
    """(number of the first block, blocks as (n, nodesize), items in each), a bounded number of blocks at a
    time.

    A block that does not say of itself what its pointer said, or whose checksum is wrong, is taken from
    another copy; where none is right it has no items.
    """
    for rows, data in source.reader.batches(address, source.nodesize, BATCH):
        part = address[rows]
        data, healed, bad = mended(source, data, part, generation[rows], level)
        damage.add("copy-used", "tree [block|blocks] had to be read from another copy", part[healed])
        damage.add(
            "tree",
            "tree [block is not what its pointer says|blocks are not what their pointers say] (address, "
            "generation, level, fsid), or [has|have] a wrong checksum",
            part[bad],
        )
        nritems = _header(data)["nritems"].astype(np.int64)
        nritems[bad] = 0
        yield rows.start, data, nritems


def mended(
    source: TreeSource, data: Bytes, address: Int, generation: Int, level: int
) -> tuple[Bytes, Int, Int]:
    """(blocks, which of them another copy gave, which are right in no copy)."""
    bad = np.flatnonzero(~_sound(source, data, address, generation, level))
    if len(bad) == 0:
        return data, EMPTY, EMPTY
    data, first = data.copy(), bad
    for copy in source.copies.others():
        again = copy.read_blocks(address[bad], source.nodesize)
        good = _sound(source, again, address[bad], generation[bad], level)
        data[bad[good]] = again[good]
        bad = bad[~good]
        if len(bad) == 0:
            break
    return data, np.setdiff1d(first, bad), bad


def _header(data: Bytes) -> np.ndarray:
    return np.ndarray((len(data),), ondisk.HEADER, data.data, strides=(data.shape[1],))


def _sound(source: TreeSource, data: Bytes, address: Int, generation: Int, level: int) -> np.ndarray:
    header, item = _header(data), KEY_PTR_SIZE if level else ITEM_SIZE
    sound: np.ndarray = (
        (header["bytenr"] == address.astype(np.uint64))
        & (header["generation"] == generation.astype(np.uint64))
        & (header["level"] == level)
        & (header["fsid"] == source.fsid).all(axis=1)
        & (header["nritems"] <= (source.nodesize - HEADER_SIZE) // item)
    )
    data = data if sound.all() else data[sound]
    right = ondisk.checksums(data[:, ondisk.SUPER_CSUM_SIZE :], source.csum_type)
    sound[sound] = (data[:, : right.shape[1]] == right).all(axis=1)
    return sound


@dataclass(frozen=True)
class Items:
    """Items of one kind out of a batch of leaves, as columns: the key, `leaf` by number, and the item's bytes
    data[start:start + size].

    `logical` is where these bytes lie in the volume.
    """

    data: Bytes
    leaf: Int
    objectid: Int
    offset: Int
    start: Int
    size: Int
    logical: Int

    def __len__(self) -> int:
        return len(self.leaf)

    def records(self, dtype: np.dtype[np.void]) -> np.ndarray:
        """The items' first bytes as records."""
        return ondisk.records_at(self.data, self.start, dtype)

    def select(self, keep: np.ndarray) -> "Items":
        """Those for which the boolean or index array asks."""
        return Items(self.data, *(getattr(self, column.name)[keep] for column in fields(self)[1:]))


class Leaves(NamedTuple):
    """The items of a batch of leaves that lie inside their leaf."""

    data: Bytes
    items: np.ndarray
    leaf: Int
    base: int
    address: Int
    damage: Damage
    reader: Reader

    def of(self, key_type: int, minimum: int) -> Items:
        """The items of one type. Those shorter than `minimum` bytes are damage."""
        rows = np.flatnonzero(self.items["type"] == key_type)
        items, local = self.items[rows], self.leaf[rows]
        at = items["data_offset"].astype(np.int64) + HEADER_SIZE
        found = Items(
            self.data, local + self.base, np.ascontiguousarray(items["objectid"]),
            np.ascontiguousarray(items["offset"]), at + local * (self.data.size // max(1, len(self.address))),
            items["data_size"].astype(np.int64), self.address[local] + at,
        )  # fmt: skip
        short = found.size < minimum
        if short.any():
            self.damage.add(
                "tree", "[item is too short for its|items are too short for their] type", found.logical[short]
            )
            found = found.select(~short)
        return found


def read_leaves(source: TreeSource, forest: Forest, damage: Damage) -> Iterator[Leaves]:
    """The leaves of a walk, a batch at a time."""
    for base, data, nritems in node_batches(source, forest.leaf_address, forest.leaf_generation, 0, damage):
        yield leaves_of(source, data, nritems, forest.leaf_address[base : base + len(data)], base, damage)


def leaves_of(
    source: TreeSource, data: Bytes, nritems: Int, address: Int, base: int, damage: Damage
) -> Leaves:
    """The items of a batch of leaves, which are numbered from `base` on."""
    room = (source.nodesize - HEADER_SIZE) // ITEM_SIZE
    slots = np.ndarray(
        (len(data), room), np.dtype(("V", ITEM_SIZE)), data.data, HEADER_SIZE, (source.nodesize, ITEM_SIZE)
    )
    items = slots[np.arange(room) < nritems[:, None]].view(ondisk.ITEM)
    leaf = np.repeat(np.arange(len(data), dtype=np.int64), nritems)
    low, high = items["data_offset"].astype(np.int64), items["data_size"].astype(np.int64)
    high += low
    inside = (low >= (nritems * ITEM_SIZE)[leaf]) & (high <= source.nodesize - HEADER_SIZE)
    if not inside.all():
        damage.add("tree", "[item reaches out of its|items reach out of their] leaf", address[leaf[~inside]])
        items, leaf = items[inside], leaf[inside]
    return Leaves(data.reshape(-1), items, leaf, base, address, damage, source.reader)
