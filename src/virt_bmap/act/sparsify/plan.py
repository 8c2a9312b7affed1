"""What of a disk may be given back: what its allocators and the map both call free, and nothing of a
filesystem about which they disagree."""

from collections.abc import Callable, Collection

from virt_bmap.ask.space import Ranges, Space, free_space
from virt_bmap.core.arrays import Int
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

SWAP = "swap"


def plan(bmap: BlockMap, disk: int, swap: bool = False) -> Space:
    """What of the volume `disk` may be given back, in its bytes, and which volumes are left alone, with the
    reason. `swap`: the content of swap space, too."""
    kinds = kinds_of(bmap, ("free", SWAP) if swap else ("free",))
    return free_space(bmap, disk, kinds)


def kinds_of(bmap: BlockMap, what: Collection[str]) -> Callable[[int], tuple[int, ...]]:
    """Which kinds of extents of a volume are meant: of "free", "gap" (slack after filesystems, too),
    "unreferenced" and "swap", those that are asked for."""
    always = tuple(kind for kind in tables.IDLE if tables.KINDS[kind] in what)

    def kinds(volume: int) -> tuple[int, ...]:
        format = formats.filesystem(bmap.filesystem_type(volume)) if SWAP in what else None
        return (*always, tables.CONTENT) if format and format.scratch else always

    return kinds


def whole_blocks(ranges: Ranges, block: int) -> tuple[Int, Int]:
    """The whole blocks in ranges: all that giving them back would free."""
    low, high = -(-ranges[0] // block) * block, ranges[1] // block * block
    return low[high > low], high[high > low]
