"""What of a disk may be given back: what its allocators and the map both call free, and nothing of a filesystem about which they disagree."""

from collections.abc import Callable, Collection

from virt_bmap import tables
from virt_bmap.arrays import Int
from virt_bmap.blockmap import BlockMap
from virt_bmap.check import check
from virt_bmap.space import Ranges, Space, free_space

SWAP = "swap"
HIBERNATED = "hibernated"
"""The state of swap space, or of a Windows volume, that holds the memory of a machine."""


def plan(bmap: BlockMap, disk: int, swap: bool = False) -> Space:
    """What of the volume `disk` may be given back, in its bytes, and which volumes are left alone, with the reason. `swap`: the content of swap space, too."""
    kinds = kinds_of(bmap, ("free", SWAP) if swap else ("free",))
    return free_space(bmap, disk, kinds, doubts(bmap))


def doubts(bmap: BlockMap) -> dict[int, str]:
    """The volumes whose owners and allocator contradict each other; all where the machine sleeps, since it has filesystems open that may look clean."""
    names, systems = bmap.volumes.column("name").to_pylist(), bmap.filesystems.to_pylist()
    for system in systems:
        if system["state"] == HIBERNATED:
            return dict.fromkeys(range(len(names)), f"the machine sleeps: {names[system['volume']]} is hibernated")
    return {found.volume: f"the map and its allocator disagree: {found.code}" for found in check(bmap).disagreements}


def kinds_of(bmap: BlockMap, what: Collection[str]) -> Callable[[int], tuple[int, ...]]:
    """Which kinds of extents of a volume count as free: of "free", "gap" (slack behind filesystems, too) and "swap", those that are asked for."""
    systems = dict(zip(bmap.filesystems.column("volume").to_pylist(), bmap.filesystems.column("type").to_pylist(), strict=True))
    always = tuple(kind for word, kind in (("free", tables.FREE), ("gap", tables.GAP)) if word in what)

    def kinds(volume: int) -> tuple[int, ...]:
        return (*always, tables.CONTENT) if SWAP in what and systems.get(volume) == SWAP else always

    return kinds


def whole_blocks(ranges: Ranges, block: int) -> tuple[Int, Int]:
    """The whole blocks in ranges: all that giving them back would free."""
    low, high = -(-ranges[0] // block) * block, ranges[1] // block * block
    return low[high > low], high[high > low]
