"""A volume group: its physical volumes, and its logical volumes in an order in which each comes after those
that it is made of.

Logical volumes lie on physical volumes or on other logical volumes (a RAID on its images, a thin volume on
its pool). The inner ones become volumes of the map, too, but nobody looks for a filesystem in them.

Sources: lvm2 lib/format_text/import_vsn1.c (the text's sections), lib/metadata/metadata-exported.h.
"""

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import complement, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.stripes import Place
from virt_bmap.formats.volumes.lvm.label import SECTOR, Pv
from virt_bmap.formats.volumes.lvm.text import Section
from virt_bmap.formats.volumes.lvm.thin import ThinPool
from virt_bmap.model.contract import Assembly, Child
from virt_bmap.model.tables import METADATA, ExtentRows

MAX_EXTENTS = 1 << 32
"""Extents of one volume (MAX_EXTENT_COUNT in lvm2's metadata.h)."""
MAX_EXTENT_SIZE = 1 << 32
"""Sectors of one extent (MAX_EXTENT_SIZE there)."""
MAX_BYTES = 1 << 58
"""Of one volume, so that sums and products with small numbers fit in 63 bits."""


PHYSICAL_OR_LOGICAL = ("stripes", "mirrors")
"""Keys of a segment that list physical or logical volumes; a name of both is the physical volume's
(_read_segments in import_vsn1.c)."""
LOGICAL = ("raids", "raid0_lvs", "mirror_log", "origin", "external_origin", "thin_pool", "pool", "metadata",
    "cow_store",
           "merging_store", "cache_pool", "data", "writecache", "meta_dev", "vdo_pool")  # fmt: skip
"""Keys of a segment that name logical volumes."""


Opener = Callable[[Reader], Reader]
"""Wraps the reader that follows a volume's rows."""


MAX_VOLUMES = 1 << 16
"""Logical volumes of one group."""


class Located(NamedTuple):
    """A place that segments can name: a physical or logical volume.

    `place` is its extent 0, `size` what there is, in bytes.
    """

    place: Place
    size: int


@dataclass
class Group:
    """One volume group while it is put together; `logical` grows as logical volumes are placed, None stands
    for a missing one."""

    name: str
    uuid: str
    text: Section
    extent_size: int
    assembly: Assembly
    pvs: list[Pv]
    physical: dict[str, Located | None] = field(default_factory=dict)
    logical: dict[str, Located | None] = field(default_factory=dict)
    missing: dict[tuple[bool, str], str] = field(default_factory=dict)
    """(logical?, name) of every volume that is not there, and the id of the disk for want of which it is
    not."""
    pools: dict[str, tuple[ThinPool, int]] = field(default_factory=dict)
    """Thin pools that were read, with the number of their data volume."""
    devices: dict[tuple[str, int], str] = field(default_factory=dict)
    """Whose the device of that number in a thin pool is."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """Stores of snapshots of the old kind, and their origins."""
    merging: dict[str, str] = field(default_factory=dict)
    """Origins into which a snapshot is being merged, and its store."""
    readers: dict[int, Reader] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    """Logical volumes that are images of a RAID volume, and of which."""
    taken: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)
    """What segments take of each physical and logical volume: (first byte, end, whose it is), sorted and
    apart."""

    def bytes(self, extents: int) -> int:
        """So many extents in bytes. Raises Corrupt where that is more than any volume has."""
        if not 0 <= extents * self.extent_size <= MAX_BYTES:
            raise Corrupt(
                f"{plural(extents, 'extent')} of {self.extent_size:,} bytes are more than any volume has",
                code="mapping",
            )
        return extents * self.extent_size

    @property
    def volumes(self) -> dict[str, Section]:
        """The logical volumes of the text by name."""
        return self.text.section("logical_volumes").sections

    def find(self, key: str, name: str) -> tuple[bool, str]:
        """Whether a name that `key` lists is a logical volume's, and the name.

        Raises Corrupt where it is nobody's.
        """
        if key in PHYSICAL_OR_LOGICAL and name in self.physical:
            return False, name
        if name not in self.logical:
            raise Corrupt(f"{key} names {name!r}, which is not a volume of the group")
        return True, name

    def space(self, key: str, name: str) -> Located | None:
        """The volume that `key` names; None where it is missing."""
        logical, name = self.find(key, name)
        return self.logical[name] if logical else self.physical[name]

    def absent(self, segment: Section) -> list[str]:
        """The ids of the missing disks that a segment needs."""
        named = (
            self.find(key, name) for key in (*PHYSICAL_OR_LOGICAL, *LOGICAL) for name in segment.words(key)
        )
        return [self.missing[found] for found in named if found in self.missing]

    def take(self, owner: str, place: Place, size: int) -> None:
        """Note that these bytes are a volume's.

        Corrupt where any of them is taken: LVM gives an extent away once, and what many volumes show would be
        read for each.
        """
        if size <= 0:
            return
        taken = self.taken.setdefault(place.parent, [])
        at = bisect(taken, (place.offset,))
        for start, end, other in taken[max(0, at - 1) : at + 1]:
            if start < place.offset + size and place.offset < end:
                detail = (
                    f"its extents at byte {max(start, place.offset):#x} of "
                    f"{self.readers[place.parent].name} are also those of {other}"
                )
                raise Corrupt(detail, max(start, place.offset), "two-owners")
        taken.insert(at, (place.offset, place.offset + size, owner))

    def take_whole(self, owner: str, key: str, name: str) -> Located | None:
        """The volume that `key` names, which serves its owner alone, also where it is missing or empty."""
        space = self.space(key, name)
        if name in self.whole:
            raise Corrupt(f"its image {name} is also one of {self.whole[name]}", code="two-owners")
        self.whole[name] = owner
        if space:
            self.take(owner, space.place, space.size)
        return space

    @cached_property
    def thin_devices(self) -> dict[str, list[int]]:
        """The numbers of the thin devices of each pool that are volumes of the group."""
        found: dict[str, list[int]] = {}
        for section in self.volumes.values():
            for segment in segments_of(section):
                device = segment.values.get("device_id")
                if isinstance(device, int):
                    found.setdefault(segment.text("thin_pool"), []).append(device)
        return found

    def all_metadata(self, number: int, part: str) -> None:
        """A volume holds nothing but one kind of metadata."""
        rows = self.assembly.volumes[number].extents = ExtentRows()
        rows.add(METADATA, 0, self.sizes[number], part=part)

    def add(self, child: Child) -> int:
        """One more volume; its number, by which rows of further volumes name it."""
        number = self.assembly.add(child).number
        self.readers[number] = child.over(self.readers, child.name)
        self.sizes[number] = child.size
        return number


def new_group(text: Section, name: str, pvs: list[Pv], assembly: Assembly) -> Group:
    """The group with its physical volumes placed.

    Raises Corrupt where the text lacks what every group has.
    """
    group_text = text.sections[name]
    extent_size = group_text.number("extent_size", low=1, high=MAX_EXTENT_SIZE) * SECTOR
    group = Group(name, group_text.text("id"), group_text, extent_size, assembly, pvs)
    if len(group.volumes) > MAX_VOLUMES:
        raise Corrupt(
            f"it lists {plural(len(group.volumes), 'logical volume')}, more than {MAX_VOLUMES:,}",
            code="too-many",
        )
    by_uuid = {pv.uuid: pv for pv in pvs}
    for label, section in group_text.section("physical_volumes").sections.items():
        uuid = section.text("id")
        pv = by_uuid.get(uuid)
        if pv is None:
            group.physical[label] = None
            hint = section.text("device")
            group.missing[False, label] = f"{uuid} (once {hint})" if hint else uuid
            continue
        number, reader = pv.member.number, pv.member.reader
        start = section.number("pe_start", high=MAX_BYTES // SECTOR) * SECTOR
        group.readers[number], group.sizes[number] = reader, reader.size
        group.physical[label] = Located(Place(number, start), reader.size - start)
        if (end := start + group.bytes(section.number("pe_count", high=MAX_EXTENTS))) > reader.size:
            words = f"its extents end at byte {end:#x}, but it ends at {reader.size:#x}"
            group.assembly.about(pv.member).damage.say("truncated", words, reader.size)
    for section in group.volumes.values():
        for segment in segments_of(section):
            if segment.text("type") == "snapshot":
                store = segment.text("cow_store") or segment.text("merging_store")
                origin = segment.text("origin")
                if store in group.volumes and origin in group.volumes:
                    group.snapshots[store] = origin
                    group.merging |= {origin: store} if segment.text("merging_store") else {}
    return group


def span(group: Group, segment: Section) -> tuple[int, int]:
    """(first byte, bytes) of the logical volume that the segment describes."""
    start = segment.number("start_extent", high=MAX_EXTENTS)
    count = segment.number("extent_count", high=MAX_EXTENTS)
    return group.bytes(start), group.bytes(count)


def segments_of(section: Section) -> list[Section]:
    """The segments of a logical volume, by number."""
    return [part for name, part in section.sections.items() if name.startswith("segment")]


def references(name: str, group: Group) -> Iterator[str]:
    """The logical volumes that this one is made of."""
    if name in group.snapshots:
        yield group.snapshots[name]
    for segment in segments_of(group.volumes[name]):
        for key in (*PHYSICAL_OR_LOGICAL, *LOGICAL):
            if key == "origin" and segment.text("type") == "thin":
                continue  # where a thin snapshot was taken; its blocks lie in the pool
            for other in segment.words(key):
                if other in group.volumes and not (key in PHYSICAL_OR_LOGICAL and other in group.physical):
                    yield other


def in_order(group: Group) -> list[str]:
    """The names so that each comes after its references. Raises Corrupt where volumes contain each other."""
    result: list[str] = []
    state: dict[str, bool] = {}
    for name in group.volumes:
        stack = [(name, False)]
        while stack:
            at, done = stack.pop()
            if done:
                state[at] = True
                result.append(at)
            elif at not in state:
                state[at] = False
                stack.append((at, True))
                for other in references(at, group):
                    if state.get(other) is False:
                        raise Corrupt(
                            f"the logical volumes {at} and {other} contain each other", code="twice"
                        )
                    stack.append((other, False))
    return result


def add_free(group: Group, kind: int) -> None:
    """The physical extents that no logical volume takes: free, unless there are logical volumes of which it
    is not known what they take."""
    for label, section in group.text.section("physical_volumes").sections.items():
        space = group.physical[label]
        if space is None:
            continue
        number = space.place.parent
        starts, ends = (ints([piece[side] for piece in group.taken.get(number, [])]) for side in (0, 1))
        low = space.place.offset
        high = space.place.offset + group.bytes(section.number("pe_count", high=MAX_EXTENTS))
        size = group.sizes[number]
        left = complement(starts, ends, min(low, size), min(high, size))
        group.assembly.volumes[number].extents.add(kind, left[0], left[1] - left[0])
