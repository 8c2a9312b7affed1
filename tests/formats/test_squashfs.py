"""squashfs against the kernel's mount and unsquashfs, contents read back by the map, real images, and
damage."""

import contextlib
import hashlib
import lzma
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from support import BytesReader, assert_proven, hashes, mapped, mounted, need, run, tree
from virt_bmap.core.packed import Codec
from virt_bmap.formats.filesystems.squashfs.compression import CODECS
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

COMPRESSORS = ("gzip", "lzma", "lzo", "lz4", "xz", "zstd")
STORED = ("-noI", "-noD", "-noF", "-noX")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of one and of many blocks, tails, duplicates, holes, links, attributes, a large and a deep
    directory."""
    root = tmp_path_factory.mktemp("squashfs-source")
    dice = random.Random(4)
    words = [bytes(dice.choices(b"abcdefgh ", k=8)) for _ in range(200)]
    for i in range(150):
        (root / f"text {i}").write_bytes(b"".join(dice.choices(words, k=dice.randrange(0, 4000))))
    (root / "noise").write_bytes(dice.randbytes(300_001))
    (root / "copy of noise").write_bytes((root / "noise").read_bytes())
    with (root / "holes").open("wb") as file:
        file.seek(700_000)
        file.write(b"after the hole")
        file.truncate(2_000_000)
    large = root / "large"
    large.mkdir()
    for i in range(3000):
        (large / f"{i:05} {'n' * (i % 100)}").touch()
    (root / "a/b/c/d/e").mkdir(parents=True)
    (root / "a/b/c/d/e/leaf").write_bytes(b"leaf")
    os.link(root / "noise", root / "a/hard link")
    (root / "link").symlink_to("a/b/" + "x/" * 150)
    (root / "empty").touch()
    os.mkfifo(root / "pipe")
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError):
            os.setxattr(root / "noise", "user.note", b"value" * 20)
    return root


def build(source: Path, where: Path, *options: str) -> Path:
    """An image made by mksquashfs."""
    where.unlink(missing_ok=True)
    run(
        need("mksquashfs", "squashfs-tools"),
        source,
        where,
        "-noappend",
        "-no-progress",
        "-quiet",
        "-processors",
        "2",
        *options,
    )
    return where


def unpack(name: str, data: bytes, size: int) -> bytes | None:
    """A block decompressed by a library that knows nothing of this project, at most `size` bytes; None
    without one."""
    if name == "gzip":
        return zlib.decompress(data)
    if name in ("xz", "lzma"):
        return lzma.decompress(data)
    if name == "zstd":
        return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())
    if name == "lz4":
        return bytes(pa.Codec("lz4_raw").decompress(data, size, asbytes=True))
    return None


def assert_contents(bmap: BlockMap, image: Path, source: Path, compressor: str) -> None:
    """Every file of `source`, put together from the blocks that the map names."""
    data, found = image.read_bytes(), tree(bmap, 0)
    rows: dict[int, list[dict[str, int]]] = {}
    for row in bmap.extents.to_pylist():
        if row["kind"] == "data":
            rows.setdefault(row["inode"], []).append(row)
    for path in source.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        expected = path.read_bytes()
        result = bytearray(len(expected))
        for row in rows.get(found["/" + str(path.relative_to(source))], []):
            stored, at = data[row["volume_offset"] :][: row["length"]], row["file_offset"]
            piece = expected[at : at + row["file_length"]]
            if row["flags"] & tables.COMPRESSED:
                block = unpack(compressor, stored, 1 << 16)
                assert block is None or piece in block, (path, row)
                result[at : at + len(piece)] = piece
            else:
                result[at : at + row["length"]] = stored
        assert bytes(result) == expected, path


def assert_as_mounted(bmap: BlockMap, image: Path) -> None:
    """Names and inodes as the kernel shows them."""
    of = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    found = tree(bmap, 0)
    with mounted(image, "ro") as where:
        paths = [where, *where.rglob("*")]
        assert {
            "/" + str(path.relative_to(where)).strip(".")
            if path == where
            else "/" + str(path.relative_to(where))
            for path in paths
        } == set(found)
        for path in paths[1:]:
            row, stat = of[found["/" + str(path.relative_to(where))]], path.lstat()
            said = (row["inode"], row["mode"], row["uid"], row["gid"], row["nlink"], row["mtime_ns"])
            assert said == (
                stat.st_ino,
                stat.st_mode,
                stat.st_uid,
                stat.st_gid,
                stat.st_nlink,
                stat.st_mtime_ns,
            ), path
            assert path.is_dir() or row["size"] == stat.st_size


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_compressor(compressor: str, source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", "-comp", compressor, "-b", "64K")
    bmap = mapped(image)
    assert_proven(bmap)
    row = bmap.filesystems.to_pylist()[0]
    assert row["type"] == "squashfs"
    assert row["features"].split()[0] == compressor
    assert set(tree(bmap, 0)) == {"/"} | {"/" + str(path.relative_to(source)) for path in source.rglob("*")}
    assert_contents(bmap, image, source, compressor)


def test_as_the_kernel_mounts_it(source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", "-b", "16K")
    assert_as_mounted(mapped(image), image)


def test_stored_blocks_and_fragments_are_exact(source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", "-b", "16K", *STORED)
    bmap = mapped(image)
    assert_proven(bmap)
    assert not any(row["flags"] & tables.COMPRESSED for row in bmap.extents.to_pylist())
    assert_contents(bmap, image, source, "gzip")
    target = next(row for row in bmap.extents.to_pylist() if row["kind"] == "symlink")
    assert image.read_bytes()[target["volume_offset"] :][: target["length"]] == os.fsencode(
        os.readlink(source / "link")
    )


@pytest.mark.parametrize(
    "options",
    [
        ("-no-fragments",),
        ("-always-use-fragments",),
        ("-no-duplicates",),
        ("-no-exports",),
        ("-nopad",),
        ("-no-xattrs",),
    ],
)
def test_options(options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", *options)
    bmap = mapped(image)
    assert_proven(bmap)
    assert_contents(bmap, image, source, "gzip")


def test_duplicates_and_fragments_are_shared(source: Path, tmp_path: Path) -> None:
    bmap = mapped(build(source, tmp_path / "image", "-b", "128K"))
    found = tree(bmap, 0)
    rows = bmap.extents.to_pylist()
    for name in ("/copy of noise", "/noise"):
        mine = [row for row in rows if row["inode"] == found[name] and row["kind"] == "data"]
        assert mine
        assert all(row["flags"] & tables.SHARED for row in mine)
    assert found["/noise"] == found["/a/hard link"]
    assert {"superblock", "inode table", "directory table", "fragment table", "export table", "id table"} <= {
        row["part"] for row in rows
    }


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("options", [(), ("-b", "4096"), ("-b", "1M", "-always-use-fragments")])
def test_content_is_what_went_in(
    source: Path, tmp_path: Path, compressor: str, options: tuple[str, ...]
) -> None:
    """Whole blocks, tails in fragments, duplicates, holes."""
    image = build(source, tmp_path / "image", "-comp", compressor, *options)
    files = [path for path in source.rglob("*") if path.is_file() and not path.is_symlink()]
    wanted = {str(path.relative_to(source)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert hashes(image) == wanted


@pytest.mark.parametrize("codec", CODECS.values())
def test_codecs_refuse_nonsense_and_give_no_more_than_is_asked(codec: Codec) -> None:
    dice = np.random.default_rng(7)
    for _ in range(300):
        try:
            assert len(codec(dice.bytes(int(dice.integers(1, 200))), 8192)) <= 8192
        except ValueError:
            continue


def test_other_versions_are_refused_by_name() -> None:
    for magic, version, words in ((b"hsqs", 3, "version 3.1"), (b"sqsh", 3, "big-endian")):
        data = np.zeros(8192, np.uint8)
        order = "little" if magic == b"hsqs" else "big"
        data[:4] = np.frombuffer(magic, np.uint8)
        data[28:32] = np.frombuffer(version.to_bytes(2, order) + (1).to_bytes(2, order), np.uint8)
        bmap = survey([BytesReader(data)])
        assert words in bmap.problems.column("detail")[0].as_py()


def test_few_reads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = build(source, tmp_path / "image")
    calls = []
    original = RawReader._fetch
    monkeypatch.setattr(
        RawReader,
        "_fetch",
        lambda self, offsets, lengths: calls.append(1) or original(self, offsets, lengths),
    )
    mapped(image)
    assert len(calls) < 30


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    unsquashfs = need("unsquashfs", "squashfs-tools")
    for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]:
        path, kind = line.split("\t")[0], line.split("\t")[5]
        if kind == "squashfs":
            data = (corpus / path).read_bytes()
            image = tmp_path / "image"
            image.write_bytes(lzma.decompress(data) if path.endswith(".xz") else data)
            bmap = mapped(image)
            assert_proven(bmap)
            listed = run(unsquashfs, "-l", "-d", "", image, ok=(0, 1, 2)).decode().splitlines()
            expected = {line or "/" for line in listed if line == "" or line.startswith("/")}
            if "pathtraversal" not in path and len(expected) > 1:
                assert set(tree(bmap, 0)) | {"/"} == expected | {"/"}, path
