"""One array: which of its members are in use, how large it is, and where its bytes lie on them.

Sources: kernel drivers/md/md.c (analyze_sbs), raid0.c (create_strip_zones, map_sector), md-linear.c, raid1.c,
raid5.c, raid10.c.
"""

from dataclasses import dataclass

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.formats.common import stripes
from virt_bmap.formats.common.duplicates import Copy, choose
from virt_bmap.formats.common.rebuild import Stripes
from virt_bmap.formats.common.stripes import Place, Raid10
from virt_bmap.formats.volumes.md.superblock import FAULTY, JOURNAL, SECTOR, SPARE, Superblock

LINEAR, RAID0, RAID1, RAID4, RAID5, RAID6, RAID10 = -1, 0, 1, 4, 5, 6, 10
NAMES = {
    LINEAR: "linear",
    RAID0: "raid0",
    RAID1: "raid1",
    RAID4: "raid4",
    RAID5: "raid5",
    RAID6: "raid6",
    RAID10: "raid10",
}
OTHERS = {-4: "multipath", -5: "faulty", -100: "container"}
ORIGINAL_LAYOUT = 1
"""Of a RAID0 whose members differ in size: how the second and later zones are numbered (kernel commit
c84a1372df92, Linux 5.4)."""


@dataclass
class Array:
    """An array as its freshest superblock describes it; `slots[i]` is the member in slot i, None where it is
    missing or out of date."""

    head: Superblock
    members: list[Superblock]
    slots: list[Superblock | None]

    @property
    def present(self) -> list[Superblock]:
        """The members in use, by slot."""
        return [member for member in self.slots if member]


def gather(members: list[Superblock]) -> Array:
    """Sort the members of one array into slots; what is not used says why in its damage."""
    fresh = max(members, key=lambda member: (member.events, member.role < SPARE))
    if fresh.raid_disks > stripes.MAX_MEMBERS:
        raise Unsupported(
            f"an array of {plural(fresh.raid_disks, 'member')} is "
            f"not supported; the limit is {stripes.MAX_MEMBERS}"
        )
    array = Array(fresh, members, [None] * fresh.raid_disks)
    slots: dict[int, list[Superblock]] = {}
    for member in members:
        role = fresh.roles[member.number] if member.number < len(fresh.roles) else SPARE
        if role == JOURNAL:
            member.metadata.append(("md journal", member.data_offset, member.data_size or member.size))
        elif member.events + 1 < fresh.events:
            _unused(
                member,
                f"it has seen {member.events} events, the array "
                f"{fresh.events}: it dropped out, and is not used",
            )
        elif role == FAULTY or (role != SPARE and role >= fresh.raid_disks):
            _unused(member, "the array calls it faulty: it is not used")
        elif role == SPARE:
            _unused(member, "a spare: it holds no data of the array")
        elif member.recovered is not None and member.recovered < fresh.size:
            _unused(member, f"only its first {member.recovered} bytes are rebuilt: it is not used")
        else:
            slots.setdefault(role, []).append(member)
    for slot, found in slots.items():
        array.slots[slot] = _one_of(slot, found)
    return array


def _one_of(slot: int, claims: list[Superblock]) -> Superblock:
    """Who of several that claim one slot is used: rather not a replacement, or what was rebuilt lately."""
    rank = min((one.replacement, one.recovered is not None) for one in claims)
    equal = [one for one in claims if (one.replacement, one.recovered is not None) == rank]
    what = f"the member in slot {slot} of the array {claims[0].uuid}"
    used = equal[choose([Copy(one.member, one.events, one.damage) for one in equal], what, "events")]
    for other in claims:
        if other not in equal:
            _unused(other, f"slot {slot} is held by {used.member.name}: this replacement is not used yet")
    return used


def _unused(member: Superblock, detail: str) -> None:
    """A member that dropped out is what redundancy is for: a note, unless two claim one slot."""
    member.damage.say("unused-member", detail)


def place(array: Array) -> tuple[int, Rows, Stripes | None]:
    """(bytes of the array, mapping rows, how to compute what is missing). Raises Corrupt or Unsupported."""
    head = array.head
    if head.level not in NAMES:
        raise Unsupported(f"an md array of level {OTHERS.get(head.level, head.level)} is not supported")
    if head.reshaping:
        raise Unsupported(
            "the array is being reshaped: its bytes lie partly in the old and partly in the new layout",
        )
    if head.level not in (LINEAR, RAID1) and (head.chunk < SECTOR or head.chunk % SECTOR):
        raise Corrupt(
            f"the md superblock at byte {head.offset:#x} has a chunk of {head.chunk} bytes",
            head.offset,
            "superblock",
        )
    if head.level in (LINEAR, RAID0):
        size, rows = (_linear if head.level == LINEAR else _raid0)(array)
        return size, rows, None
    spots = [Place(one.member.number, one.data_offset) if one else None for one in array.slots]
    disks = len(spots)
    if head.level == RAID1:
        return head.size, stripes.mirrored(head.size, spots), None
    chunk, each = head.chunk, head.size // head.chunk
    if head.level == RAID10:
        layout = Raid10.of(head.layout, disks)
        size = layout.chunks(each, disks)[0] * chunk
        return size, stripes.rows(layout.pattern(each, disks), chunk, size, spots), None
    parity = stripes.parity(head.level, head.layout, disks)
    size = each * chunk * parity.data.shape[1]
    found = Stripes(
        parity, chunk, size, [(one.member.reader, one.data_offset) if one else None for one in array.slots]
    )
    return size, stripes.rows(parity.pattern(), chunk, size, spots), found


def lost(array: Array) -> int:
    """How many slots too many are empty for the level; 0 where all bytes can be read or computed."""
    empty = sum(one is None for one in array.slots)
    if array.head.level == RAID10:
        return 0 if empty == 0 else max(0, empty - (Raid10.of(array.head.layout, len(array.slots)).near - 1))
    return max(
        0, empty - {RAID1: len(array.slots) - 1, RAID4: 1, RAID5: 1, RAID6: 2}.get(array.head.level, 0)
    )


def _sizes(array: Array) -> list[int]:
    """What each member gives, in whole chunks.

    A missing member of an array that needs all is taken to be like the first.
    """
    known = [(one.data_size or one.size) if one else -1 for one in array.slots]
    first = next((size for size in known if size >= 0), 0)
    chunk = max(array.head.chunk, 1)
    return [(first if size < 0 else size) // chunk * chunk for size in known]


def _linear(array: Array) -> tuple[int, Rows]:
    at, rows = 0, []
    for member, size in zip(array.slots, _sizes(array), strict=True):
        if member and size:
            rows.append(Row(at, member.member.number, member.data_offset, size))
        at += size
    return at, Rows.of(rows)


def _raid0(array: Array) -> tuple[int, Rows]:
    """Zones: all members up to the size of the smallest, then those that go on up to the next smallest, and
    so forth."""
    sizes, chunk = _sizes(array), array.head.chunk
    layout = array.head.layout if array.head.raid0_layout else ORIGINAL_LAYOUT
    at, low, parts = 0, 0, []
    for high in sorted(set(sizes)):
        zone = [one for one, size in zip(array.slots, sizes, strict=True) if size >= high]
        width = len(zone)
        first = at // chunk % width if layout == ORIGINAL_LAYOUT else 0
        spots = [Place(one.member.number, one.data_offset + low) if one else None for one in zone]
        parts.append(stripes.rows(stripes.striped(width, first), chunk, (high - low) * width, spots, at))
        at, low = at + (high - low) * width, high
    return at, Rows.concat(parts)
