"""Saved maps, traces and results as tables of an SQL database in memory (DuckDB).

A map gives its own tables (docs/data-model.md) and `files`, one row for each path; a trace gives `accesses`
and `touched`, one row for each object that a request touched; any other Parquet or CSV file one table, named
after the file. Text that comes from a disk is escaped as in the text map, so it is text even where a name
isn't. The database reaches no file or network: a query sees the tables and nothing else.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.accesses import traces
from virt_bmap.accesses.traces import is_trace
from virt_bmap.core.errors import MapError, MissingTool, UsageError
from virt_bmap.host import inputs, signals
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved import parquet, results
from virt_bmap.survey.maps import is_saved, load

TABLE = "a table"
"""What a file is to be."""
FENCE = {
    "enable_external_access": "false", "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false", "python_enable_replacements": "false",
}  # fmt: skip
"""A query is text from somewhere: it must not read, write or load what it was not given."""

FILES = """
    select device, path, type, size, coalesce(allocated, 0)::bigint as allocated,
           coalesce(fragments, 0)::bigint as fragments, make_timestamp_ns(mtime_ns) as mtime,
           mode, uid, gid, nlink, flags, volume, inode
    from {paths} join {inodes} using (volume, inode) left join (
        select volume, inode, sum(length) as allocated, count(*) as fragments
        from {extents} where kind in ('data', 'unwritten', 'directory') and inode is not null
        group by volume, inode
    ) using (volume, inode)
"""
"""The view `files`: a file with several names has a row for each."""
TOUCHED = """
    select disk, time_ns, op, touched.*
    from (select disk, time_ns, op, unnest(objects) as touched from {accesses})
"""


def parse_source(text: str) -> tuple[str, str]:
    """(name, path) of `[NAME=]FILE`; '' where no name is given.

    A file that exists under the whole text is that file.
    """
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.+)", text)
    return ("", text) if not match or Path(text).exists() else (match[1], match[2])


def connect(sources: Sequence[tuple[str, str]], query: str = "") -> Any:
    """A DuckDB connection with the tables of (name, path)
    sources, those of a named one in a schema of that name.

    `files` is joined only if the word stands in `query`, or if there is none: paths take longer than all
    else. Raises UsageError where two sources give tables of one name, ImageError and MapError where a file
    can't be read, MissingTool without DuckDB.
    """
    try:
        # an exception while DuckDB makes its classes ends the process: C++ lets none through
        with signals.held():
            import duckdb
    except ImportError as error:
        raise MissingTool("sql needs DuckDB, which is not installed: pip install 'virt-bmap[sql]'") from error
    database = duckdb.connect(config=FENCE)
    wanted = not query or re.search(r"\bfiles\b", query, re.IGNORECASE) is not None
    given: dict[str, str] = {}
    for schema, path in sources:
        for name, table in _tables(path, wanted):
            whole = f"{schema}.{name}" if schema else name
            if whole in given:
                raise UsageError(
                    f"{path} and {given[whole]} both have a table {name}: give "
                    f"them names, as in new={path}, and ask for new.{name}"
                )
            given[whole] = path
            _add(database, schema, name, table)
    database.execute("set lock_configuration = true")
    return database


def _add(database: Any, schema: str, name: str, table: pa.Table | str) -> None:
    """A table under its name; a view is SQL with the names of others in braces."""
    if schema:
        database.execute(f'create schema if not exists "{schema}"')
    prefix = f'"{schema}".' if schema else ""
    if isinstance(table, str):
        source = re.sub(r"\{(\w+)\}", lambda match: f'{prefix}"{match[1]}"', table)
    else:
        source = f'select * from "{schema} {name} as given"'
        database.register(f"{schema} {name} as given", table)
    database.execute(f'create view {prefix}"{name}" as {source}')


def _tables(path: str, with_files: bool) -> Iterator[tuple[str, pa.Table | str]]:
    """The tables of one file, and the views over them."""
    if path.endswith(".csv"):
        yield _stem(path), results.safe(_csv(path))
        return
    if is_saved(path) and not _is_other_parquet(path):
        bmap = load(path)
        for name in BlockMap.TABLES:
            yield name, results.safe(getattr(bmap, name))
        if with_files:
            yield "paths", results.safe(_paths(bmap))
            yield "files", FILES
        return
    if is_trace(path):
        yield "accesses", results.safe(traces.read(path).rows)
        yield "touched", TOUCHED
    else:
        yield _stem(path), results.safe(_parquet(path))


def _paths(bmap: BlockMap) -> pa.Table:
    """(device, volume, inode, path): a row for each path
    of each filesystem, the names of text maps included."""
    device = bmap.volumes.column("name").to_pylist()
    pieces = [(volume, *bmap.paths(volume)) for volume in bmap.filesystems.column("volume").to_pylist()]
    schema = pa.schema(
        [("device", pa.string()), ("volume", pa.int32()), ("inode", pa.int64()), ("path", pa.large_binary())]
    )
    made = [
        pa.table([pa.repeat(device[volume], len(inode)), tables.arrow(np.full(len(inode), volume, np.int32)),
                tables.arrow(inode), path], schema=schema)
        for volume, inode, path in pieces
    ]  # fmt: skip
    return pa.concat_tables(made) if made else schema.empty_table()


def _stem(path: str) -> str:
    """A table's name from its file's."""
    return re.sub(r"\W", "_", Path(path).stem) or "data"


def _is_other_parquet(path: str) -> bool:
    with _readable(path):
        with inputs.opened(path, TABLE) as file:
            if file.read(4) != b"PAR1":
                return False
        return parquet.KEY not in (inputs.open_file(path, TABLE).schema_arrow.metadata or {})


def _parquet(path: str) -> pa.Table:
    with _readable(path):
        with inputs.opened(path, TABLE) as file:
            if file.read(4) != b"PAR1":
                raise MapError(
                    f"{path}: is not a saved map, a trace, Parquet or CSV; "
                    f"map a disk first: virt-bmap -o map.parquet {path}"
                )
        return inputs.rows(inputs.open_file(path, TABLE))


def _csv(path: str) -> pa.Table:
    from pyarrow import csv

    with _readable(path), inputs.opened(path, TABLE) as file:
        return csv.read_csv(file)


def _readable(path: str) -> AbstractContextManager[None]:
    return inputs.reading(path, TABLE)


def ask(database: Any, query: str) -> pa.Table:
    """The result of the query, of its last statement if there are several.

    Raises UsageError with DuckDB's own words where it is wrong.
    """
    import duckdb

    try:
        found = database.sql(query)
        if found is None:
            raise UsageError("the query gives no rows: end it with a select")
        return _printable(found.to_arrow_table())
    except duckdb.Error as error:
        raise UsageError(f"the query can't be answered: {_one_line(str(error))}") from error


def _printable(table: pa.Table) -> pa.Table:
    """Bytes that a query made as escaped text; text is safe already and must not be escaped twice."""
    for at, about in enumerate(table.schema):
        if pa.types.is_binary(about.type) or pa.types.is_large_binary(about.type):
            safe = results.safe(table.select([at])).column(0)
            table = table.set_column(at, about.with_type(safe.type), safe)
    return table


def _one_line(message: str) -> str:
    """DuckDB's words without its drawing of the place, which takes lines of its own."""
    lines = [line.strip() for line in message.splitlines()]
    drawing = next((at for at, line in enumerate(lines) if re.match(r"LINE \d+:", line)), len(lines))
    return " ".join(line for line in lines[:drawing] if line)
