"""btrfs: superblocks and tree nodes, CRC-32C from byte 32 on. Source: fs/btrfs/disk-io.c csum_tree_block."""

from collections.abc import Iterator

import numpy as np

from ..disk import Disk
from .unit import ONES, Unit, Volume, crc32c, le16, le32, own


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Nodes are blocks that carry the filesystem's UUID where nodes do."""
    image = disks[volume.disk]
    head = image.read(volume.base + 0x10000, 4096)
    if head[0x40:0x48] != b"_BHRfS_M" or le16(head, 0xC4) != 0:
        return
    for at in (0x10000, 0x4000000):
        yield own(volume.disk, volume.base + at, 4096, 0, 4, _value)
    size, fsid = le32(head, 0x94), np.frombuffer(head[0x20:0x30], np.uint8)
    for start in range(volume.base, volume.base + volume.size - 4095, 1 << 20):
        data = image.read(start, 1 << 20)
        blocks = np.frombuffer(data[: len(data) // 4096 * 4096], np.uint8).reshape(-1, 4096)
        for row in np.flatnonzero((blocks[:, 0x20:0x30] == fsid).all(axis=1)).tolist():
            yield own(volume.disk, start + row * 4096, size, 0, 4, _value)


def _value(data: bytes) -> int:
    return crc32c(data[32:]) ^ ONES
