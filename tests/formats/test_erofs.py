"""EROFS against the kernel's mount, FIEMAP and dump.erofs, real images, and damage."""

import lzma
import os
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from support import (
    BytesReader,
    Extent,
    assert_proven,
    fiemap,
    file_extents,
    join,
    lz4_block,
    mapped,
    mounted,
    need,
    run,
    tree,
)
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

LAYOUTS = {
    "plain": (),
    "extended": ("-Eforce-inode-extended",),
    "no-inline": ("-Enoinline_data",),
    "chunks": ("--chunksize=4096",),
    "chunk-indexes": ("--chunksize=16384", "-Eforce-chunk-indexes"),
    "lz4": ("-zlz4",),
    "lz4-full-index": ("-zlz4hc,12", "-Elegacy-compress"),
    "big-pcluster": ("-zlz4hc", "-C65536"),
    "ztailpacking": ("-zlz4hc", "-Eztailpacking"),
    "big-ztailpacking": ("-zlz4", "-C32768", "-Eztailpacking"),
    "fragments": ("-zlz4hc", "-C65536", "-Efragments"),
    "dedupe": ("-zlz4hc", "-Ededupe"),
    "shared-xattrs": ("-x1",),
    "no-xattrs": ("-x-1",),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all sizes, compressible and not, large and deep directories, links, attributes."""
    root = tmp_path_factory.mktemp("erofs-source")
    dice = random.Random(5)
    words = [bytes(dice.choices(b"abcdefgh ", k=8)) for _ in range(200)]
    for i in range(120):
        (root / f"text {i}").write_bytes(b"".join(dice.choices(words, k=dice.randrange(0, 6000))))
    (root / "noise").write_bytes(dice.randbytes(200_001))
    (root / "copy of noise").write_bytes((root / "noise").read_bytes())
    (root / "mixed").write_bytes(
        b"".join(dice.choice([bytes(20000), dice.randbytes(9000), b"text " * 3000]) for _ in range(20))
    )
    large = root / "large"
    large.mkdir()
    for i in range(1500):
        (large / f"{i:05} {'n' * (i % 100)}").touch()
    (root / "a/b/c/d/e").mkdir(parents=True)
    (root / "a/b/c/d/e/leaf").write_bytes(b"leaf")
    os.link(root / "noise", root / "a/hard link")
    (root / "link").symlink_to("a/b/" + "x/" * 150)
    (root / "empty").touch()
    os.mkfifo(root / "pipe")
    for i in range(20):
        try:
            os.setxattr(root / f"text {i}", "user.same", b"the same everywhere")
            os.setxattr(root / f"text {i}", f"user.own{i}", b"v" * 40 * i)
        except OSError:
            break
    return root


def build(source: Path, where: Path, *options: str) -> Path:
    """An image made by mkfs.erofs; skips where this version does not know an option."""
    where.unlink(missing_ok=True)
    done = subprocess.run([need("mkfs.erofs", "erofs-utils"), *options, where, source], capture_output=True)
    if done.returncode:
        pytest.skip(f"mkfs.erofs: {(done.stderr + done.stdout).decode(errors='replace').splitlines()[0]}")
    return where


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", *LAYOUTS[layout])
    bmap = mapped(image)
    assert_proven(bmap)
    assert bmap.filesystems.column("type").to_pylist() == ["erofs"]
    assert set(tree(bmap, 0)) == {"/"} | {"/" + str(path.relative_to(source)) for path in source.rglob("*")}
    assert_contents(bmap, image, source)
    assert_extents(bmap, image, source)
    with mounted(image, "ro", kind="erofs") as where:
        assert_as_mounted(bmap, where)


def assert_as_mounted(bmap: BlockMap, where: Path) -> None:
    """Inodes as the kernel shows them, and the extents of every file as FIEMAP gives them."""
    found = tree(bmap, 0)
    of = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    for path in where.rglob("*"):
        row, stat = of[found["/" + str(path.relative_to(where))]], path.lstat()
        said = (row["inode"], row["mode"], row["uid"], row["gid"], row["nlink"], row["size"], row["mtime_ns"])
        assert said == (
            stat.st_ino,
            stat.st_mode,
            stat.st_uid,
            stat.st_gid,
            stat.st_nlink,
            stat.st_size,
            stat.st_mtime_ns,
        ), path
        if (
            path.is_file()
            and not path.is_symlink()
            and not row["flags"] & tables.I_COMPRESSED
            and row["size"]
        ):
            assert _clipped(file_extents(bmap, 0, row["inode"]), row["size"]) == _clipped(
                fiemap(path), row["size"]
            ), path


def _clipped(extents: list[Extent], size: int) -> list[Extent]:
    """Without what lies behind the end of the file: the kernel counts it in some layouts."""
    return join(
        [
            Extent(e.file_offset, e.offset, min(e.length, size - e.file_offset))
            for e in extents
            if e.file_offset < size
        ]
    )


def assert_extents(bmap: BlockMap, image: Path, source: Path) -> None:
    """Physical clusters and their places in the file as dump.erofs lists them."""
    dump = need("dump.erofs", "erofs-utils")
    found = tree(bmap, 0)
    rows: dict[int, set[tuple[int, int, int, int]]] = {}
    for row in bmap.extents.to_pylist():
        if row["kind"] == "data" and row["file_offset"] is not None and not row["flags"] & tables.INLINE:
            rows.setdefault(row["inode"], set()).add(
                (row["file_offset"], row["file_length"], row["volume_offset"], row["length"])
            )
    for name in ("mixed", "noise", "text 3", "text 77", "copy of noise"):
        inode = found["/" + name]
        if (
            not next(row for row in bmap.inodes.to_pylist() if row["inode"] == inode)["flags"]
            & tables.I_COMPRESSED
        ):
            continue
        out = run(dump, "-e", f"--nid={inode}", image, ok=(0, 1)).decode()
        listed = re.findall(
            r"^\s*\d+:\s*(\d+)\.\.\s*(\d+) \|\s*(\d+) :\s*(\d+)\.\.\s*(\d+) \|\s*(\d+)", out, re.M
        )
        said = {
            (int(a), int(size), int(low), int(length)) for a, _, size, low, _, length in listed if int(length)
        }
        mine = rows.get(inode, set())
        assert mine <= said, (name, sorted(mine - said)[:5], sorted(said - mine)[:5])
        assert len(said - mine) <= 1, name  # an inline tail or a fragment


def assert_contents(bmap: BlockMap, image: Path, source: Path) -> None:
    """What is stored as it is reads back; what LZ4 packed unpacks to the file's bytes."""
    data, found = image.read_bytes(), tree(bmap, 0)
    rows: dict[int, list[dict[str, int]]] = {}
    for row in bmap.extents.to_pylist():
        if row["kind"] == "data":
            rows.setdefault(row["inode"], []).append(row)
    for path in source.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        expected, covered = path.read_bytes(), 0
        for row in rows.get(found["/" + str(path.relative_to(source))], []):
            stored, at = data[row["volume_offset"] :][: row["length"]], row["file_offset"]
            piece = expected[at : at + row["file_length"]]
            covered += len(piece)
            if not row["flags"] & tables.COMPRESSED:
                assert stored[: len(piece)] == piece, (path, row)
            elif len(piece) <= len(stored) and _plain(stored, piece):
                continue
            elif not row["flags"] & tables.INLINE:
                assert piece in _lz4(stored), (path, row)
        assert covered == len(expected), path


def _plain(stored: bytes, piece: bytes) -> bool:
    """A PLAIN cluster holds the bytes as they are, from its start, or rotated by the offset in the logical
    cluster."""
    return piece in stored + stored


def _lz4(stored: bytes) -> bytes:
    """Unpack a physical cluster as far as it goes: padding with zeroes comes first, or behind where the image
    is old."""
    first = lz4_block(stored.lstrip(b"\0"))
    return first if len(first) > 64 else lz4_block(stored)


def test_shared_content_is_marked(source: Path, tmp_path: Path) -> None:
    bmap = mapped(build(source, tmp_path / "image", "--chunksize=4096"))
    found = tree(bmap, 0)
    for name in ("/copy of noise", "/noise"):
        mine = [
            row for row in bmap.extents.to_pylist() if row["inode"] == found[name] and row["kind"] == "data"
        ]
        assert mine
        assert all(row["flags"] & tables.SHARED for row in mine)
    assert found["/noise"] == found["/a/hard link"]


def test_attributes_and_metadata_are_named(source: Path, tmp_path: Path) -> None:
    bmap = mapped(build(source, tmp_path / "image", "-x1", "-zlz4"))
    rows = bmap.extents.to_pylist()
    assert {"superblock", "inodes", "boot area"} <= {row["part"] for row in rows}
    assert {"directory", "symlink", "data", "tree"} <= {row["kind"] for row in rows}


def test_label_uuid_and_state(source: Path, tmp_path: Path) -> None:
    image = build(source / "a", tmp_path / "image", "-U", "01234567-89ab-cdef-0123-456789abcdef")
    row = mapped(image).filesystems.to_pylist()[0]
    assert row["uuid"] == "01234567-89ab-cdef-0123-456789abcdef"
    assert row["state"] == "clean"


def test_unknown_features_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    data = np.frombuffer(build(source / "a", tmp_path / "image").read_bytes(), np.uint8).copy()
    data[1024 + 80] |= 0x80
    assert "48bit" in survey([BytesReader(data)]).problems.column("detail")[0].as_py()


def test_few_reads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = build(source, tmp_path / "image", "-zlz4")
    calls = []
    original = RawReader._fetch
    monkeypatch.setattr(
        RawReader,
        "_fetch",
        lambda self, offsets, lengths: calls.append(1) or original(self, offsets, lengths),
    )
    mapped(image)
    assert len(calls) < 40


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]:
        path, kind = line.split("\t")[0], line.split("\t")[5]
        if kind != "erofs":
            continue
        image = tmp_path / "image"
        image.write_bytes(lzma.decompress((corpus / path).read_bytes()))
        bmap = mapped(image)
        if "minix-magic" in path:  # the first 2 MiB of a larger one
            assert "truncated" in bmap.problems.column("code").to_pylist()
            continue
        assert_proven(bmap)
        with mounted(image, "ro", kind="erofs") as where:
            paths = {"/" + str(path.relative_to(where)) for path in where.rglob("*")}
            assert paths == set(tree(bmap, 0)) - {"/"}
