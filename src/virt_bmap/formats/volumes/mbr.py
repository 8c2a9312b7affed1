"""MBR partition tables, with logical partitions and hybrid or protective tables left to GPT where there is
one.

Sources: UEFI specification 2.10, section 5.2 (legacy and protective MBR); Linux block/partitions/msdos.c for
what is taken for a table, for the chain of extended boot records, and for numbering: primary partitions 1 to
4 by slot, logical ones from 5 in chain order.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.partitions import SECTOR, add_partition, check_overlaps, is_cd
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Assembly,
    Checks,
    Docs,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)
from virt_bmap.model.problems import WARNING

NAME = "dos"
FEATURES = (
    "primary and logical partitions",
    "boot code and the gap behind it",
    "isohybrid disks left to ISO 9660",
    "partitions cut off by the disk's end",
)
REFUSED = ("4096-byte sectors without GPT: sizes are taken in 512-byte sectors",)
ORACLES = ("sfdisk --dump",)
CHECKS = Checks(
    checksums=None,
    rules=("partition table: places, overlaps, the chain of logical partitions",),
    unchecked=(),
)

ENTRIES, SIGNATURE = 446, 510
MAX_LOGICAL = 256
"""Links of the chain of extended boot records that are followed; the kernel stops at 256 partitions."""
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
TYPES = {
    0x01: "FAT12", 0x04: "FAT16 <32M", 0x05: "Extended", 0x06: "FAT16", 0x07: "HPFS/NTFS/exFAT",
    0x0B: "W95 FAT32", 0x0C: "W95 FAT32 (LBA)", 0x0E: "W95 FAT16 (LBA)", 0x0F: "W95 Ext'd (LBA)",
    0x27: "Hidden NTFS WinRE", 0x42: "SFS (dynamic disk)", 0x82: "Linux swap", 0x83: "Linux",
    0x85: "Linux extended", 0x8E: "Linux LVM", 0xA5: "FreeBSD", 0xA6: "OpenBSD", 0xA8: "Darwin UFS",
    0xA9: "NetBSD", 0xAF: "HFS / HFS+", 0xBF: "Solaris", 0xEE: "GPT", 0xEF: "EFI System", 0xFB: "VMware VMFS",
    0xFD: "Linux raid autodetect",
}  # fmt: skip

ENTRY = struct(16, [
    (0, "boot_indicator", "u1"),
    (4, "os_type", "u1"),
    (8, "starting_lba", "<u4"),
    (12, "size_in_lba", "<u4"),
])  # fmt: skip


def entries(sector: bytes) -> np.ndarray:
    """The four entries of a boot record, as ENTRY records."""
    return records(sector[ENTRIES : ENTRIES + 64], ENTRY)


def probe(reader: Reader) -> bool:
    """A signature, four plausible entries of which one is used, and no filesystem whose boot sector merely
    looks like that."""
    sector = reader.read_clipped(0, SECTOR)
    if (
        sector[SIGNATURE:] != b"\x55\xaa"
        or sector[3:7] == b"NTFS"
        or sector[3:8] == b"EXFAT"
        or _boot_sector_of_fat(sector)
    ):
        return False
    table = entries(sector)
    used = table[(table["os_type"] != 0) & (table["size_in_lba"] != 0)]
    if not len(used) or not np.isin(table["boot_indicator"], (0, 0x80)).all():
        return False
    # isolinux gives the entry that covers the CD image type 0
    start = widen(table["starting_lba"], "starting_lba") * SECTOR
    size = widen(table["size_in_lba"], "size_in_lba") * SECTOR
    return not isohybrid(reader, start, start + size)


def isohybrid(reader: Reader, starts: np.ndarray, ends: np.ndarray) -> bool:
    """A CD image that is also partitioned: its descriptors lie inside a partition, not in a gap where an
    older one left them."""
    descriptor = 0x8000
    return is_cd(reader) and bool(((starts <= descriptor) & (ends > descriptor)).any())


def _boot_sector_of_fat(sector: bytes) -> bool:
    """As msdos.c: a valid FAT boot sector with the same signature; a partition table has code where FAT has
    its parameters."""
    sectors_per_cluster, reserved, fats = sector[13], int.from_bytes(sector[14:16], "little"), sector[16]
    size = int.from_bytes(sector[11:13], "little")
    jump = sector[0] in (0xEB, 0xE9)
    return (
        jump and size in (512, 1024, 2048,
            4096) and sectors_per_cluster.bit_count() == 1 and reserved > 0 and fats in (1, 2)
        and (sector[21] == 0xF0 or sector[21] >= 0xF8)
    )  # fmt: skip


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk. Its partitions are children, logical ones too."""
    (disk,) = members
    assembly = Assembly(members)
    about = assembly.about(disk)
    own, damage = about.extents, about.damage
    own.add(tables.BOOT, 0, ENTRIES, part="boot code")
    own.add(tables.METADATA, ENTRIES, SECTOR - ENTRIES, part="partition table")
    signature = f"{int.from_bytes(disk.reader.read(440, 4), 'little'):08x}"
    about.uuid = signature
    for slot, entry in enumerate(entries(disk.reader.read(0, SECTOR)), 1):
        kind, start = int(entry["os_type"]), int(entry["starting_lba"]) * SECTOR
        length = int(entry["size_in_lba"]) * SECTOR
        if kind == 0 or length == 0:
            continue
        if kind in EXTENDED:
            # the kernel shows an extended partition as its first two sectors, so that boot loaders can be put
            # there
            add_partition(
                assembly,
                disk,
                slot,
                start,
                min(length, 2 * SECTOR),
                **_about(kind, slot, signature),
                contents=False,
                unread="extended partition",
            )
            _logical(assembly, disk, start, length, signature)
        else:
            add_partition(assembly, disk, slot, start, length, **_about(kind, slot, signature))
    check_overlaps(assembly, damage)
    _post_mbr_gap(disk, own, [int(child.rows.parent_offset[0]) for child in assembly.children])
    return assembly


def _logical(assembly: Assembly, disk: Member, base: int, length: int, signature: str) -> None:
    """Follow the chain of extended boot records; entry 1 is relative to this record, entry 2 to the extended
    partition."""
    own, damage = assembly.about(disk).extents, assembly.about(disk).damage
    at, number, seen = base, 5, set[int]()
    while at not in seen and len(seen) < MAX_LOGICAL:
        seen.add(at)
        if at + SECTOR > disk.reader.size or disk.reader.read(at + SIGNATURE, 2) != b"\x55\xaa":
            damage.say(
                "mapping",
                f"there is no extended boot record at byte {at:#x}, where the chain of logical "
                "partitions leads",
                at,
            )
            return
        own.add(tables.METADATA, at, SECTOR, part="extended boot record")
        sector = disk.reader.read(at, SECTOR)
        logical = record(sector, ENTRY, ENTRIES)
        further = record(sector, ENTRY, ENTRIES + 16)
        if logical["os_type"] and logical["size_in_lba"]:
            start, size = at + int(logical["starting_lba"]) * SECTOR, int(logical["size_in_lba"]) * SECTOR
            if start + size > base + length:
                damage.say(
                    "outside",
                    f"logical partition {number} reaches beyond its extended partition",
                    at,
                    severity=WARNING,
                )
            add_partition(
                assembly, disk, number, start, size, **_about(int(logical["os_type"]), number, signature)
            )
            number += 1
        if int(further["os_type"]) not in EXTENDED or further["size_in_lba"] == 0:
            return
        at = base + int(further["starting_lba"]) * SECTOR
    damage.say("twice", f"the chain of extended boot records comes back to byte {at:#x}", at)


def _about(kind: int, number: int, signature: str) -> dict[str, str]:
    return {"uuid": f"{signature}-{number:02x}", "detail": f"{kind:#04x} {TYPES.get(kind, 'unknown type')}"}


def _post_mbr_gap(disk: Member, own: tables.ExtentRows, starts: list[int]) -> None:
    """What lies between the MBR and the first partition is boot code (GRUB's core image, by custom) where it
    is not empty."""
    first = min(starts, default=0)
    if first > SECTOR and any(disk.reader.read(SECTOR, min(first, 64 << 10) - SECTOR)):
        own.add(tables.BOOT, SECTOR, first - SECTOR, part="gap behind the MBR")


def _structures() -> Structures:
    return {
        "partition table": Structure(ENTRY, many=True),
    }


FORMAT = VolumeFormat(NAME, probe, assemble, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
