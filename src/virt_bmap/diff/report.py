"""An attributed delta as a result: a row for each file or piece of metadata and what happened to it, and
these rows added up."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import Int
from virt_bmap.diff import objects as matched
from virt_bmap.diff.changes import CHANGES, FREE, MOVED, UNCHANGED, Attribution
from virt_bmap.model import tables
from virt_bmap.saved.results import field, safe

TEXT, I64 = pa.large_string(), pa.int64()
SCHEMA = pa.schema([
    field("bytes", I64, "changed bytes of the disk, each counted in one row only", "bytes"),
    field("content", I64, "of these, bytes that hold the file's content", "bytes"),
    field("change", TEXT, "what happened, see docs/deltas.md"),
    field("kind", TEXT, "type of the file; or, for what is not a file, the kind of its bytes"),
    field("device", TEXT, "the volume it lies on"),
    field("path", TEXT, "where it is now or, where it is gone, where it was; escaped",
        null="no file, or without a name"),
    field("old_path", TEXT, "where it was; escaped", null="still there"),
    field("part", TEXT, "which piece of metadata", null="a file, free space"),
    field("inode", I64, "its number", null="no file"),
    field("size", I64, "bytes of the file now", "bytes", "not there any more, or no file"),
    field("old_size", I64, "bytes of the file before", "bytes", "was not there, or no file"),
    field("pieces", I64, "separate runs of the disk that hold its content now", "count",
        "not there any more, or no file"),
    field("old_pieces", I64, "separate runs of the disk that held its content before", "count",
        "was not there, or no file"),
])  # fmt: skip
FILES = [word for word in tables.TYPES if word not in ("metadata", "unknown")]
BY = ("file", "directory", "change", "kind", "filesystem")
"""What rows can be added up by; the first leaves them as they are."""
MAX_DEPTH = 1000
"""Levels of directories that can be told apart; a regular expression counts no further."""


def table(found: Attribution) -> pa.Table:
    """The rows of an attribution with their names, most bytes first, as a table of the schema SCHEMA."""
    column = found.rows()
    objects, size = found.objects, column["bytes"]
    file = column["object"] >= 0
    new_row = np.where(file, matched.pick(objects.new_row, column["object"]), -1)
    old_row = np.where(file, matched.pick(objects.old_row, column["object"]), -1)
    kind = _kinds(objects, column["kind"], column["object"])
    path, old_path = _paths(objects, column["object"], old_row, new_row)
    volume = np.where(
        new_row >= 0,
        matched.pick(objects.new.volume, new_row),
        found.words.volume_of_old[matched.pick(objects.old.volume, old_row)],
    )
    volume = np.where(file, volume, column["volume"])
    inode = np.where(
        new_row >= 0, matched.pick(objects.new.inode, new_row), matched.pick(objects.old.inode, old_row)
    )
    columns: list[Any] = [
        size, column["content"], _words(column["change"], CHANGES), kind, _words(volume, found.words.volumes),
        path, old_path, _words(column["part"], found.words.parts), _or_null(inode, file),
        *(_or_null(matched.pick(values, row), row >= 0)
          for side, values_of in ((0, "size"), (0, "pieces"))
          for part, row in ((objects.new, new_row), (objects.old, old_row))
          for values in [getattr(part, values_of)]),
    ]  # fmt: skip
    made = safe(pa.Table.from_arrays([pa.array(values) for values in columns], names=SCHEMA.names)).cast(
        SCHEMA
    )
    return made.take(pa.array(np.lexsort((inode, volume, -size))))


def total(rows: pa.Table) -> int:
    """The bytes of all rows."""
    return int(pc.sum(rows.column("bytes")).as_py() or 0)


def pieces(found: Attribution) -> tuple[tuple[int, int], tuple[int, int]]:
    """For the old and the new map: (files with content of their own, pieces in which it lies)."""
    old, new = (
        (int(np.count_nonzero(side.pieces[mine])), int(side.pieces[mine].sum()))
        for side in (found.objects.old, found.objects.new)
        for mine in [side.type == tables.T_FILE]
    )
    return old, new


def _kinds(objects: matched.Objects, kind: Int, object: Int) -> pa.Array:
    """The type of a file, the kind of what is not a file."""
    words = [*tables.KINDS, *tables.TYPES]
    type = np.where(object >= 0, len(tables.KINDS) + matched.pick(objects.type, object), -1)
    return _words(np.where(kind >= 0, kind, type), words)


def _paths(objects: matched.Objects, object: Int, old_row: Int, new_row: Int) -> tuple[pa.Array, pa.Array]:
    """(path, old path): the old one only where it is another one
    by its own doing, not by that of a directory above it."""
    event = np.where(object >= 0, matched.pick(objects.event, object), matched.NONE)
    gone = event == matched.DELETED
    now = objects.new.path(np.where(gone, -1, new_row))
    before = objects.old.path(np.where((event == matched.RENAMED) | gone | (new_row < 0), old_row, -1))
    renamed = pc.and_(pa.array(event == matched.RENAMED), pc.is_valid(now))
    return pc.coalesce(now, before), pc.if_else(renamed, before, pa.scalar(None, pa.large_binary()))


def _words(codes: Int, words: Any) -> pa.Array:
    """The words of codes, null for -1."""
    return pa.array(list(words), TEXT).take(pa.array(codes, mask=codes < 0))


def _or_null(values: Int, known: np.ndarray) -> pa.Array:
    return pa.array(values, mask=~known)


def shown(rows: pa.Table) -> pa.Table:
    """The rows for a person, without those of what did not change: bytes, change, kind, device, and one name
    that says it all."""
    rows = rows.filter(pc.not_equal(rows.column("change"), CHANGES[UNCHANGED]))
    part = _joined("[", rows.column("part"), "]")
    inode = _joined("[inode ", rows.column("inode").cast(TEXT), "]")
    path = rows.column("path")
    name = pc.coalesce(pc.if_else(is_file(rows), path, part), path, part, inode, pa.scalar("", TEXT))
    was = _joined(" (was ", rows.column("old_path"), ")")
    name = _joined(name, pc.coalesce(was, pa.scalar("", TEXT)))
    return rows.select(["bytes", "change", "kind", "device"]).append_column("name", name)


def _joined(*parts: Any) -> Any:
    """Texts put together, null where one of them is."""
    words = [pa.scalar(part, TEXT) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*words, pa.scalar("", TEXT))


# ---- added up ----------------------------------------------------------------------------------------------


def rolled_up(rows: pa.Table, by: str, depth: int | None = None) -> pa.Table:
    """Rows of `table` added up: columns that say by what, `bytes`, their share of all in per cent, and how
    many files. `depth` cuts the paths of directories."""
    keys = {
        "directory": ["device", "path"],
        "change": ["change"],
        "kind": ["kind"],
        "filesystem": ["device"],
    }[by]
    if by == "directory":
        rows = rows.set_column(rows.schema.get_field_index("path"), "path", directories(rows, depth))
    file = pc.if_else(
        is_file(rows),
        _joined(rows.column("device"), " ", rows.column("inode").cast(TEXT)),
        pa.scalar(None, TEXT),
    )
    summed = (
        rows.append_column("file", file)
        .group_by(keys)
        .aggregate([("bytes", "sum"), ("file", "count_distinct")])
    )
    whole = total(rows)
    size = summed.column("bytes_sum")
    share = pc.multiply(pc.divide(size.cast(pa.float64()), max(1, whole)), 100.0)
    made = pa.table([size, share, summed.column("file_count_distinct"),
            *(summed.column(key) for key in keys)], schema=pa.schema([
        SCHEMA.field("bytes"), field("share", pa.float64(), "part of the whole delta in per cent"),
        field("files", I64, "how many files and directories", "count"),
        *(pa.field(key, TEXT, metadata=SCHEMA.field(key).metadata) for key in keys),
    ]))  # fmt: skip
    return made.sort_by([("bytes", "descending"), *((key, "ascending") for key in keys)])


def directories(rows: pa.Table, depth: int | None) -> pa.ChunkedArray:
    """The directory of each row, at most `depth` levels deep, with a slash at its end; for what is not a
    file, its part or kind in brackets."""
    levels = MAX_DEPTH if depth is None else min(depth, MAX_DEPTH)
    is_directory = pc.and_(pc.equal(rows.column("kind"), "directory"), pc.not_equal(rows.column("path"), "/"))
    path = pc.if_else(is_directory, _joined(rows.column("path"), "/"), rows.column("path"))
    path = pc.replace_substring_regex(path, rf"(?s)^(/(?:[^/]+/){{0,{levels}}}).*$", r"\1")
    part = _joined("[", pc.coalesce(rows.column("part"), rows.column("kind")), "]")
    return pc.coalesce(path, pc.if_else(is_file(rows), pa.scalar("[without a name]", TEXT), part))


def is_file(rows: pa.Table) -> pa.ChunkedArray:
    """Is a row that of a file, directory or the like, rather
    than of metadata that happens to have an inode?"""
    return pc.and_(pc.is_valid(rows.column("inode")), pc.is_in(rows.column("kind"), pa.array(FILES, TEXT)))


def idle_share(rows: pa.Table) -> dict[str, int]:
    """Bytes of the delta that no backup would have needed: free
    space, moved data, unchanged bytes of changed clusters."""
    change = rows.column("change")
    return {CHANGES[code]: pc.sum(pc.if_else(pc.equal(change, CHANGES[code]), rows.column("bytes"),
                0)).as_py() or 0
            for code in (FREE, MOVED, UNCHANGED)}  # fmt: skip
