"""Where the map and the disks of a watch come from."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.errors import MapError
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic, open_image
from virt_bmap.open.disks import SAFELY, Opening
from virt_bmap.open.raw import RawReader
from virt_bmap.serve.serve import Source
from virt_bmap.survey import maps

PARQUET_MAGIC = b"PAR1"


def source(image: str, opening: Opening = SAFELY) -> Source:
    """A disk to serve. Its format is found once, here, so that what is served is what was mapped."""
    found = RAW if magic.is_uri(image) else opening.format
    if found is None:
        with contextlib.closing(RawReader(image)) as plain:
            found = magic.recognise(plain)
    opening = replace(opening, format=found)
    with contextlib.closing(open_image(image, opening)) as reader:
        return Source(image, found, reader.size, opening)


def saved(path: str, sources: Sequence[Source]) -> BlockMap:
    """A saved map of these disks, Parquet or text.

    Raises MapError where it is not one, or is of other disks.
    """
    found = maps.load(path)
    if found.on_files:
        raise MapError(
            f"{path}: counts in bytes of image files, but a guest's accesses count in bytes of its disks: "
            "map them without --host-offsets"
        )
    if len(found.disks) != len(sources):
        raise MapError(
            f"{path}: is a map of {plural(len(found.disks), 'disk')}, but "
            f"{counted(len(sources), '[is|are] watched')}"
        )
    is_text = not _is_parquet(path)
    sizes = found.volumes.column("size").to_pylist()
    for number, disk in zip(found.disks, sources, strict=True):
        # the last line of a text map of the original may end before the disk does
        if sizes[number] > disk.size or (not is_text and sizes[number] != disk.size):
            raise MapError(
                f"{path}: is the map of a disk of {sizes[number]} "
                f"bytes, but {os.fspath(disk.image)} has {disk.size}"
            )
    return found


def _is_parquet(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
