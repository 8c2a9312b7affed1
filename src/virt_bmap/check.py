"""Is the map complete, and does every filesystem's own allocator agree with it?

For each volume: its extents and its children's bytes cover it to the last byte; no two owners claim the same bytes unless they
share them on purpose; nothing that is owned is called free; nothing that is allocated lacks an owner. An observed filesystem can't be proven: that is a disagreement, too.
"""

from typing import NamedTuple

import numpy as np

from virt_bmap import tables
from virt_bmap.arrays import Int, covered_twice, intersect, subtract, total, union
from virt_bmap.blockmap import BlockMap

LISTED = 100
"""Ranges named one by one for each kind of disagreement on a volume; the rest are counted."""


class Disagreement(NamedTuple):
    """Bytes [start, end) of a volume about which the map contradicts itself, the allocator, or the format."""

    volume: int
    code: str
    start: int
    end: int
    detail: str


class Totals(NamedTuple):
    """Bytes of one volume by kind; `children` are bytes that lie in further volumes. Together they are `size`."""

    volume: int
    size: int
    by_kind: dict[str, int]
    children: int


class Report(NamedTuple):
    """What `check` found. The map is proven when there is no disagreement."""

    totals: list[Totals]
    disagreements: list[Disagreement]


def check(bmap: BlockMap) -> Report:
    """Check every volume of the map."""
    report = Report([], [])
    for volume in range(bmap.volumes.num_rows):
        _check_volume(bmap, volume, report)
    for row in bmap.problems.filter(np.isin(bmap.problems.column("severity").to_pylist(), ("error", "warning"))).to_pylist():
        at = row["volume_offset"]
        if row["code"] != "unowned":  # reported below byte by byte
            report.disagreements.append(Disagreement(row["volume"], row["code"], -1 if at is None else at, -1, row["detail"]))
    return report


def _check_volume(bmap: BlockMap, volume: int, report: Report) -> None:
    size = bmap.volumes.column("size")[volume].as_py()
    _, extents = bmap.slice_of("extents", volume)
    kind, flags = tables.codes(extents, "kind"), tables.integers(extents, "flags")
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    end = start + length
    rows = bmap.rows_into(volume)
    image = np.array(bmap.volumes.column("kind").to_pylist()) == "image"
    if not image[volume] or bmap.slice_of("filesystems", volume)[1].num_rows:
        rows = rows.select(~image[rows.volume])  # the bytes of a nested image belong to its file
    inner = union(rows.on_parent.offset, rows.parent_end)
    inline = (flags & tables.INLINE) != 0
    shared = (flags & tables.SHARED) != 0
    own = ~inline

    def disagree(code: str, detail: str, ranges: tuple[Int, Int]) -> None:
        pairs = list(zip(ranges[0][:LISTED].tolist(), ranges[1][:LISTED].tolist(), strict=True))
        report.disagreements.extend(Disagreement(volume, code, low, high, detail) for low, high in pairs)
        if more := len(ranges[0]) - len(pairs):
            low, high = int(ranges[0][LISTED]), int(ranges[1][-1])
            report.disagreements.append(Disagreement(volume, code, low, high, f"{detail}: {more} more ranges"))

    everything = union(np.append(start[own], inner[0]), np.append(end[own], inner[1]))
    whole = np.zeros(1, np.int64), np.array([size], np.int64)
    disagree("untiled", "no owner", subtract(*whole, *everything))
    disagree("outside", "owned, but outside the volume", subtract(*everything, *whole))
    owned, free = np.isin(kind, tables.OWNED) & own, kind == tables.FREE
    disagree(
        "owned-but-free", "owned, but the allocator calls it free", intersect(start[owned], end[owned], start[free], end[free])
    )
    unknown = kind == tables.UNKNOWN
    if tables.OBSERVED in bmap.slice_of("filesystems", volume)[1].column("state").to_pylist():
        unseen = total(start[unknown], end[unknown])
        detail = f"mapped by reading its files: {unseen} bytes were never observed, and its allocator was not read"
        report.disagreements.append(Disagreement(volume, "not-observed", -1, -1, detail))
    else:
        disagree("allocated-but-not-owned", "allocated, but nothing refers to it", union(start[unknown], end[unknown]))
    alone = own & ~shared & (kind != tables.FREE)
    disagree("two-owners", "two owners that do not share on purpose", covered_twice(start[alone], end[alone]))
    at_home = own & shared
    disagree("two-owners", "an unshared owner on shared bytes",
             intersect(start[alone], end[alone], start[at_home], end[at_home]))  # fmt: skip
    outside = subtract(start[inline], end[inline], start[own], end[own])
    disagree("inline-outside", "said to lie inside another extent, but does not", outside)
    sums = {
        tables.KINDS[code]: total(start[own & (kind == code)], end[own & (kind == code)])
        for code in np.unique(kind[own]).tolist()
    }
    report.totals.append(Totals(volume, size, sums, int((inner[1] - inner[0]).sum())))
