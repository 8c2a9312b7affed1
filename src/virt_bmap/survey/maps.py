"""Where block maps come from: disks, mapped now, and saved maps."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from virt_bmap.core.errors import ImageError
from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.reader import DiscSession, Reader
from virt_bmap.host.looked_at import open_looked_at
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import NOTHING_MORE, Asks
from virt_bmap.open import open_disks
from virt_bmap.open.disks import NOTHING, Disks, Nested
from virt_bmap.survey.survey import survey_host, survey_open

Watcher = Callable[[Sequence[Reader]], Callable[[str], None]]
"""Given the open disks, returns what is called with each volume's name before it is read."""


@contextlib.contextmanager
def opened(
    disks: Disks,
    watcher: Watcher = lambda _: lambda _: None,
    asks: Asks = NOTHING_MORE,
    status: Sequence[str] | None = None,
) -> Iterator[tuple[BlockMap, list[Reader]]]:
    """The map of these disks, and the reader of each volume, by its number, good until the block ends.

    `asks` is what is wanted beside the map. `status=()`: the readers can also tell what is stored, as far as
    servers know; see `open_image`. Raises ImageError where a disk can't be opened or read, FormatError where
    an image's own tables can't; what is wrong *on* a disk becomes rows of the table `problems`.
    """
    if disks.host_offsets:
        from virt_bmap.open.host import open_host

        with open_host(disks.images, disks) as host:
            yield survey_host(host, watcher(host.files), disks.keys, disks.nested, asks, disks.machines)
    else:
        with open_disks(disks.images, disks, status) as readers:
            yield survey_open(readers, watcher(readers), disks.keys, disks.nested, asks, disks.machines)


def mapped(disks: Disks, watcher: Watcher = lambda _: lambda _: None, asks: Asks = NOTHING_MORE) -> BlockMap:
    """The map alone. Raises as `opened` does."""
    with opened(disks, watcher, asks) as (bmap, _):
        return bmap


def map_disks(
    images: Sequence[str],
    *,
    format: str | None = None,
    references: bool = False,
    force_share: bool = False,
    blocksize: int | None = None,
    session: DiscSession | None = None,
    keys: Keys = NO_KEYS,
    nested: Nested = NOTHING,
    machines: bool = False,
    host_offsets: bool = False,
) -> BlockMap:
    """The map of `Disks(images, ...)`, where that is all that is wanted. Raises as `opened` does."""
    disks = Disks(
        images, format=format, references=references, force_share=force_share, blocksize=blocksize,
        session=session, keys=keys, nested=nested, machines=machines, host_offsets=host_offsets,
    )  # fmt: skip
    return mapped(disks)


def is_saved(path: str) -> bool:
    """Is this file a saved map (Parquet or text) rather than a disk image?"""
    try:
        with os.fdopen(open_looked_at(path), "rb") as file:
            head = file.read(64)
    except (ImageError, OSError):
        return False
    return head[:4] == b"PAR1" or _first_line_is_a_maps(head)


def _first_line_is_a_maps(head: bytes) -> bool:
    words = head.split(b"\n", 1)[0].split(b" ")
    return (
        len(words) >= 4
        and words[0].isdigit()
        and len(words[3]) == 1
        and all(set(w) <= set(b"0123456789abcdef") for w in words[1:3])
    )


def load(path: str) -> BlockMap:
    """Read a saved map, whichever kind it is."""
    from virt_bmap.saved import bmap_reader, parquet

    try:
        with os.fdopen(open_looked_at(path, "a saved map"), "rb") as file:
            if file.read(4) == b"PAR1":
                return parquet.load(path)
            file.seek(0)
            return bmap_reader.load(file.read(), path)
    except OSError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror}") from error
