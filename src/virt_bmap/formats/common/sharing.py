"""Formats without an allocator, where packed or identical content lies once for several owners: which bytes
are shared, and what nobody owns."""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bool, Int, covered_twice, expand


class SharedCut(NamedTuple):
    """Ranges cut where sharing begins or ends: piece i is [start, end) of range `row[i]`; `shared` where
    another range covers it too."""

    row: Int
    start: Int
    end: Int
    shared: Bool


def cut_shared(starts: Int, ends: Int) -> SharedCut:
    """The ranges cut so that each piece is shared as a whole or not at all.

    At most two pieces more than ranges for each run of shared bytes: on the outer side of a cut only one
    range goes on.

        ranges   0=========6                 cuts where sharing begins and ends: 4 and 6
                        4=========10
        pieces   0=====4===6   4===6====10

    >>> found = cut_shared(np.array([0, 4]), np.array([6, 10]))
    >>> list(zip(found.row.tolist(), found.start.tolist(), found.end.tolist(), found.shared.tolist()))
    [(0, 0, 4, False), (0, 4, 6, True), (1, 4, 6, True), (1, 6, 10, False)]
    """
    low, high = covered_twice(starts, ends)
    cuts = np.unique(np.concatenate([low, high]))
    first = np.searchsorted(cuts, starts, "right")
    count = np.maximum(0, np.searchsorted(cuts, ends, "left") - first)
    row, nth = expand(count + 1)
    cuts = np.append(cuts, 0)
    start = np.where(nth == 0, starts[row], cuts[np.minimum(first[row] + nth - 1, len(cuts) - 1)])
    end = np.where(nth == count[row], ends[row], cuts[np.minimum(first[row] + nth, len(cuts) - 1)])
    at = np.searchsorted(low, start, "right") - 1
    shared = (at >= 0) & (start < np.append(high, 0)[at]) if len(low) else np.zeros(len(row), bool)
    return SharedCut(row, start, end, shared)
