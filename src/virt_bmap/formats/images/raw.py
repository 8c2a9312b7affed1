"""Raw images: the file is the disk.

Sources: none needed.
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import ints
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft
from virt_bmap.model.contract import RAW, Checks, Docs, ImageFormat, ImageLayer, Writing

FEATURES = ("files and block devices, NBD exports",)
REFUSED = ()
ORACLES = ("qemu-img map",)
CHECKS = Checks(
    checksums=None,
    rules=("the file: its size",),
    unchecked=(),
)


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """One row: every byte is where it is."""
    draft = Draft([image], image.size)
    draft.place(ints(0), ints(0), ints(image.size))
    return draft.finish(RAW, 1, {})


FORMAT = ImageFormat(
    RAW,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    writing=Writing.ANYWHERE | Writing.FREEING,
)
