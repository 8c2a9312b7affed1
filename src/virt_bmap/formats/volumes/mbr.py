"""MBR partition tables, with logical partitions and hybrid or protective tables left to GPT where there is
one.

Sources: UEFI specification 2.10, section 5.2 (legacy and protective MBR); Linux block/partitions/msdos.c for
what is taken for a table, for the chain of extended boot records, and for numbering: primary partitions 1 to
4 by slot, logical ones of all extended partitions from 5 in chain order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virt_bmap.core.layout import widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import sectors
from virt_bmap.formats.common.boot_record import (
    ENTRIES,
    ENTRY,
    SECTOR,
    SIGNATURE,
    Entry,
    chain,
    entries,
    has_partitions,
    raw_entries,
)
from virt_bmap.formats.common.partitions import (
    DYNAMIC,
    add_partition,
    check_overlaps,
    is_disc,
    say_dynamic,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Assembly,
    Checks,
    Child,
    Docs,
    Member,
    Structure,
    Structures,
    VolumeFormat,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

NAME = "dos"
FEATURES = (
    "primary and logical partitions",
    "boot code and the gap behind it",
    "isohybrid disks left to ISO 9660",
    "partitions cut off by the disk's end",
    "sectors of 512 to 4096 bytes: by what lies there, by the device, by `--blocksize`",
)
REFUSED = ("partitions of Windows dynamic disks (named only)",)
ORACLES = ("sfdisk --dump", "partx", "parted")
CHECKS = Checks(
    checksums=None,
    rules=("partition table: places, overlaps, the chain of logical partitions",),
    unchecked=(),
)

FIRST_LOGICAL, MAX_PARTITIONS = 5, 256
"""The kernel's numbers: logical partitions from 5 on, and none from 256 on."""
SFS = 0x42
PROTECTIVE = 0xEE
TYPES = {
    0x00: "Empty", 0x01: "FAT12", 0x04: "FAT16 <32M", 0x05: "Extended", 0x06: "FAT16",
    0x07: "HPFS/NTFS/exFAT",
    0x0B: "W95 FAT32", 0x0C: "W95 FAT32 (LBA)", 0x0E: "W95 FAT16 (LBA)", 0x0F: "W95 Ext'd (LBA)",
    0x27: "Hidden NTFS WinRE", 0x42: "SFS (dynamic disk)", 0x82: "Linux swap", 0x83: "Linux",
    0x85: "Linux extended", 0x8E: "Linux LVM", 0xA5: "FreeBSD", 0xA6: "OpenBSD", 0xA8: "Darwin UFS",
    0xA9: "NetBSD", 0xAF: "HFS / HFS+", 0xBF: "Solaris", 0xEE: "GPT", 0xEF: "EFI System", 0xFB: "VMware VMFS",
    0xFD: "Linux raid autodetect",
}  # fmt: skip


def labelled(reader: Reader) -> bool:
    """A signature, four plausible entries of which one is used, and no filesystem whose boot sector merely
    looks like that."""
    sector = reader.read_clipped(0, SECTOR)
    is_boot_sector = sector[3:7] == b"NTFS" or sector[3:8] == b"EXFAT" or _boot_sector_of_fat(sector)
    if sector[SIGNATURE:] != b"\x55\xaa" or (is_boot_sector and not has_partitions(sector)):
        return False
    table = raw_entries(sector)
    is_used = bool(((table["os_type"] != 0) & (table["size_in_lba"] != 0)).any())
    return is_used and bool(np.isin(table["boot_indicator"], (0, 0x80)).all())


def probe(reader: Reader) -> bool:
    """A table, on what is no CD image."""
    if not labelled(reader):
        return False
    # isolinux gives the entry that covers the CD image type 0
    table = raw_entries(reader.read_clipped(0, SECTOR))
    start = widen(table["starting_lba"], "starting_lba") * SECTOR
    size = widen(table["size_in_lba"], "size_in_lba") * SECTOR
    return not is_disc(reader, start, start + size)


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


LINKS = "extended partition"


def assemble(members: Sequence[Member]) -> Assembly:
    """One member: the disk. Its partitions are children, logical ones too."""
    (disk,) = members
    assembly = Assembly(members)
    about = assembly.about(disk)
    own, damage = about.extents, about.damage
    own.add(tables.BOOT, 0, ENTRIES, part="boot code")
    own.add(tables.METADATA, ENTRIES, SECTOR - ENTRIES, part="partition table")
    about.uuid = f"{int.from_bytes(disk.reader.read(440, 4), 'little'):08x}"
    primary = entries(disk.reader.read(0, SECTOR))
    sector = sectors.counted_in(disk, [entry for entry in primary if entry.length], about)
    number, records = FIRST_LOGICAL, list[int]()
    for slot, entry in enumerate(primary, 1):
        if entry.length and entry.is_link:
            # the kernel shows an extended partition as its first two sectors, so that boot loaders can be put
            # there
            room = min(entry.length * sector, max(sector, 2 * SECTOR))
            shown = _about(entry.kind, slot, about.uuid) | {"contents": False, "unread": LINKS}
            add_partition(assembly, disk, slot, entry.start * sector, room, **shown)
            for record in chain(disk.reader, entry, sector, damage):
                own.add(tables.METADATA, record.at, SECTOR, part="extended boot record")
                records.append(record.at)
                if number + len(record.partitions) > MAX_PARTITIONS:
                    words = f"partitions from number {number} on are left out"
                    damage.say("too-many", words, record.at)
                    break
                for logical in record.partitions:
                    _add(assembly, disk, number, logical, about.uuid)
                    number += 1
        elif entry.length:
            place = Entry(entry.kind, entry.start * sector, entry.length * sector)
            _add(assembly, disk, slot, place, about.uuid)
    partitions = [child for child in assembly.children if child.unread != LINKS]
    check_overlaps(partitions, damage)
    _check_records(partitions, records, damage)
    say_dynamic(partitions, damage)
    _post_mbr_gap(disk, own, [int(child.rows.parent_offset[0]) for child in assembly.children])
    return assembly


def _add(assembly: Assembly, disk: Member, number: int, entry: Entry, signature: str) -> None:
    """A partition that is no container, its entry in bytes of the disk."""
    about = _about(entry.kind, number, signature)
    more = DYNAMIC if entry.kind == SFS else {}
    add_partition(assembly, disk, number, entry.start, entry.length, **about, **more)


def _about(kind: int, number: int, signature: str) -> dict[str, Any]:
    return {"uuid": f"{signature}-{number:02x}", "detail": f"{kind:#04x} {TYPES.get(kind, 'unknown type')}"}


def _check_records(partitions: Sequence[Child], records: Sequence[int], damage: Damage) -> None:
    """Say which extended boot records lie in partitions: they are read, but a write there ends the chain."""
    for child in partitions:
        start = int(child.rows.parent_offset[0])
        for at in records:
            if start <= at < start + child.size:
                words = f"the extended boot record at byte {at:#x} lies inside {child.name}"
                damage.say("two-owners", words, at, severity=WARNING)


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
