"""VMDK: sparse extents with grain directories and tables, streams of compressed grains, flat extents.

Sources: VMware "Virtual Disk Format 5.0"; QEMU block/vmdk.c.
"""

from collections.abc import Sequence

from virt_bmap.core.errors import Unsupported
from virt_bmap.core.reader import Mark, Reader
from virt_bmap.formats.images.vmdk import descriptor
from virt_bmap.formats.images.vmdk.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.images.vmdk.ondisk import HEADER, MARKER, SECTOR
from virt_bmap.model.contract import (
    Docs,
    ImageFormat,
    ImageLayer,
    References,
    Structure,
    Structures,
    Writing,
)

NAME = "vmdk"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of a VMDK: a file that holds everything, or a descriptor with its extents (`others`, in the
    order in which they are named)."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.formats.images.layer import Draft
    from virt_bmap.formats.images.vmdk import extents, header, several

    found, separate = descriptor.find(image)
    if found is None and image.read_clipped(0, 4) == b"COWD":
        raise Unsupported(f"{image.name}: is a COWD (vmfsSparse) extent, which is not supported", 0)
    if found is not None and separate:
        return several.read_several(image, others, found)
    head = header.read_header(image)
    draft = Draft([image], head["capacity"] * SECTOR)
    grain = extents.own_sparse(draft, image, 0, 0, draft.size)
    return draft.finish(NAME, grain, several.facts(found, head), inflate=extents.inflate)


def references(image: Reader) -> References:
    """The text descriptor's extent lines and its parent's name.

    A parent is always a VMDK: the specification leaves nothing to guess.
    """
    found, _ = descriptor.find(image)
    if found is None:
        return References()
    extents = tuple(extent.file for extent in found.extents if extent.file)
    return References(found.parent, NAME if found.parent else None, extents=extents)


def marked(image: Reader) -> Mark | None:
    """By its header, where it is no descriptor alone."""
    from virt_bmap.formats.images.vmdk import header

    return header.marked(image)


def _structures() -> Structures:
    return {"header": Structure(HEADER), "footer": Structure(HEADER), "marker": Structure(MARKER)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    rewritten=descriptor.rewritten,
    marked=marked,
    writing=Writing.ANYWHERE,
    suffix=".vmdk",
)
