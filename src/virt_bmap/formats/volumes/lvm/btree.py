"""The trees and space maps of device-mapper's "persistent data" library, in which thin pools and caches keep
their metadata.

A tree is read a level at a time, all trees of one kind together. Blocks are 4096 bytes; each says its own
number, which is checked as its checksum is. A block whose checksum is wrong is a problem; a kernel refuses
the whole pool.

Sources: kernel drivers/md/persistent-data/ dm-block-manager.c (dm_bm_checksum), dm-btree-internal.h,
dm-btree-spine.c, dm-space-map-common.h, dm-array.c.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, bounded, expand, ints
from virt_bmap.core.checksums import crc32c
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import afford
from virt_bmap.model.damage import Damage

BLOCK = 4096
INTERNAL_NODE, LEAF_NODE = 1, 2
MAX_DEPTH = 16
"""Levels of one tree. 252 entries a node: five levels hold more than 2**39 keys."""
MAX_BATCH = 4096
"""Blocks read at once: 16 MiB, a million entries."""
MAX_NODES = 1 << 23
"""(tree, node) pairs followed: metadata devices end at 16 GiB, 4 million blocks, of which snapshots may share
many."""
MAX_SHARED = 1 << 23
"""Entries told of several trees, beyond what is stored: runs, where there are runs."""
ENTRIES_PER_BITMAP = (BLOCK - 16) * 4

NODE = struct(32, [
    (0x04, "flags", "<u4"), (0x08, "blocknr", "<u8"), (0x10, "nr_entries", "<u4"),
    (0x14, "max_entries", "<u4"), (0x18, "value_size", "<u4"),
])  # fmt: skip
SPACE_MAP_ROOT = struct(32, [
    (0x00, "nr_blocks", "<u8"), (0x08, "nr_allocated", "<u8"), (0x10, "bitmap_root", "<u8"),
    (0x18, "ref_count_root", "<u8"),
])  # fmt: skip
INDEX_ENTRY = struct(16, [(0x00, "blocknr", "<u8")])
MAX_METADATA_BITMAPS = 255
ARRAY_BLOCK = struct(24, [(0x08, "nr_entries", "<u4"), (0x0C, "value_size", "<u4"), (0x10, "blocknr", "<u8")])


NODE_SALT, INDEX_SALT, BITMAP_SALT, ARRAY_SALT = 121107, 160478, 240779, 595846735
"""What the checksum of each kind of block is combined with, so that none passes for another."""


def sound(data: np.ndarray, salt: int) -> np.ndarray:
    """Which blocks, (n, 4096), begin with the checksum of what follows."""
    if not len(data):
        return np.zeros(0, bool)
    good: np.ndarray = (
        crc32c(data[:, 4:]) ^ np.uint32(salt) == np.ascontiguousarray(data[:, :4]).view("<u4")[:, 0]
    )
    return good


class TreeEntries(NamedTuple):
    """Leaf entries of some trees: `tree` is the position of the root asked for; `values` has shape (n,
    value_size) in bytes."""

    tree: Int
    keys: Int
    values: np.ndarray

    def numbers(self) -> Int:
        """The first eight bytes of every value as a number; what does not fit in 63 bits becomes -1."""
        if len(self.values) == 0:
            return np.zeros(0, np.int64)
        raw = np.ascontiguousarray(self.values[:, :8]).view("<u8")[:, 0]
        return np.where(raw >> np.uint64(63), -1, raw.astype(np.int64))


class Store:
    """A metadata device. Notes which blocks were found to be what, and what was wrong with them."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.blocks = reader.size // BLOCK
        self.used: list[tuple[str, Int]] = []
        """(part, block numbers) of everything that was read."""
        self.damage = Damage()

    def take(self, part: str, blocks: Int) -> None:
        """Note that blocks are in use."""
        self.used.append((part, blocks))

    def bad(self, what: str, blocks: Int, code: str = "tree") -> None:
        """Say what is wrong with these blocks."""
        self.damage.add(code, f"[block|blocks] of its metadata {what}", blocks * BLOCK)

    def read(self, blocks: Int, salt: int) -> np.ndarray:
        """Blocks of one kind as an array (n, 4096)."""
        data = self.reader.read_blocks(blocks * BLOCK, BLOCK)
        self.bad("[has|have] a wrong checksum", blocks[~sound(data, salt)], "checksum")
        return data

    def inside(self, blocks: Int) -> np.ndarray:
        """Which numbers are blocks of the device. Block 0 is the superblock and never anything else."""
        inside = (blocks > 0) & (blocks < self.blocks)
        self.bad("[lies|lie] outside its metadata device or on its superblock", blocks[~inside])
        return inside

    def walk(
        self, part: str, roots: Int, value_size: int, pack: Callable[[TreeEntries], TreeEntries] | None = None
    ) -> TreeEntries:
        """All leaf entries of the trees with these roots, in no certain order.

        A step follows all trees down one level. A visit is a pair (tree, node), as one number:
        tree * blocks + node; a visit that was made before is damage, and not followed. Nodes that many
        trees share are read once a level. Two snapshots, whose roots are blocks 7 and 8 of 100, share node 5:

            level    visits (tree, node)      as numbers     read
            0        (0, 7) (1, 8)            7 108          7 8
            1        (0, 4) (0, 5) (1, 5)     4 5 105        4 5; `which` is 0 1 1, the node of each visit
            leaves   entries of 4 once, for tree 0; entries of 5 twice, for trees 0 and 1

        `pack`, where given, makes the entries of nodes fewer before they are told of each tree.
        """
        pack = pack or (lambda entries: entries)
        found: list[TreeEntries] = [
            pack(TreeEntries(ints([]), ints([]), np.zeros((0, value_size), np.uint8)))
        ]
        tree, block = np.arange(len(roots), dtype=np.int64), roots
        seen, shared = np.zeros(0, np.int64), MAX_SHARED
        for _ in range(MAX_DEPTH):
            keep = self.inside(block)
            pair, times = np.unique(tree[keep] * self.blocks + block[keep], return_counts=True)
            again = (times > 1) | np.isin(pair, seen)
            self.bad("[is|are] reached twice in one tree", pair[again] % max(self.blocks, 1))
            fresh = np.setdiff1d(pair, seen, assume_unique=True)
            seen = np.union1d(seen, fresh)
            if len(seen) > MAX_NODES:
                raise Corrupt(f"more than {MAX_NODES} nodes of {part}", code="tree")
            tree, block = fresh // max(self.blocks, 1), fresh % max(self.blocks, 1)
            if len(block) == 0:
                return _join(found)
            children: list[TreeEntries] = []
            unique, which = np.unique(block, return_inverse=True)
            order = np.argsort(which, kind="stable")
            tree, which = tree[order], which[order]
            for start in range(0, len(unique), MAX_BATCH):
                batch = unique[start : start + MAX_BATCH]
                low, high = np.searchsorted(which, [start, start + len(batch)])
                for entries, into in zip(
                    self._nodes(part, batch, value_size, pack), (children, found), strict=True
                ):
                    into.append(_spread(entries, tree[low:high], which[low:high] - start, shared))
                    shared -= max(0, len(into[-1].keys) - len(entries.keys))
            below = _join(children)
            tree, block = below.tree, below.numbers()
        self.bad(f"[lies|lie] deeper than {MAX_DEPTH} levels", block)
        return _join(found)

    def _nodes(
        self, part: str, blocks: Int, value_size: int, pack: Callable[[TreeEntries], TreeEntries]
    ) -> tuple[TreeEntries, TreeEntries]:
        """The entries of internal nodes and, packed, of leaves among `blocks`; their `tree` is the position
        of the node."""
        data = self.read(blocks, NODE_SALT)
        head = np.ascontiguousarray(data[:, : NODE.itemsize]).view(NODE)[:, 0]
        count, limit, size = (widen(head[name], name) for name in ("nr_entries", "max_entries", "value_size"))
        internal, leaf = head["flags"] == INTERNAL_NODE, head["flags"] == LEAF_NODE
        wanted = np.where(internal, 8, value_size)
        good = (head["blocknr"] == blocks) & (internal | leaf) & (size == wanted) & (count <= limit)
        good &= limit <= (BLOCK - NODE.itemsize) // (8 + wanted)
        self.bad(f"[is not a node|are not nodes] of {part}", blocks[~good])
        self.take(part, blocks[good])
        words, results = data.view("<u8"), []
        for kind, length in ((internal, 8), (leaf, value_size)):
            row, step = expand(np.where(good & kind, count, 0))
            keys = words[row, 4 + step]
            unsorted = (row[1:] == row[:-1]) & (keys[1:] <= keys[:-1])
            self.bad("[has|have] keys out of order", blocks[np.unique(row[1:][unsorted])])
            self.bad("[has|have] keys that no tree holds", blocks[np.unique(row[keys >> np.uint64(63) != 0])])
            if length == 8:
                values = words[row, 4 + limit[row] + step].view(np.uint8).reshape(-1, 8)
            else:
                values = _columns(data, row * BLOCK + NODE.itemsize + limit[row] * 8 + step * length, length)
            fits = keys >> np.uint64(63) == 0
            results.append(TreeEntries(row[fits], keys[fits].astype(np.int64), values[fits]))
        return results[0], pack(results[1])

    def array(self, part: str, root: int, size: int, value_size: int = 8) -> np.ndarray:
        """The values of a dm-array, `size` of them at most, as bytes (n, value_size); what can't be read is
        zeroes."""
        entries = self.walk(part, ints(root), 8)
        blocks, keys = entries.numbers(), entries.keys
        each = (BLOCK - ARRAY_BLOCK.itemsize) // value_size
        keep = self.inside(blocks) & (keys < -(-size // each))
        blocks, keys = blocks[keep], keys[keep]
        afford(self.reader, size * value_size, f"an array of {plural(size, 'entry', 'entries')}")
        result = np.zeros((-(-size // each) * each, value_size), np.uint8)
        for start in range(0, len(blocks), MAX_BATCH):
            batch, at = blocks[start : start + MAX_BATCH], keys[start : start + MAX_BATCH]
            data = self.read(batch, ARRAY_SALT)
            head = np.ascontiguousarray(data[:, : ARRAY_BLOCK.itemsize]).view(ARRAY_BLOCK)[:, 0]
            count = widen(head["nr_entries"], "nr_entries")
            good = (head["blocknr"] == batch) & (head["value_size"] == value_size) & (count <= each)
            self.bad(f"[is not a block|are not blocks] of {part}", batch[~good])
            self.take(part, batch[good])
            rows = data[good, ARRAY_BLOCK.itemsize : ARRAY_BLOCK.itemsize + each * value_size].reshape(
                -1, each, value_size
            )
            rows = np.where((np.arange(each) < count[good][:, None])[:, :, None], rows, 0)
            result.reshape(-1, each, value_size)[at[good]] = rows
        return result[:size]

    def free_data(self, root: np.void) -> tuple[int, np.ndarray]:
        """(blocks, which are free) of the space map of a data device; its bitmaps are listed by a tree."""
        total = int(widen(root["nr_blocks"], "nr_blocks"))
        entries = self.walk(
            "space map", widen(root["bitmap_root"], "bitmap_root").reshape(1), INDEX_ENTRY.itemsize
        )
        order = np.argsort(entries.keys, kind="stable")
        free = self._bitmaps(entries.numbers()[order], entries.keys[order], total)
        self.walk("space map", widen(root["ref_count_root"], "ref_count_root").reshape(1), 4)
        return total, free

    def free_metadata(self, root: np.void) -> np.ndarray:
        """Which blocks of the metadata device itself are free; its bitmaps are listed in one block."""
        total = min(int(widen(root["nr_blocks"], "nr_blocks")), self.blocks)
        index = widen(root["bitmap_root"], "bitmap_root").reshape(1)
        if not self.inside(index).all():
            return np.zeros(0, bool)
        self.take("space map", index)
        count = min(-(-total // ENTRIES_PER_BITMAP), MAX_METADATA_BITMAPS)
        entries = np.frombuffer(
            self.read(index, INDEX_SALT)[0, 16 : 16 + count * INDEX_ENTRY.itemsize].tobytes(), INDEX_ENTRY
        )
        free = self._bitmaps(
            widen(entries["blocknr"], "bitmap block"), np.arange(count, dtype=np.int64), total
        )
        self.walk("space map", widen(root["ref_count_root"], "ref_count_root").reshape(1), 4)
        return free

    def _bitmaps(self, blocks: Int, keys: Int, total: int) -> np.ndarray:
        """Two bits a block, both zero where it is free.

        `keys` are numbers of bitmaps; what can't be read counts as in use.
        """
        keep = self.inside(blocks) & (keys < -(-total // ENTRIES_PER_BITMAP))
        blocks, keys = blocks[keep], keys[keep]
        blocks, first = np.unique(blocks, return_index=True)
        if len(first) < len(keys):
            self.bad("[is|are] there for several parts of the space map", blocks[:1])
        keys = keys[first]
        self.take("space map", blocks)
        if total > len(blocks) * ENTRIES_PER_BITMAP:
            what = "blocks of the space map are missing; what they describe counts as in use"
            self.damage.say("tree", what, 0)
            total = (
                int(keys.max() + 1) * ENTRIES_PER_BITMAP
                if len(keys) and keys.max() < 2 * len(keys) + 8
                else 0
            )
        free = np.zeros(-(-total // ENTRIES_PER_BITMAP) * ENTRIES_PER_BITMAP, bool)
        keep = keys < len(free) // ENTRIES_PER_BITMAP
        blocks, keys = blocks[keep], keys[keep]
        for start in range(0, len(blocks), MAX_BATCH // 8):
            batch = slice(start, start + MAX_BATCH // 8)
            bits = np.unpackbits(self.read(blocks[batch], BITMAP_SALT)[:, 16:], axis=1, bitorder="little")
            free.reshape(-1, ENTRIES_PER_BITMAP)[keys[batch]] = ~(bits[:, 0::2] | bits[:, 1::2]).astype(bool)
        return free[:total]


def _spread(entries: TreeEntries, tree: Int, which: Int, most: int) -> TreeEntries:
    """The entries of nodes for each visit: of `tree` to node number `which`.

    Corrupt where visits make more than `most` of them beyond what the nodes hold.
    """
    first, last = np.searchsorted(entries.tree, which), np.searchsorted(entries.tree, which, "right")
    bounded(int((last - first).sum()), len(entries.keys) + most, "entries of nodes that trees share")
    row, step = expand(last - first)
    at = first[row] + step
    return TreeEntries(tree[row], entries.keys[at], entries.values[at])


def _columns(data: np.ndarray, starts: Int, length: int) -> np.ndarray:
    """(n, length) bytes from each start in the flattened data."""
    if len(starts) == 0:
        return np.zeros((0, length), np.uint8)
    found: np.ndarray = data.reshape(-1)[starts[:, None] + np.arange(length)]
    return found


def _join(parts: list[TreeEntries]) -> TreeEntries:
    parts = [part for part in parts if len(part.keys)] or parts[:1]
    return TreeEntries(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("tree", "keys", "values"))
    )
