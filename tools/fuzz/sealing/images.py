"""VHD and VHDX. Sources: Virtual Hard Disk Image Format Specification 1.0; [MS-VHDX] 2.2, 2.3."""

from collections.abc import Iterator

from ..disk import Disk
from .unit import ONES, Unit, Volume, crc32c, le32, own


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """The units of one image file."""
    image = disks[volume.disk]
    for at in (0, image.size - 512):
        yield own(volume.disk, at, 512, 64, 4, lambda data: ~sum(data), "big")
    for at in range(512, min(image.size, 65536), 512):
        if image.read(at, 8) == b"cxsparse":
            yield own(volume.disk, at, 1024, 36, 4, lambda data: ~sum(data), "big")
    for at, size in ((0x10000, 4096), (0x20000, 4096), (0x30000, 65536), (0x40000, 65536)):
        yield own(volume.disk, at, size, 4, 4, lambda data: crc32c(data) ^ ONES)
    for at in range(0x100000, min(image.size, 0x300000), 4096):
        head = image.read(at, 12)
        if head[:4] == b"loge" and 4096 <= le32(head, 8) <= 1 << 20:
            yield own(volume.disk, at, le32(head, 8), 4, 4, lambda data: crc32c(data) ^ ONES)
