"""Real ext images made by other projects: none ends in a traceback, valid ones are proven, and the kernel's
own tables agree."""

import ast
import bz2
import csv
import gzip
import lzma
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support import BytesReader, tree
from virt_bmap.ask.check import check
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.survey.survey import survey

KNOWN = {
    "fs.multiple.xz": "four filesystems that overlap each other",
    "mbr.raw.gz": "its partitions overlap, its filesystems do not",
    "ext2.splitraw.000.xz": "the first half of an image in two pieces",
}
LARGEST = 64 << 20
"""Images of more bytes are left to slower tests."""


def unpack(path: Path) -> bytes:
    """The image in a compressed file."""
    data = path.read_bytes()
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ", lzma.open), (b"BZh", bz2.open)):
        if data.startswith(magic):
            with opened(path) as file:
                return file.read(LARGEST + 1)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    return data[: LARGEST + 1]


def images(corpus: Path) -> Iterator[tuple[str, bool, np.ndarray]]:
    """(file, whether it is valid, its bytes) of every ext image."""
    with open(corpus / "INVENTORY.tsv", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if "ext" in row["kind"]]
    for row in rows:
        if row["kind"].startswith(("ext", "pt:dos")) and not row["file"].endswith((".zst", ".vmdk", ".vhdx")):
            data = unpack(corpus / row["file"])
            if 2048 < len(data) <= LARGEST:
                yield row["file"], row["valid"].startswith("valid"), np.frombuffer(data, np.uint8)


@pytest.fixture(scope="module")
def maps(corpus: Path) -> dict[str, tuple[bool, BlockMap]]:
    """The map of every image: none raises."""
    return {file: (valid, survey([BytesReader(data)])) for file, valid, data in images(corpus)}


def test_corpus_maps_keep_the_contract(maps: dict[str, tuple[bool, BlockMap]]) -> None:
    """Also those that are damaged on purpose."""
    assert len(maps) > 120
    for _, bmap in maps.values():
        for name in BlockMap.TABLES:
            tables.check(name, getattr(bmap, name))


def test_valid_corpus_images_are_proven(maps: dict[str, tuple[bool, BlockMap]]) -> None:
    """Allocator and owners agree wherever a checker calls the image valid."""
    for file, (valid, bmap) in maps.items():
        if valid and Path(file).name not in KNOWN:
            assert check(bmap).disagreements == [], file


def test_corpus_equals_what_kernels_read(maps: dict[str, tuple[bool, BlockMap]], corpus: Path) -> None:
    """Paths, sizes, modes, owners, times, links, inodes and extents as tables of a mounted walk have them."""
    compared = 0
    for file, (_, bmap) in maps.items():
        truth = corpus / "truth" / f"{file.removeprefix('images/')}.truth.tsv"
        if not truth.exists() or bmap.filesystems.column("state").to_pylist() not in (
            ["clean"],
            ["in use"],
        ):
            continue
        compared += compare(bmap, truth)
    assert compared > 300


def compare(bmap: BlockMap, truth: Path) -> int:
    """Compare one image with its table; how many files were compared."""
    volume = bmap.filesystems.column("volume")[0].as_py()
    paths = tree(bmap, volume)
    _, inodes = bmap.slice_of("inodes", volume)
    at = {number: row for row, number in enumerate(tables.integers(inodes, "inode").tolist())}
    column = {
        name: tables.integers(inodes, name) for name in ("size", "mode", "uid", "gid", "mtime_ns", "nlink")
    }
    count = 0
    for line in truth.read_text().splitlines():
        if line.startswith("#"):
            continue
        path, kind, size, mode, uid, gid, mtime, nlink, inode, _, extents = line.split("\t")
        path = ast.literal_eval(path)
        if path in ("/", "") or kind not in "fdl":
            continue
        assert paths[path] == int(inode), (truth, path)
        row = at[int(inode)]
        said = {
            "size": int(size),
            "mode": int(mode, 8),
            "uid": int(uid),
            "gid": int(gid),
            "mtime_ns": int(mtime),
            "nlink": int(nlink),
        }
        assert {name: int(column[name][row]) for name in said} == said, (truth, path)
        if "+" in extents and "inline" not in extents:
            assert blocks(bmap, volume, int(inode)) == said_blocks(extents), (truth, path)
        count += 1
    return count


def blocks(bmap: BlockMap, volume: int, inode: int) -> dict[int, int]:
    """Every KiB of a file, to where it lies."""
    _, extents = bmap.slice_of("extents", volume)
    mine = (tables.integers(extents, "inode") == inode) & (
        tables.integers(extents, "flags") & tables.INLINE == 0
    )
    mine &= np.isin(tables.codes(extents, "kind"), (tables.DATA, tables.UNWRITTEN, tables.SYMLINK))
    rows = [
        tables.integers(extents, name)[mine].tolist() for name in ("file_offset", "volume_offset", "length")
    ]
    return {f + i: v + i for f, v, n in zip(*rows, strict=True) for i in range(0, n, 1024)}


def said_blocks(extents: str) -> dict[int, int]:
    """The same of a column like 0:1642496+1024[last,eof],..."""
    found = {}
    for piece in extents.replace("]", "];").rstrip(";").split(";"):
        for word in piece.split("[")[0].strip(",").split(","):
            offset, _, place = word.partition(":")
            start, _, length = place.partition("+")
            found |= {int(offset) + i: int(start) + i for i in range(0, int(length), 1024)}
    return found
