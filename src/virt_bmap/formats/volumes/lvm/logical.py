"""Logical volumes, one after the other: which kind each is, where its bytes lie, and what it is called in the
map.

Inner volumes keep their names (`/dev/VG/pool_tdata`); the store of a snapshot gets `-cow` after the
snapshot's name, as device-mapper calls it. A thin pool or cache pool is no volume of its own: its data and
metadata volumes are.
"""

import re

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import complement
from virt_bmap.core.errors import Corrupt, FormatError, Unsupported
from virt_bmap.core.mapping import COPY, DATA, Rows
from virt_bmap.formats.common.stripes import Place, bounded
from virt_bmap.formats.volumes.lvm.cache import Cached, read_cache, read_writecache
from virt_bmap.formats.volumes.lvm.group import Group, Located, Opener, add_free, in_order, segments_of, span
from virt_bmap.formats.volumes.lvm.label import SECTOR
from virt_bmap.formats.volumes.lvm.raid import TYPES as RAID_TYPES
from virt_bmap.formats.volumes.lvm.raid import raid
from virt_bmap.formats.volumes.lvm.segments import SHAPES
from virt_bmap.formats.volumes.lvm.snapshot import read_exceptions
from virt_bmap.formats.volumes.lvm.text import Section
from virt_bmap.formats.volumes.lvm.thin import read_pool
from virt_bmap.model.contract import Child
from virt_bmap.model.tables import CHECKSUMMED, CONTENT, FREE, UNREFERENCED

MAX_SECTORS = 1 << 40
"""Of a cache volume, in which metadata and data have places of their own."""
IMAGE = re.compile(r"_(rimage|rmeta|mimage|mlog)(_\d+)?$")
"""Names that LVM keeps for the parts of RAID volumes and mirrors (lvm(8), "Valid names")."""
MOST_EXPLAINED = 3
"""Logical volumes of which it is said one by one why they can't be read."""
MAX_DEVICE = 1 << 24
"""Thin devices are numbered in 24 bits (MAX_DEV_ID in dm-thin.c)."""


def read_group(group: Group) -> None:
    """Place every logical volume of the group. Raises Corrupt where their order can't be found."""
    unread: dict[str, list[tuple[str, FormatError]]] = {}
    for name in in_order(group):
        try:
            _read_volume(group, name)
        except FormatError as error:
            unread.setdefault(error.code, []).append((name, error))
            group.logical.setdefault(name, None)
            group.missing[True, name] = f"of {name}"
    for code, found in unread.items():
        for pv in group.pvs[:1]:
            group.assembly.about(pv.member).damage.say(code, _unread(group, found), pv.text_at)
    _name_unread(group)
    add_free(group, UNREFERENCED if unread else FREE)


def _unread(group: Group, found: list[tuple[str, FormatError]]) -> str:
    """What is said of the logical volumes that can't be read for one kind of reason, however many."""
    if len(found) == 1:
        ((name, error),) = found
        return f"logical volume {group.name}/{name}: {error}"
    reasons = "; ".join(f"{name}: {error}" for name, error in found[:MOST_EXPLAINED])
    more = f"; and {len(found) - MOST_EXPLAINED:,} more" if len(found) > MOST_EXPLAINED else ""
    return f"{plural(len(found), 'logical volume')} of {group.name} can't be read: {reasons}{more}"


def _name_unread(group: Group) -> None:
    """An inner volume that no other lies on, because what it serves is not read: one piece, not a gap."""
    used = {parent for child in group.assembly.children for parent in child.parents}
    for child in group.assembly.children:
        if child.number in group.sizes and not (child.contents or child.extents or child.number in used):
            spare = child.name.endswith("_pmspare")
            part = "spare pool metadata" if spare else "inner volume"
            child.extents.add(CONTENT, 0, child.size, part=part)


def _read_volume(group: Group, name: str) -> None:
    segments = segments_of(group.volumes[name])
    kind = _kind(segments[0]) if segments else ""
    builder = {"thin-pool": _thin_pool, "thin": _thin, "snapshot": _nothing, "cache-pool": _nothing,
        "cache": _cache,
               "writecache": _writecache, "integrity": _integrity}.get(kind)  # fmt: skip
    if builder and len(segments) == 1:
        builder(group, name, segments[0])
    elif name in group.snapshots:
        _snapshot(group, name, segments)
    else:
        _plain(group, name, name, segments)


def _kind(segment: Section) -> str:
    """The type without the options after a plus sign (striped+caw, thin+...)."""
    return segment.text("type").partition("+")[0]


def _nothing(group: Group, name: str, segment: Section) -> None:
    """No bytes of its own."""
    group.logical[name] = None


def _plain(group: Group, name: str, shown: str, segments: list[Section]) -> Child:
    """A volume whose segments name their places in the text."""
    parts: list[Rows] = []
    size, kinds, absent, zeroes = 0, [], [], []
    opener: Opener | None = None
    for segment in segments:
        kind = _kind(segment)
        start, length = span(group, segment)
        if kind in RAID_TYPES:
            length, more, opener = raid(group, name, segment)
            parts.append(more)
        elif kind in SHAPES:
            parts.append(SHAPES[kind](group, name, segment))
            zeroes += [(start, start + length)] if kind == "zero" else []
        else:
            raise Unsupported(f"segments of type {kind!r} are not supported")
        size = max(size, start + length)
        if log := group.logical.get(segment.text("mirror_log")):
            group.all_metadata(log.place.parent, "mirror log")
        kinds.append("linear" if kind == "striped" and segment.number("stripe_count", 1) == 1 else kind)
        absent += group.absent(segment)
    rows, lost = bounded(Rows.concat(parts), group.sizes)
    child = _add(
        group, name,
        Child("lv", f"/dev/{group.name}/{shown}", size, rows, detail=", ".join(dict.fromkeys(kinds)),
            open=opener, holes=zeroes),
    )  # fmt: skip
    what = "of its bytes [lies|lie] beyond the end of [its disk|their disks]"
    child.damage.add("truncated", what, count=lost)
    if absent:
        _say_missing(group, name, child, absent)
    if store := group.merging.get(name):
        detail = (
            f"the snapshot {store} is being merged into it; what "
            "is not merged yet is shown in the snapshot only"
        )
        child.damage.say("half-done", detail)
    return child


def _add(group: Group, name: str, child: Child, inner: bool | None = None) -> Child:
    """Add the child as the volume of that name; whether it is an inner one LVM says itself, unless the caller
    does."""
    section = group.volumes[name]
    child.uuid = section.text("id") or None
    if inner or (inner is None and "VISIBLE" not in section.words("status")):
        child.contents, child.detail = False, f"{child.detail}; part of another volume"
    number = group.add(child)
    group.logical[name] = Located(Place(number, 0), child.size)
    return child


def _say_missing(group: Group, name: str, child: Child, absent: list[str]) -> None:
    rows = child.rows.take(child.rows.role == DATA)
    here = int((rows.run * rows.count).sum())
    rebuilt = child.open is not None
    words = (
        "what is not there is computed from parity" if rebuilt else f"{here} of {child.size} bytes are there"
    )
    ids = ", ".join(dict.fromkeys(absent))
    # whether the loss of an image matters says the volume that is made of it
    severity = "note" if here == child.size or rebuilt or IMAGE.search(name) else "error"
    says = (
        f", says the metadata at byte {group.pvs[0].text_at:#x} of {group.pvs[0].member.name}"
        if group.pvs
        else ""
    )
    child.damage.say("missing-member", f"physical volume {ids} is missing{says}: {words}", severity=severity)
    if len(child.rows) == 0:
        group.logical[name] = None
        group.missing[True, name] = ids


def _space(group: Group, owner: str, segment: Section, key: str) -> Located:
    """The volume that a key names, the owner's from now on; Corrupt where it is not there."""
    space = group.space(key, segment.text(key))
    if space is None:
        raise Corrupt(f"its {key} {segment.text(key)!r} is missing or can't be read", code="missing-member")
    group.take(owner, space.place, space.size)
    return space


# ---- thin --------------------------------------------------------------------------------------------------


def _thin_pool(group: Group, name: str, segment: Section) -> None:
    """A pool: read its metadata once, for all its thin volumes."""
    group.logical[name] = None
    data, metadata = _space(group, name, segment, "pool"), _space(group, name, segment, "metadata")
    pool = read_pool(group.readers[metadata.place.parent], data.size)
    group.pools[name] = pool, data.place.parent
    group.assembly.volumes[data.place.parent].extents = pool.data
    about = group.assembly.volumes[metadata.place.parent]
    about.extents = pool.metadata
    about.damage.take(pool.damage)
    if (wanted := segment.number("transaction_id", 0)) != pool.transaction:
        detail = f"LVM expects transaction {wanted}, the pool's metadata is at {pool.transaction}"
        about.damage.say("stale", detail)
    if others := np.setdiff1d(pool.devices, group.thin_devices.get(name, [])).tolist():
        detail = (
            f"thin devices {', '.join(map(str, others[:10]))} "
            "are in the pool, but LVM knows no volume for them"
        )
        about.damage.say("simplified", detail)


def _thin(group: Group, name: str, segment: Section) -> None:
    """A thin volume: blocks of the pool, and where there is none the external origin or nothing."""
    if segment.text("thin_pool") not in group.pools:
        raise Corrupt(
            f"its thin pool {segment.text('thin_pool')!r} is missing or can't be read", code="missing-member"
        )
    pool, data = group.pools[segment.text("thin_pool")]
    _, size = span(group, segment)
    device = segment.number("device_id", high=MAX_DEVICE)
    if (other := group.devices.setdefault((segment.text("thin_pool"), device), name)) != name:
        raise Corrupt(f"its thin device {device} is that of {other}", code="two-owners")
    rows = pool.rows(device, size, data)
    if origin := group.logical.get(segment.text("external_origin")):
        starts, ends = complement(
            rows.volume_offset, rows.volume_offset + rows.run, 0, min(size, origin.size)
        )
        rows = Rows.concat([rows, Rows.make(starts, origin.place.parent, starts, ends - starts)])
    child = Child(
        "lv",
        f"/dev/{group.name}/{name}",
        size,
        rows,
        detail=f"thin, {int(rows.run.sum())} bytes mapped",
    )
    if device in pool.devices and not pool.damage.is_damaged:
        child.holes = [(0, size)]  # else nobody knows which blocks were never written
    if device not in pool.devices:
        detail = f"thin device {device} is not in the pool's metadata"
        child.damage.say("mapping", detail)
    _add(group, name, child)


# ---- snapshots and caches ----------------------------------------------------------------------------------


def _snapshot(group: Group, name: str, segments: list[Section]) -> None:
    """A snapshot of the old kind: chunks of its store, all else from the origin."""
    store = _plain(group, name, f"{name}-cow", segments)
    store.contents = False
    origin = group.logical.get(group.snapshots[name])
    if origin is None:
        raise Corrupt(
            f"its origin {group.snapshots[name]!r} is missing or can't be read", code="missing-member"
        )
    found = read_exceptions(group.readers[store.number], origin.size)
    store.extents = found.extents
    start = found.old * found.chunk
    run = np.minimum(found.count * found.chunk, origin.size - start)
    starts, ends = complement(start, start + run, 0, origin.size)
    rows = Rows.concat([
        Rows.make(start, store.number, found.new * found.chunk, run),
        Rows.make(starts, origin.place.parent, starts, ends - starts),
    ])  # fmt: skip
    detail = f"snapshot of {group.snapshots[name]}, {plural(int(found.count.sum()), 'chunk')} of its own"
    child = Child("lv", f"/dev/{group.name}/{name}", origin.size, rows, detail=detail)
    what = "[exception lies|exceptions lie] outside the origin or the store"
    child.damage.add("outside", what, count=found.outside)
    _add(group, name, child, inner=False)


def _cache(group: Group, name: str, segment: Section) -> None:
    """A cached volume: its origin, but for blocks that are newer in the cache."""
    origin = _space(group, name, segment, "origin")
    pool = segment.text("cache_pool")
    if "metadata_len" in segment.values:  # one volume for both: sectors of metadata, then of data
        fast = _space(group, name, segment, "cache_pool")
        places = [(fast.place.parent, segment.number(f"{part}_start", high=MAX_SECTORS) * SECTOR,
                segment.number(f"{part}_len", high=MAX_SECTORS) * SECTOR)
                  for part in ("metadata", "data")]  # fmt: skip
    else:
        (inner,) = segments_of(group.volumes.get(pool, Section())) or [Section()]
        parts = [_space(group, name, inner, "metadata"), _space(group, name, inner, "data")]
        places = [(space.place.parent, 0, space.size) for space in parts]
    (metadata, start, length), (data, first, size) = places
    rows = Rows.make(0, metadata, start, length)
    inside = (
        group.add(Child("lv", f"/dev/{group.name}/{pool}", length, rows, contents=False))
        if start or metadata == data
        else metadata
    )
    found = read_cache(group.readers[inside], size)
    group.all_metadata(inside, "cache metadata")
    _add_cached(group, name, "cache", origin, found, data, first)


def _writecache(group: Group, name: str, segment: Section) -> None:
    """A volume with a write cache, which holds what the origin has not been given yet."""
    origin, fast = _space(group, name, segment, "origin"), _space(group, name, segment, "writecache")
    found, extents = read_writecache(group.readers[fast.place.parent])
    group.assembly.volumes[fast.place.parent].extents = extents
    _add_cached(group, name, "writecache", origin, found, fast.place.parent, 0)


def _integrity(group: Group, name: str, segment: Section) -> None:
    """A volume with checksums: its bytes lie in its origin, the checksums in a volume beside it."""
    origin = _space(group, name, segment, "origin")
    if beside := group.logical.get(segment.text("meta_dev")):
        group.all_metadata(beside.place.parent, "integrity checksums")
    size = min(span(group, segment)[1], origin.size)
    rows = Rows.make(0, origin.place.parent, 0, size)
    device = f"/dev/{group.name}/{name}"
    _add(group, name, Child("lv", device, size, rows, detail="integrity", traits=CHECKSUMMED))


def _add_cached(
    group: Group, name: str, kind: str, origin: Located, found: Cached, data: int, first: int
) -> None:
    """The rows: blocks that are only in the cache, copies that it holds, and the origin for all that is not
    in it alone."""
    keep = (found.origin < -(-origin.size // found.size)) & (
        found.place + first <= group.sizes[data] - found.size
    )
    start = found.origin[keep] * found.size
    run = np.minimum(found.size, origin.size - start)
    dirty = found.dirty[keep]
    held = Rows.make(start, data, first + found.place[keep], run, role=np.where(dirty, DATA, COPY))
    starts, ends = complement(start[dirty], start[dirty] + run[dirty], 0, origin.size)
    rows = Rows.concat([held, Rows.make(starts, origin.place.parent, starts, ends - starts)])
    blocks = f"{plural(len(start), 'block')} cached, {int(dirty.sum()):,} of them newer than the origin"
    detail = f"{kind}, {blocks}"
    child = Child("lv", f"/dev/{group.name}/{name}", origin.size, rows, detail=detail)
    child.damage.take(found.damage)
    _add(group, name, child)
