"""Saved traces: read back as columns, and made from the logs of other tools.

A trace is Parquet with a row for each request, see docs/data-model.md. What the requests touched is taken
from the trace itself, which knows best; where it does not say, a map is asked.
"""

import os
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from virt_bmap.accesses import stream
from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.logs.text import AccessLog
from virt_bmap.accesses.resolve import BATCH, IDENTITY, Resolver, identify
from virt_bmap.accesses.trace import KEY, OBJECT, SCHEMA, VERSION, Trace, save
from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.errors import ImageError, MapError
from virt_bmap.core.escape import escape_all
from virt_bmap.host import inputs
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved.parquet import sizes

MOST_DISKS = 1 << 16
LATEST = 1 << 62
"""ns since 1970, in 2116: sums of two times stay in 64 bits."""
CHECKED = 10_000
"""Objects of a trace whose names are compared with a map's."""


READ = tuple(field for field in OBJECT if field.name not in ("map", "older"))
"""What a trace must say of an object: the first ones did not say which map a name is of."""


class Saved(NamedTuple):
    """A trace as it lies in its file: the rows, and the sizes of the disks it is of (empty: not known)."""

    name: str
    rows: pa.Table
    sizes: list[int]


class Run(NamedTuple):
    """One trace: its accesses with their disks, and the pieces of objects that they touched, by access and
    then by place.

    Bytes [start, end) of access `access` belong to object `object` of the common list, at `file_offset` in
    the file (-1: means nothing).
    """

    name: str
    disk: Int
    accesses: Accesses
    access: Int
    object: Int
    start: Int
    end: Int
    file_offset: Int


class Traces(NamedTuple):
    """Traces with the objects that any of them touched: a table of device,
    kind, path, part (as in a trace), `inode` (of the first mention, null:
    none), and `size` in bytes (null: no file, or no map was there to ask)."""

    runs: list[Run]
    objects: pa.Table
    sizes: list[int]
    """Of the disks, in bytes; empty where no trace says."""

    def labels(self) -> list[str]:
        """A name for each object that people can read: the path, or the metadata in brackets."""
        path = escape_all(self.objects.column("path").combine_chunks()).to_pylist()
        columns = (path, *(self.objects.column(name).to_pylist() for name in ("part", "inode", "kind")))
        return [label(*row) for row in zip(*columns, strict=True)]


def label(path: str | None, part: str | None, inode: int | None, kind: str) -> str:
    """An object's name: `/etc/passwd`, `/a:[stream]`, `[superblock]`, `[inode 12]`, `[free]`."""
    if path is not None:
        return f"{path}:[{part}]" if part is not None and kind in ("data", "unwritten") else path
    return f"[{part}]" if part is not None else f"[inode {inode}]" if inode is not None else f"[{kind}]"


# ---- reading -----------------------------------------------------------------------------------------------


def is_trace(path: str) -> bool:
    """Is this a Parquet file with the columns of a trace, or the stream of one that grows or was left?"""
    return (
        {"offset", "op", "objects"} <= inputs.columns_and_metadata(path)[0]
        or stream.is_stream(path)
        or _only_left(path)
    )


def _only_left(path: str) -> bool:
    """Is there no trace of that name, but what a killed watch left of it?"""
    return not os.path.exists(path) and stream.is_stream(path + stream.ENDING)


def read(path: str) -> Saved:
    """The rows of a trace, or of the stream that a killed watch left of one.

    Raises ImageError where it can't be read, MapError where it is not one, is damaged, or has no access in
    it."""
    if _only_left(path):
        raise ImageError(
            f"{path}: is not there ({path + stream.ENDING} was left by a watch that was killed, and "
            "can be read)"
        )
    with inputs.reading(path, "a trace"):
        rows, about = _of_stream(path) if stream.is_stream(path) else _of_parquet(path)
        if about.get("version", VERSION) != VERSION:
            raise MapError(
                f"{path}: is a trace of version {about['version']!r}, this program reads version {VERSION}"
            )
        rows = inputs.fit(rows, _schema(rows.schema.field("objects").type))
        sizes = inputs.sizes(about)
    if not rows.num_rows:
        raise MapError(f"{path}: is an empty trace: nothing was read or written")
    _check_numbers(path, rows)
    return Saved(path, rows, sizes)


def _of_stream(path: str) -> tuple[pa.Table, dict[str, Any]]:
    about = stream.about(path, SCHEMA)
    with inputs.opened(path, "a trace") as file:
        parts = [stream.convert(part, SCHEMA) for part, _ in stream.batches(file, SCHEMA)]
    rows = pa.concat_tables(parts or [SCHEMA.empty_table()])
    rows.validate(full=True)
    return rows, about


def _of_parquet(path: str) -> tuple[pa.Table, dict[str, Any]]:
    file = inputs.open_file(path, "a trace")
    names = set(file.schema_arrow.names)
    if missing := [name for name in SCHEMA.names if name not in names]:
        raise MapError(f"{path}: is a Parquet file, but not a trace: it has no column {missing[0]!r}")
    return inputs.rows(file, SCHEMA.names), inputs.metadata(file, KEY)


def _schema(objects: pa.DataType) -> pa.Schema:
    """The schema of a trace with such objects."""
    known = (
        pa.types.is_list(objects)
        and pa.types.is_struct(objects.value_type)
        and objects.value_type.get_field_index("map") >= 0
    )
    at = SCHEMA.get_field_index("objects")
    return SCHEMA if known else SCHEMA.set(at, SCHEMA.field(at).with_type(pa.list_(pa.struct(READ))))


def _check_numbers(path: str, rows: pa.Table) -> None:
    """MapError where numbers are impossible for a disk."""
    objects = pa.Table.from_struct_array(rows.column("objects").combine_chunks().flatten())
    for table, names in (
        (rows, ("disk", "time_ns", "offset", "length", "connection")),
        (objects, ("inode", "offset", "length", "file_offset")),
    ):
        for name in names:
            low = pc.min(table.column(name)).as_py()
            if low is not None and low < (name == "disk"):
                raise MapError(f"{path}: is damaged: column {name!r} has the value {low}")
        high = [pc.max(table.column(name)).as_py() or 0 for name in ("offset", "length")]
        if sum(high) >= 1 << 63:
            raise MapError(f"{path}: is damaged: it has offsets beyond byte 2**63")
    if pc.max(rows.column("time_ns")).as_py() >= LATEST:
        raise MapError(f"{path}: is damaged: it has times after the year 2100")
    if pc.max(rows.column("disk")).as_py() > MOST_DISKS:
        raise MapError(f"{path}: is damaged: it is of more than {MOST_DISKS:,} disks")
    if unknown := set(pc.unique(rows.column("op").cast(pa.string())).to_pylist()) - set(tables.OPS):
        raise MapError(f"{path}: is damaged: {min(unknown)!r} is not a known operation")


def load(paths: Sequence[str], bmap: BlockMap | None = None) -> Traces:
    """Traces with their objects.

    With a map, sizes of files are known, and traces without names of their own get some.

    Raises as `read` does, and MapError where a trace is not of the map's disks.
    """
    resolver = Resolver(bmap) if bmap else None
    runs, parts, base = [], [], 0
    known: list[int] = sizes(bmap) if bmap else []
    for path in paths:
        saved = read(path)
        if bmap:
            check_disks(saved, bmap)
        if known and saved.sizes and saved.sizes != known:
            raise MapError(
                f"{path}: is a trace of {_disks(saved.sizes)}, but {paths[0]} "
                f"is of {_disks(known)}: they are of different machines"
            )
        known = known or saved.sizes
        if resolver and not pc.any(pc.greater(pc.list_value_length(saved.rows.column("objects")), 0)).as_py():
            saved = named(saved, resolver)
        run, objects = _run(saved)
        runs.append(run._replace(object=run.object + base))
        parts.append(objects)
        base += len(objects)
    everything = pa.concat_tables(parts)
    number, first = identify(everything)
    objects = everything.take(pa.array(first))
    runs = [run._replace(object=number[run.object]) for run in runs]
    return Traces(runs, objects.append_column("size", _sizes(objects, bmap)), known)


def check_disks(saved: Saved, bmap: BlockMap) -> None:
    """MapError where a trace can't be of a map's disks: sizes, accesses beyond the end, or names that the map
    has elsewhere."""
    mine = sizes(bmap)
    if saved.sizes and saved.sizes != mine:
        raise MapError(
            f"{saved.name}: is a trace of {_disks(saved.sizes)}, but the "
            f"map is of {_disks(mine)}: they are of different machines"
        )
    disk = tables.integers(saved.rows, "disk")
    end = tables.integers(saved.rows, "offset") + tables.integers(saved.rows, "length")
    if disk.max() > len(mine):
        raise MapError(
            f"{saved.name}: is a trace of disk {disk.max()}, but the "
            f"map has {len(mine)}: they are of different machines"
        )
    behind = np.flatnonzero(end > ints(mine)[disk - 1])
    if len(behind):
        row = int(behind[0])
        raise MapError(
            f"{saved.name}: row {row + 1}: bytes up to {end[row]:#x} lie beyond the end of disk {disk[row]}, "
            f"which has {mine[disk[row] - 1]:#x}: it is a trace of another disk"
        )
    _check_names(saved, bmap)


def _check_names(saved: Saved, bmap: BlockMap) -> None:
    """Disks of one size can still be different ones: then most inodes have other names."""
    _, objects = _run(saved)
    has_both = pc.and_(objects.column("path").is_valid(), objects.column("inode").is_valid())
    objects = objects.filter(has_both).slice(0, CHECKED)
    if not len(objects):
        return
    devices = bmap.volumes.column("name").to_pylist()
    known = right = 0
    for device in pc.unique(objects.column("device")).to_pylist():
        mine = objects.filter(pc.equal(objects.column("device"), device))
        known += len(mine)
        if device not in devices:
            continue
        inode, path = bmap.paths(bmap.volume_named(device))
        wanted = tables.integers(mine, "inode")
        pairs = pa.table({"inode": inode, "path": path.cast(pa.large_binary())}).filter(
            pc.is_in(pa.array(inode), pa.array(wanted))
        )
        right += len(
            pairs.join(
                pa.table({"inode": wanted, "path": mine.column("path")}), ["inode", "path"], join_type="inner"
            )
        )
    if right * 2 < known:
        raise MapError(
            f"{saved.name}: names {plural(known, 'file')}, of which {known - right:,} "
            "are other files in the map: it is a trace of another disk"
        )


def _disks(sizes: Sequence[int]) -> str:
    count = "a disk" if len(sizes) == 1 else plural(len(sizes), "disk")
    return f"{count} of {', '.join(f'{size:,}' for size in sizes)} bytes"


def _run(saved: Saved) -> tuple[Run, pa.Table]:
    """A trace's columns, and the objects that its pieces name, one for each piece: those with a byte of their
    own, and reads, writes and the like only."""
    rows = saved.rows
    op = pc.index_in(rows.column("op").cast(pa.string()), pa.array(tables.OPS)).combine_chunks()
    accesses = Accesses(
        tables.integers(rows, "time_ns"), tables.integers(rows, "connection"),
        op.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64), tables.integers(rows, "offset"),
        tables.integers(rows, "length"),
    )  # fmt: skip
    lists = rows.column("objects").combine_chunks()
    pieces = pa.Table.from_struct_array(lists.flatten())
    access = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    moves = accesses.op <= tables.OPS.index("zero")
    keep = moves[access] & ~pieces.column("inline").combine_chunks().to_numpy(zero_copy_only=False)
    if not len(pieces):  # nobody named them: each access touches its disk
        access, keep = np.arange(len(accesses)), moves
        disk = tables.integers(rows, "disk")
        pieces = _nameless(disk, accesses)
    pieces, access = pieces.filter(pa.array(keep)), access[keep]
    start = tables.integers(pieces, "offset")
    objects = pa.table(
        {
            **{
                name: pieces.column(name)
                .cast(pa.large_binary() if name == "path" else pa.string())
                .combine_chunks()
                for name in IDENTITY
            },
            "inode": pieces.column("inode").cast(pa.int64()).combine_chunks(),
        }
    )
    run = Run(saved.name, tables.integers(rows, "disk"), accesses, access, np.arange(len(access)), start,
              start + tables.integers(pieces, "length"), tables.integers(pieces, "file_offset"))  # fmt: skip
    return run, objects


def _nameless(disk: Int, accesses: Accesses) -> pa.Table:
    n = len(disk)
    letters = pa.array(
        [
            f"/dev/sd{chr(97 + number)}" if number < 26 else f"disk {number + 1}"
            for number in range(int(disk.max()))
        ]
    )
    return pa.table({
        "device": letters.take(pa.array(disk - 1)), "kind": pa.repeat("disk", n),
        "path": pa.nulls(n, pa.large_binary()), "part": pa.nulls(n, pa.string()),
        "inode": pa.nulls(n, pa.int64()), "offset": accesses.offset, "length": accesses.length,
        "file_offset": pa.nulls(n, pa.int64()),
    })  # fmt: skip


def _sizes(objects: pa.Table, bmap: BlockMap | None) -> pa.Array:
    """The size of each file by the map."""
    size = np.full(len(objects), -1, np.int64)
    if bmap:
        from virt_bmap.model.paths import positions

        names = bmap.volumes.column("name").to_pylist()
        device = objects.column("device").to_pylist()
        of = np.array(
            [len(names) - 1 - names[::-1].index(name) if name in names else -1 for name in device], np.int64
        )
        inode = tables.integers(objects, "inode")
        content = pc.is_in(objects.column("kind"), pa.array(["data", "unwritten"])).to_numpy(
            zero_copy_only=False
        )
        for volume in np.unique(of[of >= 0]).tolist():
            _, table = bmap.slice_of("inodes", volume)
            mine = np.flatnonzero((of == volume) & (inode >= 0) & content)
            row = positions(tables.integers(table, "inode"), inode[mine])
            if table.num_rows:
                size[mine] = np.where(row >= 0, tables.integers(table, "size")[row], -1)
    return tables.arrow(size, size < 0)


# ---- making ------------------------------------------------------------------------------------------------


def named(saved: Saved, resolver: Resolver) -> Saved:
    """The trace with the objects that a map knows."""
    buffer = pa.BufferOutputStream()
    writer: Any = Trace(resolver, buffer)
    run, _ = _run(saved)
    for disk in np.unique(run.disk).tolist():
        _write(writer, run.accesses.take(run.disk == disk), resolver, disk)
    writer.close()
    rows = inputs.rows(pq.ParquetFile(pa.BufferReader(buffer.getvalue())))
    return saved._replace(rows=rows.sort_by("time_ns"))


def recover(path: str, file: BinaryIO) -> int:
    """Write what a killed watch left as a trace: how many requests there are.

    Raises MapError where it is not such a stream.
    """
    with inputs.opened(path, "a trace") as left:
        if not stream.is_stream(path):
            raise MapError(f"{path}: is not the stream that a watch leaves of its trace when it is killed")
        about = stream.about(path, SCHEMA)
        return save(stream.batches(left, SCHEMA), about, file)


def save_log(log: AccessLog, file: BinaryIO, bmap: BlockMap | None = None, disk: int = 1) -> None:
    """Write a log as a trace of disk number `disk`, its objects named by the map.

    Raises MapError, with the line, where an access lies beyond the disk's end.
    """
    accesses = log.accesses
    resolver = Resolver(bmap) if bmap else None
    if bmap:
        size = bmap.size_of(bmap.disk(disk))
        behind = np.flatnonzero(accesses.offset + accesses.length > size)
        if len(behind):
            row = int(behind[np.argmin(log.line[behind])])
            raise MapError(
                f"{log.source}: line {log.line[row]}: bytes "
                f"{accesses.offset[row]:#x}-{accesses.offset[row] + accesses.length[row]:#x} lie beyond the "
                f"end of disk {disk}, which has {size:#x} bytes: it is a log of another disk"
            )
    trace = Trace(resolver, file)
    _write(trace, accesses, resolver, disk)
    trace.close()


def _write(trace: Trace, accesses: Accesses, resolver: Resolver | None, disk: int) -> None:
    for at in range(0, len(accesses), BATCH):
        batch = accesses.take(np.arange(at, min(at + BATCH, len(accesses))))
        trace.add(disk, batch, resolver.touched(disk, batch.offset, batch.length) if resolver else None)
