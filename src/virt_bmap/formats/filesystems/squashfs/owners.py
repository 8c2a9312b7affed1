"""Blocks and fragments of files, and what lies inside metadata blocks."""

import numpy as np

from virt_bmap.core.arrays import Int, expand
from virt_bmap.core.columns import take
from virt_bmap.core.layout import widen
from virt_bmap.core.packed import Codec, PackedRows, unpacked
from virt_bmap.core.reader import Packed, Reader
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.squashfs import links
from virt_bmap.formats.filesystems.squashfs.compression import MetadataBlocks, codec_of
from virt_bmap.formats.filesystems.squashfs.inodes import INVALID, REG, WalkedTree
from virt_bmap.formats.filesystems.squashfs.metadata import MetadataTables
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

STORED = 1 << 24
"""Set in a block's size where it is stored as it is."""


MAX_XATTRS = 256 << 10
"""Bytes of one inode's attributes; Linux lists at most 64 KiB of names, and has values of 64 KiB."""


def add_content(
    rows: ExtentRows,
    reader: Reader,
    superblock: np.void,
    found: MetadataTables,
    tree: WalkedTree,
    damage: Damage,
) -> Packed | None:
    """Rows of all blocks and fragments; and the content of those that are compressed."""
    block_size = int(superblock["block_size"])
    parts = [
        _block_rows(found.inodes, tree, block_size, damage),
        _fragment_rows(found.fragments, tree, block_size, damage),
    ]
    inode, at, size, start, length, packed, skip = (
        np.concatenate([part[i] for part in parts]) for i in range(7)
    )
    inside = (start >= 0) & (start <= min(int(superblock["bytes_used"]), reader.size) - length)
    damage.check(inside, "outside", "[block of a file lies|blocks of files lie] outside the image", start)
    inode, at, size, start, length, packed, skip = (
        values[inside] for values in (inode, at, size, start, length, packed, skip)
    )
    pieces = cut_shared(start, start + length)
    shared = np.zeros(len(start), bool)
    np.logical_or.at(shared, pieces.row, pieces.shared)
    whole = packed.astype(bool)
    rows.add(tables.DATA, start[whole], length[whole], inode=inode[whole], file_offset=at[whole],
        file_length=size[whole],
             flags=tables.COMPRESSED + tables.SHARED * shared[whole])  # fmt: skip
    plain = ~whole[pieces.row]
    row, low = pieces.row[plain], pieces.start[plain]
    rows.add(tables.DATA, low, pieces.end[plain] - low, inode=inode[row],
        file_offset=at[row] + low - start[row],
             flags=tables.SHARED * pieces.shared[plain])  # fmt: skip
    whole &= (skip >= 0) & (skip + size <= block_size)
    units = PackedRows(inode, at, size, skip, start, length, np.zeros(len(start), np.int64))
    codec = codec_of(superblock)
    # LZ4 wants to be told what a whole block may become, of which only this much is asked for
    unpack: Codec = lambda data, wanted: codec(data, block_size)[:wanted]  # noqa: E731
    return unpacked(reader, take(units, whole), (skip + size)[whole], [unpack])


Columns = tuple[Int, Int, Int, Int, Int, Int, Int]
"""inode, file offset, bytes of the file, volume offset, bytes there, whether they are compressed, and from
which byte on of what they unpack to."""


def _block_rows(table: MetadataBlocks, tree: WalkedTree, block_size: int, damage: Damage) -> Columns:
    """Whole blocks: each inode has a list of their stored sizes; they lie one after the other."""
    column = tree.column
    file = np.flatnonzero((column["type"] == REG) & (column["size"] > 0))
    size, tail = column["size"][file], column["fragment"][file] != INVALID
    count = np.where(tail, size // block_size, -(-size // block_size))
    fits = count <= (table.length - column["list_at"][file]) // 4
    fits &= (
        np.cumsum(np.where(fits, count, 0)) <= table.length // 4
    )  # lists do not overlap, so together they are shorter than the table
    what = "[file claims|files claim] more blocks than the inode table has room for"
    damage.add("extents", what, count=int((~fits).sum()))
    file, count = file[fits], count[fits]
    row, nth = expand(count)
    word = _words(table, column["list_at"][file][row] + 4 * nth)
    length = word & (STORED - 1)
    before = np.cumsum(length) - length
    first = (
        before[np.minimum(np.cumsum(count) - count, max(len(before) - 1, 0))]
        if len(before)
        else np.zeros(len(file), np.int64)
    )
    start = column["start"][file][row] + before - first[row]
    at = nth * block_size
    held = np.minimum(block_size, column["size"][file][row] - at)
    there = length > 0
    stored = (word & STORED) != 0
    # a stored last block is as long as what it holds; a file's row never claims more
    return (column["inode"][file][row][there], at[there], np.where(stored, length, held)[there], start[there],
        length[there],
            (~stored)[there].astype(np.int64), np.zeros(there.sum(), np.int64))  # fmt: skip


def _words(table: MetadataBlocks, at: Int) -> Int:
    four = table.data[at[:, None] + np.arange(4)].astype(np.int64) if len(at) else np.zeros((0, 4), np.int64)
    result: Int = four @ (np.int64(1) << (8 * np.arange(4, dtype=np.int64)))
    return result


def _fragment_rows(fragments: np.ndarray, tree: WalkedTree, block_size: int, damage: Damage) -> Columns:
    """Tails: a compressed fragment as a whole for each file, of a stored one the very bytes."""
    column = tree.column
    file = np.flatnonzero((column["type"] == REG) & (column["fragment"] != INVALID) & (column["size"] > 0))
    known = column["fragment"][file] < len(fragments)
    damage.add(
        "extents",
        "[file refers to a fragment that does|files refer to fragments that do] not exist",
        count=int((~known).sum()),
    )
    file = file[known]
    fragment = fragments[column["fragment"][file]]
    start = widen(np.minimum(fragment["start_block"], np.uint64(2**62)), "start_block")
    word = widen(fragment["size"], "size")
    stored, length = (word & STORED) != 0, word & (STORED - 1)
    tail = column["size"][file] % block_size
    file, start, stored, length, tail = (values[tail > 0] for values in (file, start, stored, length, tail))
    offset = column["offset"][file]
    return (column["inode"][file], column["size"][file] - tail, tail, np.where(stored, start + offset, start),
        np.where(stored, tail, length),
            (~stored).astype(np.int64), offset)  # fmt: skip


def add_inside_tables(rows: ExtentRows, found: MetadataTables, tree: WalkedTree) -> None:
    """Names, link targets and attributes: inside metadata blocks that are named above, so INLINE."""
    column = tree.column

    def add(
        kind: int, table: MetadataBlocks, inode: Int, at: Int, length: Int, content: bool = False
    ) -> None:
        row, offset, size, packed = table.on_disk(at, length)
        at_start, held = (np.zeros(len(row), np.int64), length[row]) if content else (-1, None)
        rows.add(
            kind,
            offset,
            size,
            inode=inode[row],
            flags=tables.INLINE + tables.COMPRESSED * packed,
            file_offset=at_start,
            file_length=held,
        )

    add(tables.DIRECTORY, found.directories, *tree.listing)
    link = links.whole(found, tree)
    add(
        tables.SYMLINK,
        found.inodes,
        column["inode"][link],
        column["list_at"][link],
        column["size"][link],
        content=True,
    )
    has = np.flatnonzero(column["xattr"] < len(found.xattr_ids))
    named = found.xattr_ids[column["xattr"][has]]
    place, size = widen(np.minimum(named["xattr"], np.uint64(2**62)), "xattr"), widen(named["size"], "size")
    base = int(found.xattrs.disk[0]) if len(found.xattrs.disk) else 0
    at = found.xattrs.position(base + (place >> 16), place & 0xFFFF)
    good = (at >= 0) & (size > 0) & (size <= MAX_XATTRS) & (at + size <= found.xattrs.length)
    add(tables.XATTR, found.xattrs, column["inode"][has][good], at[good], size[good])
