"""The boot regions: what the volume looks like, and where its areas lie."""

from typing import NamedTuple

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

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


def read_geometry(reader: Reader, damage: Damage) -> Geometry:
    """The main boot sector; Corrupt where its regions can't be."""
    boot = record(reader.read_clipped(0, BOOT_SECTOR.itemsize), BOOT_SECTOR)
    shift, per_cluster = int(boot["BytesPerSectorShift"]), int(boot["SectorsPerClusterShift"])
    where = f"{reader.name}: exFAT boot sector"
    if int(boot["FileSystemRevision"]) >> 8 != 1:
        raise Unsupported(
            f"{where}: revision "
            f"{boot['FileSystemRevision'] >> 8}.{boot['FileSystemRevision'] & 255}; 1.x is supported",
            104,
        )
    if not 9 <= shift <= 12 or shift + per_cluster > MAX_CLUSTER_SHIFT:
        raise Corrupt(
            f"{where}: sectors of 2^{shift} bytes and clusters of "
            f"2^{shift + per_cluster}, not 2^9 to 2^12 and up to 2^25",
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
            f"{where}: FAT at sector {fat} (+{fat_length} x {fats}), "
            f"clusters at {heap}, end at {sectors}: in an impossible order",
            72,
        )
    size = 1 << shift
    if reader.size < heap * size:
        raise Corrupt(
            f"{reader.name}: ends at byte {reader.size:#x}, before "
            f"the first cluster at {heap * size:#x}: it is truncated",
            reader.size,
            "truncated",
        )
    _check_boot_region(reader, size, damage)
    room = min((sectors - heap) >> per_cluster, fat_length * size // 4 - 2)
    if clusters > room:
        damage.say("superblock", f"ClusterCount is {clusters}, but there is room for {room}", 92)
    damage.ends_early(sectors * size, reader.size)
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
        words = (
            "the last sector of the main boot region does not "
            f"repeat the checksum of the others, {checksum:#x}"
        )
        damage.say("checksum", words, last)


def add_regions(rows: tables.ExtentRows, geometry: Geometry) -> None:
    """What lies before and after the clusters."""
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
