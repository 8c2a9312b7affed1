"""A file allocation table as runs of clusters, and every chain in it followed at once; FAT and exFAT share
it.

The table is read in batches and kept only as runs: clusters each linked to the one after it. The runs of one
chain are then put side by side by list ranking (pointer doubling), so that following is slicing: n files with
f fragments in all cost n + f steps of array work, however the fragments are spread.

On a damaged table links meet or go round. Runs are split where links meet; from there on, chains are followed
piece by piece.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, Intervals, expand

FREE, END, BAD, BROKEN, EDGE = 0, -1, -2, -3, -4
"""What an entry says where it is not a link: free, last of
its chain, bad cluster, a number that no cluster has.

EDGE: no entry at all.
"""

WHOLE, NOTHING, CUT, LOOP, TANGLED = range(5)
"""How a chain ended: well; it starts at no allocated cluster; at a link to none; in itself; not followed to
the end."""

MAX_MEETINGS = 512
"""Places where one chain meets others that are passed.

Sound FATs have none; exFAT leaves links behind in clusters it frees.
"""
ROWS_A_RUN = 4
"""Rows that all chains together may have for each run of the table: chains that share their runs by the
thousand must end."""


@dataclass(frozen=True)
class Followed:
    """The runs of chains, by chain (`query`) and in order: clusters [cluster, cluster + count), `before` of
    the chain come before.

    For each query `length` is its clusters in all, and `fate` how it ended.
    """

    query: Int
    cluster: Int
    count: Int
    before: Int
    length: Int
    fate: Int


@dataclass
class ClusterChains:
    """Runs of linked clusters [start, end), sorted, and how they follow each other.

    Runs that follow each other and are met by no other chain lie side by side in `order`; `place` is its
    inverse. For each place, `stop` is where its chain ends there, and `onward` the run that the chain's last
    one leads to (negative: what its entry says).
    """

    start: Int
    end: Int
    order: Int
    place: Int
    stop: Int
    onward: Int
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        self.budget = ROWS_A_RUN * len(self.start) + 65536

    def follow(self, first: Int) -> Followed:
        """The chains that begin at the clusters `first`."""
        fate = np.full(len(first), NOTHING, np.int64)
        run = np.searchsorted(self.start, first, "right") - 1
        query = np.flatnonzero((run >= 0) & (first < np.append(self.end, 0)[run]))
        run = run[query]
        skip = first[query] - self.start[run]
        parts: list[tuple[Int, Int, Int]] = []
        seen = EMPTY
        for _ in range(MAX_MEETINGS):
            query, run, skip = self._afford(query, run, skip, fate)
            if len(query) == 0:
                break
            at = self.place[run]
            row, step = expand(self.stop[at] - at)
            found = self.order[at[row] + step]
            begin = self.start[found] + np.where(step == 0, skip[row], 0)
            parts.append((query[row], begin, self.end[found] - begin))
            onward = self.onward[at]
            fate[query] = np.where(onward == END, WHOLE, np.where(onward < 0, CUT, TANGLED))
            seen = np.append(seen, query * len(self.start) + self.stop[at] - 1)
            more = np.flatnonzero(onward >= 0)
            query, run = query[more], onward[more]
            again = (
                np.isin(query * len(self.start) + self.stop[self.place[run]] - 1, seen)
                if len(more)
                else np.zeros(0, bool)
            )
            fate[query[again]] = LOOP
            seen = seen[np.isin(seen // len(self.start), query)]
            query, run, skip = query[~again], run[~again], np.zeros(int((~again).sum()), np.int64)
        return _followed(parts, fate)

    def _afford(self, query: Int, run: Int, skip: Int, fate: Int) -> tuple[Int, Int, Int]:
        """Those chains whose rows the budget still allows."""
        at = self.place[run]
        cost = np.cumsum(self.stop[at] - at)
        allowed = int(np.searchsorted(cost, self.budget, "right"))
        fate[query[allowed:]] = TANGLED
        self.budget -= int(cost[allowed - 1]) if allowed else 0
        return query[:allowed], run[:allowed], skip[:allowed]


def _followed(parts: list[tuple[Int, Int, Int]], fate: Int) -> Followed:
    query, cluster, count = (np.concatenate([EMPTY, *(part[i] for part in parts)]) for i in range(3))
    if len(parts) > 1:
        order = np.argsort(query, kind="stable")
        query, cluster, count = query[order], cluster[order], count[order]
    apart = np.append(True, (query[1:] != query[:-1]) | (cluster[1:] != (cluster + count)[:-1]))[: len(query)]
    if not apart.all():  # where the chain was only met by another
        first = np.flatnonzero(apart)
        query, cluster, count = query[first], cluster[first], np.add.reduceat(count, first)
    length = np.bincount(query, count, len(fate)).astype(np.int64)
    before = np.cumsum(count) - count - (np.cumsum(length) - length)[query]
    return Followed(query, cluster, count, before, length, fate)


class ClusterRuns(NamedTuple):
    """Runs of clusters [start, end), sorted, each linked to the next, with the entry of the last one; free
    and bad clusters."""

    start: Int
    end: Int
    link: Int
    free: tuple[Int, Int]
    bad: tuple[Int, Int]

    def within(self, starts: Int, ends: Int) -> "ClusterRuns":
        """What of the runs lies in the clusters [starts[i], ends[i]), sorted ranges that do not overlap."""
        run, part = Intervals(starts, ends).overlaps(self.start, self.end)
        start, end = np.maximum(self.start[run], starts[part]), np.minimum(self.end[run], ends[part])
        return ClusterRuns(
            start, end, np.where(end == self.end[run], self.link[run], end), self.free, self.bad
        )


def chains_of(runs: ClusterRuns) -> ClusterChains:
    """The chains that the runs make."""
    start, end, link = _split(runs.start, runs.end, runs.link)
    run = np.searchsorted(start, link)
    known = (link >= 2) & (np.append(start, -1)[run] == link)
    successor = np.where(known, run, np.where(link == END, END, BROKEN))
    order, chain = _rank(successor)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    last = np.append(np.flatnonzero(chain[1:] != chain[:-1]), len(chain) - 1) if len(chain) else EMPTY
    of = np.searchsorted(last, np.arange(len(order)))
    return ClusterChains(start, end, order, place, last[of] + 1, successor[order[last]][of])


def read_runs(batches: Iterable[Int | int]) -> ClusterRuns:
    """The runs of a table whose entries come in batches, from cluster 2: links, FREE, END, BAD or BROKEN.

    A number is so many entries that are FREE.
    """
    edges: list[list[Int]] = [[EMPTY] for _ in range(7)]
    cluster, held = 1, np.array([EDGE], np.int64)
    for found_next in _with_edge(batches):
        free = found_next if isinstance(found_next, int) else 0
        batch = np.array([FREE], np.int64) if isinstance(found_next, int) else found_next
        values = np.concatenate([held, batch])
        here, after = values[:-1], values[1:]
        linked = here == np.arange(cluster + 1, cluster + 1 + len(batch))
        # in use, and below: not reached from the one before
        starts = (after != FREE) & (after != BAD) & (after != EDGE)
        ends = (here != FREE) & (here != BAD) & (here != EDGE) & ~(linked & starts)
        starts &= ~linked
        last = np.flatnonzero(ends)
        found = [np.flatnonzero(starts) + cluster + 1, last + cluster + 1, here[last]]
        for value in (FREE, BAD):
            was, now = here == value, after == value
            found += [np.flatnonzero(now & ~was) + cluster + 1, np.flatnonzero(was & ~now) + cluster + 1]
        for kept, new in zip(edges, found, strict=True):
            kept.append(new)
        cluster, held = cluster + (free or len(batch)), values[-1:]
    start, end, link, *rest = (np.concatenate(parts) for parts in edges)
    return ClusterRuns(start, end, link, (rest[0], rest[1]), (rest[2], rest[3]))


def _with_edge(batches: Iterable[Int | int]) -> Iterator[Int | int]:
    yield from batches
    yield np.array([EDGE], np.int64)


def _split(start: Int, end: Int, link: Int) -> tuple[Int, Int, Int]:
    """The runs cut wherever a link leads into the middle of one, so that links lead to starts only."""
    run = np.searchsorted(start, link, "right") - 1
    inside = (run >= 0) & (link > np.append(start, 0)[run]) & (link < np.append(end, 0)[run])
    if not inside.any():
        return start, end, link
    starts = np.union1d(start, link[inside])
    run = np.searchsorted(start, starts, "right") - 1
    ends = np.minimum(end[run], np.append(starts[1:], end[-1]))
    return starts, ends, np.where(ends == end[run], link[run], ends)


def _rank(successor: Int) -> tuple[Int, Int]:
    """(order, chain): the runs sorted by chain and by their
    place in it, and for each the first run of its chain.

    A chain begins where no run leads, or more than one. Runs 3 -> 0 -> 2 and 1:

        run    leads to    before it    (head, rank)
         0        2            3           (3, 1)
         1      none         none          (1, 0)
         2      none           0           (3, 2)
         3        0          none          (3, 0)

    >>> order, chain = _rank(np.array([2, END, END, 0]))
    >>> order.tolist(), chain.tolist()
    ([1, 3, 0, 2], [1, 3, 3, 3])
    """
    n = len(successor)
    links = np.flatnonzero(successor >= 0)
    if len(links) == 0:
        return np.arange(n), np.arange(n)
    before = np.full(n, -1, np.int64)
    before[successor[links]] = links
    before[np.bincount(successor[links], minlength=n) > 1] = -1
    cycles = _climb(before)[2]
    if len(cycles):
        before[_lowest(before, cycles)] = -1
    head, rank, _ = _climb(before)
    order = np.lexsort((rank, head))
    return order, head[order]


def _climb(before: Int) -> tuple[Int, Int, Int]:
    """(head, rank) of each run by the links `before` (-1:
    none), and the runs that go round and so have no head.

    Pointer doubling: in each round a run adds the steps of the run that
    it points to, and then points where that one did. Of the chain 0 1 2 3:

        round    run 1     run 2     run 3      (points to, steps)
          0      (0, 1)    (1, 1)    (2, 1)
          1      (0, 1)    (0, 2)    (1, 2)
          2      (0, 1)    (0, 2)    (0, 3)     all point to the head
    """
    n = len(before)
    is_head = before < 0
    head = np.where(is_head, np.arange(n), before)
    rank = np.where(is_head, 0, 1)
    active = np.flatnonzero(~is_head)
    active = active[~is_head[head[active]]]
    for _ in range(n.bit_length() + 1):
        if len(active) == 0:
            break
        up = head[active]
        rank[active] += rank[up]
        head[active] = head[up]
        active = active[~is_head[head[active]]]
    return head, rank, active


def _lowest(before: Int, cycles: Int) -> Int:
    """The lowest run of each cycle: where it is cut."""
    lowest, jump = np.arange(len(before)), before.copy()
    for _ in range(len(cycles).bit_length() + 1):
        lowest[cycles] = np.minimum(lowest[cycles], lowest[jump[cycles]])
        jump[cycles] = jump[jump[cycles]]
    return np.unique(lowest[cycles])
