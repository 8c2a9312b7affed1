"""Giving space back without a copy: holes punched into raw files and block devices, trims for qcow2.

Only free bytes change, one range after the other, so that
an image is valid at every moment, whenever this ends.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from virt_bmap.act.sparsify.plan import whole_blocks
from virt_bmap.ask.space import Ranges
from virt_bmap.core.errors import ImageError, OutputError, UsageError
from virt_bmap.core.reader import Reader
from virt_bmap.host.in_use import claim, refuse
from virt_bmap.host.punch import punch
from virt_bmap.model.contract import RAW, Writing
from virt_bmap.open import magic
from virt_bmap.open.disks import SAFELY, Opening
from virt_bmap.open.nbd_writer import NbdWriter
from virt_bmap.open.qemu_writer import writing
from virt_bmap.open.raw import RawReader

SECTOR = 512
AT_ONCE = 4096
"""Trims between two reports of progress."""


class Disk(Protocol):
    """An image that nobody else uses while it is open here."""

    @property
    def reader(self) -> Reader: ...

    def give_back(self, free: Ranges, tell: Callable[[int], None]) -> None:
        """Free these sorted ranges; `tell` is called with the number of bytes that are done.

        Raises OutputError.
        """


@contextlib.contextmanager
def kept(image: str, opening: Opening = SAFELY) -> Iterator[Disk]:
    """An image for reading and giving back, kept from others until the block ends.

    Raises UsageError where it is of a kind that can't give space back, ImageError where somebody uses it,
    OutputError where it can't be written.
    """
    if magic.is_uri(image):
        raise UsageError(
            f"{image}: who uses an NBD export can't be seen from here; sparsify the image where it lies, or "
            f"make a copy: sparsify {image} OUT"
        )
    plain = RawReader(image)
    try:
        found = opening.format or magic.recognise(plain)
    finally:
        plain.close()
    if Writing.FREEING not in magic.known(found).writing:
        raise UsageError(
            f"{image}: a {found} image can't give space back in place; make a copy: sparsify {image} OUT"
        )
    if found == RAW:
        disk = PunchedFile(image)
        opening.tell(disk.reader)
        try:
            yield disk
        finally:
            disk.close()
    else:
        refuse(image)
        with writing(image, found, opening) as writer:
            opening.tell(writer)
            yield TrimmedImage(writer)


class PunchedFile:
    """A raw file or block device.

    A device is opened exclusively: neither mounted nor below another device.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.reader = RawReader(path)
        try:
            self._fd = claim(path)
        except BaseException:
            self.reader.close()
            raise
        about = os.fstat(self._fd)
        if not os.path.samestat(about, os.fstat(self.reader.fileno())):
            self.close()
            raise ImageError(f"{path}: was replaced by another file while it was opened")
        self.block = about.st_blksize if stat.S_ISREG(about.st_mode) else SECTOR

    def give_back(self, free: Ranges, tell: Callable[[int], None]) -> None:
        done = 0
        try:
            for start, end in zip(*(side.tolist() for side in whole_blocks(free, self.block)), strict=True):
                punch(self._fd, start, end - start)
                done += end - start
                tell(
                    done
                    # no fsync: a power cut brings free space back at worst, and to wait for the host's
                    # journal would take longest
                )
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise OutputError(
                    f"{self.name}: can't be changed in place: what it lies on can't punch holes; make a "
                    f"copy: sparsify {self.name} OUT"
                ) from error
            raise OutputError(f"{self.name}: can't be changed: {error.strerror}") from error

    def close(self) -> None:
        self.reader.close()
        os.close(self._fd)


class TrimmedImage:
    """The disk in an image whose clusters QEMU frees."""

    def __init__(self, writer: NbdWriter) -> None:
        self.reader = writer
        self._writer = writer

    def give_back(self, free: Ranges, tell: Callable[[int], None]) -> None:
        starts, ends = whole_blocks(free, max(SECTOR, self._writer.minimum))
        done = np.cumsum(ends - starts)
        for low in range(0, len(starts), AT_ONCE):
            self._writer.trim(starts[low : low + AT_ONCE], ends[low : low + AT_ONCE])
            tell(int(done[min(low + AT_ONCE, len(done)) - 1]))
        self._writer.flush()


def held(image: str) -> int | None:
    """Bytes that an image file takes on its host; None for what is not a regular file."""
    about = os.stat(image)
    return about.st_blocks * SECTOR if stat.S_ISREG(about.st_mode) else None
