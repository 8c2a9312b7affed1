"""What lies inside other structures: short symbolic links, inline data, attributes.

Sources: kernel Documentation/filesystems/ext4/{inlinedata,attributes}.rst; fs/ext4/{symlink,inline,xattr}.c.
"""

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Bool
from virt_bmap.filesystems.ext.damage import Problems
from virt_bmap.filesystems.ext.directories import Names
from virt_bmap.filesystems.ext.inodes import EXTENTS_FL, I_BLOCK, I_BLOCK_SIZE, INLINE_DATA_FL, RESIZE, Inodes
from virt_bmap.filesystems.ext.superblock import Superblock
from virt_bmap.reader import Reader
from virt_bmap.tables import ExtentRows


def fast_symlinks(superblock: Superblock, nodes: Inodes, types: np.ndarray) -> Bool:
    """Symbolic links whose target lies in i_block.

    Old kernels wrote some short targets to a block: these have one block pointer, and blocks beyond that of their attributes.
    """
    short = (types == tables.T_SYMLINK) & (nodes.size < I_BLOCK_SIZE) & (nodes.flags & (EXTENTS_FL | INLINE_DATA_FL) == 0)
    beyond = nodes.sectors - np.where(nodes.acl != 0, superblock.block_size * superblock.cluster // 512, 0)
    pointer = (nodes.block[:, :4] != 0).any(axis=1) & (nodes.block[:, 4:] == 0).all(axis=1)
    fast: Bool = short & ~((beyond > 0) & pointer)
    return fast


def add(
    reader: Reader,
    superblock: Superblock,
    nodes: Inodes,
    types: np.ndarray,
    rows: ExtentRows,
    names: list[Names],
    problems: Problems,
) -> None:
    """Rows for bytes inside inodes."""
    fast = np.flatnonzero(fast_symlinks(superblock, nodes, types))
    rows.add(tables.SYMLINK, nodes.offset[fast] + I_BLOCK, nodes.size[fast], inode=nodes.number[fast],
             file_offset=np.zeros(len(fast), np.int64), flags=tables.INLINE)  # fmt: skip
    size = superblock.block_size
    with_acl = np.flatnonzero((nodes.acl != 0) & superblock.inside(nodes.acl, 1))
    block, first, count = np.unique(nodes.acl[with_acl], return_inverse=True, return_counts=True)
    shared = np.where(count[first] > 1, tables.SHARED, 0)
    rows.add(tables.XATTR, block[first] * size, np.full(len(first), size, np.int64), inode=nodes.number[with_acl], flags=shared)
    resize = np.flatnonzero(nodes.number == RESIZE)
    if len(resize):
        dind = nodes.block[resize].view("<u4")[:, 13].astype(np.int64)
        dind = dind[superblock.inside(dind, 1)]
        rows.add(tables.TREE, dind * size, np.full(len(dind), size, np.int64), part="resize inode", inode=RESIZE)
