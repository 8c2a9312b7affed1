"""Persistent bitmaps: their directory, tables and data.

Sources: QEMU docs/interop/qcow2.rst (v8.2) section "Bitmaps".
"""

from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft, used_entries
from virt_bmap.formats.images.qcow2.allocator import Uses
from virt_bmap.formats.images.qcow2.header import Header, Table, placed
from virt_bmap.formats.images.qcow2.ondisk import AUTO, BITMAP, IN_USE, OFFSET_MASK


class Bitmap(NamedTuple):
    """One entry of the bitmap directory."""

    name: str
    table: Table
    granularity: int
    flags: int


class Bitmaps(NamedTuple):
    """All that the directory names."""

    entries: list[Bitmap]

    def facts(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "bitmaps": [
                {
                    "name": one.name,
                    "granularity": one.granularity,
                    "in_use": bool(one.flags & IN_USE),
                    "enabled": bool(one.flags & AUTO),
                }
                for one in self.entries
            ]
        }


def read_bitmaps(image: Reader, header: Header) -> Bitmaps:
    """The entries follow each other, each padded to 8 bytes."""
    start, length = header.bitmap_directory
    area = image.read(start, length)
    found, at, total = [], 0, 0
    for number in range(1, header.bitmap_count + 1):
        if at + BITMAP.size > len(area):
            raise Corrupt(
                f"{image.name}: the entry of bitmap {number} at byte {start + at:#x} leaves the directory",
                start + at,
            )
        offset, entries, flags, _, bits, name_size, extra = BITMAP.unpack_from(area, at)
        name = at + BITMAP.size + extra
        if name + name_size > len(area) or bits > 62:
            raise Corrupt(
                f"{image.name}: the entry of bitmap {number} at byte {start + at:#x} is damaged", start + at
            )
        table = placed(image, f"table of bitmap {number}", offset, entries * 8, image.size, start + at)
        text = area[name : name + name_size].decode(errors="surrogateescape")
        found.append(Bitmap(text, table, 1 << bits, flags))
        total += table[1]
        at = name + name_size
        at += -at % 8
    if total > image.size:
        raise Corrupt(
            f"{image.name}: the tables of its {len(found)} bitmaps together are larger than the file", start
        )
    return Bitmaps(found)


def own_tables(image: Reader, draft: Draft, head: Header, bitmaps: Bitmaps, uses: Uses) -> None:
    """The directory, the tables that it names, and the bitmaps' data."""
    uses.own_table(draft, "bitmap directory", *head.bitmap_directory)
    offset, length = (ints([one.table[side] for one in bitmaps.entries]) for side in (0, 1))
    uses.own_table(draft, "bitmap table", offset, length)
    _, place = used_entries(image, offset, length, ">u8", 0, OFFSET_MASK)
    wrong = (place % head.cluster != 0) | (place >= image.size)
    draft.damage.add(
        "outside",
        "[entry of a bitmap table leads|entries of bitmap tables lead] outside the file or between clusters",
        place[wrong],
    )
    place = place[~wrong]
    draft.own("bitmap data", place, head.cluster)
    uses.add(place, np.full(len(place), head.cluster))
