"""From what was read of the disks to bytes of one volume, in the order in which they were read."""

import numpy as np

from virt_bmap.core.arrays import Int, joined
from virt_bmap.core.mapping import PARITY
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.observe.disks import Reads


def lineage(bmap: BlockMap, volume: int) -> set[int]:
    """The volumes that a volume lies on, itself included."""
    found = {volume}
    pairs = zip(
        tables.integers(bmap.mappings, "volume").tolist(),
        tables.integers(bmap.mappings, "parent").tolist(),
        strict=True,
    )
    for child, parent in sorted(pairs, reverse=True):  # parents come before children
        if child in found:
            found.add(parent)
    return found


def climb(bmap: BlockMap, volume: int, reads: Reads) -> tuple[Int, Int]:
    """(starts, ends) in the volume of what was read, in that order, whichever copy it was.

    What lies outside the volume is left out, and so is parity.
    """
    family = np.array(sorted(lineage(bmap, volume)), np.int64)
    parts: list[tuple[Int, Int, Int, Int]] = []
    queue = []
    for number, disk in enumerate(bmap.disks, 1):
        mine = np.flatnonzero(reads.disk == number)
        queue.append((disk, mine, reads.start[mine], reads.start[mine], reads.end[mine]))
    while queue:
        here, query, on_disk, start, end = queue.pop(0)
        if here == volume:
            parts.append((query, on_disk, start, end))
            continue
        rows = bmap.rows_into(here)
        if len(rows) == 0 or len(query) == 0:
            continue
        pieces = rows.up(start, end)
        child = rows.volume[pieces.row]
        wanted = np.isin(child, family) & (rows.role[pieces.row] != PARITY)
        for above in np.unique(child[wanted]).tolist():
            one = np.flatnonzero(wanted & (child == above))
            at = pieces.query[one]
            moved = on_disk[at] + pieces.source[one] - start[at]
            queue.append(
                (above, query[at], moved, pieces.target[one], pieces.target[one] + pieces.target_length[one])
            )
    query, on_disk, start, end = joined(parts, 4)
    order = np.lexsort((on_disk, query))
    return start[order], end[order]
