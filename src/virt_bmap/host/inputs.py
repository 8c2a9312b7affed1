"""The border that saved maps, traces and profiles cross: Parquet files that anyone may have written, as
tables that the code after it may trust.

A file may claim a thousand million rows in a kilobyte (run lengths, dictionaries), have columns of other
types, nulls where there are none, text that is not UTF-8. What passes here has the types of its schema, and
no more values than a file of its size can honestly hold.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from virt_bmap.core.errors import ImageError, MapError
from virt_bmap.host.looked_at import open_looked_at
from virt_bmap.host.pages import Unpacked, unpacked

LIMITS = Unpacked(1 << 25, 256 << 20, 512 << 20), Unpacked(128, 256, 256)
"""What a file may unpack to, and more than that for each of its bytes. Maps of real disks have less than one
value a byte, the most regular one that can be drawn up (extents of one size side by side, nothing else) has
170. Text counts as if all of it were as long as the longest."""


@contextlib.contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """What goes wrong with a file that should be `what`, as MapError, or ImageError where it is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror or 'no such file'}") from error
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise MapError(f"{path}: can't be read as {what}: {words}") from error


def opened(path: str, what: str) -> BinaryIO:
    """A saved file, open for reading.

    Raises ImageError where it is not there, or would have to be waited for (a FIFO, a terminal).
    """
    return os.fdopen(open_looked_at(path, what), "rb")


def open_file(path: str, what: str) -> pq.ParquetFile:
    """A Parquet file that unpacks to no more than its size allows.

    ValueError otherwise; `what` it was to be.
    """
    with opened(path, what) as file:
        data = file.read()
    found, size = unpacked(memoryview(data)), len(data)
    for what, count, free, each in zip(Unpacked._fields, found, *LIMITS, strict=True):
        if count > free + each * size:
            raise ValueError(
                f"it claims {count:,} {what} in a file of {size:,} "
                "bytes: it is damaged, or made to fill memory"
            )
    # the bytes that were looked at, whatever becomes of the file
    return pq.ParquetFile(pa.BufferReader(data))


def rows(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows, row group by row group: Arrow reads dictionaries in lists of no more at a time. Text is
    UTF-8, and codes are in their dictionaries."""
    groups = [file.read_row_group(number, columns=columns) for number in range(file.num_row_groups)]
    found = pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()
    found = found if columns is None else found.select(columns)
    found.validate(full=True)
    return found


def columns_and_metadata(path: str) -> tuple[set[str], dict[bytes, bytes]]:
    """What a Parquet file says of itself: nothing where it is none, or can't be read."""
    try:
        with opened(path, "Parquet") as file:
            schema = pq.read_schema(file)
    except (ImageError, OSError, pa.ArrowException):
        return set(), {}
    return set(schema.names), schema.metadata or {}


def metadata(file: pq.ParquetFile, key: bytes) -> dict[str, Any]:
    """What a file says of itself under `key`, a JSON object; an empty one where it says nothing."""
    about = json.loads((file.schema_arrow.metadata or {}).get(key, b"{}"))
    if not isinstance(about, dict):
        raise ValueError(f"its metadata {key.decode()!r} is not a JSON object")
    return about


def sizes(about: dict[str, Any]) -> list[int]:
    """The sizes of the disks that a file's metadata name, in bytes."""
    found = about.get("disks", [])
    if not isinstance(found, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in found):
        raise ValueError("its metadata does not say how large the disks are")
    return found


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns and types of `schema`, in one
    piece; ValueError or ArrowException where that can't be."""
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise ValueError(f"it has no column {field.name!r}")
            table = table.append_column(field, pa.nulls(len(table), field.type))  # of an older version
    columns = [
        pa.chunked_array(
            [_fit(chunk, field, field.name) for chunk in table.column(field.name).chunks], field.type
        )
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema).unify_dictionaries().combine_chunks()


def _fit(values: pa.Array, field: pa.Field, name: str) -> pa.Array:
    """Values as those of `field`, inside lists and structs, too; `name` for messages."""
    if values.null_count and not field.nullable:
        raise ValueError(f"column {name!r} has nulls")
    kind = field.type
    if pa.types.is_struct(kind):
        if not pa.types.is_struct(values.type):
            raise ValueError(f"column {name!r} has the type {values.type}")
        inner = {found.name: part for found, part in zip(values.type, values.flatten(), strict=True)}
        if missing := [part.name for part in kind if part.name not in inner]:
            raise ValueError(f"column {name!r} has no {missing[0]!r}")
        parts = [_fit(inner[part.name], part, f"{name}.{part.name}") for part in kind]
        return pa.StructArray.from_arrays(parts, fields=list(kind))
    if pa.types.is_list(kind):
        if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
            raise ValueError(f"column {name!r} has the type {values.type}")
        import pyarrow.compute as pc

        ends = pc.cumulative_sum(pc.list_value_length(values).cast(pa.int64()))
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends.cast(pa.int32())])
        return pa.ListArray.from_arrays(offsets, _fit(values.flatten(), kind.value_field, name), type=kind)
    if pa.types.is_dictionary(kind) and not values.type.equals(kind):
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        codes = values.cast(kind.value_type).dictionary_encode()
        return pa.DictionaryArray.from_arrays(codes.indices.cast(kind.index_type), codes.dictionary)
    return values if values.type.equals(kind) else values.cast(kind)
