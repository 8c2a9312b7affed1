"""exFAT: the boot region's checksum in its own sector, one in each file's entry set, one over the up-case
table. Source: exFAT specification 3.4, 6.3.3, 7.2.2."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..disk import Disk
from .unit import ONES, Unit, Volume, le32, le64


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Both boot regions, and every entry set and table in the clusters."""
    image = disks[volume.disk]
    boot = image.read(volume.base, 512)
    sector = 1 << boot[108]
    for at in (volume.base, volume.base + 12 * sector):
        yield Unit(volume.disk, at, at + 11 * sector, partial(_seal_boot, at, sector))
    heap = volume.base + le32(boot, 88) * sector
    entries = np.frombuffer(
        image.read(heap, (volume.base + volume.size - heap) // 32 * 32), np.uint8
    ).reshape(-1, 32)
    for row in np.flatnonzero(entries[:, 0] == 0x85).tolist():
        size = 32 * (1 + int(entries[row, 1]))
        yield Unit(
            volume.disk, heap + 32 * row, heap + 32 * row + size, partial(_seal_set, heap + 32 * row, size)
        )
    for row in np.flatnonzero(entries[:, 0] == 0x82).tolist():
        entry = entries[row].tobytes()
        start, size = heap + (le32(entry, 20) - 2) * (sector << boot[109]), le64(entry, 24)
        if size <= 1 << 17:
            yield Unit(volume.disk, start, start + size, partial(_seal_table, heap + 32 * row, start, size))


def _sum(data: bytes, skip: tuple[int, ...], bits: int) -> int:
    """The checksum of the format: rotate right and add."""
    value, mask = 0, (1 << bits) - 1
    for at, byte in enumerate(data):
        if at not in skip:
            value = ((value & 1) << (bits - 1)) + (value >> 1) + byte & mask
    return value


def _seal_boot(at: int, sector: int, image: Disk) -> None:
    value = _sum(image.read(at, 11 * sector), (106, 107, 112), 32)
    image.write(at + 11 * sector, (value & ONES).to_bytes(4, "little") * (sector // 4))


def _seal_set(at: int, size: int, image: Disk) -> None:
    image.write(at + 2, _sum(image.read(at, size), (2, 3), 16).to_bytes(2, "little"))


def _seal_table(entry: int, start: int, size: int, image: Disk) -> None:
    image.write(entry + 4, _sum(image.read(start, size), (), 32).to_bytes(4, "little"))
