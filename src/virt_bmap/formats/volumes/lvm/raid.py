"""RAID volumes: dm-raid is md with its superblock in a volume of its own beside each image.

Sources: kernel drivers/md/dm-raid.c (raid_types, struct dm_raid_superblock); lvm2 lib/raid/raid.c; man page
lvmraid(7).
"""

from functools import partial

import numpy as np

from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.layout import record, struct, widen
from virt_bmap.core.mapping import Rows
from virt_bmap.formats.common import stripes
from virt_bmap.formats.common.rebuild import RebuiltReader, Stripes
from virt_bmap.formats.common.stripes import Place, Raid10
from virt_bmap.formats.volumes.lvm.group import MAX_EXTENTS, Group, Opener, span
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.formats.volumes.lvm.text import Section

MAGIC = 0x64526D44
SUPPORTS_V190 = 1
RESHAPE_ACTIVE = 1
SUPERBLOCK = struct(512, [
    (0x00, "magic", "<u4"), (0x04, "compat_features", "<u4"), (0x08, "num_devices", "<u4"),
    (0x0C, "array_position", "<u4"), (0x10, "events", "<u8"), (0x18, "failed_devices", "<u8"),
    (0x20, "disk_recovery_offset", "<u8"), (0x3C, "flags", "<u4"), (0x60, "data_offset", "<u8"),
])  # fmt: skip

MAX_SKIP = 1 << 40
"""Bytes of the room for a reshape at an image's start; LVM sets aside a few MiB."""

PARITY_TYPES = {
    "raid4": (5, stripes.PARITY_0),
    "raid5": (5, stripes.LEFT_SYMMETRIC), "raid5_ls": (5, stripes.LEFT_SYMMETRIC),
    "raid5_la": (5, stripes.LEFT_ASYMMETRIC), "raid5_ra": (5, stripes.RIGHT_ASYMMETRIC),
    "raid5_rs": (5, stripes.RIGHT_SYMMETRIC), "raid5_n": (5, stripes.PARITY_N),
    "raid6": (6, stripes.ROTATING_ZERO_RESTART), "raid6_zr": (6, stripes.ROTATING_ZERO_RESTART),
    "raid6_nr": (6, stripes.ROTATING_N_RESTART), "raid6_nc": (6, stripes.ROTATING_N_CONTINUE),
    "raid6_n_6": (6, stripes.PARITY_N), "raid6_ls_6": (6, stripes.Q_LAST + stripes.LEFT_SYMMETRIC),
    "raid6_la_6": (6, stripes.Q_LAST + stripes.LEFT_ASYMMETRIC),
    "raid6_ra_6": (6, stripes.Q_LAST + stripes.RIGHT_ASYMMETRIC),
    "raid6_rs_6": (6, stripes.Q_LAST + stripes.RIGHT_SYMMETRIC),
}  # fmt: skip
"""Segment type -> md's level and layout. dm-raid's raid4 has its parity first, unlike md's own."""
MIRRORED_TYPES = ("raid1",)
STRIPED_TYPES = ("raid0", "raid0_meta")
NEAR_TYPES = ("raid10", "raid10_near")
TYPES = (*PARITY_TYPES, *MIRRORED_TYPES, *STRIPED_TYPES, *NEAR_TYPES)


def raid(group: Group, owner: str, segment: Section) -> tuple[int, Rows, Opener | None]:
    """(bytes, mapping rows, what computes the bytes of missing images) of a RAID segment.

    The last is None where none is missing.
    """
    start, size = span(group, segment)
    kind = segment.text("type").partition("+")[0]
    images, metadata = _parts(segment, kind)
    spaces = [group.take_whole(owner, "raids", name) for name in images]
    for name in metadata:
        group.take_whole(owner, "raids", name)
    heads = _superblocks(group, metadata)
    for at in _failed(group, images, heads):
        spaces[at] = None
    if any(
        head["compat_features"] & SUPPORTS_V190 and head["flags"] & RESHAPE_ACTIVE for head in heads.values()
    ):
        raise Unsupported("the RAID volume is in the middle of a reshape")
    skip = _skipped(heads)
    places = [Place(space.place.parent, space.place.offset + skip) if space else None for space in spaces]
    chunk = segment.number("stripe_size", 1, low=1, high=1 << 32) * SECTOR
    layout = stripes.parity(*PARITY_TYPES[kind], len(places)) if kind in PARITY_TYPES else None
    width = layout.data.shape[1] if layout else len(places)
    # room that a reshape left behind is counted in the segment, but holds nothing of the volume
    size = max(0, size - segment.number("reshape_count", 0, high=MAX_EXTENTS) * group.extent_size * width)
    if layout:
        members = [(group.readers[place.parent], place.offset) if place else None for place in places]
        computable = 0 < members.count(None) <= (2 if layout.q[0] >= 0 else 1)
        degraded = Stripes(layout, chunk, size, members) if computable else None
        rows = stripes.rows(layout.pattern(), chunk, size, places, start)
        return size, rows, partial(RebuiltReader, stripes=degraded) if degraded else None
    if kind in STRIPED_TYPES:
        rows = stripes.rows(stripes.striped(len(places)), chunk, size, places, start)
    elif kind in NEAR_TYPES:
        near = segment.number("data_copies", 2, 1, 255)
        pattern = Raid10.of(near | 1 << 8, len(places)).pattern(size // chunk, len(places))
        rows = stripes.rows(pattern, chunk, size, places, start)
    else:
        rows = stripes.mirrored(size, places, start)
    return size, rows, None


def _skipped(heads: dict[int, np.void]) -> int:
    """Bytes at the start of every image that a reshape left free."""
    found = {
        int(widen(head["data_offset"], "data_offset")) * SECTOR
        for head in heads.values()
        if head["compat_features"] & SUPPORTS_V190
    }
    if len(found) > 1:
        raise Corrupt(
            f"the RAID superblocks disagree on where data begins: {sorted(found)}", code="superblock"
        )
    skip = found.pop() if found else 0
    if skip > MAX_SKIP:
        raise Corrupt(f"a RAID superblock says that data begins at byte {skip:#x}", code="superblock")
    return skip


def _parts(segment: Section, kind: str) -> tuple[list[str], list[str]]:
    """The names of images and of their metadata volumes; a plain raid0 has none of these."""
    names = segment.words("raids") or segment.words("raid0_lvs")
    if kind == "raid0":
        images, metadata = names, []
    else:
        metadata, images = names[::2], names[1::2]
    if not 1 <= len(images) <= stripes.MAX_MEMBERS or (metadata and len(metadata) != len(images)):
        raise Corrupt(f"a {kind} segment lists {len(names)} parts", code="mapping")
    return images, metadata


def _superblocks(group: Group, metadata: list[str]) -> dict[int, np.void]:
    """Image -> its superblock, of those that are there; their volumes are named."""
    heads = {}
    for at, name in enumerate(metadata):
        space = group.space("raids", name)
        if space is None:
            continue
        number = space.place.parent
        group.all_metadata(number, "RAID metadata")
        head = record(group.readers[number].read_clipped(space.place.offset, SUPERBLOCK.itemsize), SUPERBLOCK)
        if head["magic"] == MAGIC and head["array_position"] == at:
            heads[at] = head
    return heads


def _failed(group: Group, images: list[str], heads: dict[int, np.void]) -> list[int]:
    """The images that the newest superblock calls failed, or that say of themselves that they are not rebuilt
    yet."""
    if not heads:
        return []
    newest = max(heads.values(), key=lambda head: int(head["events"]))
    gone = []
    for at, name in enumerate(images):
        own = heads.get(at)
        space = group.space("raids", name)
        if space is None:
            continue
        failed = at < 64 and int(newest["failed_devices"]) >> at & 1
        stale = own is not None and int(own["events"]) + 1 < int(newest["events"])
        rebuilding = own is not None and int(own["disk_recovery_offset"]) * SECTOR < space.size
        if failed or stale or rebuilding:
            why = "has failed" if failed else "is out of date" if stale else "is not rebuilt yet"
            about = group.assembly.volumes[space.place.parent]
            about.damage.say("unused-member", f"RAID image {name} {why}: it is not used")
            gone.append(at)
    return gone
