"""What changed, as ranges of a disk: two images compared, the layers of an overlay, a dirty bitmap, a list of
changed blocks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, intersect, ints, subtract, union
from virt_bmap.core.reader import Reader
from virt_bmap.diff.compare import SECTOR, differing, padded
from virt_bmap.open.status import DEPTH, DIRTY, STATE_DIRTY, StatusReader

Ranges = tuple[Int, Int]
CLUSTER = 64 << 10
"""Bytes in which changes are counted where nothing says
otherwise: the default of qcow2 and of QEMU's dirty bitmaps."""


class Delta(NamedTuple):
    """The ranges [starts[i], ends[i]) of a disk that changed, sorted and merged, in bytes.

    They were found in units of `grain` bytes. `same` are those of their bytes that are known to be equal on
    both sides (None: nobody looked); `how` says for a person where all this comes from.
    """

    starts: Int
    ends: Int
    grain: int
    how: str
    same: Ranges | None = None

    @property
    def size(self) -> int:
        """All bytes of the ranges."""
        return int((self.ends - self.starts).sum())

    @property
    def only_owners(self) -> bool:
        """Are the ranges the whole disk, of which bytes count as changed where their owner did?"""
        return self.grain == 1


def of_owners(size: int) -> Delta:
    """Two maps of a disk of `size` bytes, compared without the disk."""
    return Delta(ints(0), ints(size), 1, "bytes that have another owner, by two maps")


def of_images(old: Reader, new: Reader, tell: Callable[[int, int], None] = lambda _done, _all: None) -> Delta:
    """Two images, read and compared; what both call zero is left out unread."""
    old = padded(old, new.size)
    here, there = old.stored(), new.stored()
    starts, ends = union(
        np.concatenate([here[0], there[0]]) // SECTOR * SECTOR, np.concatenate([here[1], there[1]])
    )
    starts, ends = differing(old, new, starts, np.minimum(ends, new.size), SECTOR, tell)
    return Delta(starts, ends, SECTOR, "both images read and compared", (EMPTY, EMPTY))


def of_layers(reader: StatusReader, layers: int = 1, grain: int = CLUSTER) -> Delta:
    """What the uppermost `layers` images of a backing chain hold themselves; no data is read."""
    starts, ends, depth = reader.status(DEPTH)
    keep = (depth >= 1) & (depth <= layers)
    return Delta(*union(starts[keep], ends[keep]), grain, "clusters that the overlay allocates")


def of_bitmap(reader: StatusReader, name: str) -> Delta:
    """What a dirty bitmap calls changed."""
    starts, ends, flags = reader.status(DIRTY + name)
    keep = (flags & STATE_DIRTY) != 0
    return of_ranges(starts[keep], ends[keep], f"dirty bitmap {name}")


def of_ranges(starts: Int, ends: Int, how: str) -> Delta:
    """What a list calls changed.

    Its unit is the largest that all its ranges are whole numbers of, as far as that is a likely one.
    """
    starts, ends = union(starts, ends)
    unit = (
        int(np.gcd.reduce(np.concatenate([starts, (ends - starts)[: max(1, len(ends) - 1)]])))
        if len(starts)
        else CLUSTER
    )
    # the last range may be cut by the disk's end
    return Delta(starts, ends, min(max(unit, SECTOR), CLUSTER), how)


def verified(
    delta: Delta, old: Reader, new: Reader, tell: Callable[[int, int], None] = lambda _done, _all: None
) -> Delta:
    """The delta without the clusters that are the same on both sides; in those that are left it is known
    which bytes are equal."""
    old = padded(old, new.size)
    bad = differing(old, new, delta.starts, delta.ends, SECTOR, tell)
    # a cluster with a difference counts whole, as far as the delta reaches
    clusters = union(bad[0] // delta.grain * delta.grain, -(-bad[1] // delta.grain) * delta.grain)
    starts, ends = intersect(*clusters, delta.starts, delta.ends)
    return Delta(starts, ends, delta.grain, f"{delta.how}, read and compared", subtract(starts, ends, *bad))
