"""Whose free clusters of an NTFS were: a record that is not in use any more still holds names, sizes and run
lists.

Deleting clears IN_USE, frees the clusters in $Bitmap, and counts the record's sequence number up by one. So
the table is read as if all its records were in use, those of deleted files with the sequence number that they
had: names lead to the directories that are meant, deleted ones too, and a directory whose record has been
used again since is none. Of several records that claim a cluster the one with the latest log sequence number
(Windows writes it, ntfs-3g does not) was the last.

Sources: ntfs-3g libntfs-3g/mft.c ntfs_mft_record_free(), ntfsprogs/ntfsundelete.c; kernel fs/ntfs3/fsntfs.c
ntfs_mark_rec_free().
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import past
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.contents import read_contents, sizes_and_flags
from virt_bmap.formats.filesystems.ntfs.inodes import (
    NameTree,
    inode_table,
    inode_types,
    read_tree,
    record_offset,
)
from virt_bmap.formats.filesystems.ntfs.mft import Mft, read_mft
from virt_bmap.formats.filesystems.ntfs.owners import claim
from virt_bmap.formats.filesystems.ntfs.superblock import read_boot
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows


def former(reader: Reader, extents: pa.Table, starts: Int, ends: Int) -> pa.Table:
    """What records of deleted files say of the bytes [starts[i], ends[i])."""
    mft, tree, dead, inodes, table = _as_if_alive(reader)
    owner = tables.integers(table, "inode")
    found = table.take(pa.array(past.chosen(table, starts, ends, (owner >= 0) & dead[owner])))
    return past.former(
        inodes, _names(tree, mft), ntfs.ROOT, found,
        said_by="record of the deleted file",
        sequence=_log_sequence(reader, mft, tables.integers(found, "inode")),
    )  # fmt: skip


def contents(reader: Reader) -> pa.Table:
    """Where the records of deleted files say that their content lies: rows of the table `extents`."""
    _, _, dead, _, table = _as_if_alive(reader)
    owner = tables.integers(table, "inode")
    return table.take(np.flatnonzero((owner >= 0) & dead[owner]))


def _as_if_alive(reader: Reader) -> tuple[Mft, NameTree, Bool, pa.Table, pa.Table]:
    """The $MFT with all its records in use, its names, which records are dead, and the tables `inodes` and
    `extents` of them all."""
    damage = Damage()
    geometry = read_boot(reader, damage)
    mft = read_mft(reader, geometry, damage)
    dead = mft.records.usable & ~mft.records.in_use
    sequence = np.where(dead, _before(mft.records.sequence), mft.records.sequence)
    mft.records = replace(mft.records, in_use=mft.records.usable, sequence=sequence)
    tree = read_tree(mft, damage)
    contents = read_contents(mft, geometry, damage)
    none = np.zeros(len(mft), np.int64)
    types = inode_types(mft, tree, none, none)
    sizes, flags = sizes_and_flags(mft, tree, contents, none)
    rows = ExtentRows()
    claim(mft, tree, contents, types, reader.size, rows, damage)
    return mft, tree, dead, inode_table(mft, tree, types, sizes, flags), rows.table(0)


def _before(sequence: np.ndarray) -> np.ndarray:
    """The sequence number before a record was freed; it goes from 0xFFFF to 1."""
    return np.where(sequence <= 1, 0xFFFF, sequence - 1).astype(sequence.dtype)


def _names(tree: NameTree, mft: Mft) -> pa.Table:
    """The names whose directory is known, and the bare names of inodes that have no other."""
    bare = np.flatnonzero(~np.isin(mft.names.record, tree.inode))
    parent = np.append(tree.parent, np.full(len(bare), (1 << 48), np.int64))
    names = tree.name.concat([tree.name, mft.names.name.take(bare)])
    return tables.make(
        "names",
        volume=0,
        parent=parent,
        inode=np.append(tree.inode, mft.names.record[bare]),
        name=names.arrow(),
    )


def _log_sequence(reader: Reader, mft: Mft, numbers: Int) -> Int:
    """The log sequence number of each record; -1 where it has none."""
    some, back = np.unique(numbers, return_inverse=True)
    heads = (
        reader.read_blocks(record_offset(mft, some), ntfs.MFT_RECORD.itemsize)
        .view(ntfs.MFT_RECORD)
        .reshape(-1)
    )
    lsn = np.minimum(heads["lsn"], np.uint64(2**63 - 1)).astype(np.int64)
    return np.where(lsn > 0, lsn, -1)[back]
