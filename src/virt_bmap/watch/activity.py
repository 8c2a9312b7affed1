"""What goes on at the moment, for a screen: rates, the places of the disks that are touched, and the objects
touched most or last.

A sink: the watch adds to it from its thread, a screen looks at it from its own, a few times a second. An
object keeps its number and its sums as long as its name lasts, whichever map gave that name.
"""

import threading
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import OPEN, Resolver, Touched
from virt_bmap.core.arrays import Bool, Int
from virt_bmap.model import tables
from virt_bmap.saved.results import field

BINS = 4096
"""Places of a disk that are told apart: more than a terminal has cells for."""
MOST_OBJECTS = 1 << 18
"""Objects that are told apart: a guest that makes new files for days fills no memory."""
OTHERS = "[others]"
SORTS = ("bytes", "read", "written", "accesses", "recent", "name")
READ, TRIM = tables.OPS.index("read"), tables.OPS.index("trim")
_READING, _WRITING = (np.isin(np.arange(len(tables.OPS)), [tables.OPS.index(op) for op in ops])
                      for ops in (("read",), ("write", "trim", "zero")))  # fmt: skip

RESULT = pa.schema([
    field("device", pa.string(), "the volume it lies on"),
    field("kind", pa.string(), "letter of the kind, as in the text map"),
    field("name", pa.string(), "path or name of the metadata, escaped; empty: the volume, or free space"),
    field("read", pa.int64(), "bytes read, each time they were", "bytes"),
    field("written", pa.int64(), "bytes written or zeroed, each time they were", "bytes"),
    field("accesses", pa.int64(), "requests that touched it", "count"),
    field("last_ns", pa.int64(), "time of the last access, since 1970 UTC"),
])  # fmt: skip


class ObjectRow(NamedTuple):
    """One object as it is listed; sizes in bytes, `last_ns` since 1970 UTC."""

    letter: str
    device: str
    name: str
    read: int
    written: int
    accesses: int
    last_ns: int


class Strip(NamedTuple):
    """A disk from its first byte to its last in BINS places: requests since the last look, and whether a
    place was ever touched."""

    name: str
    size: int
    reads: Int
    writes: Int
    was_read: Bool
    was_written: Bool


class ActivityView(NamedTuple):
    """Requests and bytes so far, by operation of tables.OPS, and the disks."""

    begin_ns: int
    end_ns: int
    requests: Int
    bytes: Int
    objects: int
    maps: int
    strips: list[Strip]


class Activity:
    """Adds up accesses of all disks."""

    def __init__(self, resolver: Resolver) -> None:
        self._lock = threading.Lock()
        volumes = resolver.bmap.volumes
        self._disks = [
            (volumes.column("name")[disk].as_py(), volumes.column("size")[disk].as_py())
            for disk in resolver.bmap.disks
        ]
        shape = len(self._disks), BINS
        self._now = np.zeros((2, *shape), np.int64)
        self._ever = np.zeros((2, *shape), bool)
        self._requests, self._bytes = np.zeros(len(tables.OPS), np.int64), np.zeros(len(tables.OPS), np.int64)
        self._begin_ns = self._end_ns = 0
        self._ids: dict[tuple[str, str, str], int] = {}
        self._columns = np.zeros((4, 1024), np.int64)
        """Bytes read, bytes written, requests, time of the
        last one: for each object that was ever touched."""
        self._use(resolver)

    def _use(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._id_of = np.full(resolver.named + resolver.bmap.volumes.num_rows, -1, np.int64)

    # ---- as a sink -----------------------------------------------------------------------------------------

    def renew(self, resolver: Resolver) -> None:
        """Objects are those of a newer map from now on."""
        with self._lock:
            self._use(resolver)

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        """Count these."""
        with self._lock:
            self._begin_ns = self._begin_ns or int(accesses.time_ns[0])
            self._end_ns = int(accesses.time_ns[-1])
            self._requests += np.bincount(accesses.op, minlength=len(tables.OPS))
            np.add.at(self._bytes, accesses.op, accesses.length)
            size = self._disks[disk - 1][1]
            for way, ops in enumerate((_READING, _WRITING)):
                mine = ops[accesses.op] & (accesses.length > 0)
                # a disk has less than 2**51 bytes
                first = np.minimum(accesses.offset[mine] * BINS // size, BINS - 1)
                last = np.minimum((accesses.offset + accesses.length)[mine] * BINS // size, BINS - 1)
                edges = np.bincount(first, minlength=BINS + 1) - np.bincount(last + 1, minlength=BINS + 1)
                covered = np.cumsum(edges)[:BINS]
                self._now[way, disk - 1] += covered
                self._ever[way, disk - 1] |= covered > 0
            self._count(accesses, touched.take(~np.isin(touched.state, OPEN)))

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        """Count the objects of pieces that were held or guessed."""
        with self._lock:
            self._count(accesses, touched)

    def _count(self, accesses: Accesses, touched: Touched) -> None:
        moving = (_READING | _WRITING)[accesses.op[touched.access]]
        touched = touched.take(moving & ~touched.inline)
        if not len(touched):
            return
        new = np.unique(touched.object[self._id_of[touched.object] < 0])
        for number, label in self._resolver.labels(new).items() if len(new) else ():
            if self._id_of[number] < 0:
                kept = (
                    label
                    if len(self._ids) < MOST_OBJECTS or label in self._ids
                    else (label[0], label[1], OTHERS)
                )
                self._id_of[number] = self._ids.setdefault(kept, len(self._ids))
        while len(self._ids) > self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        ids, length = self._id_of[touched.object], touched.end - touched.start
        op = accesses.op[touched.access]
        np.add.at(self._columns[0], ids, np.where(op == READ, length, 0))
        np.add.at(self._columns[1], ids, np.where((op == READ) | (op == TRIM), 0, length))
        np.add.at(self._columns[2], ids, 1)
        np.maximum.at(self._columns[3], ids, accesses.time_ns[touched.access])

    # ---- for a screen --------------------------------------------------------------------------------------

    def look(self) -> ActivityView:
        """The state now; what the strips call recent is what came since the last look."""
        with self._lock:
            recent, self._now = self._now, np.zeros_like(self._now)
            strips = [Strip(name, size, recent[0, n], recent[1, n], self._ever[0, n].copy(),
                    self._ever[1, n].copy())
                      for n, (name, size) in enumerate(self._disks)]  # fmt: skip
            return ActivityView(self._begin_ns, self._end_ns, self._requests.copy(), self._bytes.copy(),
                len(self._ids),
                        self._resolver.number, strips)  # fmt: skip

    def rows(self, count: int, sort: str = "bytes", words: str = "", since_ns: int = 0) -> list[ObjectRow]:
        """The first `count` objects by one of SORTS whose device and name contain `words` (in any case) and
        that were touched after `since_ns`."""
        with self._lock:
            labels = list(self._ids)
            columns = self._columns[:, : len(labels)].copy()
        found = np.flatnonzero(columns[3] > since_ns)
        if words:
            wanted = words.lower()
            found = found[[wanted in f"{labels[row][1]} {labels[row][2]}".lower() for row in found.tolist()]]
        if sort == "name":
            found = np.array(sorted(found.tolist(), key=lambda row: labels[row][1:]), np.int64)
        else:
            key = {
                "bytes": columns[0] + columns[1],
                "read": columns[0],
                "written": columns[1],
                "accesses": columns[2],
                "recent": columns[3],
            }[sort]
            found = found[np.argsort(-key[found], kind="stable")]
        return [ObjectRow(*labels[row], *columns[:, row].tolist()) for row in found[:count].tolist()]

    def table(self) -> pa.Table:
        """All objects, most bytes first, as a table of the schema RESULT."""
        rows = self.rows(len(self._ids))
        names = {"kind": "letter"}
        return pa.Table.from_arrays([pa.array([getattr(row,
                            names.get(about.name, about.name)) for row in rows],
                            about.type) for about in RESULT],
                                    schema=RESULT)  # fmt: skip
