"""md superblocks of versions 0.90 and 1.

Sources: include/uapi/linux/raid/md_p.h; drivers/md/md.c calc_sb_csum, calc_sb_1_csum.
"""

from collections.abc import Iterator

from ..disk import Disk
from .unit import ONES, Unit, Volume, le16, le32, own


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Wherever a superblock of either version can lie."""
    image, end = disks[volume.disk], volume.size
    for at in (0, 4096, (end // 512 - 16) // 8 * 8 * 512):
        head = image.read(volume.base + at, 256)
        if le32(head, 0) == 0xA92B4EFC:
            yield own(volume.disk, volume.base + at, 256 + 2 * le32(head, 220), 216, 4, _sum_1)
    yield own(volume.disk, volume.base + end // 65536 * 65536 - 65536, 4096, 4 * 38, 4, _sum_90)


def _folded(total: int) -> int:
    return (total & ONES) + (total >> 32)


def _sum_1(data: bytes) -> int:
    return _folded(
        sum(le32(data, at) for at in range(0, len(data) - 3, 4))
        + (le16(data, len(data) - 2) if len(data) % 4 else 0)
    )


def _sum_90(data: bytes) -> int:
    return _folded(sum(le32(data, at) for at in range(0, 4096, 4)))
