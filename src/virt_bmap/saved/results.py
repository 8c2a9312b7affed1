"""Results of commands, written in one place: a table for people, JSON lines, CSV, Parquet.

A result is an Arrow table. A field may say in its metadata what it `meaning`s, and `unit`: bytes and count
get separators of thousands for people. Text that comes from a disk passes through `safe` first, so that no
output carries control characters; lists and structs become JSON where a format has none.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import pyarrow as pa

from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape_all
from virt_bmap.core.printable import printable, to_json
from virt_bmap.host.files import replacing

ENDINGS = (".csv", ".parquet", ".jsonl")
"""What `save` writes, by the end of the file's name."""
KEY = b"virt-bmap-result"
"""In the metadata of Parquet files: whose they are."""
BATCH = 1 << 16
"""Rows that are turned into Python objects at a time."""
UNITS = ("bytes", "count")


def field(name: str, kind: pa.DataType, meaning: str, unit: str = "", null: str = "") -> pa.Field:
    """A column of a result; `null` says what a missing value means, where there may be one."""
    about = {"meaning": f"{meaning}; null: {null}" if null else meaning} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=bool(null), metadata=about)


def safe(table: pa.Table) -> pa.Table:
    """The table with every text, name and dictionary as escaped
    text, also inside lists and structs; all else as it is."""
    for at, about in enumerate(table.schema):
        column = table.column(at)
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        column = _safe(column)
        table = table.set_column(at, about.with_type(column.type), column)
    return table


def _safe(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
        values = values.cast(pa.large_binary())
    elif pa.types.is_struct(kind):
        fields = [values.type.field(at) for at in range(kind.num_fields)]
        inner = [_safe(values.field(at)) for at in range(kind.num_fields)]
        mended = [about.with_type(found.type) for about, found in zip(fields, inner, strict=True)]
        return pa.StructArray.from_arrays(inner, fields=mended, mask=values.is_null())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        made = pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray
        return made.from_arrays(
            values.offsets, _safe(values.values), mask=values.is_null() if values.null_count else None
        )
    if _is_text(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return escape_all(values.cast(pa.large_binary()))
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# ---- files -------------------------------------------------------------------------------------------------


def check_name(path: str) -> None:
    """UsageError where `save` would not know what to write: asked before a long job is begun."""
    if not path.endswith(ENDINGS):
        raise UsageError(
            f"{path}: the end of the name says what to write: {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        )


def save(table: pa.Table, path: str) -> None:
    """Write all rows to a file, CSV, Parquet or JSON lines by the end of its name.

    The file appears whole or not at all.
    """
    check_name(path)
    with replacing(path) as file:
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            about = {**(table.schema.metadata or {}), KEY: b"1"}
            pq.write_table(table.replace_schema_metadata(about), file, compression="zstd")
        elif path.endswith(".csv"):
            from pyarrow import csv

            csv.write_csv(_no_formulas(_flat(table)), file, csv.WriteOptions(quoting_style="needed"))
        else:
            for line in json_lines(table):
                file.write(f"{line}\n".encode())


def _flat(table: pa.Table) -> pa.Table:
    """Lists and structs as JSON text."""
    for at, about in enumerate(table.schema):
        if pa.types.is_nested(about.type):
            words = [None if value is None else _json(value) for value in table.column(at).to_pylist()]
            table = table.set_column(
                at, about.with_type(pa.large_string()), pa.array(words, pa.large_string())
            )
        elif pa.types.is_dictionary(about.type):
            table = table.set_column(
                at, about.with_type(about.type.value_type), table.column(at).cast(about.type.value_type)
            )
    return table


FORMULA = "^['=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]"
"""How text begins that a spreadsheet computes, the wide letters included, and with an apostrophe, which is
put before it. Source: OWASP, CSV Injection."""


def _no_formulas(table: pa.Table) -> pa.Table:
    """Text that a spreadsheet would take for a formula with an apostrophe before it; whoever drops the first
    apostrophe of a text has it back. Numbers stay numbers."""
    import pyarrow.compute as pc

    for at, about in enumerate(table.schema):
        if _is_text(about.type):
            guarded = pc.replace_substring_regex(table.column(at), f"({FORMULA})", "'\\1")
            table = table.set_column(at, about, guarded)
    return table.rename_columns([re.sub(f"({FORMULA})", r"'\1", name) for name in table.column_names])


def json_lines(table: pa.Table) -> Iterator[str]:
    """One JSON object for each row, without the end of line."""
    for at in range(0, table.num_rows, BATCH):
        for row in table.slice(at, BATCH).to_pylist():
            yield _json(row)


def _json(value: Any) -> str:
    """JSON has no word for what is not a number; what it has no type for (dates, decimals) becomes text."""
    try:
        return to_json(value, str, allow_nan=False)
    except ValueError:
        return to_json(_finite(value), str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- people ------------------------------------------------------------------------------------------------


def show(table: pa.Table, out: TextIO, columns: Sequence[str] | None = None, limit: int | None = None) -> int:
    """Write the first `limit` rows as a table, fitted to the terminal's width where `out` is one; how many
    rows were left out."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = _flat((table if columns is None else table.select(columns)).slice(0, limit))
    cells = [
        [_cell(value, about) for value in shown.column(at).to_pylist()]
        for at, about in enumerate(shown.schema)
    ]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for about in shown.schema:
        right = pa.types.is_integer(about.type) or pa.types.is_floating(about.type)
        # a path is worth more room than a number, and must not be cut: the end of it is what tells
        made.add_column(
            Text(printable(about.name.replace("_", " "))),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    for row in zip(*cells, strict=True):
        made.add_row(*map(Text, row))
    is_terminal = out.isatty()
    wide = sum(
        2 + max(map(cell_len, [printable(about.name), *column]))
        for about, column in zip(shown.schema, cells, strict=True)
    )
    console = Console(
        file=out, width=None if is_terminal else max(1, wide), highlight=False, emoji=False, markup=False
    )
    with console.capture() as text:
        console.print(made)
    out.writelines(f"{line.rstrip()}\n" for line in text.get().splitlines())
    left: int = table.num_rows - shown.num_rows
    return left


def _cell(value: Any, about: pa.Field) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool) and _unit(about) in UNITS:
        return f"{value:,}"
    return printable(str(value))


def _unit(about: pa.Field) -> str:
    return ((about.metadata or {}).get(b"unit") or b"").decode()
