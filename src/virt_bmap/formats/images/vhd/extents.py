"""The block allocation table of a VHD: where its blocks lie, and what they leave of the file.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0, "Block Allocation Table and Data
Blocks"; QEMU block/vpc.c.
"""

import numpy as np

from virt_bmap.core.arrays import complement, ints
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft, place_sectors, used_entries
from virt_bmap.formats.images.vhd.header import Footer
from virt_bmap.formats.images.vhd.ondisk import HEADER, SECTOR, UNUSED
from virt_bmap.formats.images.vhd.references import read_locators
from virt_bmap.model import tables


def own_headers(image: Reader, draft: Draft, foot: Footer) -> None:
    """What lies in front of the blocks."""
    draft.own("footer copy", 0, SECTOR)
    draft.own("dynamic disk header", foot.header, HEADER.itemsize)
    draft.own("block allocation table", foot.table, foot.entries * 4)
    for _, offset, _, space in read_locators(image, foot):
        draft.own("parent locator", offset, space)


def place_blocks(image: Reader, draft: Draft, foot: Footer) -> None:
    """Each block is a bitmap of its sectors and the sectors.

    Only in differencing images the bitmap decides (QEMU reads whole blocks of dynamic ones, too).
    """
    number, entry = used_entries(image, foot.table, foot.entries * 4, ">u4", UNUSED)
    sectors = foot.block // SECTOR
    bitmap = -(-(sectors // 8) // SECTOR) * SECTOR
    host = entry * SECTOR
    wrong = host + bitmap >= image.size
    draft.damage.add(
        "outside", "[block lies|blocks lie] beyond the end of the file", foot.table + number[wrong] * 4
    )
    number, host = number[~wrong], host[~wrong]
    draft.own("block bitmap", host, bitmap)
    if foot.kind == "differencing":
        place_sectors(draft, number * foot.block, host + bitmap, host, sectors, SECTOR, "big")
    else:
        draft.place(number * foot.block, host + bitmap, np.full(len(number), foot.block))
    known = [
        (0, SECTOR),
        (foot.header, HEADER.itemsize),
        (foot.table, foot.entries * 4),
        (image.size - SECTOR, SECTOR),
        *((offset, space) for _, offset, _, space in read_locators(image, foot)),
    ]
    start = np.concatenate([host, ints([low for low, _ in known])])
    length = np.concatenate([np.full(len(host), bitmap + foot.block), ints([size for _, size in known])])
    low, high = complement(start, start + length, 0, image.size)
    draft.own("slack", low, high - low, tables.GAP)
