"""Tables of partitions, images, arrays and containers as a map has them, beside what other programs find."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from host_images import content
from others import appliance
from others import readers as others
from others.corpus import PIECE, made, sliced, unpacked
from others.files import APPLIANCE, LARGEST_COPY, Row, refused, volume_as_file
from others.layers import IMAGES, SETS, SFDISK, TABLES
from others.readers import Refused, folder
from virt_bmap import Disks, opened
from virt_bmap.core.errors import BmapError, UsageError
from virt_bmap.core.keys import Keys
from virt_bmap.core.reader import Reader
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic, open_image
from virt_bmap.open.disks import Opening
from virt_bmap.open.host import open_host
from virt_bmap.open.raw import RawReader


def tables_judged(image: Path, label: str) -> Iterator[Row]:
    """Tables of partitions: each place counts as a path."""
    with folder() as scratch:
        yield from _tables_judged(as_large_as_its_table(image, scratch / "whole"), label, scratch)


def as_large_as_its_table(image: Path, target: Path) -> Path:
    """Of many disks the first sectors alone were kept: a hole stands for the rest."""
    with contextlib.closing(RawReader(str(image))) as raw:
        if magic.recognise(raw) != RAW:
            return image
        size = raw.size
    with contextlib.suppress(Refused):
        sliced(image, 0, size, target)
        os.truncate(target, max([size, *(start + length for start, length in SFDISK.read(target))]))
        return target
    return image


def _tables_judged(image: Path, label: str, scratch: Path) -> Iterator[Row]:
    with opened(Disks([str(image)])) as (bmap, readers):
        volumes, mappings = bmap.volumes.to_pylist(), bmap.mappings.to_pylist()
        for disk in volumes:
            if disk["kind"] != "disk" or disk["type"] not in TABLES:
                continue
            mine = {
                (row["parent_offset"], row["run"])
                for row in mappings
                if row["parent"] == disk["volume"]
                and "Extended" not in (volumes[row["volume"]]["detail"] or "")
            }
            volume_as_file(bmap, readers, disk["volume"], image, scratch / "disk")
            for reader in TABLES[disk["type"]]:
                if not others.is_here(reader.program):
                    continue
                try:
                    theirs = reader.read(scratch / "disk")
                except Refused as error:
                    yield refused(disk["type"], label, reader.name, str(error))
                    continue
                told = repr(sorted(theirs - mine)), repr(sorted(mine - theirs))
                yield Row(disk["type"], label, reader.name, len(mine & theirs), 0, 0, *told, "[]", "")


def images_judged(image: Path, label: str) -> Iterator[Row]:
    """The disk in an image."""
    with contextlib.closing(RawReader(str(image))) as raw:
        format = magic.recognise(raw)
    if not IMAGES.get(format):
        return
    try:
        mine = disk_in(image, format)
    except BmapError as error:
        yield refused(format, label, "virt-bmap", str(error))
        return
    with folder() as scratch:
        for other in IMAGES[format]:
            if others.is_here(other.program):
                try:
                    other.write(image, target := scratch / other.name)
                except Refused as error:
                    yield refused(format, label, other.name, str(error))
                    continue
                with target.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == mine
                differ = "[]" if same else "['disk']"
                yield Row(format, label, other.name, 0, int(same), 0, "[]", "[]", differ, "")


def volumes_judged(corpus: Path) -> Iterator[Row]:
    """Arrays, logical volumes and opened containers: each volume counts as a path and as a content."""
    with folder() as where:
        disks = [
            [unpacked(corpus / file, made(where / f"{at}-{nth}"))[0] for nth, file in enumerate(one.files)]
            for at, one in enumerate(SETS)
        ]
        asked = [(one.kind, files, one.secret) for one, files in zip(SETS, disks, strict=True)]
        for one, files, found in zip(SETS, disks, appliance.volumes(asked), strict=True):
            keys = Keys((("all", one.secret.encode()),) if one.secret else ())
            with opened(Disks([str(file) for file in files], keys=keys)) as (bmap, readers):
                kinds = bmap.volumes.column("kind").to_pylist()
                mine = {sum_of(readers[at]) for at, kind in enumerate(kinds) if kind in ("md", "lv", "crypt")}
            same = sum(told in mine for told in found.values())
            differ = repr(sorted(name for name, told in found.items() if told not in mine))
            why = "" if found else "nothing was opened"
            yield Row(one.type, one.files[0], APPLIANCE, same, same, 0, "[]", "[]", differ, why)


def sum_of(reader: Reader) -> str:
    digest = hashlib.sha256()
    for at in range(0, reader.size, PIECE):
        digest.update(reader.read(at, min(PIECE, reader.size - at)))
    return digest.hexdigest()


def disk_in(image: Path, format: str) -> str:
    """Its SHA-256, read through our own layer where there is one; what QEMU does not open is read by ours in
    any case."""
    opening = Opening(references=True)
    with contextlib.closing(open_image(str(image), opening)) as reader:
        if reader.size > LARGEST_COPY:
            raise UsageError("too large to be compared")
        if format in ("dmg", "ewf"):
            return sum_of(reader)
        with open_host([str(image)], opening) as host:
            return hashlib.sha256(content(host)).hexdigest()
