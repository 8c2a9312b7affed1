"""The tables of metadata blocks: inodes, directories, fragments, exports, ids, attributes."""

from dataclasses import dataclass

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.layout import records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.squashfs.compression import (
    METADATA_SIZE,
    UNCOMPRESSED,
    MetadataBlocks,
    codec_of,
    read_blocks,
)
from virt_bmap.formats.filesystems.squashfs.superblock import COMPRESSOR_OPTIONS, SUPERBLOCK, place_of
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

FRAGMENT = struct(16, [(0, "start_block", "<u8"), (8, "size", "<u4")])


XATTR_ID = struct(16, [(0, "xattr", "<u8"), (8, "count", "<u4"), (12, "size", "<u4")])


MAX_TABLE = 1 << 30
"""Bytes of one table on disk: 64 million inodes have about this much."""


@dataclass
class MetadataTables:
    """What the tables hold. `regions` are (start, end) of all metadata in bytes of the volume."""

    inodes: MetadataBlocks
    directories: MetadataBlocks
    fragments: np.ndarray
    ids: Int
    xattr_ids: np.ndarray
    xattrs: MetadataBlocks
    regions: Int


class _TableReader:
    """Reads tables, names the bytes they take, and writes down what is wrong with them."""

    def __init__(self, reader: Reader, superblock: np.void, rows: ExtentRows, damage: Damage) -> None:
        self.reader, self.superblock, self.rows, self.damage = reader, superblock, rows, damage
        self.codec = codec_of(superblock)
        self.end = min(int(superblock["bytes_used"]), reader.size)
        self.regions: list[tuple[int, int]] = []

    def region(self, part: str, start: int, stop: int) -> Bytes:
        """Name the bytes [start, stop) and read them; nothing where they do not lie inside the image."""
        if not 0 <= start < stop <= self.end or stop - start > MAX_TABLE:
            if start != stop:
                words = (
                    f"the {part} from {start:#x} to {stop:#x} is not inside "
                    "the image, or does not end before the next table"
                )
                self.damage.say("tree", words, start)
            return np.zeros(0, np.uint8)
        self.rows.add(tables.METADATA, start, stop - start, part=part)
        self.regions.append((start, stop))
        return self.reader.read_ranges(ints(start), ints(stop - start))

    def blocks(self, part: str, start: int, stop: int) -> MetadataBlocks:
        """The metadata blocks that fill [start, stop)."""
        table, broken = read_blocks(self.region(part, start, stop), start, self.codec, part)
        self.damage.add("tree", f"metadata [block|blocks] of the {part} can't be read", start, broken)
        return table

    def indexed(
        self, part: str, column: str, count: int, size: int, header: int = 0
    ) -> tuple[MetadataBlocks, int]:
        """A table of `count` records of `size` bytes, whose metadata blocks are found through pointers
        `header` bytes after the superblock's `column`; and where the first of them lies."""
        index = place_of(self.superblock, column)
        none = read_blocks(np.zeros(0, np.uint8), 0, self.codec, part)[0]
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

    def xattrs(self) -> tuple[MetadataBlocks, np.ndarray, int]:
        """The attributes, the records that inodes refer to, and where the first of both lies."""
        at = place_of(self.superblock, "xattr_id_table_start")
        none = read_blocks(np.zeros(0, np.uint8), 0, self.codec, "xattr table")[0]
        if at > self.end - 16:
            return none, np.zeros(0, XATTR_ID), self.end
        header = np.frombuffer(self.reader.read(at, 16), "<u4")
        start, count = int(header[0]) | (int(header[1]) & 0x3FFFFFFF) << 32, int(header[2])
        found, first = self.indexed("xattr table", "xattr_id_table_start", count, XATTR_ID.itemsize, 16)
        values = self.blocks("xattr table", start, first) if start != first else none
        return values, records(found.data[: found.length], XATTR_ID), min(start, first)


def read_tables(reader: Reader, superblock: np.void, rows: ExtentRows, damage: Damage) -> MetadataTables:
    """Read every table and add its rows.

    Tables lie one after the other; each ends where the next one begins.
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
    directory_start = place_of(superblock, "directory_table_start")
    inodes = source.blocks("inode table", place_of(superblock, "inode_table_start"), directory_start)
    directories = source.blocks(
        "directory table", directory_start, min(xattr_start, id_start, export_start, fragment_start)
    )
    return MetadataTables(
        inodes, directories, records(fragments.data[: fragments.length], FRAGMENT),
        widen(np.frombuffer(ids.data[: ids.length // 4 * 4], "<u4"), "id"), xattr_ids, xattrs,
        np.array(source.regions, np.int64).reshape(-1, 2),
    )  # fmt: skip
