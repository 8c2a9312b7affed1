"""FAT12, FAT16 and FAT32 with long names: boot sector, file allocation table, directories.

Read are the boot sector, FSInfo, the active FAT once from end to end, and the directories, breadth first. FAT
decides what is free; a cluster that no file owns is lost and becomes `unknown`. The width of FAT entries is
told as the kernel and fsck.fat do: FAT32 where BPB_FATSz16 is 0, otherwise by the number of clusters. Short
names are shown in code page 437, the kernel's default; the disk does not say which one was used. Times are
local times of an unknown zone, taken as UTC.

Not recognised, and so named as one unknown piece: volumes of DOS 1.x without parameters in their boot sector,
and those whose sector count has 64 bits.

Inode numbers: byte offset of the directory entry / 32; the root is 0.

Sources: Microsoft FAT specification (fatgen103); kernel fs/fat/{inode,fatent,dir,namei_vfat}.c; util-linux
libblkid/src/superblocks/vfat.c; dosfstools src/{boot,fat,check}.c.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from virt_bmap.core.arrays import Int, complement, expand, ints, union
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held, spans
from virt_bmap.formats.filesystems.fat.bpb import BOOT_SECTOR, ENTRY, Geometry, looks_like_fat, read_geometry
from virt_bmap.formats.filesystems.fat.chains import BAD, BROKEN, END, WHOLE, Runs, chains_of, read_runs
from virt_bmap.formats.filesystems.fat.entries import Parser
from virt_bmap.formats.filesystems.fat.files import Heap, add_owned, clipped, inode_table
from virt_bmap.formats.filesystems.fat.tree import ROOT, Parse, Ranges, Tree, read_tree
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    NOT_LOOKED_AT,
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Proof,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE

__all__ = ["FEATURES", "NAME", "ORACLES", "REFUSED", "looks_like_fat", "probe", "read"]

NAME = "vfat"
INODE = "byte offset of the directory entry / 32; the root is 0"
FEATURES = (
    "FAT12, FAT16, FAT32, also FAT32 with few clusters", ("sectors of 512 to 4096 bytes, clusters of any "
        "power of two"),
    "long names, checked by their checksum", ("short names in code page 437, with Windows NT's lower-case "
        "flags"),
    "one or more FATs, mirrored or with one active", "FSInfo, backup boot sector", "bad clusters",
    "Atari's boot sectors", "volume labels in the root directory", "dirty and error marks",
)  # fmt: skip
REFUSED: tuple[str, ...] = ()
ORACLES = (
    "istat and fls of The Sleuth Kit",
    "mshowfat and mcopy of mtools",
    "fsck.fat of dosfstools",
    "the FAT itself",
)
CHECKS = Checks(
    checksums=None,
    rules=(
        "boot sector: geometry",
        "FAT: chains, loops, clusters with two owners, lost clusters",
        "copies of the FAT: equal to the active one, where they are to be",
        "directories: entries, sizes against chains, long names' checksums, free count",
    ),
    unchecked=(
        "content of files",
        "the backup of the boot sector",
    ),
)

FSINFO = struct(
    512, [(0, "FSI_LeadSig", "<u4"), (484, "FSI_StrucSig", "<u4"), (488, "FSI_Free_Count", "<u4")]
)
FSINFO_SIGNATURES = 0x41615252, 0x61417272
UNKNOWN_COUNT = 0xFFFFFFFF
MAX_DIRECTORY = 65536 * ENTRY
"""A directory may have 65,536 entries: fs/fat/fat.h (FAT_MAX_DIR_SIZE)."""
FAT_BATCH = 16 << 20
"""Bytes of the FAT that are looked at together; their arrays take some six times as much."""


def probe(reader: Reader) -> bool:
    """Does the first sector pass the tests of libblkid?"""
    return looks_like_fat(reader.read_clipped(0, BOOT_SECTOR.itemsize))


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds."""
    geometry, runs, heap = read_tables(reader, damage)
    parser = Parser(geometry.bits)
    tree = read_directories(reader, geometry, heap, parser)
    rows = tables.ExtentRows()
    _add_system(rows, geometry)
    _add_clusters(rows, heap, runs)
    add_owned(rows, heap, tree)
    _check_rest(reader, geometry, runs, parser, damage)
    serial = geometry.serial
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.cluster_size, root=ROOT,
        state=_state(reader, geometry, damage),
        uuid=None if serial is None else f"{serial >> 16:04X}-{serial & 0xFFFF:04X}",
        label=_label(parser.labels), features=f"FAT{geometry.bits}", reader=reader, inodes=inode_table(tree),
        names=tree.names(), extents=clipped(rows.table(0), reader.size),
    )  # fmt: skip


def read_tables(reader: Reader, damage: Damage) -> tuple[Geometry, Runs, Heap]:
    """Boot sector and FAT."""
    geometry = read_geometry(reader.read_clipped(0, BOOT_SECTOR.itemsize), reader.name)
    _check_size(reader, geometry)
    runs = read_runs(_fat_entries(reader, geometry))
    return (
        geometry,
        runs,
        Heap(geometry.data_start, geometry.cluster_size, geometry.clusters, chains_of(runs), damage),
    )


def _check_size(reader: Reader, geometry: Geometry) -> None:
    """The FATs must be there; what is missing behind them is only a problem."""
    if reader.size < geometry.data_start:
        raise Corrupt(
            f"{reader.name}: ends at byte {reader.size:#x}, inside the FATs or the root directory, "
                "which reach to "
            f"{geometry.data_start:#x}: it is truncated", reader.size, "truncated",
        )  # fmt: skip


def _fat_entries(reader: Reader, geometry: Geometry) -> Iterator[Int | int]:
    """The entries of the active FAT from cluster 2 on, in batches, as `chains` wants them."""
    start, bits = geometry.reserved + geometry.active_fat * geometry.fat_size, geometry.bits
    end, reached = geometry.clusters + 2, 2
    for at, raw in held(reader, ints(start), ints((end * bits + 7) // 8), FAT_BATCH):
        first = at * 8 // bits
        count = min(len(raw) * 8 // bits, end - first)
        if first > reached:
            yield first - reached
        yield _decoded(raw, bits, count, end)[max(0, reached - first) :]
        reached = first + count
    if reached < end:
        yield end - reached


def _decoded(raw: np.ndarray, bits: int, count: int, end: int) -> Int:
    """`count` entries of 12, 16 or 32 bits; only numbers below `end` are clusters."""
    if bits == 12:
        triple = np.append(raw, np.zeros(-len(raw) % 3, np.uint8)).reshape(-1, 3).astype(np.int64)
        low, high = triple[:, 0] | (triple[:, 1] & 15) << 8, triple[:, 1] >> 4 | triple[:, 2] << 4
        entries = np.stack([low, high], axis=1).reshape(-1)[:count]
    else:
        entries = raw.view(f"<u{bits // 8}").astype(np.int64)
    # the upper four bits of FAT32 are reserved
    highest = 0xFFF if bits == 12 else 0xFFFF if bits == 16 else 0x0FFFFFFF
    if bits == 32:
        entries &= highest
    odd = np.flatnonzero((entries >= end) | (entries == 1))
    value = entries[odd]
    entries[odd] = np.where(value >= highest - 7, END, np.where(value == highest - 8, BAD, BROKEN))
    return entries


def read_directories(reader: Reader, geometry: Geometry, heap: Heap, parser: Parse) -> Tree:
    """The tree below the root, which has an area of its own in FAT12 and FAT16, and a chain of clusters in
    FAT32."""
    if geometry.bits == 32:
        chain = heap.chains.follow(ints(geometry.root_cluster))
        root = Ranges(
            np.full(len(chain.query), ROOT), heap.offset(chain.cluster), chain.count * heap.cluster_size,
            chain.before * heap.cluster_size,
        )  # fmt: skip
        if chain.fate[0] != WHOLE:
            words = f"the root directory's chain, from cluster {geometry.root_cluster}, has no proper end"
            heap.damage.say("extents", words, 44)
    else:
        size = geometry.data_start - geometry.root_start
        root = Ranges(ints(ROOT), ints(geometry.root_start), ints(size), ints(0))
    return read_tree(reader, root, heap.locate, parser, MAX_DIRECTORY, heap.damage)


def _add_system(rows: tables.ExtentRows, geometry: Geometry) -> None:
    """Boot sectors, FATs, and what lies behind the last cluster."""
    sector = geometry.sector_size
    named = {"backup FSInfo": geometry.backup + sector if geometry.backup and geometry.fsinfo else 0,
             "backup boot sector": geometry.backup, "FSInfo": geometry.fsinfo}  # fmt: skip
    at = {offset: part for part, offset in named.items() if 0 < offset < geometry.reserved} | {
        0: "boot sector"
    }
    for offset, part in at.items():
        rows.add(tables.METADATA, offset, sector, part=part)
    starts = ints(list(at))
    left = complement(starts, starts + sector, 0, geometry.reserved)
    rows.add(tables.METADATA, left[0], left[1] - left[0], part="reserved sectors")
    for number in range(geometry.fats):
        rows.add(
            tables.METADATA,
            geometry.reserved + number * geometry.fat_size,
            geometry.fat_size,
            part=f"FAT {number + 1}",
        )
    if geometry.bits == 32:  # has none, but the kernel leaves room for it where the boot sector says so
        rows.add(
            tables.METADATA,
            geometry.root_start,
            geometry.data_start - geometry.root_start,
            part="root directory",
        )
    rows.add(tables.GAP, geometry.data_end, geometry.size - geometry.data_end, part="slack")


def _add_clusters(rows: tables.ExtentRows, heap: Heap, runs: Runs) -> None:
    """What the FAT calls free or bad."""
    for kind, part, (start, end) in (
        (tables.FREE, None, runs.free),
        (tables.METADATA, "bad clusters", runs.bad),
    ):
        rows.add(kind, heap.offset(start), (end - start) * heap.cluster_size, part=part)


def _state(reader: Reader, geometry: Geometry, damage: Damage) -> str:
    """What the marks in FAT entry 1 (Windows) and in the boot sector (Linux) say; FAT12 has the latter
    only."""
    dirty, errors = bool(geometry.state & 1), bool(geometry.state & 2)
    if geometry.bits > 12:
        width = geometry.bits // 8
        active = geometry.reserved + geometry.active_fat * geometry.fat_size
        mark = int.from_bytes(reader.read(active + width, width), "little")
        high = geometry.bits - (1 if geometry.bits == 16 else 5)
        dirty |= not mark >> high & 1
        errors |= not mark >> high - 1 & 1
    if errors:
        damage.say(
            "marked-damaged", "a driver met errors of the disk and says so in the FAT or the boot sector"
        )
    return tables.IN_USE if dirty else tables.CLEAN


def _label(labels: list[bytes]) -> str | None:
    """The volume label in the root directory, as blkid has it; the boot sector's copy is often out of
    date."""
    return labels[0].replace(b"\x05", b"\xe5").rstrip(b" \0").decode("cp437") or None if labels else None


def _check_rest(reader: Reader, geometry: Geometry, runs: Runs, parser: Parser, damage: Damage) -> None:
    """A volume that ends too early, slots of long names that are nobody's, a wrong count of free clusters."""
    if reader.size < geometry.size:
        damage.say(
            "truncated",
            f"the volume ends at byte {reader.size:#x}, but its filesystem claims {geometry.size:#x}",
            reader.size,
        )
    what = "entries of long names belong to no file"
    damage.add("directory", what, count=parser.orphans, severity=NOTE)
    if geometry.fsinfo:
        info = record(reader.read(geometry.fsinfo, FSINFO.itemsize), FSINFO)
        start, end = runs.free
        free, said = int((end - start).sum()), int(info["FSI_Free_Count"])
        if (info["FSI_LeadSig"], info["FSI_StrucSig"]) != FSINFO_SIGNATURES:
            damage.say("count", "the FSInfo sector has no signature", geometry.fsinfo, severity=NOTE)
        elif said not in (free, UNKNOWN_COUNT):
            damage.say(
                "count",
                f"FSInfo says {said} clusters are free, the FAT {free}",
                geometry.fsinfo,
                severity=NOTE,
            )


def _structures() -> Structures:
    from virt_bmap.formats.filesystems.fat.bpb import BOOT_SECTOR
    from virt_bmap.formats.filesystems.fat.entries import DIRECTORY_ENTRY

    return {
        "boot sector": Structure(BOOT_SECTOR),
        "FSInfo": Structure(FSINFO),
        "directory": Structure(DIRECTORY_ENTRY, many=True),
        "root directory": Structure(DIRECTORY_ENTRY, many=True),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.fat import history

    return History(history.former)


def _prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Where the FATs are to be copies of each other, are they? Drivers read the active one only."""
    geometry = read_geometry(found.reader.read_clipped(0, BOOT_SECTOR.itemsize), found.reader.name)
    active, used = geometry.active_fat, (geometry.clusters + 2) * geometry.bits // 8
    for copy in sorted(set(range(geometry.fats)) - {active}) if geometry.mirrored else ():
        place, other = (geometry.reserved + number * geometry.fat_size for number in (active, copy))
        mine, others = (spans(found.reader, ints(start), ints(used)) for start in (place, other))
        low, high = union(np.append(mine[0], others[0]), np.append(mine[1], others[1]))
        row, step = expand(-(-(high - low) // FAT_BATCH))
        begin = low[row] + step * FAT_BATCH
        for at, end in zip(begin.tolist(), np.minimum(begin + FAT_BATCH, high[row]).tolist(), strict=True):
            size = ints(end - at)
            differs = np.flatnonzero(
                found.reader.read_ranges(ints(place + at), size)
                != found.reader.read_ranges(ints(other + at), size)
            )
            if len(differs):
                where = other + at + int(differs[0])
                text = (
                    f"FAT {copy + 1} is no copy of FAT {active + 1}, which is used, from byte {where:#x} on"
                )
                damage.say("copy-differs", text, where)
                break
    return [Proof("checksums", NOT_LOOKED_AT, "the format has none")]


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the file allocation table",
    prove=_prove,
    structures=_structures,
    history=_history,
    fixed_records=True,
    inode=INODE,
)
