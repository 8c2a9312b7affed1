"""A profile by object: the files that were needed, in order of first use."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.profile.saved import Profile
from virt_bmap.accesses.resolve import identify
from virt_bmap.accesses.traces import label
from virt_bmap.core.arrays import Int, union
from virt_bmap.core.escape import escape, escape_all
from virt_bmap.model import tables
from virt_bmap.saved.results import field

FILES = pa.schema([
    field("first_s", pa.float64(), "seconds from the start of the run to its first use"),
    field("needed", pa.int64(), "bytes of it that were read, each counted once", "bytes"),
    field("in_all_runs", pa.int64(), "of these, read in every run", "bytes"),
    field("read", pa.int64(), "bytes read of it in all runs, each time they were", "bytes"),
    field("size", pa.int64(), "bytes of the whole file", "bytes", null="no file, or made without a map"),
    field("share", pa.float64(), "per cent of the file that was read", null="size not known"),
    field("runs", pa.int64(), "runs that read any of it", "count"),
    field("ranges", pa.int64(), "pieces on the disk", "count"),
    field("kind", pa.large_string(), "kind of the object"),
    field("device", pa.large_string(), "the volume it lies on"),
    field("name", pa.large_string(), "path, or name of the metadata, escaped"),
])  # fmt: skip


class Grouped(NamedTuple):
    """Rows of a profile by object: the object of each row, numbered in order of first use, and the first row
    of each object."""

    object: Int
    first: Int


def grouped(profile: Profile) -> Grouped:
    """The objects of a profile."""
    number, first = identify(profile.ranges)
    order = np.argsort(first, kind="stable")  # rows are in order of first use
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Grouped(rank[number], first[order])


def names(table: pa.Table) -> list[str]:
    """The name of each row's object, escaped."""
    path = escape_all(table.column("path").combine_chunks()).to_pylist()
    part, inode, kind = (table.column(name).to_pylist() for name in ("part", "inode", "kind"))
    part = [None if word is None else escape(word.encode()) for word in part]
    return [label(*row) for row in zip(path, part, inode, kind, strict=True)]


def files(profile: Profile) -> pa.Table:
    """Every object that was needed, as a table of the schema FILES."""
    groups = grouped(profile)
    count = len(groups.first)
    length, runs = profile.column("length"), profile.column("runs")

    def added(values: Int) -> Int:
        total = np.zeros(count, np.int64)
        np.add.at(total, groups.object, values)
        return total

    most = np.zeros(count, np.int64)
    np.maximum.at(most, groups.object, runs)
    one = profile.ranges.take(pa.array(groups.first))
    needed, size = added(length), tables.integers(one, "size")
    known = size > 0
    share = np.where(known, 100 * np.minimum(needed, size) / np.maximum(size, 1), 0)
    return pa.table([
        pa.array(tables.integers(one, "first_ns") / 1e9), pa.array(needed),
        pa.array(added(length * (runs == len(profile.runs)))), pa.array(added(profile.column("read"))),
        tables.arrow(size, size < 0), pa.array(share, mask=~known), pa.array(most),
        pa.array(added(np.ones(len(length), np.int64))), one.column("kind"), _safe(one.column("device")),
        pa.array(names(one), pa.large_string()),
    ], schema=FILES)  # fmt: skip


def _safe(column: pa.ChunkedArray) -> pa.Array:
    return escape_all(column.combine_chunks().cast(pa.large_binary()))


def disk_ranges(profile: Profile, disk: int, common: bool = False) -> tuple[Int, Int]:
    """(starts, ends) of what was needed of a disk, in order
    of first use, unmerged; `common`: in every run."""
    keep = profile.column("disk") == disk
    if common:
        keep &= profile.column("runs") == len(profile.runs)
    start = profile.column("offset")[keep]
    return start, start + profile.column("length")[keep]


def totals(profile: Profile) -> list[dict[str, int]]:
    """For each disk: bytes needed, each counted once, bytes
    needed by every run, and the disk's size (0: not known)."""
    result = []
    for disk in np.unique(profile.column("disk")).tolist():
        every, common = (union(*disk_ranges(profile, disk, only)) for only in (False, True))
        size = profile.sizes[disk - 1] if disk <= len(profile.sizes) else 0
        result.append(
            {
                "disk": disk,
                "needed": int((every[1] - every[0]).sum()),
                "common": int((common[1] - common[0]).sum()),
                "size": size,
            }
        )
    return result
