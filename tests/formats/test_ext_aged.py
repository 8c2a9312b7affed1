"""ext filesystems after a life of writes, holes, deletions and crashes under the running kernel."""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support import (
    Extent,
    assert_proven,
    content,
    fiemap,
    file_extents,
    join,
    mapped,
    mounted,
    need,
    run,
    sync,
    tree,
)
from virt_bmap.formats.filesystems.ext import journal
from virt_bmap.formats.filesystems.ext.superblock import read_superblock
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader

AGED = {
    "ext2-1k": "-t ext2 -b 1024",
    "ext3-1k": "-t ext3 -b 1024",
    "ext4-1k": "-t ext4 -b 1024",
    "ext4-4k": "-t ext4 -b 4096",
    "bigalloc": "-t ext4 -O bigalloc -C 16384",
    "inline": "-t ext4 -b 1024 -O inline_data",
    "quota": "-t ext4 -b 1024 -O quota",
    "orphan-file": "-t ext4 -b 1024 -O orphan_file",
    "ea-inode": "-t ext4 -b 1024 -O ea_inode",
    "sparse-super2": "-t ext4 -b 1024 -O sparse_super2,^resize_inode,uninit_bg,^metadata_csum",
}


def fallocate(*options: str | Path) -> None:
    """Holes and preallocation; block pointers know none."""
    subprocess.run(["fallocate", *map(str, options)], capture_output=True)


def live(mount: Path, seed: int = 1) -> None:
    """Write, overwrite, punch, preallocate, fragment, link, rename and delete."""
    rng = random.Random(seed)
    (mount / "d").mkdir()
    for i in range(400):
        (mount / "d" / f"file {i}").write_bytes(rng.randbytes(rng.choice([0, 10, 100, 2000, 9000])))
    for i in range(0, 400, 3):
        (mount / "d" / f"file {i}").unlink()
    with open(mount / "fragmented", "wb") as file:
        for i in range(500):
            file.seek(i * 8192)
            file.write(rng.randbytes(700))
    with open(mount / "far", "wb") as file:
        for at in (11, 12, 267, 268, 12 + 256 + 65535, 12 + 256 + 65536, 80000):
            file.seek(at * 1024)
            file.write(b"far")
    (mount / "punched").write_bytes(rng.randbytes(300_000))
    for at in range(20_000, 280_000, 40_000):
        fallocate("-p", "-o", str(at), "-l", "9000", mount / "punched")
    fallocate("-l", "500000", mount / "preallocated")
    fallocate("-n", "-l", "400000", mount / "beyond its end")
    with open(mount / "preallocated", "r+b") as file:
        file.seek(100_000)
        file.write(rng.randbytes(50_000))
    for i in range(1, 400, 4):
        if (mount / "d" / f"file {i}").exists():
            os.rename(mount / "d" / f"file {i}", mount / f"moved {i}")
    os.link(mount / "punched", mount / "d" / "again")
    os.symlink("s" * 200, mount / "long link")
    for name in ("fragmented", "punched", "far"):
        os.setxattr(mount / name, "user.same", b"x" * 600)
    try:
        os.setxattr(mount / "d", "user.huge", bytes(5000))
    except OSError:
        assert not (mount / "no ea_inode").exists()


@dataclass(frozen=True)
class Life:
    """An image after its life, and what the kernel said of it before it was unmounted."""

    image: Path
    bmap: BlockMap
    extents: dict[str, list[Extent]]
    hashes: dict[str, str]


@pytest.fixture(scope="module", params=AGED)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """A filesystem of each kind."""
    need("mke2fs", "e2fsprogs")
    image = tmp_path_factory.mktemp("aged") / "x.img"
    run("truncate", "-s", "24M", image)
    run("mke2fs", "-q", "-F", *AGED[request.param].split(), image)
    extents, hashes = {}, {}
    with mounted(image, "rw") as mount:
        live(mount)
        sync(mount)
        for where, folders, files in os.walk(mount):
            for name in folders + files:
                path = Path(where) / name
                key = "/" + str(path.relative_to(mount))
                if not path.is_symlink():
                    extents[key] = fiemap(path)
                if path.is_file() and not path.is_symlink():
                    hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    yield Life(image, mapped(image), extents, hashes)
    image.unlink()


def test_aged_map_is_proven(life: Life) -> None:
    """After all that, allocator and owners agree; so says e2fsck."""
    assert_proven(life.bmap)
    run("e2fsck", "-fn", life.image)


def test_aged_extents_equal_the_kernels(life: Life) -> None:
    """FIEMAP of every file and directory."""
    paths = tree(life.bmap, 0)
    assert set(life.extents) == set(paths) - {"/", "/long link"}
    for path, extents in life.extents.items():
        assert file_extents(life.bmap, 0, paths[path]) == extents, path


def test_aged_content_by_the_map(life: Life) -> None:
    """Every file, put together from its mapped bytes."""
    disk, paths = [RawReader(str(life.image))], tree(life.bmap, 0)
    for path, digest in life.hashes.items():
        if "file" not in path or path.endswith("7"):
            assert hashlib.sha256(content(life.bmap, disk, 0, paths[path])).hexdigest() == digest, path
    disk[0].close()


def test_shared_attribute_blocks_are_flagged(life: Life) -> None:
    """Three files with the same attributes share a block: each owns it, each row says so."""
    kind, flags = tables.codes(life.bmap.extents, "kind"), tables.integers(life.bmap.extents, "flags")
    start = tables.integers(life.bmap.extents, "volume_offset")
    mine = kind == tables.XATTR
    blocks, count = np.unique(start[mine], return_counts=True)
    shared = np.isin(start, blocks[count > 1]) & mine
    assert ((flags[mine] & tables.SHARED) != 0).tolist() == shared[mine].tolist()


# ---- deleted but open, and crashes -------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["-t ext4 -b 1024", "-t ext4 -b 1024 -O orphan_file", "-t ext3 -b 1024"])
def test_deleted_but_open_files_keep_their_blocks(tmp_path: Path, options: str) -> None:
    """No name, no links, marked as deleted; and all its bytes still owned."""
    need("mke2fs", "e2fsprogs")
    image, copy = tmp_path / "x.img", tmp_path / "copy.img"
    run("truncate", "-s", "16M", image)
    run("mke2fs", "-q", "-F", *options.split(), image)
    with mounted(image, "rw") as mount, open(mount / "gone", "w+b") as file:
        file.write(b"still here" * 5000)
        file.flush()
        os.fsync(file.fileno())
        inode = os.fstat(file.fileno()).st_ino
        (mount / "gone").unlink()
        sync(mount)
        shutil.copyfile(image, copy)
    bmap = mapped(copy)
    assert_proven(bmap)
    assert "/gone" not in tree(bmap, 0)
    row = tables.integers(bmap.inodes, "inode") == inode
    assert tables.integers(bmap.inodes, "flags")[row] == tables.I_DELETED
    assert content(bmap, [RawReader(str(copy))], 0, inode) == b"still here" * 5000


CRASHED = {
    "ext4": ("-t ext4", ""),
    "ext4-1k": ("-t ext4 -b 1024", ""),
    "32bit": ("-t ext4 -b 1024 -O ^64bit,^metadata_csum", ""),
    "checksum-v1": ("-t ext4 -b 1024 -O ^metadata_csum", "journal_checksum"),
    "async-v1": ("-t ext4 -b 1024 -O ^metadata_csum", "journal_async_commit,data=writeback"),
    "async": ("-t ext4 -b 1024", "journal_async_commit,data=writeback"),
    "ext3": ("-t ext3 -b 1024", ""),
    "data-journal": ("-t ext4 -b 1024", "data=journal"),
    "data-journal-32bit": ("-t ext3 -b 1024", "data=journal"),
}


def commit(path: Path) -> None:
    """Commit the journal's transaction. Unlike sync, this leaves the blocks themselves where they were."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def crash(folder: Path, options: str, mount_options: str, devices: tuple[Path, ...] = ()) -> list[Path]:
    """Copies of an image (and other devices) taken while it is mounted, its journal full of what is not yet
    in place."""
    image = folder / "x.img"
    run("truncate", "-s", "64M", image)
    # roomy: a full one is emptied into place, and nothing is left to recover
    journal_size = [] if devices else ["-J", "size=16"]
    run("mke2fs", "-q", "-F", *options.split(), *journal_size, image)
    copies = [folder / f"{disk.stem}.crashed" for disk in (image, *devices)]
    with mounted(image, ",".join(filter(None, ["rw", "commit=300", mount_options]))) as mount:
        live(mount)
        sync(mount)
        for i in range(2, 400, 3):  # what is freed here is written again: the journal must revoke it
            (mount / "d" / f"file {i}").unlink(missing_ok=True)
        (mount / "new directory").mkdir()
        for i in range(200):
            (mount / "new directory" / f"new {i}").write_bytes(b"new")
        shutil.rmtree(mount / "d")
        (mount / "again").write_bytes(random.Random(3).randbytes(900_000))
        (mount / "escaped").write_bytes((b"\xc0\x3b\x39\x98" + bytes(1020)) * 20)
        for path in (mount / "again", mount / "escaped", mount / "new directory", mount):
            commit(path)
        for disk, copy in zip((image, *devices), copies, strict=True):
            shutil.copyfile(disk, copy)
    return copies


def essence(bmap: BlockMap, volume: int = 0) -> dict[str, object]:
    """What two maps of the same state must share."""
    _, extents = bmap.slice_of("extents", volume)
    _, inodes = bmap.slice_of("inodes", volume)
    rows = {
        name: tables.integers(extents, name).tolist()
        for name in ("inode", "file_offset", "volume_offset", "length", "flags")
    }
    rows["kind"] = tables.codes(extents, "kind").tolist()
    return {
        "paths": tree(bmap, volume),
        "sizes": dict(
            zip(
                tables.integers(inodes, "inode").tolist(),
                tables.integers(inodes, "size").tolist(),
                strict=True,
            )
        ),
        "extents": sorted(zip(*rows.values(), strict=True)),
    }


@pytest.mark.parametrize("kind", CRASHED)
def test_replayed_journal_gives_the_recovered_state(tmp_path: Path, kind: str) -> None:
    """The map of a crashed disk equals the map of the same disk after e2fsck recovered it; the image is not
    touched."""
    need("e2fsck", "e2fsprogs")
    crashed = crash(tmp_path, *CRASHED[kind])[0]
    before = hashlib.sha256(crashed.read_bytes()).digest()
    found = mapped(crashed)
    assert_proven(found)
    assert hashlib.sha256(crashed.read_bytes()).digest() == before
    assert found.filesystems.column("state").to_pylist() == ["recovered"]
    assert "journal-replayed" in found.problems.column("code").to_pylist()
    run("e2fsck", "-y", "-E", "journal_only", crashed, ok=(0, 1))
    assert essence(found) == essence(mapped(crashed))


@pytest.mark.parametrize("kind", ["ext4-1k", "data-journal", "data-journal-32bit"])
def test_replayed_blocks_equal_the_recovered_ones(tmp_path: Path, kind: str) -> None:
    """Byte for byte, those that were escaped included."""
    need("e2fsck", "e2fsprogs")
    crashed = crash(tmp_path, *CRASHED[kind])[0]
    disk = RawReader(str(crashed))
    superblock = read_superblock(disk, Damage())
    log = journal._internal(disk, superblock, Damage())
    assert log
    patch = journal._patch(log, superblock, Damage())
    assert len(patch.offsets) > 50
    escaped = patch.blocks[:, :4].tobytes().count(b"\xc0\x3b\x39\x98")
    assert escaped >= (20 if "data" in kind else 0)
    disk.close()
    run("e2fsck", "-y", "-E", "journal_only", crashed, ok=(0, 1))
    recovered = RawReader(str(crashed))
    after = recovered.read_blocks(patch.offsets, patch.blocks.shape[1])
    recovered.close()
    differ = patch.offsets[(after != patch.blocks).any(axis=1)].tolist()
    assert set(differ) <= {1024}  # e2fsck clears the flag in the superblock


def test_recovery_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the replay the same image gives another map: the tests above compare something."""
    crashed = crash(tmp_path, *CRASHED["ext4-1k"])[0]
    found = essence(mapped(crashed))
    monkeypatch.setattr(journal, "replay", lambda reader, *_: reader)
    assert essence(mapped(crashed)) != found


def test_external_journal_is_found_among_the_disks(tmp_path: Path) -> None:
    """By its UUID; without it the map says what is missing."""
    log = tmp_path / "log.img"
    run("truncate", "-s", "8M", log)
    run("mke2fs", "-q", "-F", "-b", "1024", "-O", "journal_dev", log)
    loop = run("losetup", "-f", "--show", log).decode().strip()
    try:
        disk, journal_disk = crash(tmp_path, f"-t ext4 -b 1024 -J device={loop}", "", (log,))
        found = mapped(disk, journal_disk)
        assert_proven(found)
        assert found.volumes.column("type").to_pylist() == ["ext4", "jbd"]
        assert "journal-replayed" in found.problems.column("code").to_pylist()
        stale = tmp_path / "stale.img"  # a copy from before: its superblock begins with an earlier sequence
        data = bytearray(journal_disk.read_bytes())
        data[2048 + 24 : 2048 + 32] = (1).to_bytes(4, "big") + bytes(4)
        stale.write_bytes(data)
        twice = mapped(disk, stale, journal_disk)
        assert essence(twice) == essence(found)
        (words,) = [row["detail"] for row in twice.problems.to_pylist() if row["code"] == "duplicate"]
        assert words.startswith(f"{journal_disk} and {stale} are both the journal ")
        assert "which was written last (sequence" in words
        alone = mapped(disk)
        assert alone.problems.column("code").to_pylist()[0] == "journal-missing"
        run("e2fsck", "-y", "-E", "journal_only", "-j", journal_disk, disk, ok=(0, 1))
        assert essence(found) == essence(mapped(disk))
    finally:
        run("losetup", "-d", loop)


def test_fast_commits_are_named_where_they_are_not_replayed(tmp_path: Path) -> None:
    """After an fsync that only wrote a fast commit, the map says that newer changes are missing."""
    image, copy = tmp_path / "x.img", tmp_path / "copy.img"
    run("truncate", "-s", "64M", image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "fast_commit", image)
    copies = []
    with mounted(image, "rw,commit=300") as mount:
        (mount / "first").write_bytes(b"1")
        sync(mount)
        with open(mount / "first", "r+b") as file:
            for number in range(5):  # another test's write-out may commit in full just before a copy
                file.write(b"x" * 100_000)
                file.flush()
                os.fsync(file.fileno())
                copies.append(shutil.copyfile(image, copy.with_suffix(f".{number}")))
    assert any("not-replayed" in mapped(copy).problems.column("code").to_pylist() for copy in copies)


def test_join_is_what_the_kernel_comparison_rests_on() -> None:
    """Neighbours on both sides become one; a gap on either side does not."""
    a = [Extent(0, 100, 10), Extent(10, 110, 10), Extent(20, 200, 5), Extent(30, 205, 5)]
    assert join(a) == [Extent(0, 100, 20), Extent(20, 200, 5), Extent(30, 205, 5)]
