"""Giving the space of a part of a file back to its filesystem: fallocate(2), which Python lacks."""

import ctypes
import errno
import os

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_FALLOCATE = getattr(_LIBC, "fallocate64", None) or getattr(_LIBC, "fallocate", None)


def punch(fd: int, offset: int, length: int) -> None:
    """Free [offset, offset + length) of an open file, which reads as zeroes then.

    Raises OSError, with EOPNOTSUPP where the filesystem can't.
    """
    if _FALLOCATE is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    while _FALLOCATE(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
