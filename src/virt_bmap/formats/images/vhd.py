"""VHD (QEMU's vpc): fixed, dynamic and differencing.

Sources: Microsoft "Virtual Hard Disk Image Format Specification" 1.0; QEMU block/vpc.c for how large a disk
is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Int, complement, expand, ints, runs
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.backing import of_parent
from virt_bmap.formats.images.layer import Draft, used_entries
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Checks,
    Docs,
    ImageFormat,
    ImageLayer,
    References,
    Structure,
    Structures,
)
from virt_bmap.model.problems import WARNING

NAME = "vpc"
FEATURES = ("fixed, dynamic and differencing images", "sector bitmaps of differencing images")
REFUSED = ("parents by anything but a relative or absolute path",)
ORACLES = ("qemu-img map", "content read through the map", "sectors of a parent and child laid out by hand")
CHECKS = Checks(
    checksums="footer and dynamic disk header",
    rules=(
        "footer and header: both copies, sizes",
        "block allocation table: places, each block once",
    ),
    unchecked=("the guest's bytes",),
)

FOOTER = struct(512, [
    (0, "cookie", "S8"), (12, "file_format_version", ">u4"), (16, "data_offset", ">u8"),
    (28, "creator_application", "V4"), (48, "current_size", ">u8"), (56, "cylinder", ">u2"),
    (58, "heads", "u1"), (59, "sectors", "u1"), (60, "disk_type", ">u4"), (64, "checksum", ">u4"),
])  # fmt: skip
HEADER = struct(1024, [
    (0, "cookie", "S8"), (16, "table_offset", ">u8"), (28, "max_table_entries", ">u4"),
    (32, "block_size", ">u4"), (36, "checksum", ">u4"), (576, "parent_locator_entries", "V192"),
])  # fmt: skip
LOCATOR = struct(
    24,
    [
        (0, "platform_code", "S4"),
        (4, "data_space", ">u4"),
        (8, "data_length", ">u4"),
        (16, "data_offset", ">u8"),
    ],
)
SECTOR = 512
TYPES = {2: "fixed", 3: "dynamic", 4: "differencing"}
UNUSED = 0xFFFFFFFF
SIZE_BY_BYTES = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")
"""Programs whose disks have `current_size` bytes; of all others the geometry counts (QEMU vpc_open)."""
MAX_GEOMETRY = 65535 * 16 * 255
MAX_LOCATOR = 4096
"""Bytes of a parent's name: Windows' longest paths have some hundred characters."""
BATCH = 4096
"""Blocks whose sector bitmaps are looked into at a time."""


class Footer(NamedTuple):
    """What matters of the footer and, unless the image is fixed, of the dynamic disk header."""

    kind: str
    size: int
    header: int
    table: int = 0
    entries: int = 0
    block: int = 0
    wrong: bool = False
    """A checksum does not hold."""


def read(image: Reader, others: Sequence[Reader] = ()) -> ImageLayer:
    """The layer of one VHD file."""
    foot = read_footer(image)
    draft = Draft([image], foot.size)
    if foot.wrong:
        draft.damage.say(
            "checksum",
            "the checksum of the footer or of the dynamic disk header does not hold",
            foot.header,
            severity=WARNING,
        )
    end = image.size - SECTOR
    if image.read(end, 8) == b"conectix":
        draft.own("footer", end, SECTOR)
    if foot.kind == "fixed":
        draft.place(ints(0), ints(0), ints(min(foot.size, end)))
        draft.own("slack", min(foot.size, end), max(0, end - foot.size), tables.GAP)
        return draft.finish(NAME, 1, {"subformat": "fixed"})
    draft.own("footer copy", 0, SECTOR)
    draft.own("dynamic disk header", foot.header, HEADER.itemsize)
    draft.own("block allocation table", foot.table, foot.entries * 4)
    own_locators(image, draft, foot)
    place_blocks(image, draft, foot)
    return draft.finish(NAME, foot.block, {"subformat": foot.kind})


def read_footer(image: Reader) -> Footer:
    """The footer at the end, or its copy at the start; sizes as QEMU takes them.

    Raises Corrupt or Unsupported.
    """
    if image.size < SECTOR:
        raise Corrupt(f"{image.name}: is too short for a VHD: {image.size} bytes", 0)
    places = [at for at in (0, image.size - SECTOR) if image.read(at, 8) == b"conectix"]
    if not places:
        raise Corrupt(
            f"{image.name}: has a VHD footer neither at its start nor at its end", image.size - SECTOR
        )
    sector = image.read(places[0], SECTOR)
    raw = record(sector, FOOTER)
    wrong = checksum(sector, 64) != int(raw["checksum"])
    kind = TYPES.get(int(raw["disk_type"]))
    if kind is None or (kind != "fixed" and places[0] != 0):
        raise Unsupported(
            f"{image.name}: its VHD footer at byte {places[0]:#x} says type {int(raw['disk_type'])}; "
            "fixed, dynamic and differencing are known",
            places[0] + 60,
        )
    sectors = int(raw["cylinder"]) * int(raw["heads"]) * int(raw["sectors"])
    size = sectors * SECTOR
    if raw["creator_application"].tobytes() in SIZE_BY_BYTES or sectors == MAX_GEOMETRY:
        size = int(raw["current_size"]) // SECTOR * SECTOR
    if size > 1 << 62:
        raise Corrupt(f"{image.name}: its VHD footer says that the disk has {size:#x} bytes", places[0] + 48)
    if kind == "fixed":
        return Footer(kind, size, 0, wrong=wrong)
    at = int(raw["data_offset"])
    if at + HEADER.itemsize > image.size:
        raise Corrupt(
            f"{image.name}: its dynamic disk header at byte {at:#x} lies behind the end of the file", 16
        )
    head = record(image.read(at, HEADER.itemsize), HEADER)
    table, entries, block = (int(head[name]) for name in ("table_offset", "max_table_entries", "block_size"))
    if (
        bytes(head["cookie"]) != b"cxsparse"
        or block == 0
        or block % SECTOR
        or table + entries * 4 > image.size
    ):
        raise Corrupt(
            f"{image.name}: its dynamic disk header at byte {at:#x} is damaged: {entries:,} blocks "
            f"of {block:,} bytes, table at byte {table:#x}",
            at,
        )
    if entries * block < size:
        raise Corrupt(
            f"{image.name}: its {entries:,} blocks of {block:,} bytes are less than the disk's {size:,}",
            at + 28,
        )
    wrong |= checksum(image.read(at, HEADER.itemsize), 36) != int(head["checksum"])
    return Footer(kind, size, at, table, entries, block, wrong)


def checksum(data: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes but the checksum's own, which lie at `at`."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def place_blocks(image: Reader, draft: Draft, foot: Footer) -> None:
    """Each block is a bitmap of its sectors and the sectors.

    Only in differencing images the bitmap decides (QEMU reads whole blocks of dynamic ones, too).
    """
    number, entry = used_entries(image, foot.table, foot.entries, ">u4", UNUSED)
    bitmap = -(-(foot.block // SECTOR // 8) // SECTOR) * SECTOR
    host = entry * SECTOR
    wrong = host + bitmap >= image.size
    draft.damage.add("outside", "blocks lie behind the end of the file", foot.table + number[wrong] * 4)
    number, host = number[~wrong], host[~wrong]
    draft.own("block bitmap", host, bitmap)
    if foot.kind == "differencing":
        for at in range(0, len(number), BATCH):
            _place_sectors(image, draft, foot, number[at : at + BATCH], host[at : at + BATCH], bitmap)
    else:
        draft.place(number * foot.block, host + bitmap, np.full(len(number), foot.block))
    known = [
        (0, SECTOR),
        (foot.header, HEADER.itemsize),
        (foot.table, foot.entries * 4),
        (image.size - SECTOR, SECTOR),
    ]
    known += (
        [(offset, space) for _, offset, _, space in _locators(image, foot)]
        if foot.kind == "differencing"
        else []
    )
    start = np.concatenate([host, ints([low for low, _ in known])])
    length = np.concatenate([np.full(len(host), bitmap + foot.block), ints([size for _, size in known])])
    low, high = complement(start, start + length, 0, image.size)
    draft.own("slack", low, high - low, tables.GAP)


def _place_sectors(image: Reader, draft: Draft, foot: Footer, number: Int, host: Int, bitmap: int) -> None:
    """The runs of sectors that a differencing image has itself; the parent's others stay unused in the
    block."""
    flags = np.unpackbits(image.read_blocks(host, bitmap), axis=1)[:, : foot.block // SECTOR].astype(bool)
    for mine, used in ((flags, True), (~flags, False)):
        start, end = runs(mine.reshape(-1))
        start, end = split(start, end, mine.shape[1])
        row, inside = start // mine.shape[1], start % mine.shape[1] * SECTOR
        at, length = host[row] + bitmap + inside, (end - start) * SECTOR
        if used:
            draft.place(number[row] * foot.block + inside, at, length)
        else:
            draft.own("sectors not in use", at, length, tables.UNWRITTEN)


def split(start: Int, end: Int, unit: int) -> tuple[Int, Int]:
    """Ranges cut at the multiples of `unit`."""
    row, nth = expand((end - 1) // unit - start // unit + 1)
    bound = (start[row] // unit + nth) * unit
    return np.maximum(start[row], bound), np.minimum(end[row], bound + unit)


# ---- the parent --------------------------------------------------------------------------------------------


def _locators(image: Reader, foot: Footer) -> list[tuple[bytes, int, int, int]]:
    """(platform, offset, bytes used, bytes kept) of each parent locator that lies in the file."""
    raw = record(image.read(foot.header, HEADER.itemsize), HEADER)["parent_locator_entries"].tobytes()
    found = []
    for at in range(8):
        entry = record(raw, LOCATOR, at * LOCATOR.itemsize)
        platform, offset, length, space = (
            bytes(entry["platform_code"]),
            int(entry["data_offset"]),
            int(entry["data_length"]),
            int(entry["data_space"]),
        )
        space = (
            space * SECTOR if 0 < space < SECTOR else space
        )  # some write sectors, as the text says, some bytes, as the table does
        if platform and length and offset + length <= image.size:
            found.append((platform, offset, length, max(space, length)))
    return found


def own_locators(image: Reader, draft: Draft, foot: Footer) -> None:
    if foot.kind == "differencing":
        for _, offset, _, space in _locators(image, foot):
            draft.own("parent locator", offset, space)


def parent(image: Reader) -> str | None:
    """The name of a differencing image's parent: the relative one if there is one.

    Raises Corrupt or Unsupported.
    """
    foot = read_footer(image)
    if foot.kind != "differencing":
        return None
    names = {
        platform: image.read(offset, min(length, MAX_LOCATOR)).decode("utf-16-le", "replace").rstrip("\0")
        for platform, offset, length, _ in _locators(image, foot)
        if platform in (b"W2ru", b"W2ku")
    }
    name = names.get(b"W2ru") or names.get(b"W2ku")
    if not name:
        raise Unsupported(
            f"{image.name}: is a differencing VHD that names its parent neither by a relative nor by "
            "an absolute path",
            foot.header,
        )
    return name.replace("\\", "/")


def references(image: Reader) -> References:
    """A differencing image's parent, which is a VHD, too."""
    return of_parent(image, NAME, parent)


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
    follows=False,
    suffix=".vhd",
)
