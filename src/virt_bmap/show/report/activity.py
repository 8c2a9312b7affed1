"""What traces say, added up for drawing: over time, by place
on the disk, by object, and the working set as it grows."""

from typing import Any

import numpy as np

from virt_bmap.accesses.profile.build import build
from virt_bmap.accesses.traces import Run, Traces
from virt_bmap.core.arrays import Int, first_covers, union
from virt_bmap.model import tables
from virt_bmap.show.report.disk import Cells

TIMES = 240
"""Steps in which a run's time is drawn."""
PLACES = 128
"""Steps in which a disk is drawn beside time."""
LANES = 24
"""Objects that have a line of their own over time: those read most."""
POINTS = 400
"""Points of the working set's curve."""
OBJECTS = 5000
"""Objects in the table, in order of first use."""
READ = tables.OPS.index("read")
WRITES = tuple(tables.OPS.index(op) for op in ("write", "trim", "zero"))


def activity(traces: Traces, cells: dict[int, Cells]) -> list[dict[str, Any]]:
    """Each run for the page; `cells` are those of each disk."""
    labels = traces.labels()
    return [_run(Traces([run], traces.objects, traces.sizes), run, labels, cells) for run in traces.runs]


def _run(one: Traces, run: Run, labels: list[str], cells: dict[int, Cells]) -> dict[str, Any]:
    time = run.accesses.time_ns - run.accesses.time_ns.min()
    duration = max(1, int(time.max()))
    step = (
        np.minimum(time * TIMES // duration, TIMES - 1)
        if duration < 1 << 54
        else np.minimum(time // (duration // TIMES), TIMES - 1)
    )
    reads, writes = run.accesses.op == READ, np.isin(run.accesses.op, WRITES)
    return {
        "name": run.name.rpartition("/")[2], "seconds": duration / 1e9, "requests": len(run.accesses),
        "read": int(run.accesses.length[reads].sum()), "written": int(run.accesses.length[writes].sum()),
        "over_time": {"read": _binned(step[reads], run.accesses.length[reads]),
            "written": _binned(step[writes], run.accesses.length[writes]),
                      "requests": _binned(step, np.ones(len(step), np.int64))},
        "places": {str(disk): _places(run, disk, step, size) for disk, size in enumerate(one.sizes, 1)},
        "cells": {str(disk): _touched(run, time, found, disk) for disk, found in cells.items()},
        "lanes": _lanes(run, step, labels),
        "growth": _growth(one, time, run), "objects": _objects(one, run, time, labels),
    }  # fmt: skip


def _binned(step: Int, weight: Int) -> list[int]:
    total = np.zeros(TIMES, np.int64)
    np.add.at(total, step, weight)
    result: list[int] = total.tolist()
    return result


def _places(run: Run, disk: int, step: Int, size: int) -> dict[str, list[int]]:
    """Bytes read and written by step of time and place, only where there are any.

    An access counts where it begins: few are longer than a place.
    """
    result: dict[str, list[int]] = {}
    for way, ops in (("read", (READ,)), ("written", WRITES)):
        mine = np.isin(run.accesses.op, ops) & (run.disk == disk)
        place = np.minimum(run.accesses.offset[mine] // max(1, -(-size // PLACES)), PLACES - 1)
        at, row = np.unique(step[mine] * PLACES + place, return_inverse=True)
        total = np.zeros(len(at), np.int64)
        np.add.at(total, row, run.accesses.length[mine])
        result |= {f"{way}_at": at.tolist(), way: total.tolist()}
    return result


def _touched(run: Run, time: Int, cells: Cells, disk: int) -> dict[str, list[int]]:
    """Runs of cells that were read or written: first cell, cells, when first in milliseconds, and 1 read, 2
    written, 3 both."""
    mine = np.flatnonzero(
        (run.disk == disk) & (run.accesses.length > 0) & np.isin(run.accesses.op, (READ, *WRITES))
    )
    mine = mine[np.argsort(time[mine], kind="stable")]
    low, high = cells.of(run.accesses.offset[mine], (run.accesses.offset + run.accesses.length)[mine])
    count = len(cells.owner)
    high = np.minimum(high, count)
    first = first_covers(low, high, count)
    how = np.zeros(count, np.int64)
    for bit, ops in ((1, (READ,)), (2, WRITES)):
        some = np.isin(run.accesses.op[mine], ops)
        change = np.zeros(count + 1, np.int64)
        begin, end = union(low[some], high[some])
        change[begin] += 1
        np.subtract.at(change, end, 1)
        how |= bit * (np.cumsum(change)[:count] > 0)
    when = np.append(time[mine] // 10**6, -1)[first]
    starts = np.flatnonzero(np.append(True, (when[1:] != when[:-1]) | (how[1:] != how[:-1])))
    length = np.diff(np.append(starts, count))
    keep = how[starts] > 0
    return {
        "at": starts[keep].tolist(),
        "length": length[keep].tolist(),
        "ms": when[starts][keep].tolist(),
        "how": how[starts][keep].tolist(),
    }


def _lanes(run: Run, step: Int, labels: list[str]) -> dict[str, Any]:
    """Bytes over time of the objects that most bytes were
    read of or written to, in order of their first use."""
    length = run.end - run.start
    total = np.zeros(len(labels), np.int64)
    np.add.at(total, run.object, length)
    top = np.argsort(-total, kind="stable")[:LANES]
    top = top[total[top] > 0]
    first = np.full(len(labels), len(run.access), np.int64)
    np.minimum.at(first, run.object, np.arange(len(run.access)))
    top = top[np.argsort(first[top], kind="stable")]
    place = np.full(len(labels), -1, np.int64)
    place[top] = np.arange(len(top))
    mine = place[run.object] >= 0
    grid = np.zeros((len(top), TIMES), np.int64)
    np.add.at(grid, (place[run.object[mine]], step[run.access[mine]]), length[mine])
    return {"name": [labels[number] for number in top.tolist()], "bytes": grid.tolist()}


def _growth(one: Traces, time: Int, run: Run) -> dict[str, list[float]]:
    """The working set as it grows: bytes needed so far, each counted once, and bytes read so far."""
    profile = build(one)
    first, length = profile.column("first_ns"), profile.column("length")
    reads = run.accesses.op == READ
    at = np.linspace(0, int(time.max()), POINTS).astype(np.int64)
    needed = np.append(0, np.cumsum(length))[np.searchsorted(first, at, "right")]
    order = np.argsort(time[reads], kind="stable")
    read = np.append(0, np.cumsum(run.accesses.length[reads][order]))[
        np.searchsorted(time[reads][order], at, "right")
    ]
    return {"seconds": (at / 1e9).tolist(), "needed": needed.tolist(), "read": read.tolist()}


def _objects(one: Traces, run: Run, time: Int, labels: list[str]) -> dict[str, Any]:
    """The objects in order of first use, as columns."""
    count = len(labels)
    read, written, requests = (np.zeros(count, np.int64) for _ in range(3))
    first = np.full(count, np.iinfo(np.int64).max)
    length, is_read = run.end - run.start, run.accesses.op[run.access] == READ
    np.add.at(read, run.object, np.where(is_read, length, 0))
    np.add.at(written, run.object, np.where(is_read, 0, length))
    np.add.at(requests, run.object, 1)
    np.minimum.at(first, run.object, time[run.access])
    found = np.flatnonzero(requests)
    found = found[np.argsort(first[found], kind="stable")]
    shown = found[:OBJECTS].tolist()
    objects = one.objects.take(shown)
    from virt_bmap.saved.results import safe

    text = safe(objects.select(["device", "kind"]))
    return {
        "all": len(found), "first": (first[shown] / 1e9).round(3).tolist(), "read": read[shown].tolist(),
        "written": written[shown].tolist(), "requests": requests[shown].tolist(),
        "size": objects.column("size").to_pylist(), "kind": text.column("kind").to_pylist(),
        "device": text.column("device").to_pylist(), "name": [labels[number] for number in shown],
    }  # fmt: skip
