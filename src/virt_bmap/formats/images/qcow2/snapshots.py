"""Internal snapshots: the snapshot table, and the clusters that only snapshots hold.

Sources: QEMU docs/interop/qcow2.rst (v8.2) section "Snapshots".
"""

import struct as packing
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, ints, weigh
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.qcow2.allocator import Uses
from virt_bmap.formats.images.qcow2.extents import ClusterPieces, L2Tables
from virt_bmap.formats.images.qcow2.header import Header, Table, placed
from virt_bmap.formats.images.qcow2.ondisk import (
    MAX_L1,
    MAX_SIZE,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE,
    MAX_SNAPSHOTS,
    SNAPSHOT,
)
from virt_bmap.model import tables

SEVERAL = -1
"""Instead of the number of a snapshot."""
MAX_ENTRY = SNAPSHOT.size + MAX_SNAPSHOT_EXTRA + 2 * 0xFFFF + 7
"""Bytes of an entry: with its id and its name, padded."""


class Snapshot(NamedTuple):
    """One entry of the snapshot table; `size` is the disk's at that time.

    Names are bytes of the disk, made text.
    """

    id: str
    name: str
    date: int
    l1: Table
    vm_state: int
    size: int


class Snapshots(NamedTuple):
    """The snapshot table, and what it says; snapshots are numbered from 1."""

    table: Table
    entries: list[Snapshot]

    def facts(self) -> dict[str, Any]:
        """For people and JSON; dates in seconds since 1970."""
        return {
            "snapshots": [
                {
                    "number": number,
                    "id": one.id,
                    "name": one.name,
                    "date": one.date,
                    "size": one.size,
                    "vm_state": one.vm_state,
                }
                for number, one in enumerate(self.entries, 1)
            ]
        }


def read_snapshots(image: Reader, header: Header) -> Snapshots:
    """The entries follow each other, each padded to 8 bytes."""
    count, start = header.snapshot_count, header.snapshots_offset
    if count == 0:
        return Snapshots((0, 0), [])
    if count > MAX_SNAPSHOTS:
        raise Corrupt(f"{image.name}: says that it has {plural(count, 'snapshot')} (byte 0x3c)", 60)
    area = image.read_clipped(start, max(0, min(MAX_SNAPSHOT_TABLE, count * MAX_ENTRY, image.size - start)))
    found, at = [], 0
    for number in range(1, count + 1):
        one, end = _entry(image, header, area, start, at, number)
        found.append(one)
        at = end + -end % 8
    if sum(one.l1[1] for one in found) > image.size:
        raise Corrupt(
            f"{image.name}: the L1 tables of {plural(len(found), 'snapshot')} are larger than the file",
            start,
        )
    return Snapshots((start, min(at, len(area))), found)


def _entry(
    image: Reader, header: Header, area: bytes, start: int, at: int, number: int
) -> tuple[Snapshot, int]:
    """The snapshot whose entry lies at `at` of the table, and where that ends."""
    place, more = start + at, at + SNAPSHOT.size
    cut = Corrupt(f"{image.name}: the entry of snapshot {number} at byte {place:#x} leaves the file", place)
    if more > len(area):
        raise cut
    l1_offset, l1_size, id_size, name_size, date, _, _, vm_state, extra = SNAPSHOT.unpack_from(area, at)
    id, name, end = accumulate((id_size, name_size), initial=more + extra)
    if end > len(area):
        raise cut
    vm_state = packing.unpack_from(">Q", area, more)[0] if extra >= 8 else vm_state
    size = packing.unpack_from(">Q", area, more + 8)[0] if extra >= 16 else header.size
    l1 = placed(image, f"L1 table of snapshot {number}", l1_offset, l1_size * 8, MAX_L1, place)
    texts = _text(area[id:name]), _text(area[name:end])
    # a size says no more than where the VM state begins: what can't be is taken for the largest disk
    return Snapshot(*texts, date, l1, min(vm_state, MAX_SIZE), min(size, MAX_SIZE)), end


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def own_tables(draft: Draft, head: Header, snapshots: Snapshots, uses: Uses) -> None:
    """The snapshot table, and the L1 tables that it names."""
    uses.own_table(draft, "snapshot table", *snapshots.table)
    l1 = (ints([one.l1[side] for one in snapshots.entries]) for side in (0, 1))
    uses.own_table(draft, "L1 table of a snapshot", *l1)


def own_data(
    draft: Draft,
    head: Header,
    snapshots: Snapshots,
    l2: L2Tables,
    known: ClusterPieces,
    held: ClusterPieces,
) -> None:
    """Clusters that the current state does not hold, by the snapshot that does; where several do, that is
    said."""
    current = l2.first[held.table] == 0
    theirs = held.take(~current)
    if len(theirs.host) == 0:
        return
    sizes = ints([head.size, *(one.size for one in snapshots.entries)])
    first, last = l2.first[theirs.table], l2.last[theirs.table]
    state = theirs.guest >= -(-sizes[first] // head.cluster) * head.cluster
    mine = known.take((l2.first[known.table] == 0) & (known.host >= 0))
    for what, some in (("data", ~state), ("VM state", state)):
        _own_by_snapshot(draft, head, what, theirs.take(some), first[some], last[some], mine)


def _own_by_snapshot(
    draft: Draft, head: Header, what: str, theirs: ClusterPieces, first: Int, last: Int, mine: ClusterPieces
) -> None:
    """Ranges held by snapshots but not by the current state.

    All numbers of a range are equal where n * sum of squares is the square of the sum.
    """
    start, end = theirs.host, theirs.host + theirs.stored
    points = np.unique(np.concatenate([start, end, mine.host, mine.host + mine.stored]))
    count = weigh(points, start, end)
    number = weigh(points, start, end, first) // np.maximum(count, 1)
    alone = (weigh(points, start, end, first * first) == count * number * number) & (
        weigh(points, start, end, last - first) == 0
    )
    only = (count > 0) & (weigh(points, mine.host, mine.host + mine.stored) == 0)
    label = np.where(alone, number, SEVERAL)[only]
    order = np.argsort(label, kind="stable")
    low, high = points[:-1][only][order], points[1:][only][order]
    numbers, counts = np.unique(label, return_counts=True)
    ends = np.cumsum(counts)
    for who, begin, stop in zip(numbers.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
        name = "several snapshots" if who == SEVERAL else f"snapshot {who}"
        part = slice(begin, stop)
        file = 1 if head.external else 0
        draft.own(f"{what} of {name}", low[part], high[part] - low[part], tables.CONTENT, file)
