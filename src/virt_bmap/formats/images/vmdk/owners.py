"""Who owns what of a sparse VMDK extent lies beside its grains: the descriptor, and the markers of a stream.

Sources: VMware "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.vmdk.descriptor import MAX_DESCRIPTOR
from virt_bmap.formats.images.vmdk.ondisk import END_OF_STREAM, FOOTER, MARKER, SECTOR
from virt_bmap.model import tables


class Sparse(NamedTuple):
    """One sparse extent: its header's fields as numbers; `file` is a position in the draft, `base` its first
    byte on the disk, `size` its bytes there."""

    file: int
    base: int
    size: int
    flags: int
    grain: int
    entries: int
    directory: int
    redundant: int
    text: tuple[int, int]


def own_descriptor(draft: Draft, image: Reader, sparse: Sparse) -> None:
    """The embedded text, and the room that is kept for it."""
    at, room = sparse.text
    if 0 < at < image.size:
        room = min(room, image.size - at)
        text = len(image.read_clipped(at, min(room, MAX_DESCRIPTOR)).split(b"\0", 1)[0])
        draft.own("descriptor", at, text, file=sparse.file)
        draft.own("slack", at + text, room - text, tables.GAP, sparse.file)


def own_footer(draft: Draft, image: Reader, file: int) -> None:
    """The last sectors of a stream: the footer's marker, the footer, the end-of-stream marker."""
    end = image.size // SECTOR * SECTOR
    if end >= 4 * SECTOR and image.read(end - 2 * SECTOR, 4) == b"KDMV":
        own_markers(draft, image, file, ints(end - 3 * SECTOR), FOOTER)
        draft.own("footer", end - 2 * SECTOR, SECTOR, file=file)
        own_markers(draft, image, file, ints(end - SECTOR), END_OF_STREAM)


def own_markers(draft: Draft, image: Reader, file: int, at: Int, kind: int) -> None:
    """Those of the sectors that are markers of this type: not all programs write them."""
    at = np.unique(at[(at > 0) & (at + SECTOR <= image.size)])
    found = records(image.read_blocks(at, MARKER.itemsize), MARKER)
    draft.own("marker", at[(found["size"] == 0) & (found["type"] == kind)], SECTOR, file=file)
