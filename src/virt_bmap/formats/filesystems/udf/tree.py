"""The tree, level by level from the root: file entries, their extents, names."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Int, expand, joined
from virt_bmap.core.columns import stack, take
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import allowance
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.udf import inodes as entries
from virt_bmap.formats.filesystems.udf import names as directories
from virt_bmap.formats.filesystems.udf.inodes import Extents, FileEntries
from virt_bmap.formats.filesystems.udf.superblock import LogicalVolume
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

MAX_LEVELS = 1024


T_OF = np.full(256, tables.T_METADATA, np.uint8)


def walk_tree(
    reader: Reader, disk: LogicalVolume, partition: Int, block: Int, rows: tables.ExtentRows, damage: Damage
) -> tuple[FileEntries, Extents, pa.Table, list[tuple[Int, Int, Int]]]:
    """All entries that are reached from the root, their extents, the names, and the ICBs of streams and
    attributes; rows for blocks with further descriptors."""
    beside: list[tuple[Int, Int, Int]] = []
    found: list[FileEntries] = []
    extents: list[Extents] = []
    listed: list[tuple[Int, Int, Ragged]] = []
    seen, budget = EMPTY, allowance(reader)
    for _ in range(MAX_LEVELS):
        level: list[tuple[FileEntries, Extents]] = []
        for batch in entries.read_entries(reader, disk, partition, block, damage):
            for part, (start, inode) in (("allocation extent", batch.continued), ("ICB", batch.linked)):
                rows.add(tables.TREE, start, disk.block_size, part=part, inode=inode)
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
        damage.say(
            "too-deep", f"[directory lies|directories lie] more than {MAX_LEVELS} levels deep: not read"
        )
    reached = stack(FileEntries, found)
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


def add_beside(
    reader: Reader,
    disk: LogicalVolume,
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
                batch.entries.record,
                disk.block_size,
                part="file entry of a stream",
                inode=owner,
            )
            rows.add(tables.TREE, batch.continued[0], disk.block_size, part="allocation extent")
            rows.add(tables.TREE, batch.linked[0], disk.block_size, part="ICB")
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
    disk: LogicalVolume,
    level: list[tuple[FileEntries, Extents]],
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
            damage.say(
                "twice",
                "[directory claims|directories claim] more bytes than the volume has: the rest is not read",
            )
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
    """The directories again, each at a multiple of four bytes, with room after it; and where they begin."""
    room = -(-size // directories.ALIGN) * directories.ALIGN
    base = np.cumsum(room) - room
    if (start == base).all():
        return np.append(data, np.zeros(64, np.uint8)), base
    result = np.zeros(int(room.sum()) + 64, np.uint8)
    row, step = expand(size)
    result[base[row] + step] = data
    return result, base


def inode_table(found: FileEntries) -> pa.Table:
    known = T_OF[found.file_type]
    return tables.make(
        "inodes", volume=0, inode=found.inode, type=known,
        mode=np.where(known == tables.T_METADATA, -1, found.mode), uid=found.uid, gid=found.gid,
        size=found.size, nlink=found.nlink, mtime_ns=found.mtime_ns, flags=0, record_offset=found.record,
    )  # fmt: skip
