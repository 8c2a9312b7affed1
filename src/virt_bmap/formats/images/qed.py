"""QED: opened by QEMU.

Sources: QEMU docs/interop/qed_spec.rst, block/qed.h.
"""

import struct

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import name_at
from virt_bmap.model.contract import ONLY_QEMU, RAW, Docs, ImageFormat, References

BACKING_FILE, BACKING_FORMAT_NO_PROBE = 1, 4
"""Bits of the features."""


def references(image: Reader) -> References:
    """The header states no backing format but raw."""
    header = image.read_clipped(0, 72)
    features, at, length = struct.unpack_from("<Q", header, 16)[0], *struct.unpack_from("<II", header, 56)
    return References(
        name_at(image, at, length) if features & BACKING_FILE else None,
        RAW if features & BACKING_FORMAT_NO_PROBE else None,
    )


FORMAT = ImageFormat(
    "qed", Docs((), (ONLY_QEMU,), ("qemu-img convert",)), references=references, suffix=".qed"
)
