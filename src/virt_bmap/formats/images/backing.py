"""Names of backing files: as QEMU's own formats keep them, and as parents of differencing images.

Sources: QEMU docs/interop/qcow2.rst, block/qcow.c, block/qed.h.
"""

import os
from collections.abc import Callable

from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import References

MAX_NAME = 1023
"""Bytes, as QEMU allows."""


def name_at(image: Reader, offset: int, length: int) -> str | None:
    """The name at byte `offset` of the image; None where the header gives none."""
    if length == 0:
        return None
    if length > MAX_NAME or offset + length > image.size:
        raise ImageError(
            f"{image.name}: the backing file name at byte {offset:#x}, {length} bytes long, does not "
            "fit into the image"
        )
    return os.fsdecode(image.read(offset, length))


def of_parent(image: Reader, format: str, parent: Callable[[Reader], str | None]) -> References:
    """A parent of the same format, as `parent` finds it. What is damaged is said by who reads the image."""
    try:
        name = parent(image)
    except Corrupt as error:
        if error.code == "holes":  # who reads it would have much to do
            raise
        name = None
    return References(name, format if name else None)
