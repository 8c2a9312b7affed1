"""The half of bmaplogger that runs inside nbdkit: serves
a raw file and tells another process of every access.

nbdkit embeds the distribution's own Python, whatever the user's is, so this file imports nothing beyond the
standard library and must work on Python 3.9 and later. Telling never waits and never fails a request: a
record that does not fit into the pipe is counted instead, and the count travels with the next one that does.

Sources: nbdkit-python-plugin(3), API version 2; nbdkit-plugin(3).
"""

import itertools
import os
import struct
import tempfile
import threading
import time

try:
    import nbdkit  # type: ignore[import-not-found]
except ImportError:  # not inside nbdkit: only RECORD is wanted
    nbdkit = None

API_VERSION = 2

RECORD = struct.Struct("<qqqqiB3x")
"""time in ns since 1970, offset, length, records dropped so far, connection, operation.

Far below PIPE_BUF: written whole or not at all.
"""
READ, WRITE, FLUSH = 0, 1, 4
"""Operations, as positions in tables.OPS.

A client's zeroes arrive as writes: nbdkit does that for plugins that can't zero.
"""
END = 255
"""Operation of the last record, which only brings the final count."""
LAST_CHANCE = 1.0
"""Seconds that the last record may wait for room in the pipe, once no guest is left that could be stalled."""

LAYER_BLOCK = 4096

_config: dict[str, str] = {}
_layer: "Layer | None" = None
_pipe = -1
_connections = itertools.count(1)
_open = 0
"""Connections."""
_alone = False
"""Does nobody read the pipe any more?"""
_dropped = 0
_counting = threading.Lock()


class Layer:
    """What is written to a disk that is to stay as it is: whole blocks, in a file without a name."""

    def __init__(self) -> None:
        where = "/var/tmp"  # /tmp may be memory
        self._file = tempfile.TemporaryFile(dir=where if os.access(where, os.W_OK) else None)  # noqa: SIM115
        self._fd = self._file.fileno()
        self._blocks: set[int] = set()
        self._lock = threading.Lock()

    def write(self, disk: int, data: memoryview, offset: int) -> None:
        """Keep these bytes, with the rest of their first and last block as it is now."""
        end = offset + len(data)
        with self._lock:
            for block in {offset // LAYER_BLOCK, (end - 1) // LAYER_BLOCK} - self._blocks:
                os.pwrite(self._fd, os.pread(disk, LAYER_BLOCK, block * LAYER_BLOCK), block * LAYER_BLOCK)
            put(self._fd, data, offset)
            self._blocks.update(range(offset // LAYER_BLOCK, -(-end // LAYER_BLOCK)))

    def lay_over(self, data: memoryview, offset: int) -> None:
        """Replace what of these bytes of the disk was written."""
        end = offset + len(data)
        with self._lock:
            for block in range(offset // LAYER_BLOCK, -(-end // LAYER_BLOCK)):
                if block in self._blocks:
                    low, high = max(offset, block * LAYER_BLOCK), min(end, (block + 1) * LAYER_BLOCK)
                    os.preadv(self._fd, [data[low - offset : high - offset]], low)


def put(fd: int, data: memoryview, offset: int) -> None:
    """All of the bytes."""
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def config(key: str, value: str) -> None:
    """file=PATH: the disk; accesses=FD: the pipe, inherited and not blocking; layer=true: writes are thrown
    away at the end."""
    global _layer
    if key == "layer":
        _layer = Layer()
        return
    if key not in ("file", "accesses"):
        raise RuntimeError(f"bmaplogger: unknown parameter {key}={value}")
    _config[key] = value


def config_complete() -> None:
    """Both are needed."""
    global _pipe
    for key in ("file", "accesses"):
        if key not in _config:
            raise RuntimeError(f"bmaplogger: {key}= is missing")
    _pipe = int(_config["accesses"])
    os.set_blocking(_pipe, False)
    os.set_inheritable(_pipe, False)  # or the end of the log would wait for whatever --run leaves behind


def thread_model() -> int:
    """Reads and writes give up Python's lock while they wait, so several at a time are worth it."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def tell(connection: int, operation: int, offset: int, length: int) -> None:
    """Hand over one access, or count it as dropped."""
    global _alone, _dropped
    try:
        os.write(_pipe, RECORD.pack(time.time_ns(), offset, length, _dropped, connection, operation))
    except Exception as error:
        # full, or nobody reads any more; whatever it is, it would be an error of the disk to the guest
        _alone = _alone or isinstance(error, BrokenPipeError)
        with _counting:
            _dropped += 1


def cleanup() -> None:
    """No request can come any more: say how many were dropped."""
    end = time.monotonic() + LAST_CHANCE
    while True:
        try:
            os.write(_pipe, RECORD.pack(time.time_ns(), 0, 0, _dropped, 0, END))
            return
        except BlockingIOError:
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        except Exception:
            return


class Connection:
    """What one client has open."""

    def __init__(self, readonly: bool) -> None:
        self.number = next(_connections)
        mode = os.O_RDONLY if readonly or _layer else os.O_RDWR
        self.fd = os.open(_config["file"], mode | os.O_CLOEXEC)
        self.readonly = readonly
        self.size = os.lseek(self.fd, 0, os.SEEK_END)


def open(readonly: bool) -> Connection:
    """A new connection; one that can't write becomes read-only, as with nbdkit's file plugin."""
    global _open
    try:
        connection = Connection(readonly)
    except OSError:
        if readonly:
            raise
        connection = Connection(True)
    with _counting:
        _open += 1
    return connection


def close(connection: Connection) -> None:
    """The client has gone. Where the process that started us
    has, too, the last client was the last thing to stay for."""
    global _open
    os.close(connection.fd)
    with _counting:
        _open -= 1
        is_last = _open == 0
    if is_last and _alone:
        nbdkit.shutdown()


def get_size(connection: Connection) -> int:
    """Bytes of the disk."""
    return connection.size


def can_write(connection: Connection) -> bool:
    """False also where the file could only be opened for reading."""
    return not connection.readonly


def can_flush(_connection: Connection) -> bool:
    """fdatasync is there for every file."""
    return True


def can_multi_conn(_connection: Connection) -> bool:
    """All connections read and write one file without caches of their own."""
    return True


def pread(connection: Connection, buffer: bytearray, offset: int, _flags: int) -> None:
    """Fill the buffer from the disk."""
    tell(connection.number, READ, offset, len(buffer))
    view, begin = memoryview(buffer), offset
    while len(view):
        got = os.preadv(connection.fd, [view], offset)
        if got == 0:
            raise OSError(f"the disk ends at byte {offset}: it shrank while it was served")
        view, offset = view[got:], offset + got
    if _layer:
        _layer.lay_over(memoryview(buffer), begin)


def pwrite(connection: Connection, buffer: bytearray, offset: int, _flags: int) -> None:
    """Write the buffer to the disk."""
    tell(connection.number, WRITE, offset, len(buffer))
    if _layer:
        _layer.write(connection.fd, memoryview(buffer), offset)
    else:
        put(connection.fd, memoryview(buffer), offset)


def flush(connection: Connection, _flags: int) -> None:
    """Let what was written reach the device."""
    tell(connection.number, FLUSH, 0, 0)
    if not _layer:
        os.fdatasync(connection.fd)
