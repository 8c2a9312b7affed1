"""What of a volume is free for certain: what every allocator
on it calls free and nobody owns, in bytes of that volume.

A filesystem whose allocator can't be trusted (not clean, damaged, contradicted by its map, on a layer with a
problem) gives nothing, and says why; so does what lies on bytes that something vouches for, whoever calls
them free, and everything while the machine sleeps. What several volumes share (thin snapshots, the origin of
a snapshot, mirrors) is free only where none of them uses it. On an array with parity a byte is free where all
bytes that share its parity are: then their parity is free, too, and may be given back with them, since the
parity of zeroes is zero (P as their sum, Q as their weighted sum).
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import numpy as np

from virt_bmap.ask.check import check
from virt_bmap.core.arrays import EMPTY, Int, complement, intersect, subtract, union
from virt_bmap.core.mapping import PARITY, Rows
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

Ranges = tuple[Int, Int]
NONE: Ranges = (EMPTY, EMPTY)
HARMLESS = ("copy-missing",)
"""Problems of a layer that place no byte elsewhere: the first partition table is valid, and the disk was made
larger or smaller."""
ADVICE = {
    tables.CHECKSUMMED: "discard it from inside instead (fstrim)",
    tables.VERIFIED: "discard it before the hashes are made",
    tables.JOURNALED: "discard it from inside instead (fstrim)",
}
"""What to do instead, for volumes with these traits."""
MEANING = {
    tables.CHECKSUMMED: "keeps checksums of its blocks (dm-integrity)",
    tables.VERIFIED: "is covered by hashes, its free bytes as well (dm-verity)",
    tables.JOURNALED: "has a journal on another device, which may hold "
    "newer bytes and parity made with what it holds (md)",
}


@dataclass
class Space:
    """Free ranges by the volume whose allocator says so, in bytes of the volume asked about; and the volumes
    left alone, with the reason."""

    free: dict[int, Ranges] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    def all(self) -> Ranges:
        """The free ranges of all volumes together, sorted and merged."""
        return _together(list(self.free.values()))


def free_space(
    bmap: BlockMap,
    target: int,
    kinds: Callable[[int], tuple[int, ...]] = lambda _: (tables.FREE,),
    doubted: Mapping[int, str] | None = None,
    known: dict[int, Space] | None = None,
) -> Space:
    """What of volume `target` is free, whichever volume that lies in it says so.

    `kinds` tells which kinds of extents count as free on a volume; `doubted`
    is what `doubts` gave, where it was asked already; `known` what was found
    of arrays: they can lie in each other, and each is asked by all below it."""
    doubted = doubts(bmap) if doubted is None else doubted
    known = {} if known is None else known
    space, used = Space(), []
    volumes = inside(bmap, target)
    arrays = {
        volume for volume in volumes if volume != target and (bmap.rows_of(volume).role == PARITY).any()
    }
    for volume in volumes:
        if volume in arrays:  # it answers for all that lies in it
            mine, rest = _of_array(bmap, volume, kinds, doubted, space, known)
        else:
            mine, rest = _ranges(bmap, volume, kinds(volume))
            if len(mine[0]) and (reason := distrust(bmap, volume) or doubted.get(volume)):
                space.left[volume] = reason
                mine, rest = NONE, _together([mine, rest])
        space.free[volume] = translate(bmap, volume, mine, target, arrays)
        used.append(translate(bmap, volume, rest, target, arrays))
    taken = _together(used)
    for volume, ranges in space.free.items():
        space.free[volume] = subtract(*ranges, *taken)
        taken = _together([taken, space.free[volume]])  # what two volumes call free is given once
    return space


def _of_array(
    bmap: BlockMap,
    volume: int,
    kinds: Callable[[int], tuple[int, ...]],
    doubted: Mapping[int, str],
    space: Space,
    known: dict[int, Space],
) -> tuple[Ranges, Ranges]:
    """(free, all else) of an array with parity, in its own bytes, whatever lies in it counted."""
    if volume not in known:
        known[volume] = free_space(bmap, volume, kinds, doubted, known)
    found = known[volume]
    space.left |= found.left
    size = bmap.size_of(volume)
    free = sharing_parity(bmap.rows_of(volume), found.all(), size)
    return free, complement(*free, 0, size)


def sharing_parity(rows: Rows, free: Ranges, size: int) -> Ranges:
    """What of the free bytes of an array shares its parity with free bytes only.

    `rows` are the array's, `size` its bytes.
    """
    parity = rows.take(rows.role == PARITY)
    used = complement(*free, 0, size)
    computed = parity.down(*used)
    parent = parity.parent[computed.row]
    tied = [NONE]
    for number in np.unique(parent).tolist():
        mine = parent == number
        back = parity.take(parity.parent == number).up(
            *union(computed.target[mine], (computed.target + computed.length)[mine])
        )
        tied.append((back.target, back.target + back.length))
    return subtract(*free, *_together(tied))


def distrust(bmap: BlockMap, volume: int) -> str | None:
    """Why the allocator of a volume is not believed: its
    filesystem, or a layer that it lies on; None where it is."""
    _, system = bmap.slice_of("filesystems", volume)
    if system.num_rows and (state := system.column("state")[0].as_py()) not in tables.CONSISTENT:
        return f"its {system.column('type')[0].as_py()} is not clean: {state}"
    names, below = bmap.volumes.column("name").to_pylist(), layers(bmap, volume)
    if reason := _tied(bmap, below):
        return reason
    for row in bmap.problems.to_pylist():
        number = row["volume"]
        if row["severity"] == "note" or row["code"] in HARMLESS:
            continue
        if number == volume:
            return f"it has a problem: {row['code']}"
        if number in below or (
            _is_spanning(row["format"]) and _same_group(bmap, layers(bmap, number), below)
        ):
            return f"{names[number]}, on which it lies, has a problem: {row['code']}"
    return None


def doubts(bmap: BlockMap) -> dict[int, str]:
    """The volumes whose owners and allocator contradict each other; all where the machine sleeps, since it
    has filesystems open that may look clean."""
    names, traits = bmap.volumes.column("name").to_pylist(), traits_of(bmap)
    for number in np.flatnonzero(traits & tables.SLEEPING).tolist():
        detail = _noted(bmap, number, "asleep")
        reason = f"the machine sleeps: {names[number]} is hibernated" + (f" ({detail})" if detail else "")
        return dict.fromkeys(range(len(names)), reason)
    return {
        found.volume: f"the map and its allocator disagree: {found.code}"
        for found in check(bmap).disagreements
    }


def traits_of(bmap: BlockMap) -> Int:
    """The traits of each volume by its number; none where an older map did not look for them."""
    return np.maximum(tables.integers(bmap.volumes, "traits"), 0)


def _tied(bmap: BlockMap, below: set[int]) -> str | None:
    """Why bytes that lie on these volumes must stay as they are, and what to do instead; None where nothing
    is tied to them."""
    names, traits = bmap.volumes.column("name").to_pylist(), traits_of(bmap)
    for number in sorted(below, reverse=True):
        for trait, advice in ADVICE.items():
            if traits[number] & trait:
                detail = _noted(bmap, number, "vouched") or f"{names[number]} {MEANING[trait]}"
                return f"{detail}: {advice}"
    return None


def _noted(bmap: BlockMap, volume: int, code: str) -> str | None:
    """What a note of this code says of a volume, for a person."""
    return next(
        (
            row["detail"]
            for row in bmap.problems.to_pylist()
            if row["volume"] == volume and row["code"] == code
        ),
        None,
    )


def _is_spanning(type: str | None) -> bool:
    """Does this format describe the volumes that it makes together? Then what is wrong with one (the metadata
    of a thin pool) casts doubt on all."""
    format = formats.volume(type)
    return format is not None and format.spans


def _same_group(bmap: BlockMap, some: set[int], others: set[int]) -> bool:
    """Do two volumes share a member of what spans several: a physical volume?"""
    types = bmap.volumes.column("type").to_pylist()
    return any(_is_spanning(types[number]) for number in some & others)


def layers(bmap: BlockMap, volume: int) -> set[int]:
    """A volume and all that it lies on, down to the disks."""
    below, queue = {volume}, [volume]
    while queue:
        queue += list(set(bmap.rows_of(queue.pop()).parent.tolist()) - below)
        below.update(queue)
    return below


def inside(bmap: BlockMap, target: int) -> list[int]:
    """The volumes that lie at least partly in a volume, itself first, parents before children."""
    found = {target}
    pairs = zip(
        tables.integers(bmap.mappings, "volume").tolist(),
        tables.integers(bmap.mappings, "parent").tolist(),
        strict=True,
    )
    for child, parent in pairs:
        if parent in found:
            found.add(child)
    return sorted(found)


def translate(
    bmap: BlockMap, volume: int, ranges: Ranges, target: int, without: Set[int] = frozenset()
) -> Ranges:
    """Ranges of a volume as ranges of a volume below it, all copies and computed parity included; what lies
    elsewhere, or in further volumes of `without`, is left out."""
    parts: list[Ranges] = []
    queue = [(volume, ranges)]
    while queue:
        number, (starts, ends) = queue.pop()
        if number == target:
            parts.append((starts, ends))
            continue
        rows = bmap.rows_of(number)
        if len(rows) == 0 or len(starts) == 0 or (number in without and number != volume):
            continue
        pieces = rows.down(starts, ends)
        parent = rows.parent[pieces.row]
        for up in np.unique(parent).tolist():
            mine = parent == up
            queue.append((up, union(pieces.target[mine], (pieces.target + pieces.target_length)[mine])))
    return _together(parts)


def _ranges(bmap: BlockMap, volume: int, kinds: tuple[int, ...]) -> tuple[Ranges, Ranges]:
    """(free and not owned, owned) ranges of a volume, from its own extents.

    What its children lie on is theirs to say, and not free here.
    """
    _, table = bmap.slice_of("extents", volume)
    start = tables.integers(table, "volume_offset")
    end, free = start + tables.integers(table, "length"), np.isin(tables.codes(table, "kind"), kinds)
    owned = union(start[~free], end[~free])
    rows = bmap.rows_into(volume)
    return subtract(*subtract(start[free], end[free], *owned), rows.parent_offset, rows.parent_end), owned


def _together(parts: list[Ranges]) -> Ranges:
    parts = [part for part in parts if len(part[0])]
    return (
        union(np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts]))
        if parts
        else NONE
    )


def overlap(ranges: Ranges, others: Ranges) -> int:
    """How many bytes two sets of ranges share."""
    low, high = intersect(*ranges, *others)
    return int((high - low).sum())
