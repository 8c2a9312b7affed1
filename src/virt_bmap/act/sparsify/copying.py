"""A new image that holds what is owned, and nothing else:
raw files are written here, other formats through QEMU."""

import os
from collections.abc import Callable
from typing import NamedTuple

from virt_bmap.act.dump import GRAIN, SparseFile, dump
from virt_bmap.ask.space import Ranges
from virt_bmap.core.arrays import Bytes
from virt_bmap.core.errors import OutputError
from virt_bmap.core.lost import Missing
from virt_bmap.core.reader import Reader
from virt_bmap.host import children, programs
from virt_bmap.model.contract import RAW
from virt_bmap.open.nbd_writer import NbdWriter
from virt_bmap.open.qemu import PACKAGES
from virt_bmap.open.qemu_writer import writing

CLUSTER = 64 << 10
"""What QEMU's formats allocate at once or in multiples of (qcow2, vmdk); zeroes in smaller pieces would save
nothing, and a compressed cluster is written only once."""


class FreshImage(NamedTuple):
    """An image in which nothing was written yet: zeroes need no writing."""

    writer: NbdWriter

    def write(self, offset: int, data: Bytes) -> None:
        self.writer.write(offset, data)

    def zero(self, start: int, end: int) -> None:
        """A new image reads as zeroes."""


def copy(
    reader: Reader,
    free: Ranges,
    path: str,
    format: str,
    compress: bool,
    tell: Callable[[int], None] = lambda _: None,
    partial: bool = False,
) -> Missing:
    """Write the disk to `path`, an empty file, without what is `free`; what is missing from it (see `dump`).

    `tell` is called with the number of bytes that are done. Raises OutputError, MissingTool, and ImageError
    where the disk can't be read whole unless `partial`.
    """
    if format == RAW:
        with open(path, "r+b") as file:
            return dump(reader, SparseFile(file, reader.size), free, tell, GRAIN, partial)
    _create(path, format, reader.size)
    with writing(path, format, compress=compress) as writer:
        return dump(reader, FreshImage(writer), free, tell, CLUSTER, partial)


def _create(path: str, format: str, size: int) -> None:
    """An image of `size` bytes with nothing in it."""
    program = programs.required("qemu-img", f"{path}: a {format} image", PACKAGES)
    # with its whole name, or QEMU would take what stands before a colon for a protocol
    done = children.run([program, "create", "-q", "-f", format, os.path.abspath(path), str(size)])
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise OutputError(
            f"{path}: can't be written: {words[0] if words else f'qemu-img ended with {done.returncode}'}"
        )
