"""The half of bmaplogger that runs inside nbdkit: serves a raw file and tells another process of every
access.

nbdkit embeds the distribution's own Python, whatever the user's is, so this file imports nothing beyond the
standard library and must work on Python 3.9 and later. Telling never waits and never fails a request: a
record that does not fit into the pipe is counted instead, and the count travels with the next one that does.

Sources: nbdkit-python-plugin(3), API version 2; nbdkit-plugin(3).
"""

import itertools
import os
import struct
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

_config: dict[str, str] = {}
_pipe = -1
_connections = itertools.count(1)
_open = 0
"""Connections."""
_alone = False
"""Does nobody read the pipe any more?"""
_dropped = 0
_counting = threading.Lock()


def config(key: str, value: str) -> None:
    """file=PATH: the disk; accesses=FD: the pipe, inherited and not blocking."""
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
        self.fd = os.open(_config["file"], (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
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
    """The client has gone. Where the process that started us has, too, the last client was the last thing to
    stay for."""
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
    view = memoryview(buffer)
    while len(view):
        got = os.preadv(connection.fd, [view], offset)
        if got == 0:
            raise OSError(f"the disk ends at byte {offset}: it shrank while it was served")
        view, offset = view[got:], offset + got


def pwrite(connection: Connection, buffer: bytearray, offset: int, _flags: int) -> None:
    """Write the buffer to the disk."""
    tell(connection.number, WRITE, offset, len(buffer))
    view = memoryview(buffer)
    while len(view):
        put = os.pwrite(connection.fd, view, offset)
        view, offset = view[put:], offset + put


def flush(connection: Connection, _flags: int) -> None:
    """Let what was written reach the device."""
    tell(connection.number, FLUSH, 0, 0)
    os.fdatasync(connection.fd)
