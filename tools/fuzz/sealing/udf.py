"""UDF: every descriptor has a tag with a CRC of what follows and a sum of the tag itself.

Source: ECMA-167 3/7.2.
"""

import binascii
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..disk import Disk
from .unit import Unit, Volume, le16

TAGS = (*range(1, 10), *range(256, 267))


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """Everything that begins as a tag does, at a multiple of four bytes: names in directories begin
    anywhere."""
    image = disks[volume.disk]
    words = np.frombuffer(image.read(volume.base, volume.size // 4 * 4), "<u2").reshape(-1, 2)
    for row in np.flatnonzero(np.isin(words[:, 0], TAGS) & np.isin(words[:, 1], (2, 3))).tolist():
        start = volume.base + 4 * row
        tag = image.read(start, 16)
        if (sum(tag) - tag[4]) & 255 == tag[4]:
            yield Unit(volume.disk, start, start + 16 + le16(tag, 10), partial(_seal, start))


def _seal(start: int, image: Disk) -> None:
    length = le16(image.read(start, 16), 10)
    image.write(start + 8, binascii.crc_hqx(image.read(start + 16, length), 0).to_bytes(2, "little"))
    tag = image.read(start, 16)
    image.write(start + 4, bytes([(sum(tag) - tag[4]) & 255]))
