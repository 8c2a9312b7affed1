"""An nbdkit plugin: a raw disk that notes every request, and which blocks with our mark it carried.

(In nbdkit's own Python: standard library only.)

    nbdkit python marked_disk.py file=DISK log=LOG

a line for each: time in ns, operation, offset, length, and OFFSET:FILE:INDEX of each marked block

It stands beneath a watched disk, so that what the watch says of a request can be compared with what was
really in it.
"""

import builtins
import ctypes
import os
import struct
import time

API_VERSION = 2
MARK, BLOCK = b"\xd9marked\n", 4096
PUNCH = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE"""

_config = {}
_libc = ctypes.CDLL(None, use_errno=True)


def marked(file, index):
    """The first bytes of block `index` of file `file`."""
    return MARK + struct.pack("<II", file, index)


def marks(offset, data):
    """(offset, file, index) of the marked blocks in these bytes of the disk."""
    for at in range(-offset % BLOCK, len(data) - 15, BLOCK):
        if data[at : at + 8] == MARK:
            yield (offset + at, *struct.unpack_from("<II", data, at + 8))


def config(key, value):
    _config[key] = value


def config_complete():
    pass


def thread_model():
    import nbdkit

    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def after_fork():
    _config["out"] = builtins.open(_config["log"], "w", buffering=1 << 20)  # noqa: SIM115 - until the process ends


def open(readonly):
    return os.open(_config["file"], os.O_RDWR)


def close(fd):
    os.close(fd)
    _config["out"].flush()


def get_size(fd):
    return os.lseek(fd, 0, os.SEEK_END)


def can_flush(fd):
    return True


can_trim = can_zero = can_multi_conn = can_flush


def _note(op, offset, length, data=b""):
    words = " ".join(f"{at}:{file}:{index}" for at, file, index in marks(offset, data))
    _config["out"].write(f"{time.time_ns()} {op} {offset} {length} {words}\n")


def pread(fd, buffer, offset, flags):
    os.preadv(fd, [buffer], offset)
    _note("read", offset, len(buffer), bytes(buffer))


def pwrite(fd, buffer, offset, flags):
    _note("write", offset, len(buffer), bytes(buffer))
    os.pwrite(fd, buffer, offset)


def flush(fd, flags):
    _config["out"].flush()


def trim(fd, count, offset, flags):
    _note("trim", offset, count)
    _libc.fallocate(fd, PUNCH, ctypes.c_long(offset), ctypes.c_long(count))


def zero(fd, count, offset, flags):
    _note("zero", offset, count)
    _libc.fallocate(fd, PUNCH, ctypes.c_long(offset), ctypes.c_long(count))
