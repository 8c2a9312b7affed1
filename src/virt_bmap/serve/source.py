"""Where the map and the disks of a watch come from."""

import os
from collections.abc import Sequence

from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.errors import MapError
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic, open_image
from virt_bmap.open.raw import RawReader
from virt_bmap.serve.serve import Source
from virt_bmap.survey import maps
from virt_bmap.survey.survey import survey

PARQUET_MAGIC = b"PAR1"


def source(
    image: str, format: str | None = None, references: bool = False, force_share: bool = False
) -> Source:
    """A disk to serve. Its format is found once, here, so that what is served is what was mapped."""
    if magic.is_uri(image):
        reader = open_image(image)
        reader.close()
        return Source(image, RAW, reader.size, references)
    found = format
    if found is None:
        plain = RawReader(image)
        try:
            found = magic.recognise(plain)
        finally:
            plain.close()
    reader = open_image(image, found, references, force_share=force_share)
    reader.close()
    return Source(image, found, reader.size, references, force_share)


def mapped(sources: Sequence[Source]) -> BlockMap:
    """Map the disks now."""
    readers = [
        open_image(
            disk.image,
            None if magic.is_uri(disk.image) else disk.format,
            disk.references,
            force_share=disk.force_share,
        )
        for disk in sources
    ]
    try:
        return survey(readers)
    finally:
        for reader in readers:
            reader.close()


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
