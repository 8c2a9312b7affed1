"""The disks of other projects in the corpus, unpacked one after the other; sparse."""

import bz2
import csv
import gzip
import lzma
import os
import re
import subprocess
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from others.readers import folder

MAGICS = {b"\xfd7zXZ": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
OF_PARTS = re.compile("vmdk|qcow2|vpc|vhdx|ewf")
"""Kinds of the inventory that may refer to files beside them."""
PIECE = 1 << 20


def inventory(corpus: Path) -> list[dict[str, str]]:
    with open(corpus / "INVENTORY.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def images(corpus: Path, files: Collection[str]) -> Iterator[tuple[str, str, Path]]:
    """(name, what a checker said of it, file) of the images in some files of the corpus."""
    rows = inventory(corpus)
    for row in rows:
        if row["file"] not in files or not (corpus / row["file"]).is_file():
            continue
        with folder() as where:
            if OF_PARTS.match(row["kind"]):
                for other in rows:
                    if Path(other["file"]).parent == Path(row["file"]).parent and other != row:
                        unpacked(corpus / other["file"], where)
            for image in unpacked(corpus / row["file"], where):
                yield row["file"], row["valid"], image


def unpacked(path: Path, where: Path) -> list[Path]:
    """The images in a file of the corpus, in a folder of their own; sparse."""
    head = path.read_bytes()[:6]
    name = where / path.name
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        subprocess.run(["zstd", "-dqf", path, "-o", name], check=True)
        return [name]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [_stored(archive.open(one), where / Path(one).name)
                    for one in archive.namelist() if not one.endswith("/")]  # fmt: skip
    unpack = next((unpack for magic, unpack in MAGICS.items() if head.startswith(magic)), None)
    if not unpack:
        return [_stored(open(path, "rb"), name)]
    first = _stored(unpack(path), where / path.stem)
    if ".tar" in path.name or ".tgz" in path.name:  # a disc that begins with zeroes is a tar archive, too
        inside = made(where / "inside")
        subprocess.run(["tar", "-xSf", first, "-C", inside], check=True)
        return sorted(one for one in inside.rglob("*") if one.is_file())
    return [first] if first.read_bytes()[:2] != b"\x1f\x8b" else unpacked(first, made(where / "inner"))


def made(where: Path) -> Path:
    where.mkdir()
    return where


def _stored(source: IO[bytes] | None, target: Path) -> Path:
    assert source
    with source, target.open("wb") as file:
        while piece := source.read(PIECE):
            if piece.strip(b"\0"):
                file.write(piece)
            else:
                file.seek(len(piece), os.SEEK_CUR)
        file.truncate()
    return target


def sliced(source: Path, offset: int, length: int, target: Path) -> None:
    """[offset, offset + length) of a file as a file of its own, sparse as it is."""
    with source.open("rb") as file, target.open("wb") as out:
        at, end = offset, offset + length
        while at < end:
            try:
                at = max(at, file.seek(at, os.SEEK_DATA))
            except OSError:
                break
            file.seek(at)
            piece = file.read(min(PIECE, max(0, end - at)))
            if not piece:
                break
            out.seek(at - offset)
            out.write(piece)
            at += len(piece)
        out.truncate(length)
