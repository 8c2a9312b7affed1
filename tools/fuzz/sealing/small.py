"""Formats with a checksum or two: EROFS, LUKS2, BitLocker, the labels of Sun's and SGI's machines.

Sources: fs/erofs/super.c erofs_superblock_csum_verify; LUKS2 On-Disk Format Specification 2.1; libbde's
documentation of the FVE metadata; block/partitions/sun.c, sgi.c.
"""

import hashlib
import zlib
from collections.abc import Iterator
from functools import partial

from ..disk import Disk
from .unit import Unit, Volume, be32, be64, crc32c, le16, own


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """The units of one volume."""
    found = {"erofs": _erofs, "crypto_LUKS": _luks2, "BitLocker": _bitlocker, "sgi": _sgi, "sun": _sun}[
        volume.type
    ]
    yield from found(disks[volume.disk], volume)


def _erofs(image: Disk, volume: Volume) -> Iterator[Unit]:
    block = 1 << image.read(volume.base + 1024 + 12, 1)[0]
    yield own(volume.disk, volume.base + 1024, block - 1024, 4, 4, crc32c)


def _luks2(image: Disk, volume: Volume) -> Iterator[Unit]:
    for at in (0, *(0x4000 << step for step in range(9))):
        head = image.read(volume.base + at, 512)
        if head[:6] in (b"LUKS\xba\xbe", b"SKUL\xba\xbe") and head[6:8] == b"\0\2":
            start, size = volume.base + at, be64(head, 8)
            yield Unit(volume.disk, start, start + size, partial(_seal_luks2, start, size))


def _seal_luks2(start: int, size: int, image: Disk) -> None:
    data = image.read(start, size)
    if len(data) == size:
        image.write(start + 0x1C0, hashlib.sha256(data[:0x1C0] + bytes(64) + data[0x200:]).digest())


def _bitlocker(image: Disk, volume: Volume) -> Iterator[Unit]:
    for at in range(volume.base, volume.base + volume.size, 65536):
        head = image.read(at, 16)
        if head[:8] == b"-FVE-FS-":
            size = 16 * le16(head, 8)
            yield Unit(volume.disk, at, at + size, partial(_seal_bitlocker, at, size))


def _seal_bitlocker(start: int, size: int, image: Disk) -> None:
    image.write(start + size + 4, zlib.crc32(image.read(start, size)).to_bytes(4, "little"))


def _sgi(image: Disk, volume: Volume) -> Iterator[Unit]:
    yield own(
        volume.disk,
        volume.base,
        512,
        504,
        4,
        lambda data: -sum(be32(data, at) for at in range(0, 512, 4)),
        "big",
    )


def _sun(image: Disk, volume: Volume) -> Iterator[Unit]:
    def value(data: bytes) -> int:
        result = 0
        for at in range(0, 512, 2):
            result ^= int.from_bytes(data[at : at + 2], "big")
        return result

    yield own(volume.disk, volume.base, 512, 510, 2, value, "big")
