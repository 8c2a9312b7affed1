"""squashfs 4.0: inodes, names and blocks as arrays, with every compressor.

What is read: the superblock, the compressor's options, the inode, directory, fragment, export, id and xattr
tables, and from the inodes where each block of a file lies. Blocks are COMPRESSED rows, one each, with the
file's bytes that they hold; a compressed fragment is a row of every file whose tail it packs, SHARED. Tables
are metadata of the filesystem; names of directories, targets of links and attributes lie inside their
metadata blocks as INLINE rows, COMPRESSED where the metadata block is, which then is shown whole.
`record_offset` is the metadata block that holds the inode. There is no allocator: what lies before
`bytes_used` and has no owner is unknown.

Sources: Linux fs/squashfs (squashfs_fs.h, super.c, inode.c, dir.c, block.c);
Documentation/filesystems/squashfs.rst.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bytes, Int, expand, ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.squashfs.compression import (
    COMPRESSIONS,
    METADATA_SIZE,
    UNCOMPRESSED,
    Table,
    decompressor,
    read_blocks,
)
from virt_bmap.formats.filesystems.squashfs.inodes import DIR, INVALID, REG, SYMLINK, Tree, walk
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "squashfs"
FEATURES = (
    "version 4.0 with gzip, lzma, lzo, xz, lz4 and zstd", "basic and extended inodes",
    "fragments, shared by the files they pack", "sparse blocks", "duplicate files (as shared)",
    "directory indexes", "fragment, export, id and xattr tables", "compressor options",
)  # fmt: skip
REFUSED = ("versions 1 to 3", "big-endian images")
ORACLES = ("unsquashfs", "content through a loop mount", "content read back by the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: geometry, places of tables",
        "metadata blocks: lengths, decompression",
        "inodes and directories: references, counts",
    ),
    unchecked=("content of files",),
)

SUPERBLOCK = struct(96, [
    (0, "s_magic", "S4"), (4, "inodes", "<u4"), (8, "mkfs_time", "<u4"), (12, "block_size", "<u4"),
    (16, "fragments", "<u4"), (20, "compression", "<u2"), (22, "block_log", "<u2"), (24, "flags", "<u2"),
    (26, "no_ids", "<u2"), (28, "s_major", "<u2"), (30, "s_minor", "<u2"), (32, "root_inode", "<u8"),
    (40, "bytes_used", "<u8"), (48, "id_table_start", "<u8"), (56, "xattr_id_table_start", "<u8"),
    (64, "inode_table_start", "<u8"), (72, "directory_table_start", "<u8"),
    (80, "fragment_table_start", "<u8"), (88, "lookup_table_start", "<u8"),
])  # fmt: skip
FRAGMENT = struct(16, [(0, "start_block", "<u8"), (8, "size", "<u4")])
XATTR_ID = struct(16, [(0, "xattr", "<u8"), (8, "count", "<u4"), (12, "size", "<u4")])
COMPRESSOR_OPTIONS = 0x400
FLAGS = {0x001: "noI", 0x002: "noD", 0x008: "noF", 0x010: "no-fragments", 0x020: "always-use-fragments",
    0x040: "duplicates",
         0x080: "exportable", 0x100: "noX", 0x200: "no-xattrs", 0x400: "compressor-options"}  # fmt: skip
STORED = 1 << 24
"""Set in a block's size where it is stored as it is."""
BLOCK_LOGS = range(12, 21)
MAX_XATTRS = 256 << 10
"""Bytes of one inode's attributes; Linux lists at most 64 KiB of names, and has values of 64 KiB."""
MAX_TABLE = 1 << 30
"""Bytes of one table on disk: 64 million inodes have about this much."""


def probe(reader: Reader) -> bool:
    """The magic, either endianness."""
    return reader.read_clipped(0, 4) in (b"hsqs", b"sqsh")


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    superblock = read_superblock(reader)
    rows = ExtentRows()
    found = _read_tables(reader, superblock, rows, damage)
    tree = walk(found.inodes, found.directories, _place(superblock, "inode_table_start"),
        int(superblock["root_inode"]),
                int(superblock["block_size"]), damage)  # fmt: skip
    root = _root(found.inodes, superblock, tree, reader)
    _content(rows, reader, superblock, found, tree, damage)
    _inside_tables(rows, found, tree)
    size = int(superblock["bytes_used"])
    if size > reader.size:
        damage.say(
            "truncated", f"the image has {reader.size} of the {size} bytes that it claims", reader.size
        )
    return Filesystem(
        type=NAME, size=min(size, reader.size), block_size=int(superblock["block_size"]), root=root,
        state=tables.CLEAN, reader=reader, inodes=_inodes(found, tree),
        names=_names(tree), extents=rows.table(0),
        features=" ".join([COMPRESSIONS[int(superblock["compression"])],
                           *(name for bit, name in FLAGS.items() if int(superblock["flags"]) & bit)]),
    )  # fmt: skip


def read_superblock(reader: Reader) -> np.void:
    """The superblock of a 4.0 image, or the word for what it is instead."""
    data = reader.read_clipped(0, SUPERBLOCK.itemsize)
    found = record(data, SUPERBLOCK)
    if found["s_magic"] == b"sqsh":
        raise Unsupported(
            f"{reader.name}: a big-endian squashfs {int.from_bytes(data[28:30], 'big')}.x image, "
            "only little-endian 4.0 is read",
            0,
        )
    version = int(found["s_major"])
    if version != 4 or found["s_minor"]:
        raise Unsupported(
            f"{reader.name}: squashfs version {version}.{int(found['s_minor'])}, only 4.0 is read", 28
        )
    if int(found["block_log"]) not in BLOCK_LOGS or int(found["block_size"]) != 1 << int(found["block_log"]):
        raise Corrupt(f"{reader.name}: block_size at byte 12 is {int(found['block_size'])} and block_log "
            f"{int(found['block_log'])}, not a power "
                      "of two from 4 KiB to 1 MiB", 12)  # fmt: skip
    if int(found["bytes_used"]) > 2**62:
        raise Corrupt(
            f"{reader.name}: bytes_used at byte 40 is {int(found['bytes_used']):#x}, more than "
            "any disk holds",
            40,
        )
    return found


def _place(superblock: np.void, column: str) -> int:
    """An offset of the superblock, at most as large as leaves room for arithmetic."""
    return min(int(superblock[column]), 2**62)


@dataclass
class _Tables:
    """What the tables hold. `regions` are (start, end) of all metadata in bytes of the volume."""

    inodes: Table
    directories: Table
    fragments: np.ndarray
    ids: Int
    xattr_ids: np.ndarray
    xattrs: Table
    regions: Int


class _TableReader:
    """Reads tables, names the bytes they take, and writes down what is wrong with them."""

    def __init__(self, reader: Reader, superblock: np.void, rows: ExtentRows, damage: Damage) -> None:
        self.reader, self.superblock, self.rows, self.damage = reader, superblock, rows, damage
        self.unpack = decompressor(int(superblock["compression"]))
        self.end = min(int(superblock["bytes_used"]), reader.size)
        self.regions: list[tuple[int, int]] = []

    def region(self, part: str, start: int, stop: int) -> Bytes:
        """Name the bytes [start, stop) and read them; nothing where they do not lie inside the image."""
        if not 0 <= start < stop <= self.end or stop - start > MAX_TABLE:
            if start != stop:
                words = (
                    f"the {part} from {start:#x} to {stop:#x} is not inside the image or not before "
                    "the next table"
                )
                self.damage.say("tree", words, start)
            return np.zeros(0, np.uint8)
        self.rows.add(tables.METADATA, start, stop - start, part=part)
        self.regions.append((start, stop))
        return self.reader.read_ranges(ints(start), ints(stop - start))

    def blocks(self, part: str, start: int, stop: int) -> Table:
        """The metadata blocks that fill [start, stop)."""
        table, broken = read_blocks(self.region(part, start, stop), start, self.unpack, part)
        self.damage.add("tree", f"metadata blocks of the {part} can't be read", start, broken)
        return table

    def indexed(self, part: str, column: str, count: int, size: int, header: int = 0) -> tuple[Table, int]:
        """A table of `count` records of `size` bytes, whose metadata blocks are found through pointers
        `header` bytes behind the superblock's `column`; and where the first of them lies."""
        index = _place(self.superblock, column)
        none = read_blocks(np.zeros(0, np.uint8), 0, self.unpack, part)[0]
        if index >= self.end or count == 0:
            return none, min(index, self.end)
        pointers = -(-count * size // METADATA_SIZE)
        if pointers * 8 > self.end - index - header:
            self.damage.say("tree", f"the {part} at {index:#x} has more pointers than fit the image", index)
            return none, index
        where = widen(np.frombuffer(self.reader.read(index + header, 8 * pointers), "<u8"), part)
        first = min(int(where.min()), index)
        table = self.blocks(part, first, index)
        self.region(part, index, index + header + 8 * pointers)
        if not np.isin(where, table.disk).all():
            self.damage.say(
                "tree", f"the {part}'s pointers at {index:#x} do not lead to its metadata blocks", index
            )
        return table, first

    def xattrs(self) -> tuple[Table, np.ndarray, int]:
        """The attributes, the records that inodes refer to, and where the first of both lies."""
        at = _place(self.superblock, "xattr_id_table_start")
        none = read_blocks(np.zeros(0, np.uint8), 0, self.unpack, "xattr table")[0]
        if at > self.end - 16:
            return none, np.zeros(0, XATTR_ID), self.end
        header = np.frombuffer(self.reader.read(at, 16), "<u4")
        start, count = int(header[0]) | (int(header[1]) & 0x3FFFFFFF) << 32, int(header[2])
        found, first = self.indexed("xattr table", "xattr_id_table_start", count, XATTR_ID.itemsize, 16)
        values = self.blocks("xattr table", start, first) if start != first else none
        return values, records(found.data[: found.length], XATTR_ID), min(start, first)


def _read_tables(reader: Reader, superblock: np.void, rows: ExtentRows, damage: Damage) -> _Tables:
    """Read every table and add its rows.

    Tables lie one behind the other; each ends where the next one begins.
    """
    source = _TableReader(reader, superblock, rows, damage)
    source.region("superblock", 0, SUPERBLOCK.itemsize)
    if int(superblock["flags"]) & COMPRESSOR_OPTIONS:
        at = SUPERBLOCK.itemsize
        length = int.from_bytes(reader.read_clipped(at, 2), "little") & (UNCOMPRESSED - 1)
        source.region("compressor options", at, at + 2 + length)
    xattrs, xattr_ids, xattr_start = source.xattrs()
    ids, id_start = source.indexed("id table", "id_table_start", int(superblock["no_ids"]), 4)
    _, export_start = source.indexed("export table", "lookup_table_start", int(superblock["inodes"]), 8)
    fragments, fragment_start = source.indexed(
        "fragment table", "fragment_table_start", int(superblock["fragments"]), FRAGMENT.itemsize
    )
    directory_start = _place(superblock, "directory_table_start")
    inodes = source.blocks("inode table", _place(superblock, "inode_table_start"), directory_start)
    directories = source.blocks(
        "directory table", directory_start, min(xattr_start, id_start, export_start, fragment_start)
    )
    return _Tables(
        inodes, directories, records(fragments.data[: fragments.length], FRAGMENT),
        widen(np.frombuffer(ids.data[: ids.length // 4 * 4], "<u4"), "id"), xattr_ids, xattrs,
        np.array(source.regions, np.int64).reshape(-1, 2),
    )  # fmt: skip


def _root(inodes: Table, superblock: np.void, tree: Tree, reader: Reader) -> int:
    reference = int(superblock["root_inode"])
    at = inodes.position(
        ints(_place(superblock, "inode_table_start") + (reference >> 16)), ints(reference & 0xFFFF)
    )[0]
    row = np.flatnonzero(tree.column["at"] == at)
    if at < 0 or not len(row) or tree.column["type"][row[0]] != DIR:
        raise Corrupt(
            f"{reader.name}: root_inode at byte 32 is {reference:#x}, where the inode table has no directory",
            32,
        )
    return int(tree.column["inode"][row[0]])


def _inodes(found: _Tables, tree: Tree) -> pa.Table:
    column = tree.column
    block = np.searchsorted(found.inodes.start, column["at"], "right") - 1
    within = np.where(found.inodes.compressed[block], 0, 2 + column["at"] - found.inodes.start[block])
    owners = np.append(found.ids, -1)

    def owner(name: str) -> Int:
        return owners[np.where(column[name] < len(found.ids), column[name], -1)]

    return tables.make(
        "inodes", volume=np.zeros(len(column["inode"]), np.int64), inode=column["inode"],
        type=tables.type_of_mode(column["mode"]), mode=column["mode"], uid=owner("uid"), gid=owner("gid"),
        size=column["size"], nlink=column["nlink"], mtime_ns=column["mtime"] * 1_000_000_000,
        flags=np.zeros(len(column["inode"]), np.int64), record_offset=found.inodes.disk[block] + within,
    )  # fmt: skip


def _names(tree: Tree) -> pa.Table:
    offsets = np.append(0, np.cumsum(tree.name_length)).astype(np.int32)
    names = pa.Array.from_buffers(
        pa.binary(), len(tree.name_length), [None, pa.py_buffer(offsets), pa.py_buffer(tree.name)]
    )
    return tables.make(
        "names", volume=np.zeros(len(names), np.int64), parent=tree.parent, inode=tree.child, name=names
    )


def _content(
    rows: ExtentRows, reader: Reader, superblock: np.void, found: _Tables, tree: Tree, damage: Damage
) -> None:
    """Rows of all blocks and fragments."""
    block_size = int(superblock["block_size"])
    parts = [
        _block_rows(found.inodes, tree, block_size, damage),
        _fragment_rows(found.fragments, tree, block_size, damage),
    ]
    inode, at, size, start, length, packed = (np.concatenate([part[i] for part in parts]) for i in range(6))
    inside = (start >= 0) & (start <= min(int(superblock["bytes_used"]), reader.size) - length)
    damage.check(inside, "outside", "blocks of files lie outside the image", start)
    inode, at, size, start, length, packed = (
        values[inside] for values in (inode, at, size, start, length, packed)
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


Columns = tuple[Int, Int, Int, Int, Int, Int]
"""inode, file offset, bytes of the file, volume offset, bytes there, whether they are compressed."""


def _block_rows(table: Table, tree: Tree, block_size: int, damage: Damage) -> Columns:
    """Whole blocks: each inode has a list of their stored sizes; they lie one behind the other."""
    column = tree.column
    file = np.flatnonzero((column["type"] == REG) & (column["size"] > 0))
    size, tail = column["size"][file], column["fragment"][file] != INVALID
    count = np.where(tail, size // block_size, -(-size // block_size))
    fits = count <= (table.length - column["list_at"][file]) // 4
    fits &= (
        np.cumsum(np.where(fits, count, 0)) <= table.length // 4
    )  # lists do not overlap, so together they are shorter than the table
    what = "files claim more blocks than the inode table has room for"
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
            (~stored)[there].astype(np.int64))  # fmt: skip


def _words(table: Table, at: Int) -> Int:
    four = table.data[at[:, None] + np.arange(4)].astype(np.int64) if len(at) else np.zeros((0, 4), np.int64)
    result: Int = four @ (np.int64(1) << (8 * np.arange(4, dtype=np.int64)))
    return result


def _fragment_rows(fragments: np.ndarray, tree: Tree, block_size: int, damage: Damage) -> Columns:
    """Tails: a compressed fragment as a whole for each file, of a stored one the very bytes."""
    column = tree.column
    file = np.flatnonzero((column["type"] == REG) & (column["fragment"] != INVALID) & (column["size"] > 0))
    known = column["fragment"][file] < len(fragments)
    damage.add("extents", "files refer to fragments that do not exist", count=int((~known).sum()))
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
            (~stored).astype(np.int64))  # fmt: skip


def _inside_tables(rows: ExtentRows, found: _Tables, tree: Tree) -> None:
    """Names, link targets and attributes: inside metadata blocks that are named above, so INLINE."""
    column = tree.column

    def add(kind: int, table: Table, inode: Int, at: Int, length: Int, content: bool = False) -> None:
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
    link = (
        (column["type"] == SYMLINK)
        & (column["size"] > 0)
        & (column["list_at"] + column["size"] <= found.inodes.length)
    )
    link &= np.cumsum(np.where(link, column["size"], 0)) <= found.inodes.length
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


def _structures() -> Structures:
    return {
        "superblock": Structure(SUPERBLOCK),
    }


FORMAT = FilesystemFormat(NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
