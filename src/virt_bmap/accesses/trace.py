"""The trace: the table `accesses` with the objects that each request touched, written as it grows.

One row for each request. The metadata of the file says of which disks it is. The column `objects` is a list:
`SELECT o.path, sum(o.length) FROM (SELECT unnest(objects) AS o FROM 'trace.parquet') GROUP BY 1`.

Requests wait here, a minute at most, until all their names are certain or no better ones are to be had. A
watch then writes them as a stream that outlives it (`stream.py`), and makes Parquet of that in the end.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import DOUBTFUL, OPEN, Resolver, Touched
from virt_bmap.accesses.stream import KEY, MAPS_KEY, Part, convert
from virt_bmap.core.arrays import EMPTY, Bool, Int, Intervals, complement_by
from virt_bmap.model import tables
from virt_bmap.saved.parquet import sizes

VERSION = 1
ROW_GROUP = 1 << 17
"""Requests in a row group: they are kept in memory before they are written."""
MOST_KEPT = 1 << 19
"""Requests that are kept at most while some of them wait for their owners: some 200 MiB."""
MARGIN = 1_000_000_000
"""ns that a name may take from being known to coming here."""
CLAIM = 36_000_000_000
"""ns that a name may wait to become certain: writes to nobody's bytes for their owner, guesses for a better
map. ext4 commits every 5 s; XFS flushes its log every 30 s (xfs_sync_work)."""
EVERY = 10.0
"""Seconds after which what is ready is brought to the disk: with CLAIM, well within a minute."""

OBJECT = pa.struct([
    pa.field("device", pa.dictionary(pa.int32(), pa.string()), False, {"meaning": "the volume's name"}),
    pa.field("kind", pa.dictionary(pa.int8(), pa.string()), False,
        {"meaning": "kind of extent, or of volume where the map knows no more"}),
    pa.field("path", pa.large_binary(), True, {"meaning": "path in the filesystem, the first "
        "of several names; null: has none"}),
    pa.field("part", pa.dictionary(pa.int16(), pa.string()), True,
        {"meaning": "metadata structure or named stream; null: plain content"}),
    pa.field("inode", pa.int64(), True, {"meaning": "number of the inode; null: has none"}),
    pa.field("offset", pa.int64(), False, {"meaning": "first byte touched, on the disk"}),
    pa.field("length", pa.int64(), False, {"meaning": "bytes of the object that were touched"}),
    pa.field("file_offset", pa.int64(), True, {"meaning": "where in the file they begin; null: "
        "means nothing, or is not known"}),
    pa.field("inline", pa.bool_(), False, {"meaning": "lies inside another object's block, "
        "and is touched whenever that is"}),
    pa.field("map", pa.int32(), False, {"meaning": "number of the map that gave the name: 0 for the one "
        "from the start, then those read while the guest ran"}),
    pa.field("older", pa.bool_(), False, {"meaning": "metadata was written between the reading of that map "
        "and the request, and nothing shows that the name is right all the same"}),
])  # fmt: skip
SCHEMA = tables.SCHEMAS["accesses"].append(
    pa.field(
        "objects",
        pa.list_(OBJECT),
        False,
        {
            "meaning": "what the request touched, by place: device, kind, path, part and "
            "inode as in the map; offset and length on the disk; file_offset "
            "where in the file; inline: lies inside another object's block",
        },
    )
)


@dataclass
class _Batch:
    """Requests of one disk that are not written yet, and the pieces that they touched: each with the number
    of its request in the batch."""

    disk: int
    number: int
    accesses: Accesses
    request: Int
    start: Int
    end: Int
    open: Bool
    objects: pa.StructArray
    late: list[tuple[Int, Int, Int, pa.StructArray]] = field(default_factory=list)
    """(request, start, end, object) of pieces that came again."""
    told: list[tuple[Int, Int, Int]] = field(default_factory=list)
    """(request, start, end) of the bytes that they tell of."""

    def is_ready(self, before: int) -> bool:
        """Will nothing come again? Nothing that happened before `before` does."""
        if self.open.any() and int(self.accesses.time_ns[-1]) >= before:
            self._settle()
        return not self.open.any() or int(self.accesses.time_ns[-1]) < before

    def _settle(self) -> None:
        """Open pieces give way to those that came again, as far as these reach: parts of one may come
        apart."""
        if not self.told:
            return
        closed, open = np.flatnonzero(~self.open), np.flatnonzero(self.open)
        left, start, end = self._untold(open)
        request, low, high, objects = zip(
            (self.request[closed], self.start[closed], self.end[closed], self.objects.take(pa.array(closed))),
            *self.late,
            (self.request[open[left]], start, end, _cut(self.objects.take(pa.array(open[left])), start, end)),
            strict=True,
        )
        self.request, self.start, self.end = (np.concatenate(column) for column in (request, low, high))
        self.objects = pa.chunked_array(objects).unify_dictionaries().combine_chunks()
        self.open = np.arange(len(self.request)) >= len(self.request) - len(left)
        self.late, self.told = [], []

    def _untold(self, open: Int) -> tuple[Int, Int, Int]:
        """(number in `open`, start, end) of what of these pieces has not come again."""
        # all requests one after the other
        place = np.cumsum(self.accesses.length) - self.accesses.length - self.accesses.offset
        request, start, end = (np.concatenate(column) for column in zip(*self.told, strict=True))
        told_start, told_end = start + place[request], end + place[request]
        low, high = (side[open] + place[self.request[open]] for side in (self.start, self.end))
        piece, by = Intervals(told_start, told_end).overlaps(low, high)
        left, start, end = complement_by(
            high - low, piece, told_start[by] - low[piece], told_end[by] - low[piece]
        )
        return left, start + self.start[open[left]], end + self.start[open[left]]

    def table(self) -> pa.Table:
        """Its rows."""
        self._settle()
        order = np.lexsort((self.start, self.request))
        bounds = np.searchsorted(self.request[order], np.arange(len(self.accesses) + 1)).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(bounds), self.objects.take(pa.array(order)))
        return self.accesses.table(self.disk).append_column(SCHEMA.field("objects"), lists)


class Writer(Protocol):
    """Takes rows in their order, and the maps that have come since the last ones."""

    def write(self, table: pa.Table, maps: list[dict[str, int]]) -> None:
        """Raises OSError or ArrowException where that can't be done."""


class Trace:
    """Gathers rows and hands them to a writer, or to a Parquet file that is already open.

    Without a resolver their objects stay empty: nobody knows them yet.
    """

    def __init__(self, resolver: Resolver | None, to: "BinaryIO | Writer", often: bool = False) -> None:
        """`often`: not only whole row groups are written, but every few seconds what is ready."""
        self._writer: Writer = to if hasattr(to, "rows") else Parquet(to, about(resolver))  # type: ignore[arg-type, assignment]
        self._often = often
        self._written = time.monotonic()
        self._waiting: list[_Batch] = []
        self._added: dict[int, int] = {}
        self._maps: list[dict[str, int]] = []
        self._known = -1
        self.resolver = resolver
        if resolver:
            self.renew(resolver)

    def renew(self, resolver: Resolver) -> None:
        """Objects are those of another map from now on."""
        self.resolver = resolver
        if resolver.number > self._known:
            self._known = resolver.number
            self._maps.append({"map": resolver.number, "begun_ns": resolver.begun_ns})

    def add(self, disk: int, accesses: Accesses, touched: Touched | None) -> None:
        """Add these rows; writes a row group where enough have come together."""
        if not len(accesses):
            return
        number = self._added.get(disk, 0)
        self._added[disk] = number + len(accesses)
        if self.resolver is None or touched is None:
            self._waiting.append(
                _Batch(disk, number, accesses, EMPTY, EMPTY, EMPTY, EMPTY.astype(bool), pa.array([], OBJECT))
            )
        else:
            open, objects = np.isin(touched.state, OPEN), _objects(self.resolver, touched)
            self._waiting.append(
                _Batch(disk, number, accesses, touched.access, touched.start, touched.end, open, objects)
            )
        if sum(len(batch.accesses) for batch in self._waiting) >= ROW_GROUP:
            self._flush(int(accesses.time_ns[-1]) - CLAIM - MARGIN, ROW_GROUP)

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        """Names for pieces that were open: they take the place of what was known before, unless that is
        written already."""
        if self.resolver is None:
            return
        of_piece = number[touched.access]
        for batch in self._waiting:
            mine = (of_piece >= batch.number) & (of_piece < batch.number + len(batch.accesses))
            if batch.disk == disk and mine.any():
                again = touched.take(mine)
                batch.late.append(
                    (of_piece[mine] - batch.number, again.start, again.end, _objects(self.resolver, again))
                )
                told = (number >= batch.number) & (number < batch.number + len(batch.accesses))
                batch.told.append(
                    (
                        number[told] - batch.number,
                        accesses.offset[told],
                        (accesses.offset + accesses.length)[told],
                    )
                )

    def beat(self) -> None:
        """To be called often: writes what is ready when its time has come."""
        if self._often and time.monotonic() - self._written > EVERY:
            self._flush(time.time_ns() - CLAIM - MARGIN, 1)
            self._written = time.monotonic()

    def _flush(self, before: int, least: int) -> None:
        """Write what is complete, where that is at least so much:
        nothing of it is open, or it was before `before`."""
        kept = sum(len(batch.accesses) for batch in self._waiting)
        ready, count = 0, 0
        for batch in self._waiting:
            if kept - count <= MOST_KEPT and not batch.is_ready(before):
                break
            ready, count = ready + 1, count + len(batch.accesses)
        if count >= least:
            self._write(ready)

    def _write(self, count: int) -> None:
        rows = pa.concat_tables([batch.table() for batch in self._waiting[:count]]).unify_dictionaries()
        self._waiting = self._waiting[count:]
        self._writer.write(rows, self._maps)
        self._maps = []

    def close(self) -> None:
        """Write what is left, and the end of a Parquet file."""
        if self._waiting:
            self._write(len(self._waiting))
        if isinstance(self._writer, Parquet):
            self._writer.close(self._maps)
        elif self._maps:
            self._writer.write(SCHEMA.empty_table(), self._maps)


def about(resolver: Resolver | None) -> dict[str, Any]:
    """What a trace says of itself."""
    return {"version": VERSION, "disks": sizes(resolver.bmap) if resolver else []}


class Parquet:
    """A trace's file."""

    def __init__(self, file: BinaryIO, about: dict[str, Any]) -> None:
        self._writer = pq.ParquetWriter(
            file, SCHEMA.with_metadata({KEY: json.dumps(about)}), compression="zstd"
        )
        self._maps: list[dict[str, int]] = []

    def write(self, table: pa.Table, maps: list[dict[str, int]]) -> None:
        """A row group."""
        self._writer.write_table(table)
        self._maps += maps

    def close(self, maps: list[dict[str, int]]) -> None:
        """The file's end, with all maps that gave names."""
        self._writer.add_key_value_metadata({MAPS_KEY: json.dumps(self._maps + maps)})
        self._writer.close()


def save(rows: Iterable[tuple[pa.Table, list[dict[str, int]]]], about: dict[str, Any], file: BinaryIO) -> int:
    """Make a trace of the rows of a stream: how many there were. Takes the memory of a row group."""
    writer, waiting, count = Parquet(file, about), [], 0
    found: list[dict[str, int]] = []
    for table, maps in rows:
        waiting.append(convert(table, SCHEMA))
        found += maps
        if sum(part.num_rows for part in waiting) >= ROW_GROUP:
            writer.write(pa.concat_tables(waiting).unify_dictionaries(), [])
            waiting = []
        count += table.num_rows
    if waiting:
        writer.write(pa.concat_tables(waiting).unify_dictionaries(), [])
    writer.close(found)
    return count


__all__ = ["KEY", "MAPS_KEY", "OBJECT", "SCHEMA", "VERSION", "Parquet", "Part", "Trace", "about", "save"]


def _objects(resolver: Resolver, touched: Touched) -> pa.StructArray:
    number, volumes = touched.object, resolver.bmap.volumes
    kind = resolver.kind_of(number)
    words = [*tables.KINDS, *dict.fromkeys(volumes.column("kind").to_pylist())]
    of_volume = np.array(
        [words.index(word, len(tables.KINDS)) for word in volumes.column("kind").to_pylist()], np.int64
    )
    volume = resolver.volume_of(number)
    columns = [
        _dictionary(volume.astype(np.int32), volumes.column("name").to_pylist()),
        _dictionary(np.where(kind >= 0, kind, of_volume[volume]).astype(np.int8), words),
        resolver.paths(number),
        resolver.parts(number),
        _nullable(resolver.inode_of(number)),
        pa.array(touched.start),
        pa.array(touched.end - touched.start),
        _nullable(touched.file_offset),
        pa.array(touched.inline),
        pa.array(np.full(len(number), resolver.number, np.int32)),
        pa.array(np.isin(touched.state, (*DOUBTFUL, *OPEN))),  # until they come again, if they do
    ]
    return pa.StructArray.from_arrays(columns, fields=list(OBJECT))


def _cut(objects: pa.StructArray, start: Int, end: Int) -> pa.StructArray:
    """Parts of these objects: bytes [start[i], end[i]) of the disk are what is left of object i."""
    columns = dict(zip((column.name for column in OBJECT), objects.flatten(), strict=True))
    columns["file_offset"] = pc.add(columns["file_offset"], pc.subtract(pa.array(start), columns["offset"]))
    columns |= {"offset": pa.array(start), "length": pa.array(end - start)}
    return pa.StructArray.from_arrays(list(columns.values()), fields=list(OBJECT))


def _nullable(values: Int) -> pa.Array:
    return pa.array(values, mask=values < 0)


def _dictionary(codes: np.ndarray, words: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.string()))
