"""Is a file that is there a result of ours? By its first bytes, and for Parquet by its last ones, where its
metadata lie. Cheap, and never more than a guess on the safe side."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable

HEAD, TAIL = 64 << 10, 4 << 20
"""Bytes that are looked at: the metadata of a map with thousands of row groups take some MiB."""
MARK = b"virt-bmap"
"""Begins the keys of our metadata in Parquet and Arrow files."""
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
PAGE = (b"<!doctype html>", b"<title>virt-bmap report</title>")
MAP_LINE = re.compile(rb"[0-9]{1,4} [0-9a-f]{1,16} [0-9a-f]{1,16} [a-z] /")
LOG_LINE = re.compile(rb"(read|write|trim|zero) [a-z] /[^ ]+( |\t|$)")
SUMMARY_LINE = re.compile(rb"/dev/[^ ]+: .* in [0-9.]+ s$")
RANGES_LINE = b"offset,length"

Columns = Callable[[], Iterable[Iterable[str]]]
"""The names of the columns of each result that a command has."""


def is_map(path: str) -> bool:
    """A text map, or tables of ours in Parquet."""
    return is_tables(path) or bool(MAP_LINE.match(_head(path)))


def is_tables(path: str) -> bool:
    """A map, trace, profile or result in Parquet or as Arrow."""
    head = _head(path)
    if head.startswith(PARQUET):
        return MARK in _tail(path)
    return head.startswith((ARROW_FILE, ARROW_STREAM)) and MARK in head


def is_page(path: str) -> bool:
    """A report."""
    head = _head(path)
    return head.startswith(PAGE[0]) and PAGE[1] in head


def is_log(path: str) -> bool:
    """A live log of watch or bmaplogger."""
    return bool(LOG_LINE.match(_first_line(path)))


def is_summary(path: str) -> bool:
    """The closing summary of watch."""
    return bool(SUMMARY_LINE.match(_first_line(path)))


def is_profile_output(path: str) -> bool:
    """A profile, or one of the lists made of it that can be told from other lists."""
    return is_tables(path) or _first_line(path) == RANGES_LINE


def is_result(columns: Columns) -> Callable[[str], bool]:
    """A test for results with these columns: Parquet by its metadata, CSV by its header, JSON lines by the
    names in the first one."""

    def ours(path: str) -> bool:
        return is_tables(path) or _names(_first_line(path)) in {tuple(names) for names in columns()}

    return ours


def _names(line: bytes) -> tuple[str, ...]:
    try:
        text = line.decode()
        found = json.loads(text) if text.startswith("{") else next(csv.reader([text]), [])
    except ValueError:
        return ()
    return tuple(found)


def _first_line(path: str) -> bytes:
    return _head(path).partition(b"\n")[0]


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _tail(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read()
