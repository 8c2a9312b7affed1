"""UDF, as on DVDs, Blu-ray discs, memory cards and Windows' installation images.

Read are: the recognition sequence, all anchors, the volume descriptor sequences, the partitions' space
bitmaps, then the directories level by level with the file entries of a level at once. An inode is the byte of
the volume at which its ICB lies. A volume whose partition has no bitmap was written once: there what nobody
refers to is `unreferenced`.

A bridge disc is an ISO 9660 volume, too, of the same files or of others: Windows' images show one that holds
nothing but a text that says so. The tree that owns more bytes of files is mapped, ISO 9660 (with Rock Ridge)
where both own the same, and the other one's structures are named.

Sources: ECMA-167 (3rd edition); OSTA UDF 1.02 to 2.60; Linux fs/udf (v6.12); each module names its sections.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int, complement, expand, ints, joined, subtract, union
from virt_bmap.core.columns import stack, take
from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import allowance
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.common.sharing import cut_shared
from virt_bmap.formats.filesystems.udf import directories, entries, volume
from virt_bmap.formats.filesystems.udf.entries import Entries, Extents
from virt_bmap.formats.filesystems.udf.links import target
from virt_bmap.formats.filesystems.udf.volume import Volume
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

NAME = "udf"
INODE = "the byte of the volume at which its ICB lies"
FEATURES = (
    (
        "UDF 1.02 to 2.60 with blocks of 512 bytes to 16 KiB, plain and sparable partitions; metadata "
        "partitions (checked with one written by hand: no tool here makes them)"
    ),
    (
        "file entries and extended ones; short, long, extended and embedded allocation descriptors, and "
        "blocks in which they go on"
    ),
    "sparse and preallocated files, hard links, symbolic links, devices, names in 8 and 16 bits",
    "space bitmaps and tables of unallocated space; both descriptor sequences and all anchors",
    "bridge discs with ISO 9660: the tree with more content is mapped, the other one's structures are named",
)
REFUSED = (
    "virtual partitions of discs that are written in sessions (VAT)", "packets that sparing has moved",
    "ICBs with a strategy other than 4", "names of streams: their bytes are owned by their file",
)  # fmt: skip
ORACLES = (
    "content put in by a kernel's driver and by mkisofs, read back by the map",
    "udfinfo and blkid for label, UUID and counts of free blocks",
)
CHECKS = Checks(
    checksums="CRC-16 of volume descriptors; the sums of all tags",
    rules=(
        "volume structure: descriptors, partitions, virtual and sparable maps",
        "file entries: allocation descriptors, place, overlaps",
        "directories: identifiers, each directory once",
    ),
    unchecked=("content of files",),
)
MAX_LEVELS = 1024
T_OF = np.full(256, tables.T_METADATA, np.uint8)
T_OF[list(entries.MODES)] = [
    tables.T_DIRECTORY, tables.T_FILE, tables.T_BLOCK, tables.T_CHAR, tables.T_FIFO, tables.T_SOCKET,
    tables.T_SYMLINK, tables.T_FILE,
]  # fmt: skip


def probe(reader: Reader) -> bool:
    """A volume recognition sequence that names UDF, and an anchor."""
    if not volume.recognised(reader)[0]:
        return False
    try:
        volume.anchors_of(reader)
    except FormatError:
        return False
    return True


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume, or of the ISO 9660 volume beside it where that owns as much.

    Raises Corrupt and Unsupported.
    """
    if not volume.recognised(reader)[2]:
        return read_alone(reader, damage)
    from virt_bmap.formats.filesystems.udf import bridge

    return bridge.read(reader, others, damage)


def read_alone(reader: Reader, damage: Damage) -> Filesystem:
    """The UDF volume, whatever lies beside it."""
    disk = volume.read_volume(reader, damage)
    rows = tables.ExtentRows()
    _open_metadata(reader, disk, rows, damage)
    place, file_set = volume.read_file_set(reader, disk)
    partition, block = ints(int(file_set["RootPartition"])), ints(int(file_set["RootBlock"]))
    found, extents, names, beside = _walk(reader, disk, partition, block, rows, damage)
    if int(file_set["StreamLength"]) & 0x3FFFFFFF:
        beside.append((ints(-1), ints(int(file_set["StreamPartition"])), ints(int(file_set["StreamBlock"]))))
    _add_beside(reader, disk, beside, found.inode, rows, damage)
    _add_content(rows, found, extents, disk.block_size, damage)
    _add_structures(rows, reader, disk, place)
    _add_free(rows, reader, disk, damage)
    root = int(disk.places(partition, block)[0])
    ends = [part.start + part.length * disk.block_size for part in disk.partitions if part.runs is None]
    size = min(reader.size, max([*ends, *(end for _, _, end in disk.areas)]))
    extent_table = _tiled(rows.table(0), disk, size)
    state = tables.CLEAN if disk.closed else tables.IN_USE
    return Filesystem(
        type=NAME, size=size, block_size=disk.block_size, root=root, state=state, reader=reader,
        inodes=_inodes(found), names=names, extents=extent_table, uuid=disk.uuid, label=disk.label or None,
        features=f"UDF{disk.revision >> 8:x}.{disk.revision & 0xFF:02x}" if disk.revision else None,
    )  # fmt: skip


# ---- the tree ----------------------------------------------------------------------------------------------


def _walk(
    reader: Reader, disk: Volume, partition: Int, block: Int, rows: tables.ExtentRows, damage: Damage
) -> tuple[Entries, Extents, pa.Table, list[tuple[Int, Int, Int]]]:
    """All entries that are reached from the root, their extents, the names, and the ICBs of streams and
    attributes; rows for blocks with further descriptors."""
    beside: list[tuple[Int, Int, Int]] = []
    found: list[Entries] = []
    extents: list[Extents] = []
    listed: list[tuple[Int, Int, Ragged]] = []
    seen, budget = EMPTY, allowance(reader)
    for _ in range(MAX_LEVELS):
        level: list[tuple[Entries, Extents]] = []
        for batch in entries.read_entries(reader, disk, partition, block, damage):
            rows.add(
                tables.TREE,
                batch.continued[0],
                disk.block_size,
                part="allocation extent",
                inode=batch.continued[1],
            )
            level.append((batch.entries, batch.extents))
            beside.append(batch.beside)
        found += [one for one, _ in level]
        extents += [one for _, one in level]
        seen = np.union1d(seen, np.concatenate([EMPTY, *(one.inode for one, _ in level)]))
        names, budget = _names(reader, disk, level, budget, damage)
        target = disk.places(names.partition, names.block)
        listed.append((names.parent, target, names.name))
        new = (target >= 0) & ~np.isin(target, seen)
        partition, block = names.partition[new | (target < 0)], names.block[new | (target < 0)]
        if not new.any():
            break
    else:
        damage.say("too-deep", f"directories lie more than {MAX_LEVELS} levels deep: not read")
    reached = stack(Entries, found)
    before = np.cumsum([0] + [len(part.inode) for part in found]).tolist()
    extents = [replace(part, owner=part.owner + base) for part, base in zip(extents, before, strict=False)]
    parents, targets = (
        np.concatenate([EMPTY, *column])
        for column in ([one[0] for one in listed], [one[1] for one in listed])
    )
    name = Ragged.concat([one[2] for one in listed])
    exist = targets >= 0  # the rest was found to lie outside its partition
    table = tables.make(
        "names",
        volume=0,
        parent=parents[exist],
        inode=targets[exist],
        name=name.take(np.flatnonzero(exist)).arrow(),
    )
    return reached, stack(Extents, extents), table, beside


def _add_beside(
    reader: Reader,
    disk: Volume,
    beside: list[tuple[Int, Int, Int]],
    known: Int,
    rows: tables.ExtentRows,
    damage: Damage,
) -> None:
    """Rows for named streams and for attributes in files of their own: their bytes are the file's, whatever
    they are called; -1 stands for the system."""
    inode, partition, block = joined(beside, 3)
    seen, budget = known, allowance(reader)
    for _ in range(2):  # a directory of streams, and these
        place = disk.places(partition, block)
        fresh = (place >= 0) & ~np.isin(place, seen)
        place, first = np.unique(place[fresh], return_index=True)
        inode, partition, block = inode[fresh][first], partition[fresh][first], block[fresh][first]
        seen = np.append(seen, place)
        level = list(entries.read_entries(reader, disk, partition, block, damage))
        for batch in level:
            owner = inode[np.searchsorted(place, batch.entries.inode)]
            rows.add(
                tables.METADATA,
                batch.entries.inode,
                disk.block_size,
                part="file entry of a stream",
                inode=owner,
            )
            rows.add(tables.TREE, batch.continued[0], disk.block_size, part="allocation extent")
            out = take(batch.extents, np.flatnonzero(batch.extents.embedded == 0))
            rows.add(tables.METADATA, out.start, out.length, part="stream", inode=owner[out.owner])
        names, budget = _names(
            reader,
            disk,
            [(batch.entries, batch.extents) for batch in level],
            budget,
            damage,
            entries.STREAMS,
        )
        inode, partition, block = inode[np.searchsorted(place, names.parent)], names.partition, names.block


def _names(
    reader: Reader,
    disk: Volume,
    level: list[tuple[Entries, Extents]],
    budget: int,
    damage: Damage,
    kind: int = entries.DIRECTORY,
) -> tuple[directories.Names, int]:
    """The names in the directories of a level, and how many bytes of directories may still be read: hostile
    ones share theirs without end."""
    parts = [directories.Names(EMPTY, EMPTY, EMPTY, Ragged(np.zeros(0, np.uint8), np.zeros(0, np.uint16)))]
    for one, extents in level:
        mine = take(
            extents, np.flatnonzero((one.file_type[extents.owner] == kind) & (extents.unwritten == 0))
        )
        length = np.clip(one.size[mine.owner] - mine.file_offset, 0, mine.length)
        length[length > np.clip(reader.size - mine.start, 0, None)] = 0
        affordable = np.cumsum(length) <= budget
        if not affordable.all():
            damage.say("twice", "directories claim more bytes than the volume has: the rest is not read")
            length = np.where(affordable, length, 0)
        budget -= int(length.sum())
        order = np.lexsort((mine.file_offset, mine.owner))
        owner, start, length = mine.owner[order], mine.start[order], length[order]
        data = reader.read_ranges(start, length)
        at = np.cumsum(length) - length
        new = np.append(True, owner[1:] != owner[:-1])[: len(owner)]
        first = np.flatnonzero(new)
        size = np.diff(np.append(at[first], len(data)))
        padded, base = _aligned(data, at[first], size)
        parts.append(directories.parse(padded, one.inode[owner[first]], base, size, damage))
    parent, partition, block = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("parent", "partition", "block")
    )
    return directories.Names(parent, partition, block, Ragged.concat([part.name for part in parts])), budget


def _aligned(data: np.ndarray, start: Int, size: Int) -> tuple[np.ndarray, Int]:
    """The directories again, each at a multiple of four bytes, with room behind; and where they begin."""
    room = -(-size // directories.ALIGN) * directories.ALIGN
    base = np.cumsum(room) - room
    if (start == base).all():
        return np.append(data, np.zeros(64, np.uint8)), base
    result = np.zeros(int(room.sum()) + 64, np.uint8)
    row, step = expand(size)
    result[base[row] + step] = data
    return result, base


def _inodes(found: Entries) -> pa.Table:
    known = T_OF[found.file_type]
    return tables.make(
        "inodes", volume=0, inode=found.inode, type=known,
        mode=np.where(known == tables.T_METADATA, -1, found.mode), uid=found.uid, gid=found.gid,
        size=found.size, nlink=found.nlink, mtime_ns=found.mtime_ns, flags=0, record_offset=found.inode,
    )  # fmt: skip


# ---- rows --------------------------------------------------------------------------------------------------


def _add_content(
    rows: tables.ExtentRows, found: Entries, extents: Extents, block_size: int, damage: Damage
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


def _open_metadata(reader: Reader, disk: Volume, rows: tables.ExtentRows, damage: Damage) -> None:
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
            disk.partitions.append(below)  # behind those that references count
        for name, part_name in (
            ("MetadataFileLocation", "metadata file"),
            ("MetadataMirrorFileLocation", "metadata mirror file"),
            ("MetadataBitmapFileLocation", "metadata bitmap file"),
        ):
            block = int(about[name])
            if block == volume.NONE:
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


def _add_structures(rows: tables.ExtentRows, reader: Reader, disk: Volume, file_set: int) -> None:
    _, end, _ = volume.recognised(reader)
    rows.add(tables.BOOT, 0, volume.RECOGNITION, part="system area")
    rows.add(
        tables.METADATA, volume.RECOGNITION, end - volume.RECOGNITION, part="volume recognition sequence"
    )
    rows.add(tables.METADATA, file_set, disk.block_size, part="file set descriptor")


def _add_free(rows: tables.ExtentRows, reader: Reader, disk: Volume, damage: Damage) -> None:
    """What the partitions' own bitmaps and tables call free.

    Where nothing can be written any more, nobody has to keep them: they are no allocator's word.
    """
    size = disk.block_size
    for one in disk.descriptors:
        kind = tables.FREE if int(one["AccessType"]) in volume.REWRITABLE else tables.UNREFERENCED
        start = int(one["PartitionStartingLocation"]) * size
        blocks = min(int(one["PartitionLength"]), max(0, reader.size - start) // size)
        for name in ("UnallocatedSpaceBitmap", "FreedSpaceBitmap"):
            length, block = (int(value) for value in one[name])
            length &= 0x3FFFFFFF
            if length == 0 or block >= blocks:
                continue
            place = start + block * size
            found = volume.free_blocks(reader, place, length, blocks)
            rows.add(
                tables.METADATA,
                place,
                min(-(-length // size) * size, (blocks - block) * size),
                part="space bitmap",
            )
            if found is None:
                damage.say(
                    "allocator",
                    f"the space bitmap at byte {place:#x} is none: free space is not known",
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


def _tiled(table: pa.Table, disk: Volume, size: int) -> pa.Table:
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


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.udf.volume import ANCHOR_POINTER, FILE_SET_DESCRIPTOR

    return {
        "anchor": Structure(ANCHOR_POINTER),
        "file set descriptor": Structure(FILE_SET_DESCRIPTOR),
    }


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the space bitmaps and tables of partitions that can be rewritten; elsewhere nothing",
    structures=_structures,
    inode=INODE,
    target=target,
)
