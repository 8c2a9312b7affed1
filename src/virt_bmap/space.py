"""What of a volume is free for certain: what every allocator on it calls free and nobody owns, in bytes of that volume.

A filesystem whose allocator can't be trusted (not clean, damaged) gives nothing, and says why. What several volumes share (thin snapshots, the origin of
a snapshot, mirrors) is free only where none of them uses it; below parity nothing is, since the parity is computed from free bytes, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import EMPTY, Int, intersect, subtract, union
from virt_bmap.blockmap import BlockMap
from virt_bmap.mapping import PARITY, ROLES

Ranges = tuple[Int, Int]
NONE: Ranges = (EMPTY, EMPTY)


@dataclass
class Space:
    """Free ranges by the volume whose allocator says so, in bytes of the volume asked about; and the volumes left alone, with the reason."""

    free: dict[int, Ranges] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    def all(self) -> Ranges:
        """The free ranges of all volumes together, sorted and merged."""
        return _together(list(self.free.values()))


def free_space(bmap: BlockMap, target: int, kinds: Callable[[int], tuple[int, ...]] = lambda _: (tables.FREE,)) -> Space:
    """What of volume `target` is free, whichever volume that lies in it says so. `kinds` tells which kinds of extents count as free on a volume."""
    space, used = Space(), []
    volumes = inside(bmap, target)
    on_parity = _on_parity(bmap, volumes, target)
    for volume in volumes:
        mine, rest = _ranges(bmap, volume, kinds(volume))
        reason = distrust(bmap, volume) or ("it lies on an array with parity" if volume in on_parity else None)
        if reason:
            if len(mine[0]):
                space.left[volume] = reason
            mine, rest = NONE, _together([mine, rest])
        down, owned = translate(bmap, volume, mine, target), translate(bmap, volume, rest, target)
        used.append(owned)
        space.free[volume] = down
    taken = _together(used)
    for volume, ranges in space.free.items():
        space.free[volume] = subtract(*ranges, *taken)
        taken = _together([taken, space.free[volume]])  # what two volumes call free is given once
    return space


def distrust(bmap: BlockMap, volume: int) -> str | None:
    """Why the allocator of the filesystem on a volume is not believed; None where it is, or where there is no filesystem."""
    _, system = bmap.slice_of("filesystems", volume)
    if system.num_rows and (state := system.column("state")[0].as_py()) not in tables.CONSISTENT:
        return f"its {system.column('type')[0].as_py()} is not clean: {state}"
    found = [row for row in bmap.problems.to_pylist() if row["volume"] == volume and row["severity"] != "note"]
    return f"it has a problem: {found[0]['code']}" if found else None


def inside(bmap: BlockMap, target: int) -> list[int]:
    """The volumes that lie at least partly in a volume, itself first, parents before children."""
    found = {target}
    pairs = zip(tables.integers(bmap.mappings, "volume").tolist(), tables.integers(bmap.mappings, "parent").tolist(), strict=True)
    for child, parent in pairs:
        if parent in found:
            found.add(child)
    return sorted(found)


def translate(bmap: BlockMap, volume: int, ranges: Ranges, target: int) -> Ranges:
    """Ranges of a volume as ranges of a volume below it, all copies and computed parity included; what lies elsewhere is left out."""
    parts: list[Ranges] = []
    queue = [(volume, ranges)]
    while queue:
        number, (starts, ends) = queue.pop()
        if number == target:
            parts.append((starts, ends))
            continue
        rows = bmap.rows_of(number)
        if len(rows) == 0 or len(starts) == 0:
            continue
        pieces = rows.down(starts, ends)
        parent = rows.parent[pieces.row]
        for up in np.unique(parent).tolist():
            mine = parent == up
            queue.append((up, union(pieces.target[mine], (pieces.target + pieces.target_length)[mine])))
    return _together(parts)


def _ranges(bmap: BlockMap, volume: int, kinds: tuple[int, ...]) -> tuple[Ranges, Ranges]:
    """(free and not owned, owned) ranges of a volume, from its own extents. What its children lie on is theirs to say."""
    _, table = bmap.slice_of("extents", volume)
    start = tables.integers(table, "volume_offset")
    end, free = start + tables.integers(table, "length"), np.isin(tables.codes(table, "kind"), kinds)
    owned = union(start[~free], end[~free])
    return subtract(start[free], end[free], *owned), owned


def _on_parity(bmap: BlockMap, volumes: list[int], target: int) -> set[int]:
    """Those of the volumes in a volume that have a layer with parity between them and it."""
    found: set[int] = set()
    for volume in volumes:
        rows = bmap.rows_of(volume)
        if volume != target and ((rows.role == ROLES.index(PARITY)).any() or not found.isdisjoint(rows.parent.tolist())):
            found.add(volume)
    return found


def _together(parts: list[Ranges]) -> Ranges:
    parts = [part for part in parts if len(part[0])]
    return union(np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])) if parts else NONE


def overlap(ranges: Ranges, others: Ranges) -> int:
    """How many bytes two sets of ranges share."""
    low, high = intersect(*ranges, *others)
    return int((high - low).sum())
