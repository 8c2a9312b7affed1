"""GPT: the entries' checksum lies in the header, the header's in itself. Source: UEFI 2.10, section 5.3."""

import zlib
from collections.abc import Iterator
from functools import partial

from ..disk import Disk
from .unit import Unit, Volume, le32, le64, own

SECTOR = 512


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Both tables of one disk."""
    image = disks[volume.disk]
    for at in (volume.base + SECTOR, volume.base + volume.size - SECTOR):
        head = image.read(at, SECTOR)
        entries, size = volume.base + le64(head, 72) * SECTOR, le32(head, 80) * le32(head, 84)
        yield Unit(volume.disk, entries, entries + size, partial(_seal_entries, at, volume.base))
        yield Unit(volume.disk, at, at + 92, partial(_seal_entries, at, volume.base))
        yield own(volume.disk, at, 92, 16, 4, zlib.crc32)


def _seal_entries(at: int, base: int, image: Disk) -> None:
    head = image.read(at, SECTOR)
    start, size = base + le64(head, 72) * SECTOR, le32(head, 80) * le32(head, 84)
    if size <= 1 << 20:
        image.write(at + 88, zlib.crc32(image.read(start, size)).to_bytes(4, "little"))
