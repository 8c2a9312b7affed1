"""VDI: one table that gives each block of the disk a place in the file.

Sources: VirtualBox src/VBox/Storage/VDICore.h (VDIHEADER1PLUS); QEMU block/vdi.c.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, complement, ints
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft, used_entries
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    ImageFormat,
    ImageLayer,
    Structure,
    Structures,
    Writing,
)
from virt_bmap.model.problems import NOTE

NAME = "vdi"
FEATURES = ("dynamic and static images, blocks of any size", "discarded blocks")
REFUSED = ("undo and differencing images: named", "versions other than 1.1")
ORACLES = ("qemu-img map", "qemu-img check", "content read through the map")
CHECKS = Checks(
    checksums=None,
    rules=(
        "header: version, sizes",
        "block map: places, each block once",
    ),
    unchecked=("the guest's bytes",),
)

HEADER = struct(0x200, [
    (0x40, "u32Signature", "<u4"), (0x44, "u32Version", "<u4"), (0x48, "cbHeader", "<u4"),
    (0x4C, "u32Type", "<u4"), (0x154, "offBlocks", "<u4"), (0x158, "offData", "<u4"),
    (0x168, "cbSector", "<u4"), (0x170, "cbDisk", "<u8"), (0x178, "cbBlock", "<u4"),
    (0x17C, "cbBlockExtra", "<u4"), (0x180, "cBlocks", "<u4"), (0x184, "cBlocksAllocated", "<u4"),
])  # fmt: skip
VERSION = 0x00010001
TYPES = {1: "dynamic", 2: "static", 3: "undo", 4: "differencing"}
FREE, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
"""Block pointers: never written, and given back (reads as zeroes)."""
MAX_BLOCKS = 0x3FFFFFFF
"""VDI_BLOCKS_IN_IMAGE_MAX of QEMU."""


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one VDI file."""
    head = {
        name: int(record(image.read_clipped(0, HEADER.itemsize), HEADER)[name]) for name in HEADER.names or ()
    }
    kind = check(image, head)
    size = head["cbDisk"]
    block = head["cbBlock"]
    count = head["cBlocks"]
    table = head["offBlocks"]
    data = head["offData"]
    draft = Draft([image], size)
    draft.own("header", 0, HEADER.itemsize)
    draft.own("block map", table, count * 4)
    draft.own("slack", *_between(table + count * 4, data), tables.GAP)
    draft.own("slack", *_between(HEADER.itemsize, table), tables.GAP)
    number, entry = used_entries(image, table, count * 4, "<u4", FREE)
    place_blocks(draft, number, entry, block, data, head["cbBlockExtra"])
    known = int((entry < DISCARDED).sum())
    if known != head["cBlocksAllocated"]:
        draft.damage.add(
            "count",
            f"[block has|blocks have] a place, but the header counts {head['cBlocksAllocated']:,}",
            np.full(known, 0x184),
            severity=NOTE,
        )
    return draft.finish(NAME, block, {"version": "1.1", "subformat": kind})


def check(image: Reader, head: dict[str, int]) -> str:
    """What kind of image it is; Corrupt or Unsupported where its header can't be followed."""
    kind = TYPES.get(head["u32Type"], f"type {head['u32Type']}")
    if head["u32Version"] != VERSION:
        raise Unsupported(
            f"{image.name}: is VDI of version "
            f"{head['u32Version'] >> 16}.{head['u32Version'] & 0xFFFF}; 1.1 is supported",
            0x44,
        )
    if kind not in ("dynamic", "static"):
        raise Unsupported(
            f"{image.name}: is a VDI image of the kind {kind}, which refers "
            "to another by UUID; dynamic and static images are supported",
            0x4C,
        )
    size, block, count = head["cbDisk"], head["cbBlock"], head["cBlocks"]
    if block == 0 or block % 512 or count > MAX_BLOCKS or count * block < size:
        raise Corrupt(
            f"{image.name}: its VDI header at byte 0x170 says "
            f"{size:,} bytes in {plural(count, 'block')} of {block:,}",
            0x170,
        )
    if head["offBlocks"] < HEADER.itemsize or head["offBlocks"] + count * 4 > image.size:
        raise Corrupt(
            f"{image.name}: its block map of {count * 4:,} bytes at "
            f"byte {head['offBlocks']:#x} does not fit into the file",
            0x154,
        )
    return kind


def place_blocks(draft: Draft, number: Int, entry: Int, block: int, data: int, extra: int) -> None:
    """Blocks where their pointers say, each after `extra` bytes of its own; what of the data area no pointer
    leads to is free."""
    image = draft.files[0]
    guest = number * block
    there = entry < DISCARDED
    wrong = there & (entry >= -(-(image.size - data) // (block + extra)))
    draft.damage.add(
        "outside",
        "block [pointer leads|pointers lead] beyond the end of the file",
        np.full(int(wrong.sum()), image.size),
    )
    there &= ~wrong
    host = data + np.where(there, entry, 0) * (block + extra)
    draft.own("block header", host[there], extra)
    draft.place(guest[there], host[there] + extra, np.full(int(there.sum()), block))
    draft.zero(guest[entry == DISCARDED], np.full(int((entry == DISCARDED).sum()), block))
    low, high = complement(host[there], host[there] + extra + block, data, image.size)
    draft.own(None, low, high - low, tables.UNREFERENCED)


def _between(start: int, end: int) -> tuple[Int, Int]:
    return ints(start), ints(max(0, end - start))


def _structures() -> Structures:
    return {"header": Structure(HEADER)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    writing=Writing.ANYWHERE,
    suffix=".vdi",
)
