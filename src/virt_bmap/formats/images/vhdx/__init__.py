"""VHDX: fixed, dynamic and differencing.

Sources: Microsoft [MS-VHDX] v7.0; QEMU block/vhdx.c.
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import of_parent
from virt_bmap.formats.images.vhdx.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.model.contract import Docs, ImageFormat, ImageLayer, References, Structure, Structures, Writing

NAME = "vhdx"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one VHDX file."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.formats.images.layer import Draft
    from virt_bmap.formats.images.vhdx import extents, header, log, metadata, owners

    head = header.read_header(image)
    regions = header.read_regions(image)
    about = metadata.read_metadata(image, regions.metadata)
    draft = Draft([image], about.size)
    owners.own_regions(draft, head, regions)
    blocks = extents.read_bat(image, about, regions.bat, draft.damage)
    extents.place_blocks(draft, about, blocks)
    owners.own_unreferenced(draft, about, head, regions, blocks)
    header.say_damaged(image, draft.damage)
    log.say_replayed(image, head, draft.damage)
    return draft.finish(NAME, about.block, about.facts() | head.facts())


def references(image: Reader) -> References:
    """A differencing image's parent, which is a VHDX, too."""
    from virt_bmap.formats.images.vhdx.metadata import parent

    return of_parent(image, NAME, parent)


def recovered(image: Reader) -> Reader:
    """With its log carried out."""
    from virt_bmap.formats.images.vhdx.log import replayed

    return replayed(image)


def _structures() -> Structures:
    from virt_bmap.formats.images.vhdx.ondisk import HEADER, REGION_TABLE

    return {"header": Structure(HEADER), "region table": Structure(REGION_TABLE)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    recovered=recovered,
    follows=False,
    writing=Writing.ANYWHERE,
    suffix=".vhdx",
)
