"""Where block maps come from: disks, mapped now, and saved maps."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from virt_bmap.core.errors import ImageError
from virt_bmap.core.keys import NO_KEYS, Keys
from virt_bmap.core.reader import Reader
from virt_bmap.host.looked_at import open_looked_at
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import NOTHING_MORE, Asks
from virt_bmap.open import open_disks
from virt_bmap.survey.nested import NOTHING, Nested
from virt_bmap.survey.survey import survey, survey_host, survey_open


def map_disks(
    images: Sequence[str],
    format: str | None = None,
    references: bool = False,
    keys: Keys = NO_KEYS,
    watcher: Callable[[Sequence[Reader]], Callable[[str], None]] | None = None,
    nested: Nested = NOTHING,
    host_offsets: bool = False,
    asks: Asks = NOTHING_MORE,
    force_share: bool = False,
) -> BlockMap:
    """Map images, block devices or NBD URIs as the disks of one machine, /dev/sda, /dev/sdb, ...

    `format`, `references` and `force_share` as for `images.open_image`; `keys` open encrypted volumes;
    `nested` says which files are disks, too. `watcher` is given the open disks and returns what is called
    with each volume's name. With `host_offsets` the map counts in bytes of the image files: these are its
    disks 1, 2, ..., and the guest's disks volumes that lie in them. `asks` is what is wanted beside the map.
    Raises ImageError where a disk can't be opened or read, FormatError where an image's own tables can't;
    what is wrong *on* a disk becomes rows of the table `problems`.
    """
    if host_offsets:
        from virt_bmap.open.host import open_host

        with open_host(images, format, references, force_share) as host:
            return survey_host(host, watcher(host.files) if watcher else lambda _: None, keys, nested, asks)[
                0
            ]
    with open_disks(images, format, references, force_share=force_share) as disks:
        return survey(disks, watcher(disks) if watcher else lambda _: None, keys, nested, asks)


@contextlib.contextmanager
def open_volumes(
    images: Sequence[str],
    format: str | None = None,
    references: bool = False,
    keys: Keys = NO_KEYS,
    watcher: Callable[[Sequence[Reader]], Callable[[str], None]] | None = None,
    nested: Nested = NOTHING,
    status: Sequence[str] | None = None,
    force_share: bool = False,
    asks: Asks = NOTHING_MORE,
) -> Iterator[tuple[BlockMap, list[Reader]]]:
    """Map disks as `map_disks` does, and keep them open: also the reader of each volume, by its number, good
    until the block ends.

    `status=()`: the readers can also tell what is stored, as far as servers know; see `images.open_image`.
    """
    with open_disks(images, format, references, status, force_share) as disks:
        yield survey_open(disks, watcher(disks) if watcher else lambda _: None, keys, nested, asks)


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
