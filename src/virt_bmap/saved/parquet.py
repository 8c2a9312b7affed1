"""The whole block map in one Parquet file: one column for each table, each a list of that table's rows.

A list holds up to CHUNK rows; the tables' further rows are in the next rows of the
file, where shorter tables have empty lists. So `select unnest(inodes, recursive :=
true) from 'map.parquet'` is the table `inodes` to DuckDB, and no table costs another
one anything. The file's metadata names the disks and the version of the schema.
"""

import json
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from virt_bmap.core.errors import MapError
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

VERSION = 2
KEY = b"virt-bmap"
CHUNK = 1 << 18
"""Rows of a table in one list."""
ROW_GROUP = 4
"""Lists in one row group: a million rows of each table."""
ALIKE = {"volume", "mode", "uid", "gid", "nlink", "flags"}
"""Columns that mostly repeat a value, which LZ4 finds sooner than differences are packed."""


def save(bmap: BlockMap, file: BinaryIO, disks: Sequence[str] | None = None) -> None:
    """Write the map; `disks` are the images' names, kept so that a map can be told from another disk's."""
    from pyarrow.parquet import ParquetWriter  # 20 ms to import, and only this output needs it

    rows = max(1, max(-(-getattr(bmap, name).num_rows // CHUNK) for name in BlockMap.TABLES))
    lists = [_lists(getattr(bmap, name), rows) for name in BlockMap.TABLES]
    about = {
        "version": VERSION,
        "disks": [
            {"image": image, "size": size} for image, size in zip(disks or [], sizes(bmap), strict=False)
        ],
    }
    fields = [
        pa.field(name, found.type, nullable=False) for name, found in zip(BlockMap.TABLES, lists, strict=True)
    ]
    schema = pa.schema(fields, metadata={KEY: json.dumps(about)})
    columns = [
        (f"{name}.list.element.{field.name}", field.type)
        for name in BlockMap.TABLES
        for field in tables.SCHEMAS[name]
    ]
    writer = ParquetWriter(
        file, schema, compression="lz4", write_statistics=False, version="2.6", writer_engine_version="V2",
        use_dictionary=[column for column, kind in columns if pa.types.is_dictionary(kind)],
        column_encoding={
            column: "PLAIN" if column.rpartition(".")[2] in ALIKE else "DELTA_BINARY_PACKED"
            for column, kind in columns if pa.types.is_integer(kind)
        },
    )  # fmt: skip
    writer.write_table(pa.table(lists, schema=schema), row_group_size=ROW_GROUP)
    writer.close()


def _lists(table: pa.Table, rows: int) -> pa.ListArray:
    """The table cut into `rows` lists of up to CHUNK rows."""
    columns = [
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.combine_chunks().columns
    ]
    found = pa.StructArray.from_arrays(columns, fields=list(table.schema))
    offsets = np.minimum(np.arange(rows + 1) * CHUNK, len(found)).astype(np.int32)
    return pa.ListArray.from_arrays(
        tables.arrow(offsets), found, type=pa.list_(pa.field("element", found.type, nullable=False))
    )


def sizes(bmap: BlockMap) -> list[int]:
    """The size of each disk in bytes."""
    return [bmap.size_of(disk) for disk in bmap.disks]


def load(path: str) -> BlockMap:
    """Read a map back. Raises MapError where the file is not one, or is damaged."""
    from virt_bmap.host import inputs

    with inputs.reading(path, "a block map"):
        file = inputs.open_file(path, "a block map")
        if KEY not in (file.schema_arrow.metadata or {}):
            raise MapError(
                f"{path}: is a Parquet file, but not a block map (its metadata has no {KEY.decode()!r})"
            )
        about = inputs.metadata(file, KEY)
        if about.get("version") != VERSION:
            raise MapError(
                f"{path}: is a block map of version {about.get('version')!r}, this program reads version "
                f"{VERSION}: map the disk again"
            )
        found = {name: _table(inputs.rows(file, [name]), name) for name in BlockMap.TABLES}
        tables.check_map(found)
    return BlockMap(**found)


def _table(lists: pa.Table, name: str) -> pa.Table:
    from virt_bmap.host import inputs

    schema, kind = tables.SCHEMAS[name], lists.schema.field(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(
        kind.value_type
    ):
        raise ValueError(f"column {name!r} has the type {kind}")
    flat = [pa.Table.from_struct_array(chunk.flatten()) for chunk in lists.column(name).chunks]
    return tables.recode(inputs.fit(pa.concat_tables(flat) if flat else schema.empty_table(), schema))
