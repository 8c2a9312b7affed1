"""NTFS: no checksum, but the last two bytes of each sector of a record must hold its update sequence number.

Source: Linux-NTFS documentation, "Fixup".
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..disk import Disk
from .unit import Unit, Volume, le16, le32

SIGNATURES = (b"FILE", b"INDX", b"RSTR", b"RCRD")


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Every record in the volume, by its signature."""
    data = np.frombuffer(disks[volume.disk].read(volume.base, volume.size // 512 * 512), "<u4").reshape(
        -1, 128
    )
    for row in np.flatnonzero(np.isin(data[:, 0], [le32(word, 0) for word in SIGNATURES])).tolist():
        start = volume.base + row * 512
        head = disks[volume.disk].read(start, 8)
        yield Unit(
            volume.disk,
            start,
            start + (le16(head, 6) - 1) * 512,
            partial(_seal, start, le16(head, 4), le16(head, 6)),
        )


def _seal(start: int, usa: int, count: int, image: Disk) -> None:
    number = image.read(start + usa, 2)
    for sector in range(1, count):
        image.write(start + sector * 512 - 2, number)
