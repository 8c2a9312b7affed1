"""A disk as cells of equal size along a curve, each shown
as one owner: what the page draws block by block."""

from typing import Any, NamedTuple

import numpy as np

from virt_bmap.accesses.resolve import Resolver, Touched
from virt_bmap.core.arrays import Int, first_covers
from virt_bmap.model import tables

POWERS = range(10, 3, -1)
"""The curve fills a square of 2**power cells a side.

A million cells are finer than any screen; smaller disks need fewer.
"""
SECTOR = 512
FULL = 0.75
"""The share of the square that a disk should fill at least: the finest curve for which it does is taken."""
MOST_RUNS = 400_000
"""Runs of cells with one owner that a page carries; a disk with more is drawn coarser."""
NAMED = 20_000
"""Owners of a disk that are named, those with the most
cells; the others are shown by their kind and volume."""


class Cells(NamedTuple):
    """Cell i holds bytes [i * size, (i + 1) * size) and belongs to object `owner[i]` of the resolver, the
    longest piece that touches it."""

    size: int
    power: int
    owner: Int

    def runs(self) -> tuple[Int, Int]:
        """(first cell, owner) of each run of cells with one owner."""
        first = np.flatnonzero(np.append(True, self.owner[1:] != self.owner[:-1]))
        return first, self.owner[first]

    def of(self, starts: Int, ends: Int) -> tuple[Int, Int]:
        """Ranges of bytes as ranges of cells."""
        return starts // self.size, -(-ends // self.size)


def pieces_of(resolver: Resolver, disk: int) -> Touched:
    """Every piece of a disk and the object it belongs to, by place.

    What lies inside other objects' blocks is left out.
    """
    size = resolver.bmap.size_of(resolver.bmap.disk(disk))
    pieces = resolver.touched(disk, np.zeros(1, np.int64), np.array([size]))
    return pieces.take(~pieces.inline)


def cells_of(pieces: Touched, size: int) -> Cells:
    """The disk as cells, as fine as the page can take.

    Small pieces in one cell with a larger one are not seen; the sums beside the picture have them.
    """
    full = [power for power in POWERS if size >= FULL * 4**power * cell_size(size, power)]
    for power in full:
        cells = _cells(pieces, size, power)
        if len(cells.runs()[0]) <= MOST_RUNS:
            return cells
    return _cells(pieces, size, full[-1] if full else POWERS[-1])


def cell_size(size: int, power: int) -> int:
    """Bytes of a cell, whole sectors."""
    square: int = 4**power * SECTOR
    return -(-size // square) * SECTOR


def _cells(pieces: Touched, size: int, power: int) -> Cells:
    cell = cell_size(size, power)
    count = -(-size // cell)
    order = np.argsort(pieces.start - pieces.end, kind="stable")
    first = first_covers(pieces.start[order] // cell, -(-pieces.end[order] // cell), count)
    return Cells(cell, power, pieces.object[order[first]])


def drawn(resolver: Resolver, cells: Cells) -> dict[str, Any]:
    """The cells for the page: runs by length, the owner of each, and what the owners are."""
    first, owner = cells.runs()
    length = np.diff(np.append(first, len(cells.owner)))
    objects, at = np.unique(owner, return_inverse=True)
    weight = np.bincount(at, weights=length, minlength=len(objects))
    named = objects[np.sort(np.argsort(-weight, kind="stable")[:NAMED])]
    shown, kind, device = _owners(resolver, objects, named)
    return {"cell": cells.size, "power": cells.power, "lengths": length.tolist(),
        "owners": shown[at].tolist(), "objects": {
        "kind": kind, "device": device[0], "name": device[1]}}  # fmt: skip


def _owners(
    resolver: Resolver, objects: Int, named: Int
) -> tuple[Int, list[int], tuple[list[str], list[str]]]:
    """The place of each object in the page's list, and the list: kind, and device and name.

    Objects without a name share one entry for each kind and device.
    """
    labels = resolver.labels(named)
    kinds, volumes = resolver.kind_of(objects), resolver.volume_of(objects)
    is_named = np.isin(objects, named)
    key = (volumes + 1) * 64 + kinds + 1
    others, other_at = np.unique(key[~is_named], return_inverse=True)
    place = np.empty(len(objects), np.int64)
    place[is_named] = np.arange(len(named))
    place[~is_named] = len(named) + other_at
    names = resolver.bmap.volumes.column("name").to_pylist()
    kind = [*kinds[is_named].tolist(), *(others % 64 - 1).tolist()]
    device = [labels[number][1] for number in named.tolist()] + [
        names[volume - 1] for volume in (others // 64).tolist()
    ]
    name = [labels[number][2] for number in named.tolist()] + ["(one of many small ones)"] * len(others)
    return place, [code if code >= 0 else tables.GAP for code in kind], (device, name)
