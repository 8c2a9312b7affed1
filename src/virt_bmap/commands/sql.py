"""virt-bmap sql: ask a saved map or trace anything."""

import argparse
import sys

from virt_bmap.commands.common import add_result_options, emit
from virt_bmap.commands.paths import INPUT, Input
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.show import sql

HELP = "ask saved maps, traces and results in SQL (DuckDB)"
LISTED = """
    select case when table_schema = 'main' then '' else table_schema || '.' end || table_name as "table",
           column_name as "column", lower(data_type) as type
    from information_schema.columns where table_name not like '% as given'
    order by table_schema, table_name, ordinal_position
"""


def _file_of(source: str) -> str:
    """The file in [NAME=]FILE; a query is hardly ever the name of a file."""
    return sql.parse_source(source)[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "query",
        metavar="QUERY",
        nargs="?",
        type=Input(_file_of),
        help="one select, in DuckDB's SQL; without --file and --tables the first argument",
    )
    parser.add_argument(
        "source",
        metavar="[NAME=]FILE",
        nargs="*",
        type=Input(_file_of),
        help="a saved map, a trace, or a result in Parquet or CSV; the "
        "tables of a named one are NAME.files, NAME.extents, ...",
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="QUERY-FILE",
        type=INPUT,
        help="read the query from a file; - is standard input",
    )
    parser.add_argument("--tables", action="store_true", help="list the tables and their columns instead")
    add_result_options(parser, list)


def run(args: argparse.Namespace) -> int:
    sources = [*([args.query] if args.query is not None and (args.file or args.tables) else []), *args.source]
    query = LISTED if args.tables else args.query if args.file is None else _read(args.file)
    if not query or not query.strip():
        raise UsageError(
            "sql needs a query and the files it is about: "
            "virt-bmap sql 'select count(*) from files' map.parquet"
        )
    if not sources:
        raise UsageError(
            "sql needs at least one file: a saved map (virt-bmap -o map.parquet DISK), a trace or a result"
        )
    database = sql.connect([sql.parse_source(text) for text in sources], "" if args.tables else query)
    emit(args, sql.ask(database, query))
    return 0


def _read(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not text in UTF-8 (byte {error.start:#x})") from error
