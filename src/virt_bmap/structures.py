"""The fields of metadata by name, for people who look at bytes.

The readers declare what they read as NumPy records with the formats' own field names. This is the table of which record lies where: by the type of the volume, and by the
part of it that an extent is (or `record`, an inode's own; or `directory`). Imported with a reader only when it is asked.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.outputs.escape import escape

FILESYSTEMS, VOLUMES = "virt_bmap.filesystems.", "virt_bmap.volumes."


class Structure(NamedTuple):
    """Where a record type is declared (module:name), and whether others follow the first one to the extent's end."""

    declared: str
    many: bool = False

    @property
    def dtype(self) -> np.dtype[np.void]:
        module, _, name = self.declared.partition(":")
        found: np.dtype[np.void] = getattr(importlib.import_module(module), name)
        return found


EXT = {
    "superblock": Structure(FILESYSTEMS + "ext.superblock:SUPER"),
    "group descriptors": Structure(FILESYSTEMS + "ext.groups:DESCRIPTOR", many=True),
    "group descriptors, 64bit": Structure(FILESYSTEMS + "ext.groups:DESCRIPTOR_64", many=True),
    "record": Structure(FILESYSTEMS + "ext.inodes:INODE"),
    "journal": Structure(FILESYSTEMS + "ext.journal:JOURNAL_SUPER"),
    "tree": Structure(FILESYSTEMS + "ext.blocks:HEADER"),
}
FAT = {
    "boot sector": Structure(FILESYSTEMS + "fat.bpb:BOOT_SECTOR"), "FSInfo": Structure(FILESYSTEMS + "fat:FSINFO"),
    "directory": Structure(FILESYSTEMS + "fat.entries:DIRECTORY_ENTRY", many=True),
    "root directory": Structure(FILESYSTEMS + "fat.entries:DIRECTORY_ENTRY", many=True),
}  # fmt: skip
TABLE: dict[str, dict[str, Structure]] = {
    "ext2": EXT, "ext3": EXT, "ext4": EXT,
    "xfs": {
        "superblock": Structure(FILESYSTEMS + "xfs.disk:SUPERBLOCK"), "AGF": Structure(FILESYSTEMS + "xfs.disk:AGF"),
        "AGI": Structure(FILESYSTEMS + "xfs.disk:AGI"), "record": Structure(FILESYSTEMS + "xfs.disk:DINODE"), "record, crc": Structure(FILESYSTEMS + "xfs.disk:DINODE3"),
    },
    "btrfs": {"superblock": Structure(FILESYSTEMS + "btrfs.ondisk:SUPERBLOCK")},
    "ntfs": {
        "$Boot": Structure(FILESYSTEMS + "ntfs.structures:BOOT_SECTOR"), "boot sector copy": Structure(FILESYSTEMS + "ntfs.structures:BOOT_SECTOR"),
        "record": Structure(FILESYSTEMS + "ntfs.structures:MFT_RECORD"),
    },
    "vfat": FAT,
    "exfat": {"main boot region": Structure(FILESYSTEMS + "exfat:BOOT_SECTOR"), "backup boot region": Structure(FILESYSTEMS + "exfat:BOOT_SECTOR")},
    "iso9660": {
        "volume descriptors": Structure(FILESYSTEMS + "iso9660.descriptors:VOLUME", many=True),
        "El Torito boot catalog": Structure(FILESYSTEMS + "iso9660.descriptors:BOOT_ENTRY", many=True),
    },
    "udf": {
        "anchor": Structure(FILESYSTEMS + "udf.volume:ANCHOR_POINTER"), "file set descriptor": Structure(FILESYSTEMS + "udf.volume:FILE_SET_DESCRIPTOR"),
    },
    "squashfs": {"superblock": Structure(FILESYSTEMS + "squashfs:SUPERBLOCK")},
    "erofs": {"superblock": Structure(FILESYSTEMS + "erofs:SUPERBLOCK")},
    "f2fs": {
        "superblock": Structure(FILESYSTEMS + "f2fs.ondisk:SUPERBLOCK"), "record": Structure(FILESYSTEMS + "f2fs.ondisk:NODE"),
        "checkpoint pack 1": Structure(FILESYSTEMS + "f2fs.ondisk:CHECKPOINT"), "checkpoint pack 2": Structure(FILESYSTEMS + "f2fs.ondisk:CHECKPOINT"),
    },
    "gpt": {
        "GPT header": Structure(VOLUMES + "gpt:HEADER"), "GPT entries": Structure(VOLUMES + "gpt:ENTRY", many=True),
        "protective MBR": Structure(VOLUMES + "mbr:ENTRY", many=True),
    },
    "dos": {"partition table": Structure(VOLUMES + "mbr:ENTRY", many=True)},
    "mac": {
        "driver descriptor": Structure(VOLUMES + "apm:DRIVER_DESCRIPTOR"), "partition map": Structure(VOLUMES + "apm:ENTRY", many=True),
    },
    "sun": {"disk label": Structure(VOLUMES + "sun:LABEL")},
    "sgi": {"volume header": Structure(VOLUMES + "sgi:HEADER")},
    "LVM2_member": {"LVM label": Structure(VOLUMES + "lvm.label:LABEL_HEADER"), "LVM metadata area": Structure(VOLUMES + "lvm.label:MDA_HEADER")},
    "linux_raid_member": {"md superblock": Structure(VOLUMES + "md.superblock:SUPERBLOCK_1"), "md bitmap": Structure(VOLUMES + "md.superblock:BITMAP")},
}  # fmt: skip


def structure(type: str | None, part: str | None, features: str = "") -> Structure | None:
    """What lies in a part of a volume of this type; copies are named after what they copy, `backup superblock`."""
    found = TABLE.get(type or "", {})
    plain = (part or "").removeprefix("backup ").removeprefix("primary ")
    special = (found.get(f"{plain}, {word}") for word in features.split())
    return next(filter(None, special), None) or found.get(plain)


def fields(
    found: Structure, start: int, end: int, low: int, high: int, read: Callable[[int, int], bytes]
) -> list[dict[str, Any]]:
    """The fields that overlap bytes [low, high) of a volume, where records lie in the extent [start, end).

    `read(offset, length)` gives the volume's bytes. Each field is a dictionary: record (its number in the extent), name, start, end, value.
    """
    dtype = found.dtype
    size = dtype.itemsize
    first, last = (
        (max(0, (low - start) // size), min((end - start) // size, -(-(high - start) // size))) if found.many else (0, 1)
    )
    result = []
    for number in range(first, last):
        at = start + number * size
        record = np.frombuffer(read(at, min(size, end - at)).ljust(size, b"\0"), dtype)[
            0
        ]  # an ext inode of 128 bytes ends before its last fields
        for name, (kind, offset, *_) in sorted((dtype.fields or {}).items(), key=lambda item: item[1][1]):
            begin, behind = at + offset, at + offset + kind.itemsize
            if begin < high and behind > low and behind <= end:
                result.append(
                    {
                        "record": number if found.many else None,
                        "name": name,
                        "start": begin,
                        "end": behind,
                        "value": _value(record[name]),
                    }
                )
    return result


def _value(value: np.generic | np.ndarray | bytes) -> int | str | list[int]:
    """A number, text as escaped text, an array of numbers as a list, raw bytes as hexadecimal digits."""
    if isinstance(value, np.ndarray):
        return value.tobytes().hex() if value.dtype.itemsize == 1 else [int(each) for each in value.ravel()]
    if isinstance(value, np.void):
        return value.tobytes().hex()
    return escape(value) if isinstance(value, bytes) else int(value)
