"""The block allocation table of a VHDX file: where its payload blocks and sector bitmaps lie.

Sources: Microsoft [MS-VHDX] v7.0 sections 2.4 "Blocks" and 2.5 "BAT"; QEMU block/vhdx.h.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import IN_DATA, IN_ZERO, Draft, place_sectors, used_entries
from virt_bmap.formats.images.vhdx.header import Region
from virt_bmap.formats.images.vhdx.metadata import Metadata
from virt_bmap.formats.images.vhdx.ondisk import (
    FULLY_PRESENT,
    MIB,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    UNDEFINED,
    UNMAPPED,
    UNMAPPED_V095,
    ZERO,
)
from virt_bmap.model.damage import Damage


class PayloadBlocks(NamedTuple):
    """Payload blocks whose state is not NOT_PRESENT, by number, with their state; `there`: they lie in the
    file, at `host`. `chunk` has a sector bitmap block at `bitmap`."""

    number: Int
    state: Int
    host: Int
    there: Bool
    chunk: Int
    bitmap: Int


def read_bat(image: Reader, about: Metadata, bat: Region, damage: Damage) -> PayloadBlocks:
    """Behind each `about.chunk` payload entries there is one of a sector bitmap block."""
    blocks, chunk = -(-about.size // about.block), about.chunk
    chunks = -(-blocks // chunk)
    need = chunks * (chunk + 1) if about.differencing else blocks + max(0, blocks - 1) // chunk
    if need * 8 > bat[1]:
        raise Corrupt(
            f"{image.name}: its block allocation table at byte {bat[0]:#x} has {bat[1]:,} bytes, but "
            f"{counted(blocks, '[block needs|blocks need]')} {need * 8:,}",
            bat[0],
        )
    number, entry = used_entries(image, bat[0], need * 8, "<u8", NOT_PRESENT)
    state, host = entry & 7, entry >> 20 << 20
    is_bitmap = number % (chunk + 1) == chunk
    inside = is_bitmap & (state == FULLY_PRESENT) & (host >= MIB) & (host + MIB <= image.size)
    bitmaps = number[inside] // (chunk + 1), host[inside]
    number = (number - number // (chunk + 1))[~is_bitmap]
    state, host = state[~is_bitmap], host[~is_bitmap]
    kept = np.isin(state, (ZERO, UNMAPPED, UNMAPPED_V095)) & (host > 0)
    there = np.isin(state, (FULLY_PRESENT, PARTIALLY_PRESENT)) | kept
    wrong = there & ((host >= image.size) | (host < MIB))
    damage.add("outside", "[block lies|blocks lie] outside the file", bat[0] + number[wrong] * 8)
    return PayloadBlocks(number, state, host, there & ~wrong, *bitmaps)


def place_blocks(draft: Draft, about: Metadata, blocks: PayloadBlocks) -> None:
    """Payload blocks by their state; in differencing images some have only part of their sectors."""
    number, state, host, there, chunk, bitmap = blocks
    whole = there & (state != PARTIALLY_PRESENT)
    draft.place(
        number[whole] * about.block,
        host[whole],
        np.full(int(whole.sum()), about.block),
        np.where(state[whole] == FULLY_PRESENT, IN_DATA, IN_ZERO),
    )
    nowhere = np.isin(state, (UNDEFINED, ZERO, UNMAPPED, UNMAPPED_V095)) & ~there
    draft.zero(number[nowhere] * about.block, np.full(int(nowhere.sum()), about.block))
    draft.own("sector bitmap", bitmap, MIB)
    partly = there & (state == PARTIALLY_PRESENT)
    known = partly & np.isin(number // about.chunk, chunk)
    draft.damage.add(
        "mapping",
        "[block is|blocks are] partly present, but [has|have] no sector bitmap",
        host[partly & ~known],
    )
    number, host = number[known], host[known]
    sectors = about.block // about.sector
    at = bitmap[np.searchsorted(chunk, number // about.chunk)] + number % about.chunk * (sectors // 8)
    place_sectors(draft, number * about.block, host, at, sectors, about.sector, "little")
