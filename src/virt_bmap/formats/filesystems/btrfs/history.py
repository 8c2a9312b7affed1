"""Whose free bytes of a btrfs were: trees are never changed in place, so those of the last transactions are
still there until their blocks are used again.

The superblock keeps the roots of the last four. Each is read as the superblock's own root is: a block must
say of itself what its pointer says (address, generation, level, fsid), so that what was written over since is
missing, and not mistaken. What such a tree says was so when that transaction was committed.

Sources: include/uapi/linux/btrfs_tree.h struct btrfs_root_backup; fs/btrfs/disk-io.c backup_super_roots()
(v6.12).
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int
from virt_bmap.core.errors import FormatError
from virt_bmap.core.layout import INT64_MAX, records
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import past
from virt_bmap.formats.filesystems.btrfs import inodes as files
from virt_bmap.formats.filesystems.btrfs import items, ondisk, owners
from virt_bmap.formats.filesystems.btrfs.pool import Pool, pool_of
from virt_bmap.formats.filesystems.btrfs.trees import read_trees, source_of
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def former(reader: Reader, extents: pa.Table, starts: Int, ends: Int) -> pa.Table:
    """What the trees of earlier transactions say of the bytes [starts[i], ends[i])."""
    pool, found = pool_of(reader), []
    for older in _older(pool.superblock):
        try:
            found.append(_of_transaction(reader, pool, older, starts, ends))
        except FormatError:  # none of this transaction's blocks is left
            continue
    return tables.concat("former", found)


def _older(superblock: np.void) -> Iterator[np.void]:
    """The superblock as it was at the end of earlier transactions, the last one first: with their roots, and
    without a log."""
    backups = records(superblock["super_roots"], ondisk.BACKUP)
    generation = backups["tree_root_gen"]
    mine = backups[
        (generation < superblock["generation"]) & (generation > 0) & (backups["tree_root"] < INT64_MAX)
    ]
    for backup in mine[np.argsort(mine["tree_root_gen"])[::-1]]:
        older = np.array([superblock], ondisk.SUPERBLOCK)
        older["root"], older["root_level"] = backup["tree_root"], backup["tree_root_level"]
        older["generation"], older["log_root"] = backup["tree_root_gen"], 0
        yield older[0]


def _of_transaction(reader: Reader, pool: Pool, superblock: np.void, starts: Int, ends: Int) -> pa.Table:
    damage, source = Damage(), source_of(reader, pool)
    found, links = read_trees(source, superblock, set(), damage)
    inodes = files.inodes(items.join(found.inodes), links, damage)
    entries = files.entries(items.join(found.names), links, damage)
    names, stubs = files.name_table(entries, found.name_bytes)
    rows = tables.ExtentRows()
    owners.add_files(rows, owners.sound(files.regular(items.join(found.regular), links), pool, damage))
    table = rows.table(0)
    table = table.take(pa.array(past.chosen(table, starts, ends)))
    sequence = np.full(len(table), int(superblock["generation"]), np.int64)
    return past.former(
        files.inode_table(inodes, stubs),
        names,
        ondisk.FIRST_FREE,
        table,
        said_by="tree of an earlier transaction",
        sequence=sequence,
    )
