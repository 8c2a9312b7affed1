"""Who owns the volume's blocks, and which ones the partitions call free."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bytes, Int, complement, ints, subtract, union
from virt_bmap.core.columns import take
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import DiscSession, Reader
from virt_bmap.core.stored import afford
from virt_bmap.formats.common import sessions
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.udf import inodes as entries
from virt_bmap.formats.filesystems.udf import superblock
from virt_bmap.formats.filesystems.udf.inodes import EntryBatch, Extents, FileEntries
from virt_bmap.formats.filesystems.udf.sessions import later
from virt_bmap.formats.filesystems.udf.superblock import LogicalVolume, Partition
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

VAT_WITHIN = 4
"""Blocks at the end in which the virtual allocation table's ICB may lie: Linux' udf_find_vat_block()."""
VAT_TAIL, VAT_BEFORE = 36, 132
"""Bytes after the numbers of a table of UDF 1.50; and where the header of a later one says where the table
before it lies."""
STEP, MOST_ZEROES = 1 << 20, 1 << 30
"""Bytes: how the end of what was written is looked for, and in how many zeroes at most, since servers do not
tell what is stored."""


def add_content(
    rows: tables.ExtentRows, found: FileEntries, extents: Extents, block_size: int, damage: Damage
) -> None:
    """ICBs, and what lies where they say. Bytes that several files have are shared."""
    rows.add(tables.METADATA, found.record, block_size, part="file entry", inode=found.inode)
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


def open_partitions(
    reader: Reader, disk: LogicalVolume, rows: tables.ExtentRows, damage: Damage, state: int = 0
) -> None:
    """Where the blocks of partitions lie that are files of others; `state`: by which of the virtual
    allocation tables, from 1, which was the first to be written (0: the last one). UsageError where there are
    not as many."""
    if state and not any(part.below and part.metadata_map is None for part in disk.partitions):
        sessions.begin(reader, DiscSession(state), lambda: [0])
    for part in disk.partitions[:]:
        if part.below is None:
            continue
        reference = next(
            (at for at, one in enumerate(disk.partitions) if not one.below and one.number == part.number), -1
        )
        if reference < 0:
            reference = len(disk.partitions)
            disk.partitions.append(part.below)  # after those that references count
        if part.metadata_map is None:
            _open_virtual(reader, disk, part, reference, rows, state)
        else:
            _open_metadata(reader, disk, part, part.metadata_map, reference, rows, damage)


class VirtualTable(NamedTuple):
    """A virtual allocation table: the block of its ICB in the partition below, where each block of the
    virtual partition lies there, and the block of the ICB of the table before it."""

    block: int
    blocks: Int
    before: int
    found: EntryBatch


def _open_virtual(
    reader: Reader, disk: LogicalVolume, part: Partition, reference: int, rows: tables.ExtentRows, state: int
) -> None:
    """Where each block of the partition lies in the one below. Raises Corrupt where no table says so,
    UsageError where there are not as many as `state`."""
    size, below = disk.block_size, disk.partitions[reference]
    table = _last_table(reader, disk, reference, reader.size)
    for end in later(reader, disk)[:1].tolist() if table is None else []:
        table = _last_table(reader, disk, reference, end)
    if table is None:
        raise Corrupt(f"{reader.name}: no virtual allocation table ends what was written", _written(reader))
    if state:
        table = _earlier(reader, disk, reference, table, state)
        disk.virtual = below.start + table.block * size
    what = "virtual allocation table"
    rows.add(tables.METADATA, table.found.entries.record, size, part=f"file entry of the {what}")
    out = take(table.found.extents, np.flatnonzero(table.found.extents.embedded == 0))
    rows.add(tables.METADATA, out.start, out.length, part=what)
    there = np.flatnonzero(table.blocks < below.length)
    new = np.append(True, (np.diff(there) != 1) | (np.diff(table.blocks[there]) != 1))[: len(there)]
    first = there[new]
    count = np.diff(np.append(np.flatnonzero(new), len(there)))
    part.runs = first, below.start + table.blocks[first] * size, count
    part.length = len(table.blocks)


def _last_table(reader: Reader, disk: LogicalVolume, reference: int, end: int) -> VirtualTable | None:
    """The table whose ICB is the last block that was written before byte `end`."""
    last = (_written(reader, end) - disk.partitions[reference].start - 1) // disk.block_size
    tried = range(last, max(-1, last - VAT_WITHIN), -1)
    found = (_virtual_table(reader, disk, reference, block) for block in tried)
    return next((one for one in found if one), None)


def _earlier(
    reader: Reader, disk: LogicalVolume, reference: int, newest: VirtualTable, state: int
) -> VirtualTable:
    """The table that was the `state`th to be written: each says where the one before it lies."""
    places, one = [newest.block], newest
    while (before := one.before) < one.block:
        found = _virtual_table(reader, disk, reference, before)
        if found is None:
            break
        places.append(before)
        one = found
    below = disk.partitions[reference]
    starts = [below.start + block * disk.block_size for block in reversed(places)]
    sessions.begin(reader, DiscSession(state), lambda: starts)
    chosen = _virtual_table(reader, disk, reference, places[-state])
    assert chosen
    return chosen


def _virtual_table(reader: Reader, disk: LogicalVolume, reference: int, block: int) -> VirtualTable | None:
    """The table whose ICB is this block of the partition below; None where that is another file.

    UDF 2.60, 2.2.11: a header says how long it is, then one number for each block. UDF 1.50, 2.2.10: the
    numbers, then the name of the table and where the one before it lies.
    """
    if not 0 <= block < disk.partitions[reference].length:
        return None
    found = next(entries.read_entries(reader, disk, ints(reference), ints(block), Damage()), None)
    if (
        found is None
        or len(found.entries.inode) != 1
        or found.entries.file_type[0] not in (entries.VAT, entries.VAT_150)
    ):
        return None
    order = np.argsort(found.extents.file_offset)
    start, length = found.extents.start[order], found.extents.length[order]
    size = min(int(found.entries.size[0]), int(length.sum()))
    afford(reader, size, "a virtual allocation table")
    data = reader.read_ranges(start, length)[:size]
    if found.entries.file_type[0] == entries.VAT:
        before = _number(data[VAT_BEFORE : VAT_BEFORE + 4])
        data = data[_number(data[:2]) :]
    else:
        tail = data[max(0, size - VAT_TAIL) :]
        if not tail.tobytes()[1:].startswith(b"*UDF Virtual Alloc Tbl"):
            return None
        before, data = _number(tail[-4:]), data[: size - VAT_TAIL]
    return VirtualTable(block, data[: len(data) // 4 * 4].view("<u4").astype(np.int64), before, found)


def _number(data: Bytes) -> int:
    return int.from_bytes(data.tobytes(), "little")


def _written(reader: Reader, end: int | None = None) -> int:
    """Where the zeroes begin that lie before byte `end`, or that the image ends in."""
    starts, ends = reader.stored()
    end = min(reader.size if end is None else end, reader.size)
    end = int(np.minimum(ends, end)[starts < end].max(initial=0))
    least = max(0, end - MOST_ZEROES)
    while end > least:
        start = max(0, end - STEP)
        used = np.flatnonzero(np.frombuffer(reader.read(start, end - start), np.uint8))
        if len(used):
            return start + int(used[-1]) + 1
        end = start
    return 0


def _open_metadata(
    reader: Reader,
    disk: LogicalVolume,
    part: Partition,
    about: np.void,
    reference: int,
    rows: tables.ExtentRows,
    damage: Damage,
) -> None:
    """The extents of the files in which a metadata partition lies; the mirror serves where the file is
    lost."""
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
    _, end, _ = superblock.recognised(reader, disk.start)
    first = disk.start + superblock.RECOGNITION
    own = max(disk.start, superblock.RECOGNITION)
    rows.add(tables.BOOT, 0, superblock.RECOGNITION, part="system area")
    rows.add(tables.BOOT, own, first - own, part="system area of the session")
    rows.add(tables.METADATA, first, end - first, part="volume recognition sequence")
    rows.add(tables.METADATA, file_set, disk.block_size, part="file set descriptor")


def add_free(rows: tables.ExtentRows, reader: Reader, disk: LogicalVolume, damage: Damage) -> None:
    """What the partitions' own bitmaps and tables call free.

    Where nothing can be written any more, nobody has to keep them: they are not an allocator's word; nor is
    one session's, of a disc that has several.
    """
    plain = {part.number: at for at, part in reversed([*enumerate(disk.partitions)]) if not part.below}
    for one in disk.descriptors:
        number = plain.get(int(one["PartitionNumber"]), -1)
        if number < 0:  # of no logical volume
            continue
        part = disk.partitions[number]
        is_word = int(one["AccessType"]) in superblock.REWRITABLE and not disk.start
        kind = tables.FREE if is_word else tables.UNREFERENCED
        for name in ("UnallocatedSpaceBitmap", "FreedSpaceBitmap"):
            length, block = (int(value) for value in one[name])
            length &= 0x3FFFFFFF
            if length and block < part.length:
                length = min(length, (part.length - block) * disk.block_size)
                low, high = _free_blocks(rows, reader, disk, number, block, length, damage)
                rows.add(
                    kind, *entries.pieces(disk, low * 0 + number, low, (high - low) * disk.block_size)[2:]
                )
        length, block = (int(value) for value in one["UnallocatedSpaceTable"])
        place = int(disk.places(ints(number), ints(block))[0])
        if length & 0x3FFFFFFF and place >= 0:
            rows.add(tables.METADATA, place, disk.block_size, part="unallocated space entry")
            rows.add(kind, *entries.unallocated(reader, disk, number, place))


def _free_blocks(
    rows: tables.ExtentRows,
    reader: Reader,
    disk: LogicalVolume,
    number: int,
    block: int,
    length: int,
    damage: Damage,
) -> tuple[Int, Int]:
    """(starts, ends) of the free blocks of a partition by its bitmap of `length` bytes at `block`, which gets
    a row; nothing where it can't be read."""
    _, _, start, size = entries.pieces(disk, ints(number), ints(block), ints(length))
    rows.add(tables.METADATA, start, size, part="space bitmap")
    place = int(start.min(initial=reader.size))
    if len(start) == 1:
        found = superblock.free_blocks(reader, place, length, disk.partitions[number].length)
        if found is not None:
            return found
    what = "is not valid" if len(start) == 1 else "lies in packets that sparing has moved"
    damage.say("allocator", f"the space bitmap at byte {place:#x} {what}: free space is not known", place)
    return EMPTY, EMPTY


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
