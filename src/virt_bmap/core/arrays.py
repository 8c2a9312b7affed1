"""Array operations that know no format and do no I/O.

Ranges are half open and come as two int64 arrays, `starts` and `ends`, of one length. Unless a docstring
says otherwise they may be unsorted and may overlap; empty ranges are allowed and own nothing.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.errors import Corrupt

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

EMPTY: Int = np.zeros(0, np.int64)
LONG = 512
"""Bytes of a piece from which on it is quicker to copy each by itself than to number all bytes."""

PAIRS = 1 << 24
"""Answers to one question, beyond some for each range that takes part: disks and maps can be made that have
one for each square of their bytes."""
PIECES = 1 << 25
"""Stripes that one question may unroll: 2 TiB in stripes of 64 KiB."""
BATCH = 1 << 20
"""Pairs that are looked at together."""


def bounded(count: int, most: int, what: str) -> None:
    """Corrupt where an answer would have more than `most` of something."""
    if count > most:
        raise Corrupt(
            f"the answer has more than {most:,} {what}: ask for less at a time, unless metadata overlaps",
            None,
            "too-many",
        )


def ints(values: object) -> Int:
    """`values` (an array, a sequence or a number) as a one-dimensional int64 array.

    Raises Corrupt where a number does not fit. Python's own have no limit: here those of a disk that do not
    fit in ours are met at the latest.
    """
    try:
        return np.atleast_1d(np.asarray(values, np.int64))
    except OverflowError:
        raise Corrupt(
            f"a number of {max(map(abs, np.atleast_1d(np.asarray(values, object)).tolist())):#x} "
            "is more than any disk holds"
        ) from None


def joined(parts: Sequence[tuple[Int, ...]], count: int) -> list[Int]:
    """`count` columns, each that of the parts one after the other.

    Without any part they are empty: how many there are is up to the disk.
    """
    return [np.concatenate([EMPTY, *(part[column] for part in parts)]) for column in range(count)]


def in_order(values: Int) -> Int:
    """The values sorted. What comes from disks consists of runs that are sorted already, and only a stable
    sort makes use of them: ten times faster there."""
    return np.sort(values, kind="stable")


def expand(counts: Int) -> tuple[Int, Int]:
    """Unroll lists: for each row i, `counts[i]` results.

    Returns (row, step), both of length sum(counts): the
    row a result comes from, and its number within the row.

    >>> row, step = expand(ints([2, 0, 3]))
    >>> row.tolist(), step.tolist()
    ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])
    """
    counts = np.asarray(counts, np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    row = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    step = np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
    return row, step


def gather(data: Bytes, starts: Int, lengths: Int) -> Bytes:
    """The bytes data[starts[i]:starts[i]+lengths[i]], one after the other, as one flat array."""
    if len(lengths) and int(np.sum(lengths)) // len(lengths) >= LONG:
        ends = np.asarray(starts) + lengths
        return np.concatenate(
            [data[low:high] for low, high in zip(np.asarray(starts).tolist(), ends.tolist(), strict=True)]
        )
    row, step = expand(lengths)
    result: Bytes = data[np.asarray(starts, np.int64)[row] + step]
    return result


def scatter(result: Bytes, starts: Int, lengths: Int, data: Bytes) -> None:
    """The opposite of `gather`: write the pieces of `data`, one after the other, to
    result[starts[i]:+lengths[i]]."""
    base = np.cumsum(lengths) - lengths
    if len(lengths) and int(lengths.sum()) // len(lengths) >= 512:
        for start, length, at in zip(starts.tolist(), lengths.tolist(), base.tolist(), strict=True):
            result[start : start + length] = data[at : at + length]
        return
    row = np.repeat(np.arange(len(lengths)), lengths)
    result[(starts - base)[row] + np.arange(len(data))] = data


def runs(flags: Bool) -> tuple[Int, Int]:
    """(starts, ends) of the runs of True in a one-dimensional boolean array, in order.

        flags    . # # . . # # # .
        edges      ^   ^   ^     ^
                   1   3   5     8     every second one starts a run

    >>> np.transpose(runs(np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], bool))).tolist()
    [[1, 3], [5, 8]]
    """
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).astype(np.int64)
    return edges[0::2], edges[1::2]


def bit_runs(bitmap: Bytes, bits: int, value: bool) -> tuple[Int, Int]:
    """(starts, ends), in bits, of the runs of `value` among the first `bits` bits, least significant bit
    first. Only bytes in which a run begins or ends are taken apart."""
    data = bitmap[: -(-bits // 8)]
    before = np.empty_like(data)
    before[1:] = data[:-1] >> 7
    before[:1] = not value
    changes = (data ^ ((data << 1) | before)).astype(np.uint8)
    where = np.flatnonzero(changes)
    bit = np.flatnonzero(np.unpackbits(changes[where], bitorder="little"))
    edges = where[bit >> 3] * 8 + (bit & 7)
    edges = edges[: np.searchsorted(edges, bits)]
    if len(edges) % 2:
        edges = np.append(edges, bits)
    return edges[0::2], edges[1::2]


def union(starts: Int, ends: Int, gap: int = 0) -> tuple[Int, Int]:
    """The ranges sorted and merged where they overlap, touch, or lie at most `gap` apart.

    Starts and ends are sorted each by itself. There is a gap in front
    of the n-th start where it lies beyond the (n - 1)-th end:

        ranges    0======4        7==9
                     2==3     6=====8
        starts    0  2        6  7
        ends         3  4           8  9     6 lies beyond 4: 0-4, then 6-9

    >>> np.transpose(union(ints([7, 0, 6, 2]), ints([9, 4, 8, 3]))).tolist()
    [[0, 4], [6, 9]]
    """
    keep = ends > starts
    if not keep.all():
        starts, ends = starts[keep], ends[keep]
    if len(starts) == 0:
        return EMPTY, EMPTY
    starts, ends = in_order(starts), in_order(ends)
    new = np.flatnonzero(starts[1:] > ends[:-1] + gap) + 1
    return starts[np.append(0, new)], ends[np.append(new, len(ends)) - 1]


def union_by(group: Int, starts: Int, ends: Int) -> tuple[Int, Int, Int]:
    """(group, starts, ends): the ranges of each group sorted and merged where
    they overlap or touch, by group; none of the ranges may be empty.

    A running maximum of ends says how far the ranges so far reach. For one
    maximum to serve all groups, ends are replaced by their ranks, and each
    group's ranks are lifted above those of the group before it:

        group   range     rank of end   lifted by 4   reach so far   new?
          0     0-9            3             7             9         yes
          0     2-3            0             4             9         no: 2 <= 9
          1     1-4            1             9             4         yes, another group
          1     6-8            2            10             8         yes: 6 > 4

    >>> np.transpose(union_by(ints([0, 1, 0, 1]), ints([0, 1, 2, 6]), ints([9, 4, 3, 8]))).tolist()
    [[0, 0, 9], [1, 1, 4], [1, 6, 8]]
    """
    if len(starts) == 0:
        return EMPTY, EMPTY, EMPTY
    order = np.lexsort((starts, group))
    group, starts, ends = group[order], starts[order], ends[order]
    new = np.append(True, group[1:] != group[:-1])
    by_end = np.argsort(ends, kind="stable")
    rank = np.empty(len(ends), np.int64)
    rank[by_end] = np.arange(len(ends))
    reach = ends[by_end[np.maximum.accumulate(np.cumsum(new) * len(ends) + rank) % len(ends)]]
    new[1:] |= starts[1:] > reach[:-1]
    first = np.flatnonzero(new)
    return group[first], starts[first], reach[np.append(first[1:], len(starts)) - 1]


def complement(starts: Int, ends: Int, low: int, high: int) -> tuple[Int, Int]:
    """What of [low, high) none of the ranges covers, sorted."""
    starts, ends = union(np.clip(starts, low, high), np.clip(ends, low, high))
    left, right = np.append(low, ends), np.append(starts, high)
    keep = right > left
    return left[keep], right[keep]


def complement_by(sizes: Int, group: Int, starts: Int, ends: Int) -> tuple[Int, Int, Int]:
    """(group, starts, ends): what of [0, sizes[g]) no range of group g covers, by group and start.

    >>> np.transpose(complement_by(ints([10, 5]), ints([0, 0]), ints([6, 2]), ints([8, 4]))).tolist()
    [[0, 0, 2], [0, 4, 6], [0, 8, 10], [1, 0, 5]]
    """
    low, high = np.clip(starts, 0, sizes[group]), np.clip(ends, 0, sizes[group])
    group, low, high = union_by(*(column[high > low] for column in (group, low, high)))
    first = np.append(True, group[1:] != group[:-1])[: len(group)]
    before = np.where(first, 0, np.append(0, high[:-1])[: len(group)])
    reach = np.zeros(len(sizes), np.int64)
    reach[group] = high  # the last of each group is what stays
    group = np.append(group, np.arange(len(sizes), dtype=np.int64))
    left, right = np.append(before, reach), np.append(low, sizes)
    order = np.flatnonzero(right > left)
    order = order[np.lexsort((left[order], group[order]))]
    return group[order], left[order], right[order]


def intersect(a_starts: Int, a_ends: Int, b_starts: Int, b_ends: Int) -> tuple[Int, Int]:
    """The bytes that both sets of ranges cover, sorted and merged."""
    a = union(a_starts, a_ends)
    b = union(b_starts, b_ends)
    left, right = Intervals(*b).overlaps(*a)
    return union(np.maximum(a[0][left], b[0][right]), np.minimum(a[1][left], b[1][right]))


def subtract(a_starts: Int, a_ends: Int, b_starts: Int, b_ends: Int) -> tuple[Int, Int]:
    """The bytes that the ranges a cover and the ranges b do not, sorted and merged."""
    a_starts, a_ends = union(a_starts, a_ends)
    if len(a_starts) == 0:
        return EMPTY, EMPTY
    holes = complement(b_starts, b_ends, int(a_starts[0]), int(a_ends[-1]))
    return intersect(a_starts, a_ends, *holes)


def touching(starts: Int, ends: Int, others_starts: Int, others_ends: Int) -> Bool:
    """Which of the ranges share a byte with any of the others.

    Costs a sort and a search, however many they touch.
    """
    low, high = union(others_starts, others_ends)
    at = np.searchsorted(high, starts, "right")
    found: Bool = (ends > starts) & (at < len(low)) & (np.append(low, 0)[at] < ends)
    return found


def covered_twice(starts: Int, ends: Int) -> tuple[Int, Int]:
    """The bytes that more than one of the ranges covers, sorted and merged.

        ranges   0=====5
                    3=====8
                          8==10       touches: at one point, ends come before starts
        depth    1  2  1  1   0       3-5 has depth 2

    >>> np.transpose(covered_twice(ints([0, 3, 8]), ints([5, 8, 10]))).tolist()
    [[3, 5]]
    """
    keep = ends > starts
    starts, ends = starts[keep], ends[keep]
    points = np.concatenate([starts, ends])
    delta = np.concatenate([np.ones(len(starts), np.int64), np.full(len(ends), -1, np.int64)])
    order = np.lexsort((delta, points))
    depth = np.cumsum(delta[order])
    from_, to = runs(depth > 1)
    points = np.append(points[order], 0)
    return union(points[from_], points[to])


def first_covers(starts: Int, ends: Int, slots: int) -> Int:
    """For each slot of [0, slots) the number of the first range, in the order given, that covers it;
    len(starts) where none does.

    Ranges are in slots and inside. A range of length n is two of the next lower power of two; their minima
    are handed down, halves at a time: no range is ever unrolled.

        slots               0 1 2 3 4 5 6
        range 0: 1-7          0 0 0 0 0 0     = 1-5 and 3-7, of length 4
        range 1: 0-2        1 1               its slot 1 is taken by range 0
        best at length 4      0   0           where one of length 4 begins
        best at length 2    1 0 . 0 . 0       each handed to its two halves
        best at length 1    1 0 0 0 0 0 0

    >>> first_covers(ints([1, 0]), ints([7, 2]), 8).tolist()
    [1, 0, 0, 0, 0, 0, 0, 2]
    """
    none = len(starts)
    best = np.full(slots, none, np.int64)
    row = np.flatnonzero(ends > starts)
    level = np.frexp((ends - starts)[row].astype(np.float64))[1] - 1
    for power in range(int(level.max(initial=0)), -1, -1):
        mine, size = row[level == power], 1 << power
        np.minimum.at(best, starts[mine], mine)
        np.minimum.at(best, ends[mine] - size, mine)
        if power:
            half = size >> 1
            best[half:] = np.minimum(best[half:], best[:-half])
    return best


def weigh(points: Int, starts: Int, ends: Int, weights: Int | int = 1) -> Int:
    """For each piece [points[i], points[i + 1]) the sum of the weights of the
    ranges that cover it; every start and end is one of the sorted `points`.

    >>> weigh(ints([0, 2, 5, 9]), ints([0, 2]), ints([5, 9]), ints([1, 10])).tolist()
    [1, 11, 10]
    """
    change = np.zeros(len(points), np.int64)
    np.add.at(change, np.searchsorted(points, starts), weights)
    np.add.at(change, np.searchsorted(points, ends), -np.asarray(weights))
    depth: Int = np.cumsum(change)[:-1]
    return depth


def total(starts: Int, ends: Int) -> int:
    """How many bytes the ranges cover, each byte counted once."""
    starts, ends = union(starts, ends)
    return int((ends - starts).sum())


class Intervals:
    """An index over ranges: which of them does each query range overlap?

    Sorted starts with the running maximum of ends: a query is two binary searches and a filter. One range
    that spans most of the others makes every query visit them all, so containers and their contents belong in
    separate indexes.

        range   start  end  reach     query 5-7
          0       0     4     4
          1       2     9     9       first: the first range whose reach is beyond 5
          2       3     4     9       looked at, and left out: it ends before 5
          3       6     8     9
          4       7     9     9       last: the first one that starts at 7 or later

    >>> index = Intervals(ints([0, 2, 3, 6, 7]), ints([4, 9, 4, 8, 9]))
    >>> query, found = index.overlaps(ints([5]), ints([7]))
    >>> found.tolist()
    [1, 3]
    """

    def __init__(self, starts: Int, ends: Int) -> None:
        self.starts, self.ends = starts, ends
        self._order = np.argsort(starts, kind="stable")
        self._starts, self._ends = starts[self._order], ends[self._order]
        self._reach = np.maximum.accumulate(self._ends)

    def overlaps(self, starts: Int, ends: Int) -> tuple[Int, Int]:
        """All pairs (query, range) that share a byte, by query and then by the range's start.

        Corrupt where there are so many that someone meant it.
        """
        low, high, reach = self._starts, self._ends, self._reach
        starts, ends = ints(starts), ints(ends)
        last = np.searchsorted(low, ends, "left")
        first = np.minimum(np.searchsorted(reach, starts, "right"), last)
        looked = np.cumsum(last - first)
        allowed = PAIRS + 16 * (len(starts) + len(low))
        bounded(int(looked[-1]) if len(looked) else 0, 8 * allowed, "pairs of ranges")
        cuts = (
            np.searchsorted(looked, np.arange(BATCH, looked[-1], BATCH)) + 1
            if len(looked) and looked[-1] > BATCH
            else EMPTY
        )
        bounds = np.unique(np.concatenate([[0], cuts, [len(starts)]])).tolist()
        queries, ranges, found = [EMPTY], [EMPTY], 0
        for begin, end in pairwise(bounds):
            query, step = expand((last - first)[begin:end])
            query += begin
            place = first[query] + step
            keep = (high[place] > starts[query]) & (high[place] > low[place]) & (ends[query] > starts[query])
            queries.append(query[keep])
            ranges.append(self._order[place[keep]])
            found += len(queries[-1])
            bounded(found, allowed, "pairs of ranges")
        return (
            (queries[1], ranges[1])
            if len(queries) == 2
            else (np.concatenate(queries), np.concatenate(ranges))
        )
