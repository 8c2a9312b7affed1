"""A trace while it grows: an Arrow stream, which can be read as far as it goes when its end never came.

It lies beside the trace under its name with `.part` after it, is brought to the disk at least every minute,
and goes when the trace is there. What a watch that was killed left is read as a trace is; the next watch of
that name keeps it under another one. Words are plain text here, so that each batch stands for itself; a
batch's own metadata names the maps that have come since the one before.

Sources: Arrow columnar format, "IPC Streaming Format".
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from virt_bmap.core.errors import ImageError, MapError, OutputError
from virt_bmap.host import inputs, leftovers

ENDING = ".part"
KEY = b"virt-bmap-trace"
MAPS_KEY = b"virt-bmap-maps"
CONTINUATION = b"\xff\xff\xff\xff"
"""How each message of a stream begins."""


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, however deep they lie."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, plain(field.type), field.nullable)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of the stream for rows of this one."""
    return pa.schema([_plain_field(field) for field in schema])


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array in another type that differs only in what is a dictionary."""
    if array.type == kind:
        return array
    if pa.types.is_list(kind):
        inner = converted(array.flatten() if array.null_count else array.values, kind.value_type)
        return pa.ListArray.from_arrays(array.offsets, inner, type=kind)
    if pa.types.is_struct(kind):
        columns = [converted(array.field(number), field.type) for number, field in enumerate(kind)]
        return pa.StructArray.from_arrays(columns, fields=list(kind))
    if pa.types.is_dictionary(kind):
        found = array.dictionary_encode()
        return pa.DictionaryArray.from_arrays(
            found.indices.cast(kind.index_type), found.dictionary.cast(kind.value_type)
        )
    return array.cast(kind)


def convert(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows under another schema of the same columns."""
    columns = []
    for field in schema:
        column = table.column(field.name).combine_chunks()
        columns.append(
            converted(column.chunk(0) if isinstance(column, pa.ChunkedArray) else column, field.type)
        )
    return pa.Table.from_arrays(columns, schema=schema)


class Part:
    """The stream that a watch writes.

    Without a name of its own (the trace goes to a pipe or a device) it is a file that nobody sees.
    """

    def __init__(self, target: str, schema: pa.Schema, about: dict[str, Any]) -> None:
        """Raises OutputError where it can't be made.

        `moved` then says under which name an older one was kept.
        """
        self.moved = ""
        if os.path.isdir(target):
            raise OutputError(f"{target}: can't be written: it is a directory")
        self.path = (
            ""
            if target == "-" or (os.path.exists(target) and not os.path.isfile(target))
            else os.path.realpath(target) + ENDING
        )
        try:
            self._file: BinaryIO = self._made() if self.path else self._unseen()
        except OSError as error:
            raise OutputError(f"{target}: can't be written: {error.strerror or error}") from error
        self._schema = plain_schema(schema).with_metadata({KEY: json.dumps(about)})
        self._stream = pa.ipc.new_stream(
            self._file, self._schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        )
        self._whole = 0
        """Bytes that are whole messages on the disk."""

    @staticmethod
    def _unseen() -> BinaryIO:
        return tempfile.TemporaryFile(dir=leftovers.temporary())

    def _made(self) -> BinaryIO:
        while True:
            with contextlib.suppress(FileExistsError):
                file = open(  # noqa: SIM115 - closed by its holder
                    os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "r+b"
                )
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            self._move()

    def _move(self) -> None:
        """Another name for what a watch left that was killed. Raises OutputError where it is not dead."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{self.path}: another watch is writing this trace") from None
            number = 1
            stem = self.path.removesuffix(ENDING)
            while os.path.lexists(self.moved or f"{stem}.{number}{ENDING}"):
                number += 1
            self.moved = f"{stem}.{number}{ENDING}"
            os.rename(self.path, self.moved)

    def write(self, table: pa.Table, maps: list[dict[str, int]]) -> None:
        """Add rows, and bring all to the disk.

        Raises OSError; the file then ends with the last whole batch.
        """
        try:
            batch = convert(table, plain_schema(self._schema)).combine_chunks().to_batches()
            metadata = {MAPS_KEY: json.dumps(maps)} if maps else None
            for number, rows in enumerate(batch or [pa.RecordBatch.from_pylist([], self._schema)]):
                self._stream.write_batch(
                    rows.replace_schema_metadata(self._schema.metadata),
                    custom_metadata=None if number else metadata,
                )
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._whole = self._file.tell()
        except (OSError, pa.ArrowException):
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._whole)
            raise

    def rows(self) -> Iterator[tuple[pa.Table, list[dict[str, int]]]]:
        """All that was written, a batch at a time."""
        with os.fdopen(os.dup(self._file.fileno()), "rb") as again:
            again.seek(0)
            yield from batches(again, self._schema)

    def close(self, keep: bool = False) -> None:
        """Let go of it; the file goes, unless it is all that there is of the trace."""
        if self.path and not keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        with contextlib.suppress(OSError):  # what could not be written can't be now
            self._file.close()


def is_stream(path: str) -> bool:
    """Does this file begin as an Arrow stream?"""
    try:
        with inputs.opened(path, "a trace") as file:
            return file.read(len(CONTINUATION)) == CONTINUATION
    except (ImageError, OSError):
        return False


def about(path: str, schema: pa.Schema) -> dict[str, Any]:
    """What a stream says of itself. Raises MapError where it is not a trace."""
    try:
        with inputs.opened(path, "a trace") as file, pa.ipc.open_stream(file) as stream:
            found = stream.schema
    except (OSError, MemoryError, pa.ArrowException) as error:
        raise MapError(f"{path}: can't be read as a trace: {str(error).splitlines()[0]}") from error
    if not found.equals(plain_schema(schema)) or KEY not in (found.metadata or {}):
        raise MapError(f"{path}: is an Arrow stream, but not one of a trace")
    try:
        said: dict[str, Any] = json.loads(found.metadata[KEY])
    except ValueError as error:
        raise MapError(f"{path}: can't be read as a trace: {error}") from error
    return said


def batches(file: BinaryIO, schema: pa.Schema) -> Iterator[tuple[pa.Table, list[dict[str, int]]]]:
    """The rows of a stream and the maps that came with them, as far as it is whole."""
    with contextlib.suppress(pa.ArrowException, OSError, EOFError, StopIteration, ValueError, MemoryError):
        stream = pa.ipc.open_stream(file)
        while True:
            rows, metadata = stream.read_next_batch_with_custom_metadata()
            rows.validate(full=True)
            maps = json.loads(metadata[MAPS_KEY]) if metadata and MAPS_KEY in metadata else []
            yield pa.Table.from_batches([rows.replace_schema_metadata(None)], plain_schema(schema)), maps
