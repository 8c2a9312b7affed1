"""What else an image would make us open: backing files, external data files, extents.

Headers are read here before anything else looks at them.

Whoever wrote an image chose these names, and that can be a guest: nothing of it is opened unless the caller
allows it, and never in a format that was guessed.
"""

import contextlib
import os
from typing import NamedTuple

from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.reader import Reader
from virt_bmap.host import protection
from virt_bmap.model.contract import References
from virt_bmap.open import magic
from virt_bmap.open.disks import Opening
from virt_bmap.open.raw import RawReader

MAX_CHAIN = 64
"""Backing files below each other.

QEMU itself sets no limit; chains beyond a few dozen are unusable, and a loop must end.
"""
AS_RAW = "--format raw for a raw disk that only looks like this"


class ChainImage(NamedTuple):
    """One image of a backing chain: its file, its format, and the bytes of its clusters."""

    path: str
    format: str
    cluster: int


def allowed_references(image: Reader, format: str, opening: Opening, depth: int) -> References:
    """What the image refers to.

    ImageError where it does so though references are not allowed, where the backing file has no stated
    format, and where the chain, of which this is number `depth`, does not end."""
    try:
        found = references_of(image, format)
    except Corrupt as error:
        raise ImageError(f"{error} ({AS_RAW})") from error
    if found.names() and not opening.references:
        raise ImageError(
            f"{image.name}: its {format} header refers to {', '.join(map(repr, found.names()))}, which is "
            "not opened unless asked for, since whoever wrote the image chose that name; if you trust it, "
            f"use --references (or {AS_RAW})"
        )
    for name in found.names():
        protection.reads(os.path.join(os.path.dirname(os.path.abspath(image.name)), name))
    if depth >= MAX_CHAIN:
        raise ImageError(f"{image.name}: its backing chain is longer than {MAX_CHAIN} files, or loops")
    if found.backing and not found.backing_format:
        raise ImageError(
            f"{image.name}: its header names the backing file {found.backing!r} "
            "without its format, and guessing that is unsafe; state it with: "
            f"qemu-img rebase -u -b {found.backing} -F FORMAT {image.name}"
        )
    return found


def references_of(image: Reader, format: str) -> References:
    """What else an image of this format would make QEMU open."""
    known = magic.known(format)
    found = known.references(known.recovered(image))
    if found.backing_format not in (None, *magic.FORMATS):
        raise ImageError(
            f"{image.name}: its header states the backing format {found.backing_format!r}; there "
            f"are: {', '.join(magic.FORMATS)}"
        )
    return found


def backing_chain(path: str, opening: Opening) -> list[ChainImage]:
    """An image and those below it, uppermost first, as their headers name them; of each only the header is
    read. Raises as `allowed_references` does."""
    chain: list[ChainImage] = []
    format = opening.format
    while True:
        with contextlib.closing(RawReader(path)) as image:
            format = format or magic.recognise(image)
            found = allowed_references(image, format, opening, len(chain))
            chain.append(ChainImage(path, format, magic.known(format).cluster(image)))
        if not found.backing:
            return chain
        path = os.path.join(os.path.dirname(os.path.abspath(path)), found.backing)
        format = found.backing_format
