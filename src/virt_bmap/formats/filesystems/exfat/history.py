"""Whose free clusters of an exFAT were: deleting clears one bit in each entry of a set, and frees its
clusters in the bitmap.

All else stays, name, size and the set's checksum included, so that a set which was partly written over is
known by it. A file in one piece (NoFatChain) has its exact place; of others the FAT often keeps the old
chain, since drivers leave links behind in what they free: nobody knows whose these links are now, which is
said. Where a driver wiped the chain, only the first cluster is known.

Sources: Microsoft exFAT file system specification, sections 6.2.1.4 (InUse) and 7.1; kernel fs/exfat/dir.c
exfat_remove_entries(), fatent.c __exfat_free_cluster().
"""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, ints, touching
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import past
from virt_bmap.formats.filesystems.exfat.allocator import add_special, fat_entries, ranges_of, read_special
from virt_bmap.formats.filesystems.exfat.inodes import FILE, FILE_NAME, MAX_DIRECTORY, STREAM, Parser
from virt_bmap.formats.filesystems.exfat.superblock import read_geometry
from virt_bmap.formats.filesystems.fat.allocator import NOTHING, chains_of, read_runs
from virt_bmap.formats.filesystems.fat.extents import Heap, inode_table
from virt_bmap.formats.filesystems.fat.tree import ROOT, DirEntries, read_tree
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

IN_USE = 0x80
OLD_CHAIN = "by the chain that the FAT still holds: a later file may have changed it"


def former(reader: Reader, extents: pa.Table, starts: Int, ends: Int) -> pa.Table:
    """What deleted entry sets say of the bytes [starts[i], ends[i])."""
    damage = Damage()
    geometry = read_geometry(reader, damage)
    runs = read_runs(fat_entries(reader, geometry))
    heap = Heap(geometry.heap, geometry.cluster_size, geometry.clusters, chains_of(runs), damage)
    root = ranges_of(heap, ROOT, ints(geometry.root_cluster))
    used = add_special(tables.ExtentRows(), reader, heap, read_special(reader, root, geometry))
    old, heap.chains = heap.chains, chains_of(runs.within(*used))
    parser = DeadParser(used, geometry.cluster_size)
    tree = read_tree(reader, root, heap.locate, parser, MAX_DIRECTORY, damage)
    entries = tree.entries.take(
        np.flatnonzero(np.isin(tree.entries.inode, parser.dead) & ~tree.entries.directory)
    )
    heap.chains = old
    wiped = heap.follow(entries).fate == NOTHING
    entries = entries._replace(
        contiguous=entries.contiguous | wiped,
        size=np.where(wiped, np.minimum(entries.size, heap.cluster_size), entries.size),
    )
    found = heap.follow(entries)
    offset = found.before * heap.cluster_size
    start = heap.offset(found.cluster)
    length = np.clip(np.minimum(reader.size - start,
            heap.needed(entries.size)[found.query] * heap.cluster_size - offset), 0,
                     found.count * heap.cluster_size)  # fmt: skip
    keep = np.flatnonzero(touching(start, start + length, starts, ends))[: past.MAX_NAMED]
    rows = tables.ExtentRows()
    rows.add(
        tables.DATA,
        start[keep],
        length[keep],
        inode=entries.inode[found.query[keep]],
        file_offset=offset[keep],
    )
    sure = (entries.contiguous[found.query] | (entries.size <= heap.cluster_size)[found.query])[keep]
    doubt = [None if known else OLD_CHAIN for known in sure.tolist()]
    return past.former(
        inode_table(tree), tree.names(), ROOT, rows.table(0), said_by="deleted entry set", doubt=doubt
    )


class DeadParser:
    """Makes entries of living sets and of dead ones whose checksum is right; `dead` are the inodes of the
    latter.

    Dead directories are looked into where they were in one piece, all of which is free; `used` are the
    clusters in use, of `cluster_size` bytes.
    """

    def __init__(self, used: tuple[Int, Int], cluster_size: int) -> None:
        self.used, self.cluster_size = used, cluster_size
        self.dead = EMPTY

    def __call__(self, raw: Bytes, owner: Int, number: Int) -> DirEntries:
        gone = np.isin(owner, self.dead)
        revived = raw.copy()
        was = np.isin(raw[:, 0], np.array([FILE, STREAM, FILE_NAME]) & ~IN_USE)
        revived[was, 0] |= IN_USE
        parser = Parser(Damage())
        found = parser(revived, owner, number)
        row = (
            np.searchsorted(number, found.inode)
            if (np.diff(number) > 0).all()
            else _rows(number, found.inode)
        )
        dead = was[row] | gone[row]
        wrong = np.isin(found.inode, np.concatenate(parser.wrong))
        count = np.where(found.directory & found.contiguous, -(-found.size // self.cluster_size), 1)
        taken = touching(found.cluster, found.cluster + count, *self.used)
        keep = np.flatnonzero(~dead | (~wrong & (found.size > 0) & ~taken))
        self.dead = np.append(self.dead, found.inode[keep][dead[keep]])
        entries = found.take(keep)
        return entries._replace(name=found.name.take(keep))


def _rows(number: Int, wanted: Int) -> Int:
    """Where each wanted number is; directories of one level may lie in any order."""
    order = np.argsort(number, kind="stable")
    found: Int = order[np.searchsorted(number[order], wanted)]
    return found
