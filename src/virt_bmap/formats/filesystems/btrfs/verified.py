"""The bytes of a btrfs's files as they were written: every block is checked as it is read, and another copy
takes the place of one that is wrong.

Data has checksums in the checksum tree, for each sector; what fsync wrote since the last commit has them in
log trees. Inline content and short links lie in leaves, which carry their own checksum, address and
generation. Files without checksums (nodatacow, nodatasum) have none to go by: their best copy is what they
are.

Sources: fs/btrfs/file-item.c (btrfs_lookup_bio_sums), fs/btrfs/bio.c (btrfs_check_read_bio,
btrfs_repair_done), fs/btrfs/tree-log.c log_csums() (v6.12).
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from virt_bmap.core import lost
from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, gather, scatter, union
from virt_bmap.core.checked import CheckedReader
from virt_bmap.core.lost import NOTHING, Lost
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.btrfs import ondisk, tree
from virt_bmap.formats.filesystems.btrfs.ondisk import HEADER_SIZE, KEY_PTR_SIZE
from virt_bmap.formats.filesystems.btrfs.tree import Forest, TreeRoots, TreeSource
from virt_bmap.model.damage import Damage

BATCH = 16 << 20
"""Bytes of leaves that are looked at together: what is asked for of each may be little."""


class Index(NamedTuple):
    """The leaves of the checksum tree by the first address that each tells of; and the ranges
    [lost_starts[i], lost_ends[i]) of addresses whose nodes can't be read."""

    key: Int
    address: Int
    generation: Int
    lost_starts: Int
    lost_ends: Int


class Checksums:
    """What the checksum tree and the log trees say of sectors; read when first asked."""

    def __init__(self, source: TreeSource, roots: TreeRoots) -> None:
        self.source = source
        self.size = ondisk.CSUM_SIZES[source.csum_type]
        self._roots = roots.select(roots.id == ondisk.CSUM_TREE)
        logs = roots.select((roots.id == ondisk.TREE_LOG) & (roots.offset > 0))
        self._logs = logs._replace(wanted=np.ones(len(logs.id), bool))

    def of(self, sectors: Int) -> tuple[Bytes, np.ndarray, np.ndarray]:
        """For sorted addresses of sectors: (the checksums, which sectors have one, which have one that can't
        be read)."""
        found = np.zeros((len(sectors), self.size), np.uint8)
        known, unreadable = np.zeros(len(sectors), bool), np.zeros(len(sectors), bool)
        index = self._index
        first = np.searchsorted(index.key, sectors, "right") - 1
        leaves = np.unique(first[first >= 0])
        damage = Damage()
        for rows, data, nritems in tree.node_batches(
            self.source, index.address[leaves], index.generation[leaves], 0, damage
        ):
            part = leaves[rows : rows + len(data)]
            self._take(
                tree.leaves_of(self.source, data, nritems, index.address[part], 0, damage),
                sectors,
                found,
                known,
            )
            for bad in part[nritems == 0].tolist():
                unreadable |= first == bad
        for leaf in self._logged:
            self._take(leaf, sectors, found, known)
        gone = np.searchsorted(index.lost_starts, sectors, "right") - 1
        unreadable |= (gone >= 0) & (sectors < np.append(index.lost_ends, 0)[gone])
        return found, known, unreadable & ~known

    def _take(self, leaves: tree.Leaves, sectors: Int, found: Bytes, known: np.ndarray) -> None:
        """Enter what the items of a batch of leaves say of the sectors."""
        items = leaves.of(ondisk.EXTENT_CSUM_KEY, self.size)
        order = np.argsort(items.offset, kind="stable")
        if len(order) == 0:
            return
        start, count = items.offset[order], items.size[order] // self.size
        at = np.searchsorted(start, sectors, "right") - 1
        nth = (sectors - start[at]) // self.source.sectorsize
        mine = np.flatnonzero((at >= 0) & (nth < count[at]))
        place = items.start[order][at[mine]] + nth[mine] * self.size
        found[mine] = gather(items.data, place, np.full(len(mine), self.size, np.int64)).reshape(
            -1, self.size
        )
        known[mine] = True

    @cached_property
    def _logged(self) -> list[tree.Leaves]:
        """The leaves of all log trees."""
        damage = Damage()
        return list(tree.read_leaves(self.source, tree.walk(self.source, self._logs, damage), damage))

    @cached_property
    def _index(self) -> Index:
        """All nodes above the leaves: one in some hundred blocks of the tree."""
        key = np.zeros(len(self._roots.id), np.int64)
        address = self._roots.bytenr
        generation = self._roots.generation
        end = np.full(len(key), ondisk.MAX_END)
        lost_starts, lost_ends = EMPTY, EMPTY
        for level in range(int(self._roots.level.max(initial=0)), 0, -1):
            below: list[tuple[Int, Int, Int, Int]] = []
            sound = self.source.chunks.contain(address, np.full(len(address), self.source.nodesize, np.int64))
            lost_starts, lost_ends = np.append(lost_starts, key[~sound]), np.append(lost_ends, end[~sound])
            key, address, generation, end = key[sound], address[sound], generation[sound], end[sound]
            for at, data, nritems in tree.node_batches(self.source, address, generation, level, Damage()):
                bad = np.flatnonzero(nritems == 0) + at
                lost_starts, lost_ends = np.append(lost_starts, key[bad]), np.append(lost_ends, end[bad])
                node, slot = expand(nritems)
                room = (self.source.nodesize - HEADER_SIZE) // KEY_PTR_SIZE
                every = np.ndarray(
                    (len(data), room),
                    np.dtype(("V", KEY_PTR_SIZE)),
                    data.data,
                    HEADER_SIZE,
                    (self.source.nodesize, KEY_PTR_SIZE),
                )
                pointers = every[node, slot].view(ondisk.KEY_PTR).reshape(-1)
                first = np.clip(pointers["offset"], 0, ondisk.MAX_END).astype(np.int64)
                last = np.append(slot[1:] == 0, True)[: len(slot)]
                upto = np.where(last, end[at + node], np.append(first[1:], 0)[: len(first)])
                below.append(
                    (
                        first,
                        pointers["blockptr"].astype(np.int64),
                        pointers["generation"].astype(np.int64),
                        upto,
                    )
                )
            key, address, generation, end = (
                (np.concatenate([EMPTY, *column]) for column in zip(*below, strict=True))
                if below
                else (EMPTY,) * 4
            )
        sound = self.source.chunks.contain(address, np.full(len(address), self.source.nodesize, np.int64))
        lost_starts, lost_ends = union(np.append(lost_starts, key[~sound]), np.append(lost_ends, end[~sound]))
        order = np.flatnonzero(sound)[np.argsort(key[sound], kind="stable")]
        return Index(key[order], address[order], generation[order], lost_starts, lost_ends)


class VerifiedReader(CheckedReader):
    """Logical bytes, each block of them checked."""

    corrects = True

    def __init__(self, base: Reader, source: TreeSource, roots: TreeRoots, forests: list[Forest]) -> None:
        super().__init__(base.size, base.name)
        self._base, self._source, self.near = base, source, base.near
        self.below = [base]
        leaf = np.concatenate([forest.leaf_address for forest in forests])
        order = np.argsort(leaf, kind="stable")
        self._leaf = leaf[order]
        self._generation = np.concatenate([forest.leaf_generation for forest in forests])[order]
        self._checksums = Checksums(source, roots)

    def _look(self, offsets: Int, lengths: Int) -> tuple[Bytes, Lost]:
        result = np.zeros(int(lengths.sum()), np.uint8)
        place = np.cumsum(lengths) - lengths
        leaf = self._leaf_of(offsets, lengths)
        inside, outside = np.flatnonzero(leaf >= 0), np.flatnonzero(leaf < 0)
        parts = [self._of_leaves(offsets[inside], lengths[inside], leaf[inside], place[inside], result)]
        parts.append(self._of_sectors(offsets[outside], lengths[outside], place[outside], result))
        return result, Lost.join(parts)

    def _leaf_of(self, offsets: Int, lengths: Int) -> Int:
        """The number of the leaf that holds each range; -1 where none does."""
        if len(self._leaf) == 0:
            return np.full(len(offsets), -1, np.int64)
        at = np.maximum(np.searchsorted(self._leaf, offsets, "right") - 1, 0)
        held = (self._leaf[at] <= offsets) & (offsets + lengths <= self._leaf[at] + self._source.nodesize)
        return np.where(held, at, -1)

    def _of_leaves(self, offsets: Int, lengths: Int, leaf: Int, place: Int, result: Bytes) -> Lost:
        """Ranges inside leaves, into `result` at `place`."""
        size, parts = self._source.nodesize, [NOTHING]
        leaves, which = np.unique(leaf, return_inverse=True)
        order = np.argsort(which, kind="stable")
        step = max(1, BATCH // size)
        for low in range(0, len(leaves), step):
            mine = order[slice(*np.searchsorted(which[order], [low, low + step]).tolist())]
            address = self._leaf[leaves[low : low + step]]
            generation = self._generation[leaves[low : low + step]]
            blocks, _, bad = tree.mended(
                self._source, self._base.read_blocks(address, size), address, generation, 0
            )
            start = (which[mine] - low) * size + offsets[mine] - address[which[mine] - low]
            scatter(result, place[mine], lengths[mine], gather(blocks.reshape(-1), start, lengths[mine]))
            wrong = mine[np.isin(which[mine] - low, bad)]
            parts.append(Lost.of(union(offsets[wrong], offsets[wrong] + lengths[wrong]), lost.CHECKSUM))
        return Lost.join(parts)

    def _of_sectors(self, offsets: Int, lengths: Int, place: Int, result: Bytes) -> Lost:
        """Ranges of data, into `result` at `place`."""
        if not len(offsets):
            return NOTHING
        size = self._source.sectorsize
        low, high = union(offsets // size, -(-(offsets + lengths) // size))
        row, step = expand(high - low)
        sectors = (low[row] + step) * size
        keep = sectors + size <= self.size
        data, parts = self._right_sectors(sectors[keep])
        if not keep.all():  # after the last chunk's last whole sector nothing is data
            data = np.append(data, np.zeros((int((~keep).sum()), size), np.uint8), axis=0)
        base = np.cumsum(high - low) - (high - low)
        span = np.searchsorted(low, offsets // size, "right") - 1
        scatter(
            result,
            place,
            lengths,
            gather(data.reshape(-1), base[span] * size + offsets - low[span] * size, lengths),
        )
        return parts

    def _right_sectors(self, sectors: Int) -> tuple[Bytes, Lost]:
        """Sorted sectors as (n, sectorsize), from whichever copy is right, and what is right in none."""
        size = self._source.sectorsize
        data = self._base.read_blocks(sectors, size)
        wanted, known, unreadable = self._checksums.of(sectors)
        gone = self._base.lost(*union(sectors, sectors + size))
        absent = np.zeros(len(sectors), bool)
        absent[gone.within(sectors, sectors + size)[0]] = True
        bad = np.flatnonzero(absent | (known & ~self._match(data, wanted)))
        if len(bad):
            data = data.copy()
        why = np.where(absent, lost.MISSING, lost.CHECKSUM)
        for copy in self._source.copies.others() if len(bad) else ():
            again = copy.read_blocks(sectors[bad], size)
            missing = np.zeros(len(bad), bool)
            missing[
                copy.lost(*union(sectors[bad], sectors[bad] + size)).within(
                    sectors[bad], sectors[bad] + size
                )[0]
            ] = True
            good = ~missing & (~known[bad] | self._match(again, wanted[bad]))
            data[bad[good]] = again[good]
            why[bad[~missing & ~good]] = lost.CHECKSUM
            bad = bad[~good]
            if not len(bad):
                break
        left = np.zeros(len(sectors), bool)
        left[bad] = True
        why[unreadable & ~left] = lost.NO_CHECKSUM
        parts = [Lost.of(union(sectors[mine], sectors[mine] + size), reason)
                 for reason in np.unique(why[left | unreadable]).tolist()
                 for mine in [np.flatnonzero((left | unreadable) & (why == reason))]]  # fmt: skip
        return data, Lost.join(parts)

    def _match(self, data: Bytes, wanted: Bytes) -> np.ndarray:
        same: np.ndarray = (ondisk.checksums(data, self._source.csum_type) == wanted).all(axis=1)
        return same
