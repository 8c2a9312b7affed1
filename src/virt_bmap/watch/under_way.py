"""Writes that the server was asked for and has not ended yet: until then a map may have them or not.

A map that is read meanwhile is not of one moment. So it waits until all that was begun before its end has
ended (`oldest_ns`), and a write that took its time counts once more when it ends (`feed`).
"""

from dataclasses import replace

import numpy as np

from virt_bmap.accesses.accesses import NONE, Accesses, Ended
from virt_bmap.core.arrays import EMPTY
from virt_bmap.core.columns import stack
from virt_bmap.watch.verdict import MS, SETTLE, WRITING

LONGEST = 60_000 * MS
"""ns after which a write is taken for one whose end is missing from the log."""
_IDS = 40
"""Bits of a request's number: each connection counts its own."""


class UnderWay:
    """The writes of one disk's server."""

    def __init__(self) -> None:
        self._key = EMPTY
        self._open = NONE

    @property
    def oldest_ns(self) -> int:
        """When the first of them was begun; far in the future where there is none."""
        return int(self._open.time_ns.min(initial=np.iinfo(np.int64).max))

    def feed(self, accesses: Accesses, number: np.ndarray, ended: Ended) -> Accesses:
        """These requests, with their numbers, were begun and those ended: the writes that took longer than
        SETTLE, each at the time of its end."""
        writing = WRITING[accesses.op]
        new = accesses.take(writing)
        key = np.append(self._key, new.connection << _IDS | number[writing])
        open = stack(Accesses, [self._open, new]) if len(new) else self._open
        if not len(key):
            return NONE
        ends = ended.connection << _IDS | ended.number
        order = np.argsort(ends, kind="stable")
        ends, times = np.append(ends[order], -1), np.append(ended.time_ns[order], open.time_ns.max())
        at = np.searchsorted(ends[:-1], key)
        done = ends[at] == key
        took = times[at] - open.time_ns
        left = ~done & (open.time_ns > times[-1] - LONGEST)
        self._key, self._open = key[left], open.take(left)
        return replace(open, time_ns=times[at]).take(done & (took > SETTLE))
