"""What a guest did, added up: for each object the bytes read, written and trimmed and the first access, and
the share of the disk touched.

Objects of different maps are one where device, kind and name are the same: a file that was renamed has a row
for each name it was used under. Memory follows the objects that are told apart, of which there are
MOST_OBJECTS, and not the time watched.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import OPEN, Resolver, Touched
from virt_bmap.core.arrays import EMPTY, Int, total, union
from virt_bmap.core.columns import stack, take
from virt_bmap.model import tables
from virt_bmap.model.paths import positions

PENDING = 1 << 18
"""Ranges, and rows of objects, that are kept before they are merged with what was touched before."""
MOST_OBJECTS = 1 << 18
"""Objects that keep a row of their own: those with the most bytes, where there are more.

A guest that makes new files for days fills no memory.
"""
OTHERS = "[others]"
OBJECT_TABLES = 64
"""Tables of objects, one of each map, that are kept before they are added up; fewer where they are large."""
WAYS = {"read": ("read",), "written": ("write", "zero"), "trimmed": ("trim",)}
"""What a request does to bytes: a trim gives them back, and writes nothing."""
_WAYS = [np.isin(np.arange(len(tables.OPS)), [tables.OPS.index(op) for op in ops]) for ops in WAYS.values()]

OBJECTS = pa.schema([
    pa.field("disk", pa.int32(), False, {"meaning": "number of the disk, from 1"}),
    pa.field("kind", pa.string(), False, {"meaning": "kind of the object, or of the volume"}),
    pa.field("device", pa.string(), False, {"meaning": "the volume it lies on"}),
    pa.field("name", pa.string(), False, {"meaning": "path or name of the metadata, escaped"}),
    pa.field("size", pa.int64(), True, {"meaning": "bytes of the file as stat reports; null: not a file"}),
    pa.field("first_ns", pa.int64(), False, {"meaning": "time of the first access, since 1970 UTC"}),
    pa.field("accesses", pa.int64(), False, {"meaning": "requests that touched it"}),
    pa.field("read", pa.int64(), False, {"meaning": "bytes read, each time they were"}),
    pa.field("written", pa.int64(), False, {"meaning": "bytes written or zeroed, each time they were"}),
    pa.field("trimmed", pa.int64(), False, {"meaning": "bytes trimmed, each time they were"}),
])  # fmt: skip


@dataclass
class _Touch:
    """The bytes of one disk that were touched in one way, each counted once."""

    starts: Int
    ends: Int
    pending: list[tuple[Int, Int]]
    waiting: int = 0

    def add(self, starts: Int, ends: Int) -> None:
        self.pending.append((starts, ends))
        self.waiting += len(starts)
        if self.waiting > max(PENDING, len(self.starts)):
            self.merge()

    def merge(self) -> None:
        self.starts, self.ends = union(
            np.concatenate([self.starts, *(s for s, _ in self.pending)]),
            np.concatenate([self.ends, *(e for _, e in self.pending)]),
        )
        self.pending, self.waiting = [], 0

    def bytes(self) -> int:
        self.merge()
        return total(self.starts, self.ends)


class _Sums(NamedTuple):
    """What became of objects of one map: the time of the first access, how many there were, bytes read,
    written and trimmed."""

    object: Int
    first: Int
    accesses: Int
    read: Int
    written: Int
    trimmed: Int


class Summary:
    """Adds up the accesses of one disk."""

    def __init__(self, resolver: Resolver, disk: int) -> None:
        self.disk = disk
        self._older: list[pa.Table] = []
        """Objects that were touched while older maps were in force."""
        self._use(resolver)
        self._touch = {way: _Touch(EMPTY, EMPTY, []) for way in WAYS}
        self.requests = np.zeros(len(tables.OPS), np.int64)
        self.bytes = np.zeros(len(tables.OPS), np.int64)
        self.begin_ns = self.end_ns = 0

    def _use(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self._sums = _Sums(*(EMPTY for _ in _Sums._fields))
        self._parts: list[_Sums] = []

    def renew(self, resolver: Resolver) -> None:
        """Count by the objects of another map from now on."""
        if resolver is self.resolver:
            return
        if self._parts or len(self._sums.object):
            self._older.append(self._objects())
        rows = [table.num_rows for table in self._older]
        if len(rows) >= OBJECT_TABLES or (rows and sum(rows) > max(PENDING, 2 * rows[0])):
            self._older = [_bounded(_together(self._older))]
        self._use(resolver)

    def add(self, accesses: Accesses, touched: Touched) -> None:
        """Count these."""
        if not len(accesses):
            return
        self.begin_ns = self.begin_ns or int(accesses.time_ns[0])
        self.end_ns = int(accesses.time_ns[-1])
        self.requests += np.bincount(accesses.op, minlength=len(tables.OPS))
        np.add.at(self.bytes, accesses.op, accesses.length)
        for touch, ops in zip(self._touch.values(), _WAYS, strict=True):
            which = ops[accesses.op]
            touch.add(accesses.offset[which], (accesses.offset + accesses.length)[which])
        self.late(accesses, touched.take(~np.isin(touched.state, OPEN)))

    def late(self, accesses: Accesses, touched: Touched) -> None:
        """Count the objects of these pieces; their requests were counted before."""
        moving = np.any(_WAYS, axis=0)[accesses.op]
        touched = touched.take(moving[touched.access] & ~touched.inline)
        op, length = accesses.op[touched.access], touched.end - touched.start
        self._parts.append(_Sums(touched.object, accesses.time_ns[touched.access], np.ones(len(op), np.int64),
                                 *(np.where(ops[op], length, 0) for ops in _WAYS)))  # fmt: skip
        if sum(len(part.object) for part in self._parts) > max(PENDING, len(self._sums.object)):
            self._add_up()

    def _add_up(self) -> None:
        """One row for each object."""
        parts = stack(_Sums, [self._sums, *self._parts])
        order = np.argsort(parts.object, kind="stable")
        first = np.flatnonzero(np.append(True, np.diff(parts.object[order]) != 0)[: len(order)])
        if len(order):
            sums = (np.add.reduceat(column[order], first) for column in parts[2:])
            self._sums = _Sums(
                parts.object[order][first], np.minimum.reduceat(parts.first[order], first), *sums
            )
        self._parts = []

    @property
    def ways(self) -> list[str]:
        """What was done to bytes, by WAYS: trims only where there were any."""
        return [way for way in WAYS if way != "trimmed" or self.bytes[tables.OPS.index("trim")]]

    def share(self) -> dict[str, int]:
        """Bytes of the disk that were read, written or trimmed at least once, and its size."""
        size = self.resolver.bmap.size_of(self.resolver.bmap.disk(self.disk))
        return {name: touch.bytes() for name, touch in self._touch.items()} | {"size": size}

    def objects(self) -> pa.Table:
        """Every object that was touched, in the order of its
        first access, as a table of the schema OBJECTS."""
        return _together([*self._older, self._objects()]) if self._older else self._objects()

    def _objects(self) -> pa.Table:
        """The same of the map in force."""
        self._add_up()
        sums = take(self._sums, np.argsort(self._sums.first, kind="stable"))
        found = sums.object
        labels = self.resolver.labels(found)
        kind = self.resolver.kind_of(found)
        volume = self.resolver.volume_of(found)
        volumes = self.resolver.bmap.volumes.column("kind").to_pylist()
        size = self._sizes(found)
        return pa.Table.from_arrays([
            pa.array(np.full(len(found), self.disk, np.int32)),
            pa.array([tables.KINDS[k] if k >= 0 else volumes[v] for k,
                    v in zip(kind.tolist(), volume.tolist(), strict=True)], pa.string()),
            pa.array([labels[number][1] for number in found.tolist()], pa.string()),
            pa.array([labels[number][2] for number in found.tolist()], pa.string()),
            pa.array(size, mask=size < 0),
            *(pa.array(column) for column in sums[1:]),
        ], schema=OBJECTS)  # fmt: skip

    def _sizes(self, objects: Int) -> Int:
        """The size of each file, -1 for other objects."""
        inode, volume = self.resolver.inode_of(objects), self.resolver.volume_of(objects)
        size = np.full(len(objects), -1, np.int64)
        for number in np.unique(volume[inode >= 0]).tolist():
            _, table = self.resolver.bmap.slice_of("inodes", number)
            mine = np.flatnonzero((volume == number) & (inode >= 0))
            row = positions(tables.integers(table, "inode"), inode[mine])
            size[mine] = np.where(row >= 0, tables.integers(table, "size")[row], -1)
        return np.where(self.resolver.kind_of(objects) == tables.DATA, size, -1)


def _bounded(objects: pa.Table) -> pa.Table:
    """The same table where that is short; else the objects with the most bytes, and one row of each disk,
    kind and device for the others."""
    if objects.num_rows <= 2 * MOST_OBJECTS:
        return objects
    weight = sum(tables.integers(objects, way) for way in WAYS)
    few = np.argsort(weight, kind="stable")[:-MOST_OBJECTS]
    name = objects.column("name").combine_chunks()
    others = np.zeros(len(name), bool)
    others[few] = True
    named = pc.if_else(pa.array(others), pa.scalar(OTHERS), name)
    size = pc.if_else(pa.array(others), pa.scalar(None, pa.int64()), objects.column("size").combine_chunks())
    at = OBJECTS.get_field_index
    return _together(
        [
            objects.set_column(at("name"), OBJECTS.field("name"), named).set_column(
                at("size"), OBJECTS.field("size"), size
            )
        ]
    )


def _together(parts: list[pa.Table]) -> pa.Table:
    """Tables of the schema OBJECTS added up, in the order of
    the first access; sizes are those that are known last."""
    joined = pa.concat_tables(parts).group_by(["disk", "kind", "device", "name"], use_threads=False)
    sums = joined.aggregate(
        [("size", "last"), ("first_ns", "min"), ("accesses", "sum"), *((way, "sum") for way in WAYS)]
    )
    columns = {
        name.rpartition("_")[0] if name not in OBJECTS.names else name: sums.column(name)
        for name in sums.column_names
    }
    return (
        pa.Table.from_arrays([columns[name] for name in OBJECTS.names], OBJECTS.names)
        .cast(OBJECTS)
        .sort_by("first_ns")
    )
