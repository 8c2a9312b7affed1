"""Inodes and directories, reached level by level from the root: inode references lead to inodes, directories
to more references.

Inodes have no fixed size and no index but the references in directories, so a level of the tree is parsed at
once.

Sources: Linux fs/squashfs/squashfs_fs.h (structures), inode.c, dir.c; Documentation/filesystems/squashfs.rst.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, gather, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.squashfs.compression import (
    MetadataBlocks,
)
from virt_bmap.formats.filesystems.squashfs.metadata import MetadataTables
from virt_bmap.formats.filesystems.squashfs.superblock import (
    place_of,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions

DIR, REG, SYMLINK, BLKDEV, CHRDEV, _, SOCKET = range(1, 8)
EXTENDED = 7
"""An extended inode's type is the basic one's plus this."""
MODES = np.array([0, 0o40000, 0o100000, 0o120000, 0o60000, 0o20000, 0o10000, 0o140000], np.int64)
INVALID = 0xFFFFFFFF
MAX_LEVELS = 4096
"""More levels than a path of 4096 bytes can name."""

WINDOW = struct(64, [
    (0, "inode_type", "<u2"), (2, "mode", "<u2"), (4, "uid", "<u2"), (6, "guid", "<u2"), (8, "mtime", "<u4"),
    (12, "inode_number", "<u4"), (16, "dir_start_block", "<u4"), (20, "dir_nlink", "<u4"),
    (24, "dir_file_size", "<u2"), (26, "dir_offset", "<u2"), (16, "ldir_nlink", "<u4"),
    (20, "ldir_file_size", "<u4"), (24, "ldir_start_block", "<u4"), (32, "ldir_i_count", "<u2"),
    (34, "ldir_offset", "<u2"), (36, "ldir_xattr", "<u4"), (16, "reg_start_block", "<u4"),
    (20, "reg_fragment", "<u4"), (24, "reg_offset", "<u4"), (28, "reg_file_size", "<u4"),
    (16, "lreg_start_block", "<u8"), (24, "lreg_file_size", "<u8"), (40, "lreg_nlink", "<u4"),
    (44, "lreg_fragment", "<u4"), (48, "lreg_offset", "<u4"), (52, "lreg_xattr", "<u4"), (16, "nlink", "<u4"),
    (20, "symlink_size", "<u4"), (24, "ldev_xattr", "<u4"), (20, "lipc_xattr", "<u4"),
])  # fmt: skip
"""All inode types as one struct: the bytes from an inode's first on."""
HEADER = struct(12, [(0, "count", "<u4"), (4, "start_block", "<u4"), (8, "inode_number", "<u4")])
ENTRY = struct(8, [(0, "offset", "<u2"), (2, "inode_number", "<i2"), (4, "type", "<u2"), (6, "size", "<u2")])
COLUMNS = (
    "at", "type", "mode", "uid", "gid", "mtime", "inode", "nlink", "size", "start", "fragment", "offset",
    "xattr", "list_at", "index_count",
)  # fmt: skip


@dataclass
class WalkedTree:
    """All inodes, one row each in the columns COLUMNS, and all names: parent and inode numbers, and the names
    joined.

    `at` and `list_at` are positions in the inode table; `start` is a file's first byte in the volume or a
    directory's block in the directory table; `listing` is where a directory's names lie in the directory
    table: (inode, position, length).
    """

    column: dict[str, Int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, EMPTY))
    parent: Int = field(default_factory=lambda: EMPTY)
    child: Int = field(default_factory=lambda: EMPTY)
    name: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    name_length: Int = field(default_factory=lambda: EMPTY)
    listing: tuple[Int, Int, Int] = (EMPTY, EMPTY, EMPTY)


def windows(data: Bytes, at: Int, dtype: np.dtype[np.void]) -> np.ndarray:
    """The records at positions `at` of a table that ends in enough spare bytes."""
    return records(data[at[:, None] + np.arange(dtype.itemsize)], dtype) if len(at) else np.zeros(0, dtype)


def walk(tables_: MetadataTables, superblock: np.void, damage: Damage) -> WalkedTree:
    """Everything that can be reached from the root's reference (block << 16 | offset, relative to the inode
    table)."""
    inodes, directories = tables_.inodes, tables_.directories
    inode_start = place_of(superblock, "inode_table_start")
    root, block_size = int(superblock["root_inode"]), int(superblock["block_size"])
    found: list[dict[str, Int]] = []
    names: list[tuple[Int, Int, Bytes, Int]] = []
    listings: list[tuple[Int, Int, Int]] = []
    seen = EMPTY
    lost = budget = 0
    level = inodes.position(
        np.array([inode_start + (root >> 16)], np.int64), np.array([root & 0xFFFF], np.int64)
    )
    for _ in range(MAX_LEVELS):
        level = np.unique(level[level >= 0])
        level = level[positions(seen, level) < 0] if len(seen) else level
        if not len(level):
            break
        seen = np.append(seen, level)
        column = parse_inodes(inodes, level, block_size)
        good = (column["type"] > 0) & (column["at"] + 16 <= inodes.length)
        lost += int((~good).sum())
        column = {name: values[good] for name, values in column.items()}
        found.append(column)
        is_directory = column["type"] == DIR
        own = {name: values[is_directory] for name, values in column.items()}
        at = directories.position(
            directories.disk[0] + own["start"] if len(directories.disk) else own["start"], own["offset"]
        )
        length = own["size"] - 3  # '.' and '..' count as three bytes
        usable = (length > 0) & (at >= 0) & (at + length <= directories.length)
        lost += int(((length > 0) & ~usable).sum())
        usable &= np.cumsum(np.where(usable, length, 0)) + budget <= directories.length
        budget += int(length[usable].sum())
        own = {name: values[usable] for name, values in own.items()}
        at, length = at[usable], length[usable]
        listings.append((own["inode"], at, length))
        entries = parse_listings(directories, inodes, own, at, length)
        lost += entries.broken
        target = inodes.position(inode_start + entries.block, entries.offset)
        lost += int((target < 0).sum())
        names.append((own["inode"][entries.directory], target, entries.name, entries.name_length))
        level = target
    else:
        damage.say("too-deep", f"more than {MAX_LEVELS} levels of directories")
    damage.add(
        "inode",
        "[inode, directory or name leads nowhere or contradicts itself|inodes, directories or names lead "
        "nowhere or contradict themselves]",
        count=lost,
    )
    return _result(found, names, listings, damage)


def _result(
    found: list[dict[str, Int]],
    names: list[tuple[Int, Int, Bytes, Int]],
    listings: list[tuple[Int, Int, Int]],
    damage: Damage,
) -> WalkedTree:
    """The levels joined, with inode numbers for positions."""
    if not found:
        return WalkedTree()
    column = {name: np.concatenate([part[name] for part in found]) for name in COLUMNS}
    _, first = np.unique(column["inode"], return_index=True)
    again = len(column["inode"]) - len(first)
    damage.add("inode", "[inode has|inodes have] the number of another one", count=again)
    target = np.concatenate([EMPTY, *(part[1] for part in names)])
    row = positions(column["at"], target)
    keep = row >= 0
    lengths = np.concatenate([EMPTY, *(part[3] for part in names)])
    flat = np.concatenate([np.zeros(0, np.uint8), *(part[2] for part in names)])
    name = gather(flat, (np.cumsum(lengths) - lengths)[keep], lengths[keep])
    parent = np.concatenate([EMPTY, *(part[0] for part in names)])[keep]
    child = column["inode"][row[keep]]
    listing = tuple(np.concatenate([EMPTY, *(part[i] for part in listings)]) for i in range(3))
    column = {key: values[np.sort(first)] for key, values in column.items()}
    return WalkedTree(column, parent, child, name, lengths[keep], (listing[0], listing[1], listing[2]))


def parse_inodes(table: MetadataBlocks, at: Int, block_size: int) -> dict[str, Int]:
    """The inodes at positions `at` as COLUMNS; type 0 where it is none of the fourteen."""
    raw = windows(table.data, at, WINDOW)
    stored = widen(raw["inode_type"], "inode_type")
    kind = np.where((stored >= 1) & (stored <= SOCKET + EXTENDED), (stored - 1) % EXTENDED + 1, 0)
    extended = stored > EXTENDED
    is_dir, is_reg, is_link = kind == DIR, kind == REG, kind == SYMLINK
    is_device = (kind == BLKDEV) | (kind == CHRDEV)

    def pick(basic_dir: str, long_dir: str, basic_reg: str, long_reg: str, other: str | None) -> Int:
        default = widen(raw[other], other) if other else np.zeros(len(at), np.int64)
        return np.select(
            [is_dir & ~extended, is_dir, is_reg & ~extended, is_reg],
            [np.where(is_dir, raw[basic_dir], 0), np.where(is_dir, raw[long_dir], 0),
                np.where(is_reg, raw[basic_reg], 0),
             np.where(is_reg & extended, np.minimum(raw[long_reg], np.uint64(2**62)), 0).astype(np.int64)],
             default,
        ).astype(np.int64)  # fmt: skip

    size = pick("dir_file_size", "ldir_file_size", "reg_file_size", "lreg_file_size", "symlink_size")
    size = np.where(is_dir | is_reg | is_link, size, 0)
    link_end = at + 24 + np.where(is_link, size, 0)
    link_xattr = _u32(table, np.where(is_link & extended, link_end, 0))
    xattr = np.select([is_dir, is_reg, is_link, is_device],
        [raw["ldir_xattr"], raw["lreg_xattr"], link_xattr, raw["ldev_xattr"]],
                      raw["lipc_xattr"]).astype(np.int64)  # fmt: skip
    nlink = pick("dir_nlink", "ldir_nlink", "inode_type", "lreg_nlink", "nlink")
    fragment = np.where(extended, raw["lreg_fragment"], raw["reg_fragment"]).astype(np.int64)
    return {
        "at": at, "type": kind, "mode": widen(raw["mode"], "mode") & 0o7777 | MODES[kind],
        "uid": widen(raw["uid"], "uid"), "gid": widen(raw["guid"], "guid"),
        "mtime": widen(raw["mtime"], "mtime"), "inode": widen(raw["inode_number"], "inode_number"),
        "nlink": np.where(is_reg & ~extended, 1, nlink), "size": size,
        "start": pick("dir_start_block", "ldir_start_block", "reg_start_block",
            "lreg_start_block", None),
        "fragment": np.where(is_reg, fragment, INVALID),
        "offset": pick("dir_offset", "ldir_offset", "reg_offset", "lreg_offset", None),
        "xattr": np.where(extended, xattr, INVALID),
        "list_at": at + np.select([is_reg & ~extended, is_reg, is_dir & extended, is_link], [32, 56, 40, 24],
            0),
        "index_count": np.where(is_dir & extended, raw["ldir_i_count"], 0).astype(np.int64),
    }  # fmt: skip


def _u32(table: MetadataBlocks, at: Int) -> Int:
    """A number that may lie beyond the end of the table, where it is INVALID."""
    inside = (at >= 0) & (at + 4 <= table.length)
    four = table.data[np.where(inside, at, 0)[:, None] + np.arange(4)].astype(np.int64)
    return np.where(inside, four @ (np.int64(1) << (8 * np.arange(4, dtype=np.int64))), INVALID)


class DirectoryEntries(NamedTuple):
    """Directory entries: row of the directory, reference of the inode, and the names joined; `broken` counts
    listings cut short."""

    directory: Int
    block: Int
    offset: Int
    name: Bytes
    name_length: Int
    broken: int


def parse_listings(
    table: MetadataBlocks, inodes: MetadataBlocks, own: dict[str, Int], at: Int, length: Int
) -> DirectoryEntries:
    """All entries of the directories whose names are table.data[at:at+length], with a cursor at each place
    that a directory's index names."""
    row, index = _index(inodes, own, length)
    directory = np.concatenate([np.arange(len(at), dtype=np.int64), row])
    cursor = np.concatenate([at, at[row] + index])
    order = np.lexsort((cursor, directory))
    directory, cursor = directory[order], cursor[order]
    same = np.append(directory[1:] == directory[:-1], False)[: len(directory)]
    end = np.where(
        same, np.append(cursor[1:], 0)[: len(cursor)], (at + length)[directory] if len(at) else cursor
    )
    left, block = np.zeros(len(cursor), np.int64), np.zeros(len(cursor), np.int64)
    found: list[tuple[Int, Int, Int]] = []
    broken = 0
    while len(cursor):
        fresh = left == 0
        head = windows(table.data, cursor[fresh], HEADER)
        left[fresh] = widen(head["count"], "count") + 1
        block[fresh] = head["start_block"]
        wrong = (left > 256) | (fresh & (cursor + HEADER.itemsize > end))
        cursor = cursor + fresh * HEADER.itemsize
        cursor = np.minimum(cursor, table.length)
        entry = windows(table.data, cursor, ENTRY)
        size = widen(entry["size"], "size") + 1
        wrong |= (size > 256) | (cursor + ENTRY.itemsize + size > end)
        broken += int(wrong.sum())
        found.append((directory[~wrong], cursor[~wrong], block[~wrong]))
        cursor, left = cursor + ENTRY.itemsize + size, left - 1
        keep = ~wrong & (cursor < end)
        directory = directory[keep]
        cursor = cursor[keep]
        end = end[keep]
        left = left[keep]
        block = block[keep]
    where = np.concatenate([EMPTY, *(part[1] for part in found)])
    order = np.argsort(where, kind="stable")
    where = where[order]
    owner, block = (np.concatenate([EMPTY, *(part[i] for part in found)])[order] for i in (0, 2))
    entry = windows(table.data, where, ENTRY)
    size = widen(entry["size"], "size") + 1
    name = gather(table.data, where + ENTRY.itemsize, size)
    return DirectoryEntries(owner, block, widen(entry["offset"], "offset"), name, size, broken)


def _index(table: MetadataBlocks, own: dict[str, Int], length: Int) -> tuple[Int, Int]:
    """(directory, byte in its listing) of the headers that extended directories' indexes name: one for each 8
    KiB of names."""
    directory = np.flatnonzero(own["index_count"] > 0)
    cursor, left = own["list_at"][directory], own["index_count"][directory].copy()
    found: list[tuple[Int, Int]] = []
    while len(cursor):
        keep = (left > 0) & (cursor + 12 < table.length)
        directory, cursor, left = directory[keep], cursor[keep], left[keep]
        index, size = _u32(table, cursor), _u32(table, cursor + 8)
        good = (index > 0) & (index < length[directory]) & (size < 256)
        found.append((directory[good], index[good]))
        directory, cursor, left = directory[good], (cursor + 13 + size)[good], left[good] - 1
    return np.concatenate([EMPTY, *(part[0] for part in found)]), np.concatenate(
        [EMPTY, *(part[1] for part in found)]
    )


def root_inode(inodes: MetadataBlocks, superblock: np.void, tree: WalkedTree, reader: Reader) -> int:
    reference = int(superblock["root_inode"])
    at = inodes.position(
        ints(place_of(superblock, "inode_table_start") + (reference >> 16)), ints(reference & 0xFFFF)
    )[0]
    row = np.flatnonzero(tree.column["at"] == at)
    if at < 0 or not len(row) or tree.column["type"][row[0]] != DIR:
        raise Corrupt(
            f"{reader.name}: root_inode at byte 32 is {reference:#x}, where the inode table has no directory",
            32,
        )
    return int(tree.column["inode"][row[0]])


def inode_table(found: MetadataTables, tree: WalkedTree) -> pa.Table:
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


def name_table(tree: WalkedTree) -> pa.Table:
    offsets = np.append(0, np.cumsum(tree.name_length)).astype(np.int32)
    names = pa.Array.from_buffers(
        pa.binary(), len(tree.name_length), [None, pa.py_buffer(offsets), pa.py_buffer(tree.name)]
    )
    return tables.make(
        "names", volume=np.zeros(len(names), np.int64), parent=tree.parent, inode=tree.child, name=names
    )
