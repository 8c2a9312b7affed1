"""The trace: the table `accesses` with the objects that each request touched, written as it grows.

One row for each request. The metadata of the file says of which disks it is. The column `objects` is a list: `SELECT o.path, sum(o.length) FROM (SELECT unnest(objects) AS o FROM 'trace.parquet') GROUP BY 1`.
"""

import json
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from virt_bmap import tables
from virt_bmap.arrays import Bool, Int
from virt_bmap.outputs.parquet import sizes
from virt_bmap.watch.accesses import Accesses
from virt_bmap.watch.naming import CLAIM
from virt_bmap.watch.resolve import HELD, OLDER, Resolver, Touched

KEY = b"virt-bmap-trace"
MAPS_KEY = b"virt-bmap-maps"
VERSION = 1
ROW_GROUP = 1 << 17
"""Requests that are kept in memory before they are written."""
MOST_KEPT = 1 << 19
"""Requests that are kept at most while some of them wait for their owners: some 200 MiB."""
MARGIN = 1_000_000_000
"""ns that a name may take from being known to coming here."""

OBJECT = pa.struct([
    pa.field("device", pa.dictionary(pa.int32(), pa.string()), False, {"meaning": "the volume's name"}),
    pa.field("kind", pa.dictionary(pa.int8(), pa.string()), False, {"meaning": "kind of extent, or of volume where the map knows no more"}),
    pa.field("path", pa.large_binary(), True, {"meaning": "path in the filesystem, the first of several names; null: has none"}),
    pa.field("part", pa.dictionary(pa.int16(), pa.string()), True, {"meaning": "metadata structure or named stream; null: plain content"}),
    pa.field("inode", pa.int64(), True, {"meaning": "number of the inode; null: has none"}),
    pa.field("offset", pa.int64(), False, {"meaning": "first byte touched, on the disk"}),
    pa.field("length", pa.int64(), False, {"meaning": "bytes of the object that were touched"}),
    pa.field("file_offset", pa.int64(), True, {"meaning": "where in the file they begin; null: means nothing, or is not known"}),
    pa.field("inline", pa.bool_(), False, {"meaning": "lies inside another object's block, and is touched whenever that is"}),
    pa.field("map", pa.int32(), False, {"meaning": "number of the map that gave the name: 0 for the one from the start, then those read while the guest ran"}),
    pa.field("older", pa.bool_(), False, {"meaning": "metadata was written between the reading of that map and the request: the name may be out of date"}),
])  # fmt: skip
SCHEMA = tables.SCHEMAS["accesses"].append(
    pa.field(
        "objects",
        pa.list_(OBJECT),
        False,
        {
            "meaning": "what the request touched, by place: device, kind, path, part and inode as in the map; offset and length on the disk; "
            "file_offset where in the file; inline: lies inside another object's block",
        },
    )
)


@dataclass
class _Batch:
    """Requests of one disk that are not written yet, and the pieces that they touched: each with the number of its request in the batch."""

    disk: int
    number: int
    accesses: Accesses
    request: Int
    start: Int
    held: Bool
    objects: list[pa.StructArray]
    late: list[tuple[Int, Int]] = field(default_factory=list)
    """(request, start) of pieces that came again, behind the others in `objects`."""

    def table(self) -> pa.Table:
        """Its rows. A held piece gives way to those that came again from the same byte on."""
        request = np.concatenate([self.request, *(request for request, _ in self.late)])
        start = np.concatenate([self.start, *(start for _, start in self.late)])
        held = np.append(self.held, np.zeros(len(request) - len(self.held), bool))
        late = np.arange(len(request)) >= len(self.held)
        order = np.lexsort((start, request))
        if late.any():
            new = np.append(True, (np.diff(request[order]) != 0) | (np.diff(start[order]) != 0))
            again = np.logical_or.reduceat(late[order], np.flatnonzero(new))[np.cumsum(new) - 1]
            order = order[~(held[order] & again)]
        objects = pa.chunked_array(self.objects).unify_dictionaries().combine_chunks().take(pa.array(order))
        bounds = np.searchsorted(request[order], np.arange(len(self.accesses) + 1)).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(bounds), objects)
        return self.accesses.table(self.disk).append_column(SCHEMA.field("objects"), lists)


class Trace:
    """Writes rows to a Parquet file that is already open. Without a resolver their objects stay empty: nobody knows them yet."""

    def __init__(self, resolver: Resolver | None, file: BinaryIO) -> None:
        about = {"version": VERSION, "disks": sizes(resolver.bmap) if resolver else []}
        self._writer = pq.ParquetWriter(file, SCHEMA.with_metadata({KEY: json.dumps(about)}), compression="zstd")
        self._waiting: list[_Batch] = []
        self._added: dict[int, int] = {}
        self._maps: list[dict[str, int]] = []
        self.resolver = resolver
        if resolver:
            self.renew(resolver)

    def renew(self, resolver: Resolver) -> None:
        """Objects are those of another map from now on."""
        self.resolver = resolver
        self._maps.append({"map": resolver.number, "begun_ns": resolver.begun_ns})

    def add(self, disk: int, accesses: Accesses, touched: Touched | None) -> None:
        """Add these rows; writes a row group where enough have come together."""
        if not len(accesses):
            return
        number = self._added.get(disk, 0)
        self._added[disk] = number + len(accesses)
        if self.resolver is None or touched is None:
            none = np.zeros(0, np.int64)
            self._waiting.append(_Batch(disk, number, accesses, none, none, none.astype(bool), [pa.array([], OBJECT)]))
        else:
            held, objects = touched.state == HELD, _objects(self.resolver, touched)
            self._waiting.append(_Batch(disk, number, accesses, touched.access, touched.start, held, [objects]))
        self._flush(int(accesses.time_ns[-1]) - CLAIM - MARGIN)

    def late(self, disk: int, number: Int, accesses: Accesses, touched: Touched) -> None:
        """Names for pieces that were held: they take the place of what was known before, unless that is written already."""
        of_piece = number[touched.access]
        for batch in self._waiting:
            mine = (of_piece >= batch.number) & (of_piece < batch.number + len(batch.accesses))
            if self.resolver and batch.disk == disk and mine.any():
                batch.late.append((of_piece[mine] - batch.number, touched.start[mine]))
                batch.objects.append(_objects(self.resolver, touched.take(mine)))

    def _flush(self, before: int) -> None:
        """Write a row group of what is complete: nothing was held, or that was before `before`."""
        kept = sum(len(batch.accesses) for batch in self._waiting)
        if kept < ROW_GROUP:
            return
        ready, count = 0, 0
        for batch in self._waiting:
            if batch.held.any() and batch.accesses.time_ns[-1] >= before and kept - count <= MOST_KEPT:
                break
            ready, count = ready + 1, count + len(batch.accesses)
        if count >= ROW_GROUP:
            self._write(ready)

    def _write(self, count: int) -> None:
        self._writer.write_table(pa.concat_tables([batch.table() for batch in self._waiting[:count]]).unify_dictionaries())
        self._waiting = self._waiting[count:]

    def close(self) -> None:
        """Write what is left and the file's end."""
        if self._waiting:
            self._write(len(self._waiting))
        self._writer.add_key_value_metadata({MAPS_KEY: json.dumps(self._maps)})
        self._writer.close()


def _objects(resolver: Resolver, touched: Touched) -> pa.StructArray:
    number, volumes = touched.object, resolver.bmap.volumes
    kind = resolver.kind_of(number)
    words = [*tables.KINDS, *dict.fromkeys(volumes.column("kind").to_pylist())]
    of_volume = np.array([words.index(word, len(tables.KINDS)) for word in volumes.column("kind").to_pylist()], np.int64)
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
        pa.array(touched.state == OLDER),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(OBJECT))


def _nullable(values: Int) -> pa.Array:
    return pa.array(values, mask=values < 0)


def _dictionary(codes: np.ndarray, words: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.string()))
