"""Parallels: opened by QEMU.

Sources: QEMU docs/interop/parallels.rst, block/parallels.c.
"""

from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.closing import not_closed
from virt_bmap.model.contract import ONLY_QEMU, Docs, ImageFormat

IN_USE_AT, IN_USE = 44, b"Ynot"
"""The header's in_use, 0x746F6E59 while the image is open."""


def marked(image: Reader) -> Mark | None:
    """QEMU does not even write to an image with this mark."""
    if image.read_clipped(IN_USE_AT, 4) != IN_USE:
        return None
    return not_closed(image, "Parallels' in-use mark", "qemu-img check -r all puts it in order")


FORMAT = ImageFormat(
    "parallels", Docs((), (ONLY_QEMU,), ("qemu-img convert", "qemu-img check")), marked=marked
)
