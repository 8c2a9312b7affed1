"""Who owns the bytes of a VHDX file that are no blocks."""

import numpy as np

from virt_bmap.core.arrays import complement, ints
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.vhdx.extents import PayloadBlocks
from virt_bmap.formats.images.vhdx.header import Header, Regions
from virt_bmap.formats.images.vhdx.metadata import Metadata
from virt_bmap.formats.images.vhdx.ondisk import AREA, HEADERS, MIB, REGION_TABLES
from virt_bmap.model import tables


def own_regions(draft: Draft, head: Header, regions: Regions) -> None:
    """The header section is one MiB; the regions lie anywhere after it."""
    draft.own("file identifier", 0, AREA)
    draft.own("header", ints(HEADERS), AREA)
    draft.own("region table", ints(REGION_TABLES), AREA)
    draft.own("slack", REGION_TABLES[1] + AREA, MIB - REGION_TABLES[1] - AREA, tables.GAP)
    draft.own("log", *head.log)
    draft.own("metadata region", *regions.metadata)
    draft.own("block allocation table", *regions.bat)


def own_unreferenced(
    draft: Draft, about: Metadata, head: Header, regions: Regions, blocks: PayloadBlocks
) -> None:
    """What neither a region nor an entry of the block allocation table leads to."""
    host = blocks.host[blocks.there]
    taken = ints([(0, MIB), head.log, *regions])
    start = np.concatenate([host, blocks.bitmap, taken[:, 0]])
    length = np.concatenate([np.full(len(host), about.block), np.full(len(blocks.bitmap), MIB), taken[:, 1]])
    low, high = complement(start, start + length, 0, draft.files[0].size)
    draft.own(None, low, high - low, tables.UNREFERENCED)
