"""XFS' log: head and tail as xfs_logprint finds them, and replay in memory as the kernel does it on the
disk."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import xfs_images
from support import (
    assert_proven,
    content,
    fiemap,
    file_extents,
    mapped,
    mounted,
    need,
    need_root,
    run,
    survives,
    sync,
    tree,
)
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.xfs.journal import find_log
from virt_bmap.formats.filesystems.xfs.superblock import read_geometry
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader

SMALL = ("--unsupported", "-d", "agcount=2")
WAYS = {
    "default": ("-m", "rmapbt=1,reflink=1"),
    "large-records": ("-l", "su=32k"),
    "small-blocks": ("-b", "size=1024", "-n", "size=8192", "-m", "rmapbt=1"),
    "old-v5": ("-m", "finobt=0,reflink=0,bigtime=0", "-i", "size=1024,sparse=0"),
}
ROUNDS = 4000
"""Enough for the log, of 12 MiB, to go around."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkfs.xfs", "xfsprogs")
    need_root()
    return tmp_path_factory.mktemp("xfs-log")


@pytest.fixture(scope="session", params=list(WAYS))
def dirty(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A filesystem whose power was cut in the middle of its work."""
    image = xfs_images.make(folder / request.param, *SMALL, *WAYS[request.param], size=96 << 20)
    with mounted(image, "logbsize=256k" if request.param == "large-records" else "") as where:
        xfs_images.churn(where, len(request.param), ROUNDS)
        with open(where / "orphan", "wb") as orphan:
            orphan.write(b"o" * 50_000)
            os.fsync(orphan.fileno())
            os.unlink(where / "orphan")
            (where / "last").write_bytes(b"last")
            xfs_images.shut_down(where)
    return image


def owned(bmap: BlockMap, but: set[int]) -> set[tuple[object, ...]]:
    return {
        tuple(row.values())
        for row in bmap.extents.to_pylist()
        if row["inode"] is not None and row["inode"] not in but
    }


def rows(table: object, but: set[int]) -> set[tuple[object, ...]]:
    return {tuple(row.values()) for row in table.to_pylist() if row["inode"] not in but}  # type: ignore[attr-defined]


def test_the_replayed_log_is_what_the_kernel_makes_of_it(dirty: Path, tmp_path: Path) -> None:
    before = mapped(dirty)
    assert_proven(before)
    assert before.filesystems.column("state").to_pylist() == ["recovered"]
    assert before.problems.column("code").to_pylist() == ["journal-replayed"]
    copy = tmp_path / "recovered"
    run("cp", "--sparse=always", dirty, copy)
    with mounted(copy) as where:
        sync(where)
        paths, reader = tree(before, 0), RawReader(str(dirty))
        for path in list(paths)[::15]:
            if (where / path[1:]).is_file():
                assert file_extents(before, 0, paths[path]) == fiemap(where / path[1:]), path
                assert content(before, [reader], 0, paths[path]) == (where / path[1:]).read_bytes(), path
        reader.close()
    after = mapped(copy)
    assert after.filesystems.column("state").to_pylist() == ["clean"]
    # the kernel then frees orphans; in the map these are still there, marked as deleted
    deleted = {row["inode"] for row in before.inodes.to_pylist() if row["flags"] & tables.I_DELETED}
    assert deleted
    assert not deleted & {row["inode"] for row in after.inodes.to_pylist()}
    assert rows(before.names, set()) == rows(after.names, set())
    assert rows(before.inodes, deleted) == rows(after.inodes, set())
    assert owned(before, deleted) == owned(after, set())


def test_head_and_tail_as_xfs_logprint_finds_them(dirty: Path) -> None:
    said = subprocess.run(
        [need("xfs_logprint", "xfsprogs"), "-t", dirty], capture_output=True, text=True
    ).stdout
    # log tail: 2 head: 4040 state: <DIRTY>
    words = next(line for line in said.splitlines() if "log tail" in line).split()
    reader = RawReader(str(dirty))
    log = find_log(reader, read_geometry(reader), (), Damage())
    reader.close()
    assert log
    assert (log.tail, log.head, log.clean) == (int(words[2]), int(words[4]), False)


@pytest.mark.parametrize("dirty", ["default"], indirect=True)
def test_a_record_with_a_wrong_checksum_is_not_replayed(dirty: Path) -> None:
    reader = RawReader(str(dirty))
    log = find_log(reader, read_geometry(reader), (), Damage())
    reader.close()
    assert log
    image = np.fromfile(dirty, np.uint8)
    image[log.offset + (log.tail + 1) * 512 + 100] ^= 1
    bmap = survives(image)
    assert bmap
    details = [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "not-replayed"]
    assert "checksum" in details[0]
    assert bmap.filesystems.column("state").to_pylist() == ["needs recovery"]


@pytest.fixture(scope="session")
def external(folder: Path) -> tuple[Path, Path]:
    """A filesystem with its log on another disk, power cut."""
    data, log = folder / "external-data", folder / "external-log"
    with open(log, "wb") as file:
        file.truncate(64 << 20)
    xfs_images.make(data, *SMALL, "-l", f"logdev={log}", size=96 << 20)
    shutil.copyfile(log, log.with_suffix(".stale"))
    loop = run("losetup", "-f", "--show", log).decode().strip()
    try:
        with mounted(data, f"logdev={loop}") as where:
            xfs_images.churn(where, 5, 300)
            xfs_images.shut_down(where)
    finally:
        run("losetup", "-d", loop)
    return data, log


def test_an_external_log_is_found_among_the_other_disks(external: tuple[Path, Path]) -> None:
    bmap = mapped(*external)
    assert_proven(bmap)
    assert bmap.filesystems.column("state").to_pylist() == ["recovered"]
    assert "journal-replayed" in bmap.problems.column("code").to_pylist()
    assert bmap.names.num_rows > 100


def test_of_two_copies_of_an_external_log_the_newer_is_used(external: tuple[Path, Path]) -> None:
    """The older one says that there is nothing to do."""
    data, log = external
    stale = log.with_suffix(".stale")
    bmap = mapped(data, stale, log)
    assert bmap.filesystems.column("state").to_pylist() == ["recovered"]
    assert bmap.names.equals(mapped(data, log).names)
    (words,) = [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "duplicate"]
    assert words.startswith(f"{log} and {stale} are both the log of this XFS, ")
    assert "which was written last (log sequence number" in words


def test_a_missing_external_log_is_said(external: tuple[Path, Path]) -> None:
    bmap = mapped(external[0])
    assert bmap.filesystems.column("state").to_pylist() == ["needs recovery"]
    assert "journal-missing" in bmap.problems.column("code").to_pylist()


def test_a_mounted_filesystem_is_mapped_as_it_is(folder: Path) -> None:
    """Not unmounted, only synced: what a snapshot of a running guest looks like."""
    image = xfs_images.make(folder / "running", *SMALL, size=96 << 20)
    with mounted(image) as where:
        xfs_images.populate(where, 10)
        sync(where)
        copy = folder / "snapshot"
        shutil.copyfile(image, copy)
        expected = {
            f"{parent[len(str(where)) :]}/{name}"
            for parent, folders, files in os.walk(where)
            for name in folders + files
        }
    bmap = mapped(copy)
    assert_proven(bmap)
    assert set(tree(bmap, 0)) == expected | {"/"}


def test_round_trips_of_a_whole_map_are_few(dirty: Path) -> None:
    class Counting(Reader):
        fetches = 0

        def _fetch(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
            self.fetches += 1
            return inner.read_ranges(offsets, lengths)

    from virt_bmap.formats.filesystems import xfs

    inner = RawReader(str(dirty))
    counting = Counting(inner.size, inner.name)
    xfs.read(counting, (), Damage())
    inner.close()
    assert counting.fetches < 40
