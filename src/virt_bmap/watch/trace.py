"""The trace: the table `accesses` with the objects that each request touched, written as it grows.

One row for each request. The metadata of the file says of which disks it is. The column `objects` is a list: `SELECT o.path, sum(o.length) FROM (SELECT unnest(objects) AS o FROM 'trace.parquet') GROUP BY 1`.
"""

import json
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from virt_bmap import tables
from virt_bmap.arrays import Int
from virt_bmap.outputs.parquet import sizes
from virt_bmap.watch.accesses import Accesses
from virt_bmap.watch.resolve import Resolver, Touched

KEY = b"virt-bmap-trace"
VERSION = 1
ROW_GROUP = 1 << 17
"""Requests that are kept in memory before they are written."""

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


class Trace:
    """Writes rows to a Parquet file that is already open. Without a resolver their objects stay empty: nobody knows them yet."""

    def __init__(self, resolver: Resolver | None, file: BinaryIO) -> None:
        self.resolver = resolver
        about = {"version": VERSION, "disks": sizes(resolver.bmap) if resolver else []}
        self._writer = pq.ParquetWriter(file, SCHEMA.with_metadata({KEY: json.dumps(about)}), compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, disk: int, accesses: Accesses, touched: Touched | None) -> None:
        """Add these rows; writes a row group where enough have come together."""
        if not len(accesses):
            return
        if self.resolver is None or touched is None:
            objects = pa.ListArray.from_arrays(pa.array(np.zeros(len(accesses) + 1, np.int32)), pa.array([], OBJECT))
        else:
            bounds = np.searchsorted(touched.access, np.arange(len(accesses) + 1)).astype(np.int32)
            objects = pa.ListArray.from_arrays(pa.array(bounds), _objects(self.resolver, touched))
        self._waiting.append(accesses.table(disk).append_column(SCHEMA.field("objects"), objects))
        self._rows += len(accesses)
        if self._rows >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).unify_dictionaries())
            self._waiting, self._rows = [], 0

    def close(self) -> None:
        """Write what is left and the file's end."""
        self._flush()
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
    ]
    return pa.StructArray.from_arrays(columns, fields=list(OBJECT))


def _nullable(values: Int) -> pa.Array:
    return pa.array(values, mask=values < 0)


def _dictionary(codes: np.ndarray, words: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.string()))
