"""What the modules of formats share: a sealed structure, the volume it lies in, and a CRC-32C of their
own."""

from collections.abc import Callable
from typing import NamedTuple

from virt_bmap.model.blockmap import BlockMap

from ..disk import Disk


class Unit(NamedTuple):
    """Bytes [start, end) of a disk that a checksum covers, or that hold one; `seal` writes the checksum of
    what lies there now."""

    disk: int
    start: int
    end: int
    seal: Callable[[Disk], object]


class Volume(NamedTuple):
    """A volume that lies in one piece on one disk, from byte `base`; `number` in the undamaged map."""

    type: str
    disk: int
    base: int
    size: int
    number: int
    bmap: BlockMap


def _table() -> list[int]:
    values = list(range(256))
    for _ in range(8):
        values = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in values]
    return values


TABLE = _table()
ONES = 0xFFFFFFFF


def crc32c(data: bytes, crc: int = ONES) -> int:
    """Castagnoli's CRC, without the final complement (RFC 3720, appendix B.4)."""
    table = TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc


def le16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def le32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def le64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def be32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def be64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big")


def own(
    disk: int,
    start: int,
    length: int,
    at: int,
    width: int,
    value: Callable[[bytes], int],
    order: str = "little",
) -> Unit:
    """The plain case: a checksum inside the structure it covers, at byte `at` of it, taken as zero while
    `value` computes it."""

    def seal(image: Disk) -> None:
        data = bytearray(image.read(start, length))
        if len(data) == length:
            data[at : at + width] = bytes(width)
            number = value(bytes(data)) & (1 << 8 * width) - 1
            image.write(start + at, number.to_bytes(width, "big" if order == "big" else "little"))

    return Unit(disk, start, start + length, seal)
