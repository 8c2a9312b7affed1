"""Expert Witness segments: Adler-32 of section descriptors, and of what lies in sections.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)".
"""

import zlib
from collections.abc import Iterator

from ..disk import Disk
from .unit import Unit, Volume, le32, le64, own

DESCRIPTOR, HEADER = 76, 24


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """The units of one segment file."""
    image, at = disks[volume.disk], 13
    while at + DESCRIPTOR <= image.size:
        head = image.read(at, DESCRIPTOR)
        kind, follows = head[:16].rstrip(b"\0"), le64(head, 16)
        yield _ends(volume.disk, at, DESCRIPTOR)
        if follows <= at:
            return
        start, size = at + DESCRIPTOR, follows - at - DESCRIPTOR
        if kind in (b"volume", b"data", b"hash", b"digest"):
            yield _ends(volume.disk, start, size)
        if kind in (b"table", b"table2"):
            yield _ends(volume.disk, start, HEADER)
            yield _ends(volume.disk, start + HEADER, le32(image.read(start, 4), 0) * 4 + 4)
        at = follows


def _ends(disk: int, start: int, length: int) -> Unit:
    """Bytes that end with the Adler-32 of those before it."""
    return own(disk, start, length, length - 4, 4, lambda data: zlib.adler32(data[:-4]))
