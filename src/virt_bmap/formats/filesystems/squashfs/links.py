"""Where symbolic links lead: the path follows the inode, in metadata blocks that are mostly compressed.

Sources: Linux fs/squashfs/symlink.c.
"""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.squashfs.inodes import SYMLINK, WalkedTree, walk
from virt_bmap.formats.filesystems.squashfs.metadata import MetadataTables, read_tables
from virt_bmap.formats.filesystems.squashfs.superblock import read_superblock
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

MAX_TARGET = 4096
"""Bytes of a path: a page, as squashfs_symlink_read_folio() fills it."""


def whole(found: MetadataTables, tree: WalkedTree) -> Bool:
    """Which inodes are symbolic links whose path lies in the table; together they are not longer than it."""
    column = tree.column
    size = column["size"]
    link: Bool = (column["type"] == SYMLINK) & (size > 0) & (column["list_at"] + size <= found.inodes.length)
    link &= np.cumsum(np.where(link, size, 0)) <= found.inodes.length
    return link


def targets(reader: Reader) -> tuple[Int, pa.Array]:
    """The inodes of all symbolic links, ascending, and their paths."""
    superblock, ignored = read_superblock(reader), Damage()
    found = read_tables(reader, superblock, ExtentRows(), ignored)
    tree = walk(found, superblock, ignored)
    rows = np.flatnonzero(whole(found, tree) & (tree.column["size"] <= MAX_TARGET))
    rows = rows[np.argsort(tree.column["inode"][rows], kind="stable")]
    at, size = tree.column["list_at"][rows], tree.column["size"][rows]
    return tree.column["inode"][rows], Ragged.cut(found.inodes.data, at, size).arrow()
