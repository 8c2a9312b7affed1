"""qcow, the first version of qcow2: opened by QEMU.

Sources: QEMU block/qcow.c.
"""

import struct

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import name_at
from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat, References


def references(image: Reader) -> References:
    """The header states no backing format."""
    at, length = struct.unpack(">QI", image.read_clipped(8, 12))
    return References(name_at(image, at, length) if at else None)


FORMAT = ImageFormat(
    "qcow", Docs((), (ONLY_QEMU,), ("qemu-img convert",)), references=references, suffix=".qcow"
)
