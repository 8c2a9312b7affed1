"""Traces to a profile: for every byte of every object, in which runs it was read, and when first.

The ranges of all runs are cut at each other's ends, so that within a piece all bytes were touched by the same
accesses; all else is arithmetic on pieces.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.profile.saved import RANGES, Profile, RunFacts
from virt_bmap.accesses.traces import Run, Traces
from virt_bmap.core.arrays import Int, first_covers, joined
from virt_bmap.model import tables

READ = tables.OPS.index("read")
NEVER = np.iinfo(np.int64).max


class _Points(NamedTuple):
    """Where ranges begin and end: sorted by disk and object, then by place.

    Piece i lies between points i and i + 1.
    """

    disk: Int
    object: Int
    offset: Int


def build(traces: Traces) -> Profile:
    """The profile of these runs.

    What a run wrote before it read it was not needed from the disk, and is left out for that run.
    """
    points, bounds = _points(traces.runs)
    n = len(points.offset)
    runs, first, read, where = (np.zeros(n, np.int64) for _ in range(4))
    first[:] = NEVER
    for run, (low, high) in zip(traces.runs, bounds, strict=True):
        needed, time_ns, times, inside = _touched(run, low, high, points)
        runs += needed
        first = np.where(needed, np.minimum(first, time_ns), first)
        read += times * needed
        where = np.where(needed, inside, where)
    length = np.diff(points.offset, append=0)
    return Profile(
        _table(traces, points, length, runs, first, read * length, where),
        [_facts(run) for run in traces.runs],
        traces.sizes,
    )


def _points(runs: list[Run]) -> tuple[_Points, list[tuple[Int, Int]]]:
    """All points, and for each run the points where its ranges begin and end."""
    columns = [(run.disk[run.access], run.object, run.start, run.end) for run in runs]
    disk, object, start, end = joined(columns, 4)
    place = np.concatenate([start, end])
    keys = (place, np.tile(object, 2), np.tile(disk, 2))
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.cumsum(new) - 1
    low, high = rank[: len(start)], rank[len(start) :]
    ends = np.cumsum([len(run.access) for run in runs])
    split = [
        (low[a:b], high[a:b]) for a, b in zip(np.append(0, ends[:-1]).tolist(), ends.tolist(), strict=True)
    ]
    chosen = order[new]
    return _Points(keys[2][chosen], keys[1][chosen], place[chosen]), split


def _touched(run: Run, low: Int, high: Int, points: _Points) -> tuple[np.ndarray, Int, Int, Int]:
    """Of each piece in one run: was it read before it was written, when first (from the run's start), how
    often read, and where in the file it lies."""
    n = len(points.offset)
    order = np.argsort(run.accesses.time_ns[run.access], kind="stable")
    row = first_covers(low[order], high[order], n)
    seen = row < len(order)
    piece = order[np.minimum(row, len(order) - 1)] if len(order) else row
    access = run.access[piece] if len(order) else row
    needed = seen & (run.accesses.op[access] == READ) if len(order) else seen
    is_read = run.accesses.op[run.access] == READ
    change = np.bincount(low[is_read], minlength=n + 1) - np.bincount(high[is_read], minlength=n + 1)
    if not len(order):
        return needed, row, np.cumsum(change)[:n], row
    time_ns = run.accesses.time_ns[access] - run.accesses.time_ns.min()
    inside = np.where(
        run.file_offset[piece] >= 0, run.file_offset[piece] + points.offset - run.start[piece], -1
    )
    return needed, time_ns, np.cumsum(change)[:n], inside


def _table(
    traces: Traces, points: _Points, length: Int, runs: Int, first: Int, read: Int, where: Int
) -> pa.Table:
    """The needed pieces as a table in order of first use, neighbours that were used alike made one."""
    keep = np.flatnonzero(runs > 0)
    disk, object, offset, length, runs, first, read, where = (
        column[keep]
        for column in (points.disk, points.object, points.offset, length, runs, first, read, where)
    )
    alike = np.zeros(len(keep), bool)
    if len(keep):
        goes_on = where[1:] == where[:-1] + np.where(where[:-1] >= 0, length[:-1], 0)
        touching = offset[1:] == offset[:-1] + length[:-1]
        alike[1:] = (
            touching & goes_on & np.all([c[1:] == c[:-1] for c in (disk, object, runs, first)], axis=0)
        )
    begin = np.flatnonzero(~alike)
    if len(begin):
        length, read = np.add.reduceat(length, begin), np.add.reduceat(read, begin)
    disk, object, offset, runs, first, where = (
        column[begin] for column in (disk, object, offset, runs, first, where)
    )
    order = np.lexsort((offset, disk, first))
    names = traces.objects.take(pa.array(object[order]))
    columns = {
        "disk": disk,
        "offset": offset,
        "length": length,
        "file_offset": where,
        "runs": runs,
        "first_ns": first,
        "read": read,
    }
    made = {name: tables.arrow(column[order], column[order] < 0) for name, column in columns.items()}
    arrays = [made[name] if name in made else names.column(name) for name in RANGES.names]
    return pa.table(
        [array.cast(kind) for array, kind in zip(arrays, RANGES.types, strict=True)], schema=RANGES
    )


def _facts(run: Run) -> RunFacts:
    reading = run.accesses.op == READ
    seconds = float(run.accesses.time_ns.max() - run.accesses.time_ns.min()) / 1e9
    return RunFacts(run.name, seconds, len(run.accesses), int(run.accesses.length[reading].sum()))
