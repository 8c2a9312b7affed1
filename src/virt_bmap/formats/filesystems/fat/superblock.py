"""The boot sector of a FAT volume: is it one, and where do its areas lie?"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, struct
from virt_bmap.formats.common.boot_record import has_partitions

BOOT_SECTOR = struct(512, [
    (0, "BS_jmpBoot", "u1", (3,)),
    (11, "BPB_BytsPerSec", "<u2"),
    (13, "BPB_SecPerClus", "u1"),
    (14, "BPB_RsvdSecCnt", "<u2"),
    (16, "BPB_NumFATs", "u1"),
    (17, "BPB_RootEntCnt", "<u2"),
    (19, "BPB_TotSec16", "<u2"),
    (21, "BPB_Media", "u1"),
    (22, "BPB_FATSz16", "<u2"),
    (32, "BPB_TotSec32", "<u4"),
    # FAT12 and FAT16
    (37, "BS_Reserved1", "u1"),
    (38, "BS_BootSig", "u1"),
    (39, "BS_VolID", "<u4"),
    (54, "BS_FilSysType", "V8"),
    # FAT32
    (36, "BPB_FATSz32", "<u4"),
    (40, "BPB_ExtFlags", "<u2"),
    (42, "BPB_FSVer", "<u2"),
    (44, "BPB_RootClus", "<u4"),
    (48, "BPB_FSInfo", "<u2"),
    (50, "BPB_BkBootSec", "<u2"),
    (65, "BS_Reserved1_32", "u1"),
    (66, "BS_BootSig_32", "u1"),
    (67, "BS_VolID_32", "<u4"),
    (82, "BS_FilSysType_32", "V8"),
    (510, "Signature_word", "<u2"),
])  # fmt: skip


MAX_CLUSTERS = {12: 0xFF4, 16: 0xFFF4, 32: 0xFFFFFF6}
"""By the width of a FAT entry, as in fs/fat/fat.h (MAX_FAT12, MAX_FAT16, MAX_FAT32)."""
ENTRY = 32
"""Bytes of a directory entry."""
EXTENDED = (0x28, 0x29)
"""BS_BootSig: a serial number follows, and with 0x29 a label too."""


class Geometry(NamedTuple):
    """Where the areas of the volume lie, in bytes; cluster c (from 2) begins at data_start + (c - 2) *
    cluster_size."""

    bits: int
    sector_size: int
    cluster_size: int
    reserved: int
    fats: int
    fat_size: int
    root_start: int
    root_entries: int
    data_start: int
    clusters: int
    """How many clusters the FAT describes, so that the highest number is clusters + 1."""
    size: int
    active_fat: int
    mirrored: bool
    root_cluster: int
    fsinfo: int
    """Byte offset of the FSInfo sector, 0 where there is none; likewise the backup boot sector."""
    backup: int
    state: int
    serial: int | None

    @property
    def data_end(self) -> int:
        """Where the last cluster ends."""
        return self.data_start + self.clusters * self.cluster_size


def looks_like_fat(sector: bytes) -> bool:
    """Does a volume's first sector (512 bytes) hold a FAT boot sector rather than a partition table or
    anything else?

    The tests of libblkid's superblocks/vfat.c. A usable partition table in the same sector wins, unless its
    partition is the volume itself, as `mkfs.fat --mbr` writes it.
    """
    if len(sector) < BOOT_SECTOR.itemsize:
        return False
    boot = record(sector, BOOT_SECTOR)
    kinds = boot["BS_FilSysType"].tobytes(), boot["BS_FilSysType_32"].tobytes()
    # these keep a FAT-like header for old systems
    if kinds[0] in (b"JFS     ", b"HPFS    ") or sector[3:11] == b"-FVE-FS-":
        return False
    named = kinds[0].startswith((b"FAT", b"MSDOS")) or kinds[1].startswith((b"FAT32", b"MSWIN"))
    jumps = sector[0] in (0xEB, 0xE9, 0x60)  # 0x60 is the 68000's, on Atari disks
    if not (named or jumps or sector[510:512] == b"\x55\xaa"):
        return False
    return _plausible(boot) and not has_partitions(sector)


def _plausible(boot: np.void) -> bool:
    sector_size, per_cluster = int(boot["BPB_BytsPerSec"]), int(boot["BPB_SecPerClus"])
    media = int(boot["BPB_Media"])
    return bool(
        512 <= sector_size <= 4096
        and sector_size.bit_count() == 1
        and per_cluster.bit_count() == 1
        and boot["BPB_NumFATs"] > 0
        and boot["BPB_RsvdSecCnt"] > 0
        and (media == 0xF0 or media >= 0xF8)
        and (boot["BPB_FATSz16"] > 0 or boot["BPB_FATSz32"] > 0)
        and (boot["BPB_TotSec16"] > 0 or boot["BPB_TotSec32"] > 0)
    )


def read_geometry(sector: bytes, name: str) -> Geometry:
    """The areas that a boot sector describes; Corrupt where they contradict each other as no driver
    accepts."""
    boot = record(sector, BOOT_SECTOR)
    sector_size = int(boot["BPB_BytsPerSec"])
    # as the kernel and fsck.fat tell FAT32, whatever its number of clusters
    wide = int(boot["BPB_FATSz16"]) == 0
    fat_sectors = int(boot["BPB_FATSz32"] if wide else boot["BPB_FATSz16"])
    sectors = int(boot["BPB_TotSec16"]) or int(boot["BPB_TotSec32"])
    reserved = int(boot["BPB_RsvdSecCnt"])
    fats = int(boot["BPB_NumFATs"])
    root_entries = int(boot["BPB_RootEntCnt"])
    root_sector = reserved + fats * fat_sectors
    data_sector = root_sector - (-root_entries * ENTRY // sector_size)
    if data_sector >= sectors:
        raise Corrupt(
            f"{name}: the FAT boot sector says that the volume has {plural(sectors, 'sector')}, but its FATs "
            f"and root directory take {data_sector:,}",
            0,
        )
    clusters = (sectors - data_sector) // int(boot["BPB_SecPerClus"])
    bits = 32 if wide else 16 if clusters > MAX_CLUSTERS[12] else 12
    if clusters > MAX_CLUSTERS[bits]:
        raise Corrupt(
            f"{name}: the FAT boot sector makes "
            f"{plural(clusters, 'cluster')}, more than FAT{bits} can number",
            13,
        )
    flags = int(boot["BPB_ExtFlags"]) if wide else 0
    active = flags & 15 if flags & 0x80 else 0
    if active >= fats:
        raise Corrupt(f"{name}: BPB_ExtFlags calls FAT {active + 1} the active one, but there are {fats}", 40)
    suffix = "_32" if wide else ""
    signature = int(boot[f"BS_BootSig{suffix}"])
    return Geometry(
        bits=bits, sector_size=sector_size, cluster_size=sector_size * int(boot["BPB_SecPerClus"]),
        reserved=reserved * sector_size, fats=fats, fat_size=fat_sectors * sector_size,
        root_start=root_sector * sector_size, root_entries=root_entries, data_start=data_sector * sector_size,
        clusters=min(clusters, fat_sectors * sector_size * 8 // bits - 2), size=sectors * sector_size,
        active_fat=active, mirrored=not flags & 0x80, root_cluster=int(boot["BPB_RootClus"]) if wide else 0,
        fsinfo=_sector_of(boot, "BPB_FSInfo", wide, reserved),
        backup=_sector_of(boot, "BPB_BkBootSec", wide, reserved), state=int(boot[f"BS_Reserved1{suffix}"]),
        serial=int(boot[f"BS_VolID{suffix}"]) if signature in EXTENDED else None,
    )  # fmt: skip


def _sector_of(boot: np.void, field: str, wide: bool, reserved: int) -> int:
    """Byte offset of a sector within the reserved area; 0 where there is none."""
    sector = int(boot[field])
    return sector * int(boot["BPB_BytsPerSec"]) if wide and 0 < sector < reserved else 0
