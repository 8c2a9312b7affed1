"""Who owns the volume's bytes: descriptors, directories, path tables, files, boot images."""

import numpy as np

from virt_bmap.core.arrays import Int, expand, ints, subtract, union
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.iso9660.inodes import FileRecords, without_content
from virt_bmap.formats.filesystems.iso9660.names import DIRECTORY, Walk
from virt_bmap.formats.filesystems.iso9660.superblock import (
    FIRST_DESCRIPTOR,
    Descriptors,
    DirectoryTree,
    read_boot_catalog,
    sorted_ranges,
)
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import ERROR
from virt_bmap.model.tables import ExtentRows

MAX_UNITS = 1 << 20
"""Rows that interleaved files may become; discs that really have some hold a handful."""


SYSTEM_AREA = 32768


def add_metadata(
    rows: ExtentRows,
    reader: Reader,
    found: Descriptors,
    walks: list[tuple[DirectoryTree, Walk]],
    main: DirectoryTree,
) -> tuple[Int, Int]:
    """Rows of everything but files; returns the ranges they take."""
    system = reader.read_clipped(0, 512)
    rows.add(
        tables.BOOT,
        0,
        SYSTEM_AREA,
        part="isohybrid system area" if system[510:] == b"\x55\xaa" else "system area",
    )
    own, first = max(found.start, SYSTEM_AREA), found.start + FIRST_DESCRIPTOR
    rows.add(tables.BOOT, own, first - own, part="system area of the session")
    rows.add(tables.METADATA, first, found.end - first, part="volume descriptors")
    owned = union(*sorted_ranges([(0, SYSTEM_AREA), (own, found.end)]))
    for tree, seen in walks:
        low, size = seen.directories
        high = np.minimum(low + _whole(size, found.block_size), reader.size)
        kind, part = (tables.DIRECTORY, None) if tree is main else (tables.METADATA, f"{tree.name} directory")
        rows.add(kind, low, high - low, part=part, inode=low if tree is main else -1)
        owned = union(np.append(owned[0], low), np.append(owned[1], high))
    tables_at = sorted_ranges(
        [
            (at, at + _whole_int(size, found.block_size))
            for tree in found.trees
            for at, size in tree.path_tables
        ]
    )
    areas = [seen.areas for _, seen in walks]
    low, high = union(
        np.concatenate([area[0] for area in areas]), np.concatenate([area[1] for area in areas])
    )
    blocks = low // found.block_size * found.block_size, _whole(high, found.block_size)
    for part, ranges in (("path table", union(*tables_at)), ("continuation area", blocks)):
        inside = ranges[0], np.minimum(ranges[1], reader.size)
        low, high = subtract(*inside, *owned)
        rows.add(tables.METADATA, low, high - low, part=part)
        owned = union(np.append(owned[0], low), np.append(owned[1], high))
    return owned


def _whole(lengths: Int, block_size: int) -> Int:
    """Lengths rounded up to whole blocks."""
    return -(-lengths // block_size) * block_size


def _whole_int(length: int, block_size: int) -> int:
    return -(-length // block_size) * block_size


def add_content(
    rows: ExtentRows,
    reader: Reader,
    found: Descriptors,
    files: FileRecords,
    owned: tuple[Int, Int],
    damage: Damage,
) -> tuple[Int, Int]:
    """Rows of file contents, extended attribute records and link targets; returns all ranges taken so far."""
    column = files.walk.column
    record = np.flatnonzero(
        ((column["flags"] & DIRECTORY) == 0) & (column["size"] > 0) & ~without_content(column)
    )
    file = files.file[record]
    before = np.cumsum(column["size"][record]) - column["size"][record]
    new = np.append(True, file[1:] != file[:-1])[: len(file)]
    in_file = before - np.repeat(before[new], np.diff(np.append(np.flatnonzero(new), len(file))))
    start, length, at, row = _units(column, record, in_file, found.block_size, damage)
    inode, stream = files.inode[file][row], files.associated[file][row]
    packed = files.real_size[file][row]
    start = np.append(start, files.hidden["extent"])
    length = np.append(length, _whole(files.hidden["size"], found.block_size))
    hidden = len(files.hidden["extent"])
    inode, at = np.append(inode, files.hidden["offset"]), np.append(at, np.zeros(hidden, np.int64))
    stream = np.append(stream, np.zeros(hidden, bool))
    packed = np.append(packed, np.full(hidden, -1, np.int64))
    end = np.minimum(start + length, reader.size)
    outside = start + length > _whole_int(reader.size, found.block_size)
    damage.add(
        "outside",
        f"[extent of a file reaches|extents of files reach] beyond the end at {reader.size:#x}",
        start[outside],
    )
    start = np.minimum(start, end)
    pieces = cut_shared(start, end)
    where = pieces.row
    low, size = pieces.start, pieces.end - pieces.start
    flags = pieces.shared * tables.SHARED + (packed[where] >= 0) * tables.COMPRESSED
    file_offset = at[where] + np.where(packed[where] >= 0, 0, low - start[where])
    file_length = np.where(packed[where] >= 0, packed[where], size)
    for associated, part in ((False, None), (True, "associated file")):
        mine = stream[where] == associated
        rows.add(tables.DATA, low[mine], size[mine], part=part, inode=inode[where][mine],
            file_offset=file_offset[mine],
                 file_length=file_length[mine], flags=flags[mine])  # fmt: skip
    owned = union(np.append(owned[0], start), np.append(owned[1], end))
    return _attributes(rows, files, record, reader, owned)


def _units(
    column: dict[str, Int], record: Int, in_file: Int, block_size: int, damage: Damage
) -> tuple[Int, Int, Int, Int]:
    """(start, length, file offset, position in `record`) of the records' bytes; one row each, but interleaved
    files have one for each unit."""
    size, unit, gap = column["size"][record], column["unit"][record], column["gap"][record]
    woven = (unit > 0) & (gap > 0)
    count = np.where(woven, -(-size // np.maximum(unit, 1)), 1)
    if int(count.sum()) > len(record) + MAX_UNITS:
        what = f"interleaved [file has|files have] more than {MAX_UNITS:,} units and [is|are] shown as one"
        damage.add("simplified", what, count=int(woven.sum()), severity=ERROR)
        woven, count = np.zeros(len(record), bool), np.ones(len(record), np.int64)
    row, nth = expand(count)
    start = column["extent"][record][row] + nth * (unit + gap)[row]
    left = size[row] - nth * unit[row]
    length = _whole(np.where(woven[row], np.minimum(left, unit[row]), left), block_size)
    return start, length, in_file[row] + nth * unit[row], row


def _attributes(
    rows: ExtentRows, files: FileRecords, record: Int, reader: Reader, owned: tuple[Int, Int]
) -> tuple[Int, Int]:
    """Extended attribute records before the content, and link targets inside system use entries."""
    column = files.walk.column
    mine = record[column["xar"][record] > 0]
    low = np.maximum(column["extent"][mine] - column["xar"][mine], 0)
    high = np.minimum(column["extent"][mine], reader.size)
    rows.add(
        tables.XATTR,
        low,
        np.maximum(high - low, 0),
        part="extended attribute record",
        inode=files.inode[files.file[mine]],
    )
    at, where, length = files.walk.links
    rows.add(tables.SYMLINK, where, length, part="SL", inode=at, flags=tables.INLINE)
    return union(np.append(owned[0], low), np.append(owned[1], high))


def add_boot(
    rows: ExtentRows, reader: Reader, found: Descriptors, owned: tuple[Int, Int], damage: Damage
) -> tuple[Int, Int]:
    """The boot catalog and its images: rows of their own where no file has these bytes, named inside the
    file's where one does."""
    for catalog in found.boot_catalogs:
        length, images = read_boot_catalog(reader, catalog, damage)
        named = [(tables.METADATA, "El Torito boot catalog", catalog, length)]
        named += [(tables.BOOT, image.name, image.offset, image.length) for image in images]
        for kind, part, offset, size in named:
            low, high = subtract(ints(offset), ints(offset + size), *owned)
            rows.add(kind, low, high - low, part=part)
            inside = subtract(ints(offset), ints(offset + size), low, high)
            rows.add(kind, inside[0], inside[1] - inside[0], part=part, flags=tables.INLINE)
            owned = union(np.append(owned[0], low), np.append(owned[1], high))
    return owned
