"""F2FS: superblocks, checkpoints, inodes.

Sources: fs/f2fs/f2fs.h f2fs_chksum, checkpoint.c f2fs_checkpoint_chksum, inode.c f2fs_inode_chksum.
"""

import zlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..disk import Disk
from .unit import ONES, Unit, Volume, le32, own

MAGIC, BLOCK = 0xF2F52010, 4096
CHECKSUM_AT = 368
"""Of an inode, in its extra attributes."""


def _crc(data: bytes, start: int = MAGIC) -> int:
    """CRC-32 as the kernel's: no complement at either end."""
    return ~zlib.crc32(data, ~start & ONES) & ONES


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Both superblocks, the heads and tails of both checkpoints, and inodes by their footers."""
    image, base = disks[volume.disk], volume.base
    head = image.read(base + 1024, 3072)
    for at in (1024, BLOCK + 1024):
        yield own(volume.disk, base + at, 3072, 3068, 4, lambda data: _crc(data[:3068]))
    first = le32(head, 76)
    for pack in (first, first + 512):
        count = le32(image.read(base + pack * BLOCK, BLOCK), 136)
        for block in (pack, pack + count - 1):
            start = base + block * BLOCK
            yield Unit(volume.disk, start, start + BLOCK, partial(_seal_checkpoint, start))
    seed = _crc(head[108:124], ONES)
    area = base + le32(head, 92) * BLOCK
    for at in range(area, base + volume.size - BLOCK + 1, 1 << 20):
        data = image.read(at, 1 << 20)
        words = np.frombuffer(data[: len(data) // BLOCK * BLOCK], "<u4").reshape(-1, BLOCK // 4)
        same = (words[:, -6] == words[:, -5]) & (words[:, -6] != 0)  # an inode's footer names itself twice
        extra = words[:, 0] & 0x20000000 != 0  # a flag in the inode's fourth byte
        for row in np.flatnonzero(same & extra).tolist():
            start = at + row * BLOCK
            yield Unit(volume.disk, start, start + BLOCK, partial(_seal_inode, start, seed))


def _seal_checkpoint(start: int, image: Disk) -> None:
    data = image.read(start, BLOCK)
    at = le32(data, 164)
    if 192 <= at <= BLOCK - 4:
        value = _crc(data[:at])
        image.write(
            start + at, (_crc(data[at + 4 :], value) if at < BLOCK - 4 else value).to_bytes(4, "little")
        )


def _seal_inode(start: int, seed: int, image: Disk) -> None:
    data = image.read(start, BLOCK)
    ino, generation = data[BLOCK - 24 : BLOCK - 20], data[296:300]
    value = _crc(generation, _crc(ino, seed))
    image.write(
        start + CHECKSUM_AT,
        _crc(data[:CHECKSUM_AT] + bytes(4) + data[CHECKSUM_AT + 4 :], value).to_bytes(4, "little"),
    )
