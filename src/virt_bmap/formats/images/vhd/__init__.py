"""VHD (QEMU's vpc): fixed, dynamic and differencing.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0; QEMU block/vpc.c.
"""

from collections.abc import Sequence

from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.vhd.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.images.vhd.header import marked, options, read_footer
from virt_bmap.formats.images.vhd.ondisk import FOOTER, HEADER, SECTOR
from virt_bmap.formats.images.vhd.references import references
from virt_bmap.model import tables
from virt_bmap.model.contract import Docs, ImageFormat, ImageLayer, Structure, Structures
from virt_bmap.model.problems import WARNING

NAME = "vpc"


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one VHD file."""
    # imported here: who only opens an image asks for its references
    from virt_bmap.core.arrays import ints
    from virt_bmap.formats.images.layer import Draft
    from virt_bmap.formats.images.vhd import extents

    foot = read_footer(image)
    draft = Draft([image], foot.size)
    if foot.wrong:
        draft.damage.say(
            "checksum",
            "the checksum of the footer or of the dynamic disk header is wrong",
            foot.header,
            severity=WARNING,
        )
    end = image.size - SECTOR
    if image.read(end, 8) == b"conectix":
        draft.own("footer", end, SECTOR)
    if foot.kind == "fixed":
        if foot.size > end:
            words = (
                f"its disk has {foot.size:,} bytes, of which only {end:,} lie in the file before the footer"
            )
            draft.damage.say("truncated", words, end)
        draft.place(ints(0), ints(0), ints(min(foot.size, end)))
        draft.own("slack", min(foot.size, end), max(0, end - foot.size), tables.GAP)
        return draft.finish(NAME, 1, {"subformat": "fixed"})
    extents.own_headers(image, draft, foot)
    extents.place_blocks(image, draft, foot)
    return draft.finish(NAME, foot.block, {"subformat": foot.kind})


def _structures() -> Structures:
    return {
        "footer": Structure(FOOTER),
        "footer copy": Structure(FOOTER),
        "dynamic disk header": Structure(HEADER),
    }


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    options=options,
    marked=marked,
    follows=False,
    suffix=".vhd",
)
