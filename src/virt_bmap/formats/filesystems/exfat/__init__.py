"""exFAT: boot regions, FAT, allocation bitmap, entry sets.

Read are both boot regions' places, the main one's checksum, the active FAT and allocation bitmap once from
end to end, and the directories, breadth first. The bitmap decides what is free. A file's clusters follow each
other when its entry says so (NoFatChain), otherwise they are chained in the FAT, of which only entries of
allocated clusters count: drivers leave old links in freed ones. What lies beyond a file's ValidDataLength was
never written.

Clusters that vendor extensions allocate (entries 0xE1) have no owner here: they are `unknown`.

Inode numbers: byte offset of the file's directory entry / 32; the root is 0.

Sources: Microsoft exFAT file system specification (2019); kernel fs/exfat/{super,balloc,dir,namei}.c;
exfatprogs fsck/fsck.c.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, expand, intersect, ints, subtract
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.fat.chains import BAD, BROKEN, END, WHOLE, Runs, chains_of, read_runs
from virt_bmap.formats.filesystems.fat.entries import before_end
from virt_bmap.formats.filesystems.fat.files import Heap, add_owned, clipped, inode_table
from virt_bmap.formats.filesystems.fat.names import timestamps, utf8
from virt_bmap.formats.filesystems.fat.tree import ROOT, Entries, Ranges, read_tree
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    Filesystem,
    FilesystemFormat,
    History,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import NOTE, WARNING

NAME = "exfat"
INODE = "byte offset of the file's directory entry / 32; the root is 0"
FEATURES = (
    "main and backup boot region, with checksum", "files in one piece (NoFatChain) and chained in the FAT",
    "allocation bitmap", "TexFAT's second FAT and bitmap", "up-case table", "valid data length",
    "entry sets with checksum", "vendor extensions, skipped", "volume label, serial number", "bad clusters",
    "dirty and failure marks",
)  # fmt: skip
REFUSED = ("revisions other than 1.x",)
ORACLES = (
    "istat and fls of The Sleuth Kit",
    "fsck.exfat and dump.exfat of exfatprogs",
    "the allocation bitmap",
    "exfat-fuse",
)
CHECKS = Checks(
    checksums="main boot region; entry sets",
    rules=(
        "boot region: geometry, order of regions",
        "FAT: chains, bad clusters",
        "allocation bitmap: against what is owned",
        "entry sets: members, sizes, first clusters",
    ),
    unchecked=(
        "content of files",
        "backup boot region, name hashes, the up-case table's checksum",
    ),
)

BOOT_SECTOR = struct(512, [
    (3, "FileSystemName", "V8"),
    (72, "VolumeLength", "<u8"),
    (80, "FatOffset", "<u4"),
    (84, "FatLength", "<u4"),
    (88, "ClusterHeapOffset", "<u4"),
    (92, "ClusterCount", "<u4"),
    (96, "FirstClusterOfRootDirectory", "<u4"),
    (100, "VolumeSerialNumber", "<u4"),
    (104, "FileSystemRevision", "<u2"),
    (106, "VolumeFlags", "<u2"),
    (108, "BytesPerSectorShift", "u1"),
    (109, "SectorsPerClusterShift", "u1"),
    (110, "NumberOfFats", "u1"),
    (510, "BootSignature", "<u2"),
])  # fmt: skip
BOOT_SECTORS = 12
CHANGING = (106, 107, 112)
"""Bytes of the boot sector that its checksum leaves out: VolumeFlags and PercentInUse."""
ACTIVE_FAT, VOLUME_DIRTY, MEDIA_FAILURE = 1, 2, 4
MAX_CLUSTER_SHIFT = 25
"""Clusters of 32 MiB are the largest."""

ENTRY = 32
ALLOCATION_BITMAP, UP_CASE_TABLE, VOLUME_LABEL, FILE, STREAM, FILE_NAME = 0x81, 0x82, 0x83, 0x85, 0xC0, 0xC1
FILE_ENTRY = struct(ENTRY, [
    (1, "SecondaryCount", "u1"),
    (2, "SetChecksum", "<u2"),
    (4, "FileAttributes", "<u2"),
    (12, "LastModifiedTime", "<u2"),
    (14, "LastModifiedDate", "<u2"),
    (21, "LastModified10msIncrement", "u1"),
    (23, "LastModifiedUtcOffset", "u1"),
])  # fmt: skip
STREAM_ENTRY = struct(ENTRY, [
    (1, "GeneralSecondaryFlags", "u1"),
    (3, "NameLength", "u1"),
    (8, "ValidDataLength", "<u8"),
    (20, "FirstCluster", "<u4"),
    (24, "DataLength", "<u8"),
])  # fmt: skip
ATTRIBUTE_DIRECTORY, NO_FAT_CHAIN, UTC_OFFSET_VALID = 0x10, 2, 0x80
NAME_UNITS = 15
QUARTER = 15 * 60 * 10**9
"""Nanoseconds of one step of a UTC offset."""
MAX_DIRECTORY = 256 << 20
"""Specification, section 7.4: no directory is larger."""
FAT_BATCH = 16 << 20
"""Bytes of the FAT that are looked at together."""


def probe(reader: Reader) -> bool:
    """Is the name of the file system where it belongs, and zero where FAT has its parameters?"""
    sector = reader.read_clipped(0, 64)
    return sector[3:11] == b"EXFAT   " and not any(sector[11:64])


class Geometry(NamedTuple):
    """Where the regions of the volume lie, in bytes."""

    sector_size: int
    cluster_size: int
    size: int
    fat: int
    fat_size: int
    fats: int
    active: int
    heap: int
    clusters: int
    root_cluster: int
    serial: int
    flags: int


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds."""
    geometry = read_geometry(reader, damage)
    runs = read_runs(fat_entries(reader, geometry))
    heap = Heap(geometry.heap, geometry.cluster_size, geometry.clusters, chains_of(runs), damage)
    root = ranges_of(heap, ROOT, ints(geometry.root_cluster))
    special = read_special(reader, root, geometry)
    rows = tables.ExtentRows()
    _add_regions(rows, geometry)
    used = add_special(rows, reader, heap, special)
    _add_bad(rows, heap, runs, used)
    heap.chains = chains_of(runs.within(*used))
    tree = read_tree(reader, root, heap.locate, Parser(damage), MAX_DIRECTORY, damage)
    add_owned(rows, heap, tree)
    if geometry.flags & MEDIA_FAILURE:
        damage.say("marked-damaged", "a driver met errors of the disk and says so in the boot sector", 106)
    return Filesystem(
        type=NAME, size=geometry.size, block_size=geometry.cluster_size, root=ROOT,
        state=tables.IN_USE if geometry.flags & VOLUME_DIRTY else tables.CLEAN,
        uuid=f"{geometry.serial >> 16:04X}-{geometry.serial & 0xFFFF:04X}", label=special.label,
        reader=reader, inodes=inode_table(tree), names=tree.names(),
        extents=clipped(rows.table(0), reader.size),
    )  # fmt: skip


def read_geometry(reader: Reader, damage: Damage) -> Geometry:
    """The main boot sector; Corrupt where its regions can't be."""
    boot = record(reader.read_clipped(0, BOOT_SECTOR.itemsize), BOOT_SECTOR)
    shift, per_cluster = int(boot["BytesPerSectorShift"]), int(boot["SectorsPerClusterShift"])
    where = f"{reader.name}: exFAT boot sector"
    if int(boot["FileSystemRevision"]) >> 8 != 1:
        raise Unsupported(
            f"{where}: revision "
            f"{boot['FileSystemRevision'] >> 8}.{boot['FileSystemRevision'] & 255}, known is 1.x",
            104,
        )
    if not 9 <= shift <= 12 or shift + per_cluster > MAX_CLUSTER_SHIFT:
        raise Corrupt(
            f"{where}: sectors of 2^{shift} bytes and clusters of 2^{shift + per_cluster}, not 2^9 "
            "to 2^12 and up to 2^25",
            108,
        )
    fats, clusters = int(boot["NumberOfFats"]), int(boot["ClusterCount"])
    if fats not in (1, 2):
        raise Corrupt(f"{where}: NumberOfFats is {fats}, not 1 or 2", 110)
    sectors, fat, fat_length, heap = (
        int(boot[name]) for name in ("VolumeLength", "FatOffset", "FatLength", "ClusterHeapOffset")
    )
    if not 2 * BOOT_SECTORS <= fat <= fat + fats * fat_length <= heap < sectors < 1 << 50:
        raise Corrupt(
            f"{where}: FAT at sector {fat} (+{fat_length} x {fats}), clusters at {heap}, end at "
            f"{sectors}: not in this order",
            72,
        )
    size = 1 << shift
    if reader.size < heap * size:
        raise Corrupt(f"{reader.name}: ends at byte {reader.size:#x}, before the first cluster at "
            f"{heap * size:#x}: it is truncated",
                      reader.size, "truncated")  # fmt: skip
    _check_boot_region(reader, size, damage)
    room = min((sectors - heap) >> per_cluster, fat_length * size // 4 - 2)
    if clusters > room:
        damage.say("superblock", f"ClusterCount is {clusters}, but there is room for {room}", 92)
    if reader.size < sectors * size:
        what = f"the volume ends at byte {reader.size:#x}, but its filesystem claims {sectors * size:#x}"
        damage.say("truncated", what, reader.size)
    return Geometry(
        sector_size=size, cluster_size=size << per_cluster, size=sectors * size, fat=fat * size,
        fat_size=fat_length * size, fats=fats,
        active=int(boot["VolumeFlags"]) & ACTIVE_FAT if fats == 2 else 0, heap=heap * size,
        clusters=min(clusters, room), root_cluster=int(boot["FirstClusterOfRootDirectory"]),
        serial=int(boot["VolumeSerialNumber"]), flags=int(boot["VolumeFlags"]),
    )  # fmt: skip


def _check_boot_region(reader: Reader, sector_size: int, damage: Damage) -> None:
    """Is the last sector of the main boot region filled with the checksum of the others?"""
    data = reader.read(0, BOOT_SECTORS * sector_size)
    last = (BOOT_SECTORS - 1) * sector_size
    checksum = 0
    for at, byte in enumerate(data[:last]):  # 5,632 bytes, or 45,056 with sectors of 4 KiB
        if at not in CHANGING:
            checksum = ((checksum >> 1 | checksum << 31) + byte) & 0xFFFFFFFF
    if data[last:] != checksum.to_bytes(4, "little") * (sector_size // 4):
        words = f"the last sector of the main boot region does not repeat its checksum, {checksum:#x}"
        damage.say("checksum", words, last)


def fat_entries(reader: Reader, geometry: Geometry) -> Iterator[Int | int]:
    """The entries of the active FAT from cluster 2 on, in batches, as `chains` wants them."""
    start, end, reached = geometry.fat + geometry.active * geometry.fat_size, geometry.clusters + 2, 2
    for at, raw in held(reader, ints(start), ints(end * 4), FAT_BATCH):
        if at // 4 > reached:
            yield at // 4 - reached
        entries = raw.view("<u4")[max(0, reached - at // 4) :].astype(np.int64)
        reached = (at + len(raw)) // 4
        odd = np.flatnonzero((entries >= end) | (entries == 1))
        value = entries[odd]
        entries[odd] = np.where(value >= 0xFFFFFFF8, END, np.where(value == 0xFFFFFFF7, BAD, BROKEN))
        yield entries
    if reached < end:
        yield end - reached


def ranges_of(heap: Heap, inode: int, first: Int, size: int = 0) -> Ranges:
    """Where a structure of the volume lies: chained in the FAT or, where the chain is none, in one piece of
    `size` bytes."""
    found = heap.chains.follow(first)
    cluster, count, before = found.cluster, found.count, found.before
    if size and (found.fate[0] != WHOLE or found.length[0] < heap.needed(ints(size))[0]):
        inside = 2 <= first[0] < heap.clusters + 2
        count = np.minimum(heap.needed(ints(size)), heap.clusters + 2 - first) if inside else ints(0)
        cluster, before = first, ints(0)
    return Ranges(
        np.full(len(cluster), inode),
        heap.offset(cluster),
        count * heap.cluster_size,
        before * heap.cluster_size,
    )


class Special(NamedTuple):
    """What the root directory says of the volume: (first cluster, bytes) of bitmap and up-case table."""

    bitmap: tuple[int, int]
    upcase: tuple[int, int]
    other_bitmaps: list[tuple[int, int]]
    label: str | None


def read_special(reader: Reader, root: Ranges, geometry: Geometry) -> Special:
    """The entries of the root directory that describe the volume; Corrupt where the allocation bitmap is
    missing."""
    if len(root.start) == 0:
        raise Corrupt(
            f"{reader.name}: the root directory of exFAT begins at cluster {geometry.root_cluster}, "
            "which is not in use",
            96,
        )
    length = np.clip(np.minimum(reader.size - root.start, MAX_DIRECTORY - root.offset), 0, root.length)
    raw = reader.read_ranges(root.start, length // ENTRY * ENTRY).reshape(-1, ENTRY)
    raw = raw[before_end(raw, np.zeros(len(raw), np.int64))]

    def placed(kind: int) -> list[tuple[int, int, int]]:
        entry = records(raw[raw[:, 0] == kind][:16], STREAM_ENTRY)
        return [
            (int(e["GeneralSecondaryFlags"]) & 1, int(e["FirstCluster"]), int(e["DataLength"])) for e in entry
        ]

    bitmaps, upcase = placed(ALLOCATION_BITMAP), placed(UP_CASE_TABLE)
    mine = [(cluster, size) for which, cluster, size in bitmaps if which == geometry.active]
    wanted = -(-geometry.clusters // 8)
    if not mine or mine[0][1] < wanted or not 2 <= mine[0][0] < geometry.clusters + 2:
        raise Corrupt(
            f"{reader.name}: the root directory of exFAT names no allocation bitmap of {wanted} bytes",
            geometry.heap,
        )
    labels = raw[raw[:, 0] == VOLUME_LABEL]
    label = (
        labels[0, 2 : 2 + 2 * min(11, int(labels[0, 1]))].tobytes().decode("utf-16-le", "replace")
        if len(labels)
        else ""
    )
    others = [(cluster, size) for which, cluster, size in bitmaps if which != geometry.active]
    return Special(mine[0], upcase[0][1:] if upcase else (0, 0), others, label.rstrip("\0") or None)


def add_special(rows: tables.ExtentRows, reader: Reader, heap: Heap, special: Special) -> tuple[Int, Int]:
    """Rows for allocation bitmap, up-case table and free clusters; returns the clusters that the bitmap calls
    used."""
    limit = heap.clusters * heap.cluster_size

    def place(what: str, cluster: int, size: int) -> Ranges:
        found = ranges_of(heap, -1, ints(cluster), min(size, limit))
        rows.add(tables.METADATA, found.start, found.length, part=what)
        return found

    ranges = place("allocation bitmap", *special.bitmap)
    for other in special.other_bitmaps:
        place("inactive allocation bitmap", *other)
    if special.upcase[0]:
        place("up-case table", *special.upcase)
    else:
        heap.damage.say("directory", "the root directory names no up-case table", severity=WARNING)
    starts, ends = _free_clusters(reader, heap, ranges)
    rows.add(tables.FREE, heap.offset(starts), (ends - starts) * heap.cluster_size)
    return np.append(2, ends), np.append(starts, heap.clusters + 2)


def _free_clusters(reader: Reader, heap: Heap, ranges: Ranges) -> tuple[Int, Int]:
    """(starts, ends) of free clusters, from the bitmap at `ranges`; what of it can't be read calls nothing
    free."""
    length = np.clip(reader.size - ranges.start, 0, ranges.length)
    known = np.append(True, length[:-1] == ranges.length[:-1]).cumprod().astype(bool)[: len(length)]
    starts, ends = bitmap_runs(reader, ranges.start[known], length[known], heap.clusters, False)
    return starts + 2, ends + 2


def _add_bad(rows: tables.ExtentRows, heap: Heap, runs: Runs, used: tuple[Int, Int]) -> None:
    """Bad clusters, which the FAT marks.

    Where the bitmap calls them free, they are: drivers ask only the bitmap.
    """
    start, end = intersect(*runs.bad, *used)
    rows.add(tables.METADATA, heap.offset(start), (end - start) * heap.cluster_size, part="bad clusters")
    free = heap.offset(subtract(*runs.bad, *used)[0])
    what = "runs of clusters that the FAT calls bad are free in the bitmap"
    heap.damage.add("allocator", what, free, severity=NOTE)


def _add_regions(rows: tables.ExtentRows, geometry: Geometry) -> None:
    """What lies before and behind the clusters."""
    region, fats_end = BOOT_SECTORS * geometry.sector_size, geometry.fat + geometry.fats * geometry.fat_size
    end = geometry.heap + geometry.clusters * geometry.cluster_size
    rows.add(tables.METADATA, 0, region, part="main boot region")
    rows.add(tables.METADATA, region, region, part="backup boot region")
    rows.add(tables.METADATA, 2 * region, geometry.fat - 2 * region, part="FAT alignment")
    for number in range(geometry.fats):
        rows.add(
            tables.METADATA,
            geometry.fat + number * geometry.fat_size,
            geometry.fat_size,
            part=f"FAT {number + 1}",
        )
    rows.add(tables.METADATA, fats_end, geometry.heap - fats_end, part="cluster heap alignment")
    rows.add(tables.GAP, end, geometry.size - end, part="excess space")


@dataclass
class Parser:
    """Makes entries of raw ones; `wrong` are the inodes whose entry sets have a wrong checksum."""

    damage: Damage
    wrong: list[Int] = field(default_factory=lambda: [ints([])])

    def __call__(self, raw: Bytes, owner: Int, number: Int) -> Entries:
        kind = np.where(before_end(raw, owner), raw[:, 0], 0)
        first = np.flatnonzero(kind == FILE)
        good = _is_whole(raw, kind, owner, first)
        say = self.damage.add
        say("directory", "entry sets of files are incomplete: not read", number[first[~good]] * ENTRY)
        first = first[good]
        entry, stream = records(raw[first], FILE_ENTRY), records(raw[first + 1], STREAM_ENTRY)
        wrong = _checksums(raw, first, entry["SecondaryCount"]) != entry["SetChecksum"]
        self.wrong.append(number[first[wrong]])
        say("checksum", "entry sets of files have a wrong checksum", self.wrong[-1] * ENTRY, severity=WARNING)
        long = first[stream["ValidDataLength"] > stream["DataLength"]]
        say("directory", "files have more valid data than data", number[long] * ENTRY, severity=WARNING)
        zone = ((entry["LastModifiedUtcOffset"] << 1).view(np.int8) >> 1).astype(np.int64) * QUARTER
        local = timestamps(entry["LastModifiedDate"], entry["LastModifiedTime"])
        mtime = local + entry["LastModified10msIncrement"].astype(np.int64) * 10**7
        size = _lengths(stream["DataLength"])
        return Entries(
            inode=number[first], parent=owner[first],
            directory=entry["FileAttributes"] & ATTRIBUTE_DIRECTORY != 0,
            cluster=stream["FirstCluster"].astype(np.int64), size=size,
            valid=np.minimum(size, _lengths(stream["ValidDataLength"])),
            contiguous=stream["GeneralSecondaryFlags"] & NO_FAT_CHAIN != 0,
            mtime_ns=mtime - np.where(entry["LastModifiedUtcOffset"] & UTC_OFFSET_VALID, zone, 0),
            name=_names(raw, first),
        )  # fmt: skip


def _lengths(values: np.ndarray) -> Int:
    """Sizes in bytes; what is more than any volume holds becomes the largest that one can hold."""
    return widen(np.minimum(values, np.uint64(1 << 62)), "size")


def _is_whole(raw: Bytes, kind: Bytes, owner: Int, first: Int) -> np.ndarray:
    """Which entry sets, by their file entries `first`, have all members: a stream, the names it counts, in
    one directory."""
    last = first + raw[first, 1]
    at = np.minimum(first + 1, len(raw) - 1)
    slots = -(-raw[at, 3].astype(np.int64) // NAME_UNITS)
    names = np.append(0, np.cumsum(kind == FILE_NAME))
    end = np.minimum(first + 2 + slots, len(raw))
    whole: np.ndarray = (
        (last < len(raw)) & (owner[np.minimum(last, len(raw) - 1)] == owner[first]) & (kind[at] == STREAM)
        & (slots > 0) & (raw[first,
                1] >= 1 + slots) & (names[end] - names[np.minimum(first + 2, len(raw))] == slots)
    )  # fmt: skip
    return whole


def _names(raw: Bytes, first: Int) -> Ragged:
    length = raw[first + 1, 3].astype(np.int64)
    row, step = expand(-(-length // NAME_UNITS))
    text = np.ascontiguousarray(raw[first[row] + 2 + step, 2:]).view("<u2")
    keep = np.arange(NAME_UNITS) < (length[row] - step * NAME_UNITS)[:, None]
    return utf8(text[keep], length)


def _checksums(raw: Bytes, first: Int, count: np.ndarray) -> np.ndarray:
    """The checksum of each entry set, all sets a byte at a time: 96 steps for short names, 608 for the
    longest."""
    order = np.argsort(-count.astype(np.int64), kind="stable")
    length = (count[order].astype(np.int64) + 1) * ENTRY
    flat, start = raw.reshape(-1), first[order] * ENTRY
    total = np.zeros(len(first), np.uint16)
    for at in range(int(length.max(initial=0))):
        if at not in (2, 3):  # SetChecksum itself
            n = len(length) if at < 3 * ENTRY else int(np.searchsorted(-length, -at, "left"))
            total[:n] = (total[:n] << 15 | total[:n] >> 1) + flat[start[:n] + at]
    result = np.empty(len(first), np.uint16)
    result[order] = total
    return result


def _structures() -> Structures:
    return {
        "main boot region": Structure(BOOT_SECTOR),
        "backup boot region": Structure(BOOT_SECTOR),
    }


def _history() -> History:
    from virt_bmap.formats.filesystems.exfat import history

    return History(history.former)


FORMAT = FilesystemFormat(
    NAME,
    probe,
    read,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    allocator="the allocation bitmap",
    structures=_structures,
    history=_history,
    fixed_records=True,
    inode=INODE,
)
