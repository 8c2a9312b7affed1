"""Raw files and block devices, read with pread.

Not mapped into memory: a file that shrinks while it is read would kill the process with SIGBUS instead of
giving an error.
"""

import errno
import fcntl
import os
import stat
import struct

import numpy as np

from virt_bmap.core.arrays import Bytes, Int, ints
from virt_bmap.core.errors import ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.host import in_use, notices, protection
from virt_bmap.host.looked_at import open_looked_at

BLKSSZGET = 0x1268
"""linux/fs.h."""


class RawReader(Reader):
    """A raw file or block device, opened read-only."""

    in_turn = False

    def __init__(self, path: str) -> None:
        self._fd = open_looked_at(path)
        try:
            mode = os.fstat(self._fd).st_mode
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if size == 0:
                raise ImageError(f"{path}: is empty (0 bytes), not a disk image")
        except BaseException:
            os.close(self._fd)
            raise
        super().__init__(size, path)
        protection.reads_open(self._fd, path)
        self.in_use = in_use.writer_of_open(self._fd)
        if self.in_use:
            notices.say(f"{path}: is in use: {self.in_use}; what is read of it may mix several states")
        if stat.S_ISBLK(mode):
            self.sector = sector_of(self._fd)
        self.near = stat.S_ISREG(mode)  # most files are in the kernel's cache, most devices are not

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        data = np.empty(int(lengths.sum()), np.uint8)
        view, at = memoryview(data.data), 0
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            end = at + length
            while at < end:
                here = offset + length - (end - at)
                try:
                    got = os.preadv(self._fd, [view[at:end]], here)
                except OSError as error:
                    raise ImageError(
                        f"{self.name}: can't be read at byte {here:#x}: {error.strerror}"
                    ) from error
                if got == 0:
                    raise ImageError(
                        f"{self.name}: ends at byte {here:#x} but had {self.size:#x} bytes when it was "
                        "opened: it shrank while it was read"
                    )
                at += got
        return data

    def stored(self) -> tuple[Int, Int]:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return super().stored()
        try:
            return data_ranges(self._fd, self.size)
        except OSError as error:
            raise ImageError(f"{self.name}: can't be read: {error.strerror}") from error

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


def sector_of(device: int) -> int | None:
    """Bytes of a logical sector of an open block device; None where it does not tell."""
    answer = bytearray(struct.calcsize("i"))
    try:
        fcntl.ioctl(device, BLKSSZGET, answer)
    except OSError:
        return None
    size: int = struct.unpack("i", answer)[0]
    return size


def data_ranges(file: int, size: int) -> tuple[Int, Int]:
    """(starts, ends) of what of an open file is no hole, by lseek(2) with SEEK_DATA and SEEK_HOLE.

    Raises OSError.
    """
    starts, ends, at = [], [], 0
    while at < size:
        try:
            starts.append(os.lseek(file, at, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data after `at`
                raise
            break
        at = min(size, os.lseek(file, starts[-1], os.SEEK_HOLE))
        ends.append(at)
    return ints(starts).astype(np.int64), ints(ends).astype(np.int64)
