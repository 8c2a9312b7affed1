"""What else a qcow2 image is made of, by its header alone: backing file, external data file.

This is asked before anything else looks at an image, and takes less for granted than `header.read_header`.

Sources: QEMU docs/interop/qcow2.rst (v8.2), "Header" and "Header extensions".
"""

import os
import struct

from virt_bmap.core.errors import ImageError
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.backing import name_at
from virt_bmap.formats.images.qcow2.ondisk import (
    CORRUPT,
    DATA_FILE,
    DIRTY,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_END,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    V2_LENGTH,
)
from virt_bmap.model.contract import References
from virt_bmap.model.problems import NOTE

MAX_EXTENSIONS = 64 << 10
"""Bytes of header extensions that are looked at.

Real ones have some hundreds, and what is not found is refused.
"""


def marked(image: Reader) -> Mark | None:
    """QEMU marks an image whose tables it has met in contradiction, and writes to it no more; and one whose
    refcounts it writes back late, while it is open."""
    version, features = struct.unpack_from(">I64xQ", image.read_clipped(0, 104), 4)
    if version < 3 or not features & (CORRUPT | DIRTY):
        return None
    if features & CORRUPT:
        words = "QEMU has marked it as damaged, and what is read may be wrong: see qemu-img check"
        return Mark("marked-damaged", f"{image.name}: {words}")
    words = (
        "was not closed (qcow2's dirty bit): refcounts are not up to date, and qemu-img check -r all puts "
        "them in order; what a guest reads is not affected"
    )
    return Mark("unclean", f"{image.name}: {words}", NOTE)


def references(image: Reader) -> References:
    """The names in the header, and the backing format in an extension of it."""
    header = image.read_clipped(0, 104)
    version, at, length = struct.unpack_from(">IQI", header, 4)
    backing = name_at(image, at, length) if at else None
    start = V2_LENGTH if version < 3 else struct.unpack_from(">I", header, 100)[0]
    backing_format, data = _extensions(image.read_clipped(start, MAX_EXTENSIONS))
    incompatible = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
    if not incompatible & DATA_FILE:
        data = None
    elif data is None:
        raise ImageError(
            f"{image.name}: its qcow2 header says that an external data file holds the data, but names none"
        )
    return References(backing, backing_format, data)


def _extensions(area: bytes) -> tuple[str | None, str | None]:
    """(backing format, data file) that the header extensions state."""
    found: dict[int, bytes] = {}
    place = 0
    while place + 8 <= len(area):
        kind, size = struct.unpack_from(">II", area, place)
        body = area[place + 8 : place + 8 + size]
        if kind == EXT_END or len(body) < size:
            break
        found[kind] = body
        place += 8 + (size + 7) // 8 * 8
    format, data = found.get(EXT_BACKING_FORMAT), found.get(EXT_DATA_FILE)
    return format.decode("ascii", "replace") if format else None, os.fsdecode(data) if data else None


def cluster(image: Reader) -> int:
    """Bytes of a cluster (cluster_bits)."""
    bits: int = struct.unpack_from(">I", image.read_clipped(20, 4))[0]
    return 1 << min(max(bits, MIN_CLUSTER_BITS), MAX_CLUSTER_BITS)
