"""XFS version 5: each kind of block has its CRC-32C at its own place; and the log's records.

Sources: fs/xfs/libxfs/xfs_format.h, xfs_da_format.h, xfs_log_format.h.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..disk import Disk
from .unit import ONES, Unit, Volume, be32, be64, crc32c, own

PLACES = {
    b"XFSB": 224, b"XAGF": 216, b"XAGI": 312, b"XAFL": 32, b"AB3B": 52, b"AB3C": 52, b"IAB3": 52, b"FIB3": 52,
    b"RMB3": 52, b"R3FC": 52, b"BMA3": 64, b"XDB3": 4, b"XDD3": 4, b"XDF3": 4, b"XSLM": 12, b"XARM": 12,
}  # fmt: skip
"""The checksum's byte, by the magic at the block's start."""
LATER = {b"\x3e\xbe": 12, b"\x3d\xf1": 12, b"\x3d\xff": 12, b"\x3b\xee": 12}
"""Directory and attribute blocks whose magic lies at byte 8."""
INODE, INODE_CRC = b"IN", 100
RECORD = b"\xfe\xed\xba\xbe"


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Blocks by their magic, each tried with every size that it can have; the log's records."""
    image = disks[volume.disk]
    head = image.read(volume.base, 512)
    block = be32(head, 4)
    sector = int.from_bytes(head[102:104], "big")
    inode = int.from_bytes(head[104:106], "big")
    sizes = sorted({sector, block, block << head[192]})
    data = image.read(volume.base, volume.size // 512 * 512)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 512)
    first = rows[:, :4].copy().view("S4")[:, 0]
    later = rows[:, 8:10].copy().view("S2")[:, 0]
    for row in np.flatnonzero(np.isin(first, list(PLACES)) | np.isin(later, list(LATER))).tolist():
        place = PLACES.get(bytes(rows[row, :4]), LATER.get(bytes(rows[row, 8:10]), 0))
        for size in sizes:
            yield own(volume.disk, volume.base + row * 512, size, place, 4, _value)
    each = np.frombuffer(data[: len(data) // inode * inode], np.uint8).reshape(-1, inode)
    for row in np.flatnonzero((each[:, :2].copy().view("S2")[:, 0] == INODE) & (each[:, 4] == 3)).tolist():
        yield own(volume.disk, volume.base + row * inode, inode, INODE_CRC, 4, _value)
    yield from _log(image, volume, head, block)


def _value(data: bytes) -> int:
    return crc32c(data) ^ ONES


def _log(image: Disk, volume: Volume, head: bytes, block: int) -> Iterator[Unit]:
    start, blocks, agblocks, log = be64(head, 48), be32(head, 96), be32(head, 84), head[124]
    base = volume.base + ((start >> log) * agblocks + (start & (1 << log) - 1)) * block
    data = image.read(base, blocks * block)
    for at in range(0, len(data) - 512, 512):
        if data[at : at + 4] == RECORD and (length := be32(data, at + 12)) and length <= 1 << 18:
            headers = max(1, -(-be32(data, at + 300) // 32768)) if be32(data, at + 8) == 2 else 1
            yield Unit(
                volume.disk,
                base + at,
                base + at + headers * 512 + length,
                partial(_seal_record, base + at, headers, length),
            )


def _seal_record(start: int, headers: int, length: int, image: Disk) -> None:
    """The header without its checksum, what the further headers hold, the body."""
    data = bytearray(image.read(start, headers * 512 + length))
    data[32:36] = bytes(4)
    value = crc32c(bytes(data[:328]))
    for number in range(1, min(headers, -(-length // 32768))):
        value = crc32c(bytes(data[number * 512 : number * 512 + 260]), value)
    image.write(start + 32, (crc32c(bytes(data[headers * 512 :]), value) ^ ONES).to_bytes(4, "little"))
