"""In which file an image goes on, by its last section alone.

This is asked before anything else looks at an image. The name of the next file follows from the first one's;
the image only says whether there is one. Still, whoever wrote it may have put something else there.
"""

import os

from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.ewf.names import segment_name
from virt_bmap.formats.images.ewf.ondisk import NEXT
from virt_bmap.formats.images.ewf.sections import number_of, walk
from virt_bmap.model.contract import References


def references(image: Reader) -> References:
    """The first segment says whether there is a second one."""
    if (number := number_of(image)) != 1:
        raise ImageError(
            f"{image.name}: is segment {number:,} of an Expert Witness image: open the first one, whose name "
            "ends in .E01 or .s01"
        )
    return References(continued=following(image, image, 1))


def following(first: Reader, segment: Reader, number: int) -> str | None:
    """The name of the file in which the image goes on behind this segment; None where it does not."""
    found = walk(segment)
    if found.number != number:
        raise Corrupt(
            f"{segment.name}: says that it is segment {found.number:,}, but segment {number:,} of "
            f"{first.name} should be here",
            9,
        )
    return segment_name(os.path.basename(first.name), number + 1) if found.last == NEXT else None
