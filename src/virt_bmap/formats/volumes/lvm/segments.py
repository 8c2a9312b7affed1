"""Segments of logical volumes as mapping rows: one function for each shape, a table that says which type has
which.

Sources: lvm2 lib/striped/striped.c, lib/mirror/mirrored.c, lib/raid/raid.c (keys of the text); kernel
drivers/md/dm-raid.c.
"""

from collections.abc import Callable

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapping import Rows
from virt_bmap.formats.common import stripes
from virt_bmap.formats.common.stripes import Place
from virt_bmap.formats.volumes.lvm.group import MAX_EXTENTS, Group, Located, span
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.formats.volumes.lvm.text import Section

MAX_STRIPES = 512
"""Areas of one segment. LVM stops at 128 stripes and 253 RAID images."""

Area = tuple[Located | None, int]
"""The physical or logical volume (None where it is missing) and the first byte in it."""


def areas(group: Group, segment: Section, key: str) -> list[Area]:
    """A list of pairs (name of a volume, first extent)."""
    items = segment.items(key)
    found: list[Area] = []
    for name, extent in zip(items[::2], items[1::2], strict=False):
        if not isinstance(name, str) or not isinstance(extent, int) or not 0 <= extent <= MAX_EXTENTS:
            raise Corrupt(f"{key} lists {name!r}, {extent!r} instead of a volume and an extent")
        found.append((group.space(key, name), group.bytes(extent)))
    if not 1 <= len(found) <= MAX_STRIPES or len(items) % 2:
        raise Corrupt(f"{key} has {plural(len(items), 'item')} instead of pairs for 1 to {MAX_STRIPES} areas")
    return found


def _take(group: Group, owner: str, area: Area, size: int) -> Place | None:
    """The place of `size` bytes at an area, which are the owner's from now on."""
    space, offset = area
    if space is None:
        return None
    place = Place(space.place.parent, space.place.offset + offset)
    group.take(owner, place, size)
    return place


def striped(group: Group, owner: str, segment: Section) -> Rows:
    """Linear, or chunk after chunk over several areas."""
    start, size = span(group, segment)
    found = areas(group, segment, "stripes")
    if len(found) == 1:
        place = _take(group, owner, found[0], size)
        return stripes.mirrored(size, [place], start)
    chunk = segment.number("stripe_size", low=1, high=1 << 32) * SECTOR
    places = [_take(group, owner, area, size // len(found)) for area in found]
    return stripes.rows(stripes.striped(len(found)), chunk, size, places, start)


def mirror(group: Group, owner: str, segment: Section) -> Rows:
    """The old mirror target, which pvmove uses, too: every area holds all bytes; reads come from the first
    that is there."""
    start, size = span(group, segment)
    return stripes.mirrored(
        size, [_take(group, owner, area, size) for area in areas(group, segment, "mirrors")], start
    )


def nothing(group: Group, owner: str, segment: Section) -> Rows:
    """Lies nowhere: reads as zeroes or as errors."""
    return Rows.of([])


SHAPES: dict[str, Callable[[Group, str, Section], Rows]] = {
    "striped": striped, "linear": striped, "mirror": mirror, "zero": nothing, "error": nothing,
    "free": nothing,
}  # fmt: skip
