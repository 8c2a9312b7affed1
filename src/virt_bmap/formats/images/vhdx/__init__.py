"""VHDX: fixed, dynamic and differencing.

Sources: Microsoft [MS-VHDX] v7.0 sections 2.4 "Blocks" and 2.5 "BAT"; QEMU block/vhdx.c.
"""

from collections.abc import Sequence

import numpy as np

from virt_bmap.core.arrays import Int, complement, ints, runs
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import of_parent
from virt_bmap.formats.images.layer import IN_DATA, IN_ZERO, Draft, used_entries
from virt_bmap.formats.images.vhd import split
from virt_bmap.formats.images.vhdx.metadata import (
    AREA,
    HEADERS,
    MIB,
    REGION_TABLES,
    Metadata,
    damaged,
    read_metadata,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    ImageFormat,
    ImageLayer,
    References,
    Structure,
    Structures,
    Writing,
)
from virt_bmap.model.problems import WARNING

NAME = "vhdx"
FEATURES = (
    "fixed, dynamic and differencing images, sectors of 512 and 4096 bytes",
    "blocks kept though they are zeroed or unmapped",
    "sector bitmaps",
)
REFUSED = ("changes that are in the log only: reported, not replayed", "parents by volume name")
ORACLES = ("qemu-img map", "content read through the map", "images made by Windows")
CHECKS = Checks(
    checksums="CRC-32C of both headers and both region tables",
    rules=(
        "headers: sequence, log",
        "region and metadata tables: places, known entries",
        "block allocation table: states, places, each block once",
    ),
    unchecked=(
        "the guest's bytes",
        "the log, which is not replayed",
    ),
)

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_V095, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 5, 6, 7
"""States of payload blocks; 5 is QEMU's name for what drafts of the format called unmapped."""
SECTORS_IN_CHUNK = 1 << 23
"""Sectors that one sector bitmap block of 1 MiB describes."""
BATCH = 256
"""Blocks whose sector bitmaps are looked into at a time."""


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one VHDX file."""
    about = read_metadata(image)
    draft = Draft([image], about.size)
    own_regions(draft, about)
    chunk = SECTORS_IN_CHUNK * about.sector // about.block
    place_blocks(image, draft, about, *read_bat(image, about, chunk), chunk)
    for at in damaged(image):
        draft.damage.say(
            "checksum",
            f"the header or region table at byte {at:#x} has a wrong checksum; another copy is used",
            at,
            severity=WARNING,
        )
    if about.log_in_use:
        words = (
            "the log has changes that were not carried out: the map may be out of date until the image is "
            "opened for writing"
        )
        draft.damage.say("not-replayed", words, about.log[0])
    return draft.finish(
        NAME,
        about.block,
        {
            "version": 1,
            "subformat": "differencing" if about.differencing else "dynamic or fixed",
            "sector_size": about.sector,
            "dirty": about.log_in_use,
        },
    )


def parent(image: Reader) -> str | None:
    """The name of a differencing image's parent; Unsupported where it has none that can be followed."""
    about = read_metadata(image)
    if about.differencing and not about.parent:
        raise Unsupported(
            f"{image.name}: is a differencing VHDX that names its parent neither by a relative nor "
            "by an absolute path",
            about.metadata[0],
        )
    return about.parent


def own_regions(draft: Draft, about: Metadata) -> None:
    """The header section is one MiB; the regions lie anywhere behind it."""
    draft.own("file identifier", 0, AREA)
    draft.own("header", ints(HEADERS), AREA)
    draft.own("region table", ints(REGION_TABLES), AREA)
    draft.own("slack", REGION_TABLES[1] + AREA, MIB - REGION_TABLES[1] - AREA, tables.GAP)
    draft.own("log", *about.log)
    draft.own("metadata region", *about.metadata)
    draft.own("block allocation table", *about.bat)


def read_bat(image: Reader, about: Metadata, chunk: int) -> tuple[Int, Int, Int, Int]:
    """(number, entry) of the payload blocks that are not in the state 0, and of the sector bitmap blocks:
    behind each `chunk` payload entries there is one."""
    blocks = -(-about.size // about.block)
    chunks = -(-blocks // chunk)
    need = chunks * (chunk + 1) if about.differencing else blocks + max(0, blocks - 1) // chunk
    if need * 8 > about.bat[1]:
        raise Corrupt(
            f"{image.name}: its block allocation table at byte {about.bat[0]:#x} has "
            f"{about.bat[1]:,} bytes, but {blocks:,} blocks need {need * 8:,}",
            about.bat[0],
        )
    number, entry = used_entries(image, about.bat[0], need, "<u8", NOT_PRESENT)
    is_bitmap = number % (chunk + 1) == chunk
    payload = number - number // (chunk + 1)
    return payload[~is_bitmap], entry[~is_bitmap], number[is_bitmap] // (chunk + 1), entry[is_bitmap]


def place_blocks(
    image: Reader,
    draft: Draft,
    about: Metadata,
    number: Int,
    payload: Int,
    chunks: Int,
    bitmap: Int,
    chunk: int,
) -> None:
    """Payload blocks by their state; in differencing images some have only part of their sectors."""
    state, host = payload & 7, payload >> 20 << 20
    kept = np.isin(state, (ZERO, UNMAPPED, UNMAPPED_V095)) & (host > 0)
    there = np.isin(state, (FULLY_PRESENT, PARTIALLY_PRESENT)) | kept
    wrong = there & ((host >= image.size) | (host < MIB))
    draft.damage.add("outside", "blocks lie outside the file", about.bat[0] + number[wrong] * 8)
    there &= ~wrong
    whole = there & (state != PARTIALLY_PRESENT)
    draft.place(
        number[whole] * about.block,
        host[whole],
        np.full(int(whole.sum()), about.block),
        np.where(kept[whole], IN_ZERO, IN_DATA),
    )
    nowhere = np.isin(state, (UNDEFINED, ZERO, UNMAPPED, UNMAPPED_V095)) & ~there
    draft.zero(number[nowhere] * about.block, np.full(int(nowhere.sum()), about.block))
    place = bitmap >> 20 << 20
    inside = ((bitmap & 7) == FULLY_PRESENT) & (place >= MIB) & (place + MIB <= image.size)
    chunks, place = chunks[inside], place[inside]
    draft.own("sector bitmap", place, MIB)
    partly = there & (state == PARTIALLY_PRESENT)
    _place_sectors(image, draft, about, number[partly], host[partly], chunk, chunks, place)
    taken = [(0, MIB), about.log, about.metadata, about.bat]
    start = np.concatenate([host[there], place, ints([at for at, _ in taken])])
    length = np.concatenate(
        [np.full(int(there.sum()), about.block), np.full(len(place), MIB), ints([size for _, size in taken])]
    )
    low, high = complement(start, start + length, 0, image.size)
    draft.own(None, low, high - low, tables.UNREFERENCED)


def _place_sectors(
    image: Reader, draft: Draft, about: Metadata, number: Int, host: Int, chunk: int, chunks: Int, place: Int
) -> None:
    """The runs of sectors that partly present blocks have; a chunk's bitmap has one bit for each of its
    sectors, lowest first."""
    sectors = about.block // about.sector
    known = np.isin(number // chunk, chunks)
    draft.damage.add("mapping", "blocks are partly present, but have no sector bitmap", host[~known])
    number, host = number[known], host[known]
    for at in range(0, len(number), BATCH):
        mine, where = number[at : at + BATCH], host[at : at + BATCH]
        first = place[np.searchsorted(chunks, mine // chunk)] + mine % chunk * (sectors // 8)
        flags = np.unpackbits(image.read_blocks(first, sectors // 8), axis=1, bitorder="little").astype(bool)
        for part, used in ((flags, True), (~flags, False)):
            start, end = split(*runs(part.reshape(-1)), sectors)
            row, inside = start // sectors, start % sectors * about.sector
            low, length = where[row] + inside, (end - start) * about.sector
            if used:
                draft.place(mine[row] * about.block + inside, low, length)
            else:
                draft.own("sectors not in use", low, length, tables.UNWRITTEN)


def references(image: Reader) -> References:
    """A differencing image's parent, which is a VHDX, too."""
    return of_parent(image, NAME, parent)


def _structures() -> Structures:
    from virt_bmap.formats.images.vhdx.metadata import HEADER, REGION_TABLE

    return {"header": Structure(HEADER), "region table": Structure(REGION_TABLE)}


FORMAT = ImageFormat(
    NAME,
    Docs(FEATURES, REFUSED, ORACLES),
    CHECKS,
    read=read,
    structures=_structures,
    references=references,
    follows=False,
    writing=Writing.ANYWHERE,
    suffix=".vhdx",
)
