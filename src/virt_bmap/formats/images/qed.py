"""QED: opened by QEMU.

Sources: QEMU docs/interop/qed_spec.rst, block/qed.h.
"""

import struct

from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.backing import name_at
from virt_bmap.formats.images.closing import not_closed
from virt_bmap.model.contract import ONLY_QEMU, RAW, Docs, ImageFormat, References

BACKING_FILE, NEED_CHECK, BACKING_FORMAT_NO_PROBE = 1, 2, 4
"""Bits of the features."""


def references(image: Reader) -> References:
    """The header states no backing format but raw."""
    header = image.read_clipped(0, 72)
    features, at, length = struct.unpack_from("<Q", header, 16)[0], *struct.unpack_from("<II", header, 56)
    return References(
        name_at(image, at, length) if features & BACKING_FILE else None,
        RAW if features & BACKING_FORMAT_NO_PROBE else None,
    )


def marked(image: Reader) -> Mark | None:
    """The mark stands while clusters are given away: their tables may not be written yet."""
    (features,) = struct.unpack("<Q", image.read_clipped(16, 8))
    if not features & NEED_CHECK:
        return None
    return not_closed(image, "QED's need-check bit", "qemu-img check -r all puts it in order")


FORMAT = ImageFormat(
    "qed",
    Docs((), (ONLY_QEMU,), ("qemu-img convert", "qemu-img check")),
    references=references,
    marked=marked,
    suffix=".qed",
)
