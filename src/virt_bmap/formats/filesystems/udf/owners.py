"""Who owns the volume's blocks, and which ones the partitions call free."""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import complement, ints, subtract, union
from virt_bmap.core.columns import take
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.udf import inodes as entries
from virt_bmap.formats.filesystems.udf import superblock
from virt_bmap.formats.filesystems.udf.inodes import Extents, FileEntries
from virt_bmap.formats.filesystems.udf.superblock import LogicalVolume
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage


def add_content(
    rows: tables.ExtentRows, found: FileEntries, extents: Extents, block_size: int, damage: Damage
) -> None:
    """ICBs, and what lies where they say. Bytes that several files have are shared."""
    rows.add(tables.METADATA, found.inode, block_size, part="file entry", inode=found.inode)
    kind = np.array([tables.DATA, tables.DIRECTORY, tables.SYMLINK])[
        (found.file_type == entries.DIRECTORY) + 2 * (found.file_type == entries.SYMLINK)
    ]
    inside = take(extents, np.flatnonzero(extents.embedded))
    rows.add(
        kind[inside.owner],
        inside.start,
        inside.length,
        inode=found.inode[inside.owner],
        file_offset=inside.file_offset,
        flags=tables.INLINE,
    )
    out = take(extents, np.flatnonzero(extents.embedded == 0))
    cut = cut_shared(out.start, out.start + out.length)
    owner, size = out.owner[cut.row], cut.end - cut.start
    unwritten = out.unwritten[cut.row] > 0
    rows.add(
        np.where(unwritten, tables.UNWRITTEN, kind[owner]),
        cut.start,
        size,
        inode=found.inode[owner],
        file_offset=out.file_offset[cut.row] + cut.start - out.start[cut.row],
        flags=cut.shared * tables.SHARED,
    )


def open_metadata(reader: Reader, disk: LogicalVolume, rows: tables.ExtentRows, damage: Damage) -> None:
    """Where the blocks of metadata partitions lie: the extents of their files, which the partition below
    holds. The mirror serves where the file is lost."""
    for part in disk.partitions[:]:
        about, below = part.metadata_map, part.below
        if about is None or below is None:
            continue
        reference = next(
            (at for at, one in enumerate(disk.partitions) if one.runs is None and one.number == part.number),
            -1,
        )
        if reference < 0:
            reference = len(disk.partitions)
            disk.partitions.append(below)  # after those that references count
        for name, part_name in (
            ("MetadataFileLocation", "metadata file"),
            ("MetadataMirrorFileLocation", "metadata mirror file"),
            ("MetadataBitmapFileLocation", "metadata bitmap file"),
        ):
            block = int(about[name])
            if block == superblock.NONE:
                continue
            for found in entries.read_entries(reader, disk, ints(reference), ints(block), damage):
                out = take(found.extents, np.flatnonzero(found.extents.embedded == 0))
                rows.add(
                    tables.METADATA,
                    found.entries.inode,
                    disk.block_size,
                    part=f"file entry of the {part_name}",
                )
                rows.add(
                    tables.METADATA,
                    found.continued[0],
                    disk.block_size,
                    part=f"{part_name}, allocation extent",
                )
                if part_name == "metadata bitmap file":
                    rows.add(tables.METADATA, out.start, out.length, part=part_name)
                    continue
                disk.held.append((part_name, out.start, out.start + out.length))
                if part.length == 0 and len(out.start):
                    order = np.argsort(out.file_offset, kind="stable")
                    part.runs = (
                        out.file_offset[order] // disk.block_size,
                        out.start[order],
                        out.length[order] // disk.block_size,
                    )
                    part.length = int((part.runs[0] + part.runs[2]).max())


def add_structures(rows: tables.ExtentRows, reader: Reader, disk: LogicalVolume, file_set: int) -> None:
    _, end, _ = superblock.recognised(reader)
    rows.add(tables.BOOT, 0, superblock.RECOGNITION, part="system area")
    rows.add(
        tables.METADATA,
        superblock.RECOGNITION,
        end - superblock.RECOGNITION,
        part="volume recognition sequence",
    )
    rows.add(tables.METADATA, file_set, disk.block_size, part="file set descriptor")


def add_free(rows: tables.ExtentRows, reader: Reader, disk: LogicalVolume, damage: Damage) -> None:
    """What the partitions' own bitmaps and tables call free.

    Where nothing can be written any more, nobody has to keep them: they are not an allocator's word.
    """
    size = disk.block_size
    for one in disk.descriptors:
        kind = tables.FREE if int(one["AccessType"]) in superblock.REWRITABLE else tables.UNREFERENCED
        start = int(one["PartitionStartingLocation"]) * size
        blocks = min(int(one["PartitionLength"]), max(0, reader.size - start) // size)
        for name in ("UnallocatedSpaceBitmap", "FreedSpaceBitmap"):
            length, block = (int(value) for value in one[name])
            length &= 0x3FFFFFFF
            if length == 0 or block >= blocks:
                continue
            place = start + block * size
            found = superblock.free_blocks(reader, place, length, blocks)
            rows.add(
                tables.METADATA,
                place,
                min(-(-length // size) * size, (blocks - block) * size),
                part="space bitmap",
            )
            if found is None:
                damage.say(
                    "allocator",
                    f"the space bitmap at byte {place:#x} is not valid: free space is not known",
                    place,
                )
                continue
            rows.add(kind, start + found[0] * size, (found[1] - found[0]) * size)
        length, block = (int(value) for value in one["UnallocatedSpaceTable"])
        number = next(
            (at for at, part in enumerate(disk.partitions) if part.runs is None and part.start == start), -1
        )
        if length & 0x3FFFFFFF and block < blocks and number >= 0:
            place = start + block * size
            rows.add(tables.METADATA, place, size, part="unallocated space entry")
            rows.add(kind, *entries.unallocated(reader, disk, number, place))


def tiled(table: pa.Table, disk: LogicalVolume, size: int) -> pa.Table:
    """The rows, with owners for what is left of areas that hold others' blocks (metadata files, overlapping
    sequences), and, where no bitmap says what is in use, for the rest."""
    flags = tables.integers(table, "flags")
    start, length = tables.integers(table, "volume_offset"), tables.integers(table, "length")
    plain = flags & tables.INLINE == 0
    owned = union(start[plain], (start + length)[plain])
    rows = tables.ExtentRows()
    for part, begin, end in [
        *((part, ints(begin), ints(end)) for part, begin, end in disk.areas),
        *disk.held,
    ]:
        low, high = subtract(*union(begin, np.maximum(begin, np.minimum(end, size))), *owned)
        rows.add(tables.METADATA, low, high - low, part=part)
        owned = union(np.append(owned[0], low), np.append(owned[1], high))
    known = [
        one
        for one in disk.descriptors
        if any(
            int(one[name][0]) & 0x3FFFFFFF
            for name in ("UnallocatedSpaceBitmap", "UnallocatedSpaceTable", "FreedSpaceBitmap")
        )
    ]
    counted = union(
        ints([int(one["PartitionStartingLocation"]) * disk.block_size for one in known]),
        ints(
            [
                (int(one["PartitionStartingLocation"]) + int(one["PartitionLength"])) * disk.block_size
                for one in known
            ]
        ),
    )
    low, high = subtract(*complement(*owned, 0, size), *counted)
    rows.add(tables.UNREFERENCED, low, high - low)
    return tables.concat("extents", [table, rows.table(0)])
