"""LVM's labels and text metadata, and the metadata of thin pools.

Sources: LVM2 lib/format_text/layout.h, lib/misc/crc.c; drivers/md/dm-thin-metadata.c and persistent-data/*.c
(CSUM_XOR constants).
"""

import zlib
from collections.abc import Iterator
from functools import partial

from ..disk import Disk
from .unit import ONES, Unit, Volume, crc32c, le32, le64, own

SALTS = (160774, 121107, 240779, 160478)
"""Thin superblock, B-tree node, bitmap, bitmap index."""
LIMIT = 1 << 20


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Labels, metadata areas, their texts; blocks of thin metadata wherever they are."""
    image = disks[volume.disk]
    for at in range(volume.base, volume.base + 2048, 512):
        label = image.read(at, 512)
        if label[:8] == b"LABELONE":
            yield own(volume.disk, at, 512, 16, 4, lambda data: _crc(data[20:]))
            for area, size in _areas(label):
                start = volume.base + area
                yield Unit(volume.disk, start, start + size, partial(_seal_text, start, size))
                yield own(volume.disk, start, 512, 0, 4, lambda data: _crc(data[4:]))
    for at in range(volume.base + LIMIT, volume.base + min(volume.size, 3 * LIMIT), 4096):
        block = image.read(at, 4096)
        if any(block) and (salt := crc32c(block[4:]) ^ le32(block, 0)) in SALTS:
            yield own(volume.disk, at, 4096, 0, 4, partial(_salted, salt))


def _crc(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ ONES) ^ ONES


def _salted(salt: int, data: bytes) -> int:
    return crc32c(data[4:]) ^ salt


def _areas(label: bytes) -> list[tuple[int, int]]:
    """(offset, size) of the metadata areas: the second of two lists that each end with zeroes."""
    at, lists, found = le32(label, 20) + 40, 0, []
    while at + 16 <= 512 and lists < 2:
        pair = le64(label, at), le64(label, at + 8)
        lists += pair == (0, 0)
        if lists == 1 and pair != (0, 0):
            found.append(pair)
        at += 16
    return found


def _seal_text(start: int, size: int, image: Disk) -> None:
    """The checksum of each text that the area's header names; a text can go round the area's end."""
    head = image.read(start, 512)
    for slot in (40, 64):
        at, length = le64(head, slot), le64(head, slot + 8)
        if 0 < length <= LIMIT and at < size:
            text = image.read(start + at, min(length, size - at))
            text += image.read(start + 512, length - len(text))
            image.write(start + slot + 16, _crc(text).to_bytes(4, "little"))
