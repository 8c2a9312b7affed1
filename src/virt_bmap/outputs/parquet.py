"""The whole block map in one Parquet file: one column for each table, row i of the column `inodes` is row i of the table `inodes`.

Shorter tables end in nulls, so `select unnest(extents) from 'map.parquet' where extents is not null` is the table `extents` to DuckDB, and pandas and Polars
read single tables by column. The file's metadata names the disks and the version of the schema.
"""

import json
from typing import Any, BinaryIO

import pyarrow as pa

from virt_bmap import tables
from virt_bmap.blockmap import BlockMap
from virt_bmap.errors import MapError

VERSION = 1
KEY = b"virt-bmap"
ROW_GROUP = 1 << 20


def save(bmap: BlockMap, file: BinaryIO, disks: list[str] | None = None) -> None:
    """Write the map; `disks` are the images' names, kept so that a map can be told from another disk's."""
    import pyarrow.parquet as pq

    columns = {name: getattr(bmap, name) for name in BlockMap.TABLES}
    longest = max(table.num_rows for table in columns.values())
    about = {
        "version": VERSION,
        "disks": [{"image": image, "size": size} for image, size in zip(disks or [], sizes(bmap), strict=False)],
    }
    schema = pa.schema(
        [pa.field(name, _struct(name), metadata={b"rows": str(columns[name].num_rows)}) for name in columns],
        metadata={KEY: json.dumps(about)},
    )
    arrays = [_padded(table, schema.field(name).type, longest) for name, table in columns.items()]
    pq.write_table(
        pa.table(arrays, schema=schema), file, row_group_size=ROW_GROUP, compression="lz4", use_dictionary=False, write_statistics=False,
    )  # fmt: skip


def sizes(bmap: BlockMap) -> list[int]:
    """The size of each disk in bytes."""
    return [bmap.volumes.column("size")[disk].as_py() for disk in bmap.disks]


def _struct(name: str) -> pa.StructType:
    """The table's schema as one column; its fields may be null where the table has ended."""
    return pa.struct([field.with_nullable(True) for field in tables.SCHEMAS[name]])


def _padded(table: pa.Table, kind: pa.StructType, rows: int) -> pa.ChunkedArray:
    table = table.combine_chunks()
    columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in table.columns]
    found = pa.StructArray.from_arrays(columns, fields=list(kind))
    return pa.chunked_array([found, pa.nulls(rows - len(found), kind)] if len(found) < rows else [found])


def load(path: str) -> BlockMap:
    """Read a map back. Raises MapError where the file is not one, or is damaged."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if KEY not in (file.schema_arrow.metadata or {}):
            raise MapError(f"{path}: is a Parquet file, but not a block map (its metadata has no {KEY.decode()!r})")
        about: dict[str, Any] = json.loads(file.schema_arrow.metadata[KEY])
        if about.get("version") != VERSION:
            raise MapError(
                f"{path}: is a block map of version {about.get('version')}, this program reads version {VERSION}: map the disk again"
            )
        found = {name: _table(file, name) for name in BlockMap.TABLES}
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise MapError(f"{path}: can't be read as a block map: {str(error).splitlines()[0]}") from error
    return BlockMap(**found)


def _table(file: Any, name: str) -> pa.Table:
    schema = tables.SCHEMAS[name]
    column = file.read(columns=[name]).column(name)
    rows = int(file.schema_arrow.field(name).metadata[b"rows"])
    column = column.slice(0, rows)
    flat = [chunk.field(index) for chunk in column.chunks for index in range(len(schema))]
    arrays = [pa.chunked_array(flat[index :: len(schema)], field.type) for index, field in enumerate(schema)]
    return tables.recode(pa.Table.from_arrays(arrays, schema=schema).unify_dictionaries().combine_chunks())
