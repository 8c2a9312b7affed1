"""One file for each way to open a disk image; `open_image`
chooses by magic, or by the format that the caller names (`open/disks.py`).

Safe by default. A guest can write any magic into the first bytes of its raw disk, and an image can name any
file of the host as its backing or data file. So the format is found by magic and said aloud, and a file that
a header refers to is opened only when the caller asks for it (`references=True`), with a format that the
header states: never guessed. A guest's own qcow2 header can at worst make the map wrong; it can't make us
read another file.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from virt_bmap.core.errors import ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic, raw
from virt_bmap.open.disks import SAFELY, Opening

PACKED = 16
"""Bytes of a guest's disk that one of an image's file may stand for, where it is compressed: of metadata,
which is what counts here, less."""


def open_image(image: str, opening: Opening = SAFELY, status: Sequence[str] | None = None) -> Reader:
    """Open a path or NBD URI for reading.

    `status`, where given, asks NBD servers (qemu-nbd included) for these metadata contexts, and for
    allocation where they tell it. Raises ImageError, and MissingTool where qemu-nbd is needed and not there.
    """
    reader = _open(image, opening, status)
    opening.tell(reader)
    return reader


def _open(image: str, opening: Opening, status: Sequence[str] | None) -> Reader:
    if magic.is_uri(image):
        if status is not None:
            from virt_bmap.open.status import StatusReader

            return StatusReader(image, wanted=status)
        from virt_bmap.open import nbd

        return nbd.NbdReader(image)
    plain = raw.RawReader(image)
    found = opening.format or magic.recognise(plain)
    if found == RAW:
        if status:
            plain.close()
            raise ImageError(f"{image}: is a raw disk, which has no {status[0].removeprefix('qemu:')}")
        return plain
    from virt_bmap.open import host, qemu
    from virt_bmap.open.graph import NotForQemu

    try:
        reader: Reader
        try:
            reader = qemu.open_with_qemu(plain, found, opening, status)
        except NotForQemu:
            reader = host.LayeredReader(image, opening)
        reader.in_use = plain.in_use
        if reader.stored_most is None and not opening.references:  # nothing but this file is read
            reader.stored_most = min(reader.size, PACKED * os.fstat(plain.fileno()).st_blocks * 512)
        return reader
    finally:
        plain.close()


@contextlib.contextmanager
def open_disks(
    images: Sequence[str], opening: Opening = SAFELY, status: Sequence[str] | None = None
) -> Iterator[list[Reader]]:
    """The disks of one machine, in order, opened as `open_image` does; closed at the end of the block."""
    with contextlib.ExitStack() as stack:
        disks = []
        for image in images:
            disks.append(open_image(image, opening, status))
            stack.callback(disks[-1].close)
        yield disks
