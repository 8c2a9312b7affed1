"""What lies inside other structures: short symbolic links, and the content of small files and directories.

Inline data begins in i_block and goes on in the value of the attribute `system.data`, after the record's
fixed fields.

Sources: kernel Documentation/filesystems/ext4/{inlinedata,attributes}.rst; fs/ext4/{symlink,inline,xattr}.c,
fs/ext4/xattr.h.
"""

import numpy as np

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.layout import struct
from virt_bmap.formats.filesystems.ext import names as directories
from virt_bmap.formats.filesystems.ext.inodes import (
    ENCRYPT_FL,
    EXTENTS_FL,
    I_BLOCK,
    I_BLOCK_SIZE,
    INLINE_DATA_FL,
    Bodies,
    Inodes,
    with_types,
)
from virt_bmap.formats.filesystems.ext.names import Names
from virt_bmap.formats.filesystems.ext.superblock import Superblock
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

FIXED = 128
"""Bytes of a record that every inode has; i_extra_isize says how many more fields follow, then attributes."""
EXTRA_ISIZE = 0x80
XATTR_MAGIC = 0xEA020000
XATTR_ENTRY = struct(16, [
    (0x0, "e_name_len", "u1"),
    (0x1, "e_name_index", "u1"),
    (0x2, "e_value_offs", "<u2"),
    (0x8, "e_value_size", "<u4"),
])  # fmt: skip
SYSTEM, DATA_NAME = 7, np.frombuffer(b"data", "<u4")[0]
DIRECTORY_HEADER = 4
"""The number of the parent, where a directory in blocks has its entries '.' and '..'."""


def fast_symlinks(superblock: Superblock, nodes: Inodes, types: np.ndarray) -> Bool:
    """Symbolic links whose target lies in i_block.

    Old kernels wrote some short targets to a block: these have one block pointer, and blocks beyond that of
    their attributes.
    """
    fast: Bool = (
        (types == tables.T_SYMLINK)
        & (nodes.size < I_BLOCK_SIZE)
        & (nodes.flags & (EXTENTS_FL | INLINE_DATA_FL) == 0)
    )
    at = np.flatnonzero(fast)
    sectors, acl, block = nodes.sectors[at], nodes.acl[at], nodes.block[at]
    beyond = sectors - np.where(acl != 0, superblock.block_size * superblock.cluster // 512, 0)
    fast[at] = ~((beyond > 0) & (block[:, :4] != 0).any(axis=1) & (block[:, 4:] == 0).all(axis=1))
    return fast


def add_symlinks(rows: ExtentRows, superblock: Superblock, nodes: Inodes, types: np.ndarray) -> None:
    """Rows for the targets that lie in i_block."""
    at = np.flatnonzero(fast_symlinks(superblock, nodes, types))
    flags = np.where(nodes.flags[at] & ENCRYPT_FL != 0, tables.INLINE | tables.ENCRYPTED, tables.INLINE)
    rows.add(tables.SYMLINK, nodes.offset[at] + I_BLOCK, nodes.size[at], inode=nodes.number[at],
             file_offset=np.zeros(len(at), np.int64), flags=flags)  # fmt: skip


def add_data(
    rows: ExtentRows,
    superblock: Superblock,
    nodes: Inodes,
    types: np.ndarray,
    bodies: Bodies,
    damage: Damage,
) -> list[Names]:
    """Rows for inline data; returns the names in inline directories."""
    if not len(bodies.number) or not len(nodes.number):
        return []
    at = np.minimum(np.searchsorted(nodes.number, bodies.number), len(nodes.number) - 1)
    kept = with_types(types[at], tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK) & (
        nodes.number[at] == bodies.number
    )
    at, data = at[kept], bodies.data[kept]
    value, length = _system_data(data, nodes.offset[at], damage)
    offset = nodes.offset[at]
    number = nodes.number[at]
    size = nodes.size[at]
    is_dir = types[at] == tables.T_DIRECTORY
    kind_of = {
        tables.T_FILE: tables.DATA,
        tables.T_DIRECTORY: tables.DIRECTORY,
        tables.T_SYMLINK: tables.SYMLINK,
    }
    kind = np.array([kind_of.get(code, 0) for code in range(len(tables.TYPES))], np.int8)[types[at]]
    first = np.where(is_dir, I_BLOCK_SIZE, np.minimum(size, I_BLOCK_SIZE))
    rest = np.where(is_dir, length, np.clip(size - I_BLOCK_SIZE, 0, length))
    cut = ~is_dir & (size > I_BLOCK_SIZE + length)
    damage.add(
        "inode",
        "[inode|inodes] with inline data [is larger than its|are larger than their] inline data",
        offset[cut],
    )
    zero = np.zeros(len(at), np.int64)
    rows.add(kind, offset + I_BLOCK, first, inode=number, file_offset=zero, flags=tables.INLINE)
    rows.add(kind, offset + value, rest, inode=number, file_offset=zero + I_BLOCK_SIZE, flags=tables.INLINE)
    return _names(
        superblock, number[is_dir], data[is_dir], offset[is_dir], value[is_dir], length[is_dir], damage
    )


def _system_data(data: np.ndarray, offsets: Int, damage: Damage) -> tuple[Int, Int]:
    """(offset in the record, length) of the value of `system.data` in n records, (n, inode size) bytes; (0,
    0) where there is none.

    One cursor a record, all stepped at once over the attributes' entries.
    """
    n, width = data.shape
    value, length = np.zeros(n, np.int64), np.zeros(n, np.int64)
    if width <= FIXED + 8:
        return value, length
    words = data.view("<u4")
    extra = data[:, EXTRA_ISIZE : EXTRA_ISIZE + 2].copy().view("<u2")[:, 0].astype(np.int64)
    fits = (extra <= width - FIXED - 8) & (extra % 4 == 0)
    row = np.flatnonzero(fits)
    row = row[words[row, (FIXED + extra[row]) // 4] == XATTR_MAGIC]
    first = at = FIXED + extra[row] + 4
    flat = data.reshape(-1)
    while len(row):
        go = at + XATTR_ENTRY.itemsize <= width
        go[go] &= words[row[go], at[go] // 4] != 0
        row, at, first = row[go], at[go], first[go]
        place = (row * width + at)[:, None] + np.arange(XATTR_ENTRY.itemsize)
        entry = flat[place].view(XATTR_ENTRY)[:, 0]
        name = np.minimum(at + XATTR_ENTRY.itemsize, width - 4) // 4
        mine = (
            (entry["e_name_index"] == SYSTEM) & (entry["e_name_len"] == 4) & (words[row, name] == DATA_NAME)
        )
        value[row[mine]] = first[mine] + entry["e_value_offs"][mine].astype(np.int64)
        length[row[mine]] = entry["e_value_size"][mine].astype(np.int64)
        at = at + XATTR_ENTRY.itemsize + (entry["e_name_len"].astype(np.int64) + 3 & ~3)
        row, at, first = row[~mine], at[~mine], first[~mine]
    bad = (value > width - length) | ((length > 0) & (value % 4 != 0))
    damage.add(
        "inode", "inline [attribute reaches out of its|attributes reach out of their] inode", offsets[bad]
    )
    return np.where(bad, 0, value), np.where(bad, 0, length)


def _names(
    superblock: Superblock,
    number: Int,
    data: np.ndarray,
    offset: Int,
    value: Int,
    length: Int,
    damage: Damage,
) -> list[Names]:
    base = np.arange(len(number), dtype=np.int64) * superblock.inode_size
    head = I_BLOCK + DIRECTORY_HEADER
    start = np.stack(
        [base + head, base + np.where(length > 0, value, superblock.inode_size)], axis=1
    ).reshape(-1)
    end = start + np.stack([np.full(len(number), I_BLOCK + I_BLOCK_SIZE - head), length], axis=1).reshape(-1)
    place = (np.repeat(offset - base, 2) + start).astype(np.int64)
    return [
        directories.parse(
            data.reshape(-1),
            start,
            end,
            np.repeat(number, 2),
            place,
            superblock.block_size,
            superblock.inodes,
            damage,
        )
    ]
