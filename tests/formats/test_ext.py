"""ext2, ext3, ext4: every flavour that mke2fs makes, compared with what was put in, with the kernel and with
debugfs."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ext_images
from ext_images import FLAVOURS, Flavour
from support import (
    BytesReader,
    assert_proven,
    content,
    fiemap,
    file_extents,
    mapped,
    mounted,
    need,
    run,
    tree,
)
from virt_bmap.core.reader import HEAD, TAIL
from virt_bmap.formats.filesystems import ext
from virt_bmap.formats.filesystems.ext import inodes
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader
from virt_bmap.survey import owners


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of files that all images hold."""
    for tool in ("mke2fs", "debugfs"):
        need(tool, "e2fsprogs")
    path = tmp_path_factory.mktemp("ext") / "tree"
    path.mkdir()
    ext_images.fill(path)
    return path


@pytest.fixture(scope="session", params=FLAVOURS, ids=lambda flavour: flavour.name)
def made(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Flavour, Path, BlockMap]]:
    """(flavour, image, its map)."""
    flavour = request.param
    image = ext_images.make(folder, flavour, tmp_path_factory.mktemp("ext") / f"{flavour.name}.img")
    yield flavour, image, mapped(image)
    image.unlink()


def column(bmap: BlockMap, table: str, name: str) -> np.ndarray:
    """An integer column."""
    return tables.integers(getattr(bmap, table), name)


def rows_of_parts(bmap: BlockMap) -> dict[str, int]:
    """Bytes of every named part of the metadata."""
    part, length = bmap.extents.column("part").to_pylist(), column(bmap, "extents", "length")
    return {name: int(length[[p == name for p in part]].sum()) for name in set(part) - {None}}


def test_map_is_proven(made: tuple[Flavour, Path, BlockMap]) -> None:
    """Allocator and owners agree to the byte, and nothing is wrong."""
    flavour, _, bmap = made
    assert_proven(bmap)
    row = bmap.filesystems.to_pylist()[0]
    assert (row["uuid"], row["label"], row["state"]) == (
        "01234567-89ab-cdef-0123-456789abcdef",
        "a label",
        "clean",
    ), flavour


def wrong_by_mke2fs(flavour: Flavour) -> set[str]:
    """mke2fs 1.47.0 itself writes sparse files wrongly with inline_data: a mount shows the same bytes as the
    map."""
    return {"/sparse"} if "inline" in flavour.options else set()


def test_names_and_content_are_what_was_put_in(made: tuple[Flavour, Path, BlockMap], folder: Path) -> None:
    """Every path; content by hash; size, mode, owner, links and time as stat gives them."""
    flavour, image, bmap = made
    paths = tree(bmap, 0)
    assert set(paths) - {"/lost+found"} == ext_images.all_paths(folder)
    disk = [RawReader(str(image))]
    for path, digest in ext_images.hashes(folder).items():
        if "/many/" in path and int(path[-6:]) % 60:
            continue
        if path in wrong_by_mke2fs(flavour):
            continue
        assert hashlib.sha256(content(bmap, disk, 0, paths[path])).hexdigest() == digest, (flavour, path)
    disk[0].close()
    at = {inode: i for i, inode in enumerate(column(bmap, "inodes", "inode").tolist())}
    stat = {
        name: column(bmap, "inodes", name) for name in ("mode", "uid", "gid", "size", "nlink", "mtime_ns")
    }
    for path, inode in paths.items():
        if path in {"/", "/lost+found"} | wrong_by_mke2fs(flavour):
            continue
        said, row = os.lstat(folder / path[1:]), at[inode]
        assert stat["mode"][row] == said.st_mode, path
        assert (stat["uid"][row], stat["gid"][row]) == (said.st_uid, said.st_gid), path
        assert stat["nlink"][row] == said.st_nlink, path
        assert stat["mtime_ns"][row] // 10**9 == said.st_mtime_ns // 10**9, path
        if not os.path.isdir(folder / path[1:]):
            assert stat["size"][row] == said.st_size, path


def test_symlinks_hold_their_targets(made: tuple[Flavour, Path, BlockMap], folder: Path) -> None:
    """Short targets lie in the inode, long ones in a block."""
    _, image, bmap = made
    disk, paths = [RawReader(str(image))], tree(bmap, 0)
    for name in ("one", "fast", "slow", "long"):
        assert os.fsdecode(content(bmap, disk, 0, paths[f"/{name}"])) == os.readlink(folder / name)
    disk[0].close()


def test_extents_equal_the_kernels(made: tuple[Flavour, Path, BlockMap]) -> None:
    """FIEMAP of every file and directory through a loop mount."""
    flavour, image, bmap = made
    if not flavour.mount:
        pytest.skip("this kernel mounts no blocks larger than its pages")
    paths = tree(bmap, 0)
    with mounted(image, flavour.mount) as mount:
        for path, inode in paths.items():
            name = mount / path[1:]
            if name.is_symlink() or not (name.is_file() or name.is_dir()) or name.lstat().st_ino != inode:
                assert name.lstat().st_ino == inode, path
                continue
            assert file_extents(bmap, 0, inode) == fiemap(name), (flavour, path)


def test_blocks_equal_debugfs(made: tuple[Flavour, Path, BlockMap]) -> None:
    """`debugfs blocks` of each inode with blocks: what e2fsprogs says, tree nodes included."""
    _, image, bmap = made
    size = bmap.filesystems.column("block_size")[0].as_py()
    inode = column(bmap, "extents", "inode")
    kind = tables.codes(bmap.extents, "kind")
    flags = column(bmap, "extents", "flags")
    start, length = column(bmap, "extents", "volume_offset"), column(bmap, "extents", "length")
    mine = np.isin(kind, (tables.DATA, tables.DIRECTORY, tables.SYMLINK, tables.UNWRITTEN, tables.TREE)) & (
        flags & tables.INLINE == 0
    )
    wanted = [number for number in np.unique(inode[mine]).tolist() if number >= 11 or number == 2][:40]
    said = run(
        "debugfs", "-f", "-", image, stdin="".join(f"blocks <{number}>\n" for number in wanted).encode()
    ).decode()
    answers = re.split(r"^debugfs: blocks <\d+>\n", said, flags=re.M)[1:]
    for number, answer in zip(wanted, answers, strict=True):
        rows = np.flatnonzero(mine & (inode == number))
        blocks = {b for row in rows for b in range(start[row] // size, (start[row] + length[row]) // size)}
        assert blocks == {int(word) for word in answer.split()} - {0}, number


PARTS = {
    "ext4": {"superblock", "backup superblock", "group descriptors", "reserved group descriptors",
        "block bitmap", "inode bitmap",
             "inode table", "inode table (unused)", "journal"},
    "no-checksums": {"inode table", "block bitmap"},
    "meta-bg": {"backup group descriptors", "block bitmap (uninitialised)", "inode bitmap (uninitialised)"},
    "bigalloc": {"cluster slack"},
    "quota": {"user quota", "group quota", "project quota"},
    "orphan-file": {"orphan file"},
    "mmp": {"mmp block"},
}  # fmt: skip


def test_metadata_is_named(made: tuple[Flavour, Path, BlockMap]) -> None:
    """What each flavour has besides files is called by its name, as large as dumpe2fs says where it says
    so."""
    flavour, image, bmap = made
    parts = rows_of_parts(bmap)
    assert PARTS.get(flavour.name, set()) <= set(parts)
    said = run("dumpe2fs", image).decode()
    supers = len(re.findall(r"(?:Primary|Backup) superblock at", said))
    size = bmap.filesystems.column("block_size")[0].as_py()
    assert parts.get("backup superblock", 0) == (supers - 1) * size
    table = sum(int(b) - int(a) + 1 for a, b in re.findall(r"Inode table at (\d+)-(\d+)", said))
    assert parts.get("inode table", 0) + parts.get("inode table (unused)", 0) == table * size
    features = re.search(r"Filesystem features: +(.*)", said)
    assert features
    assert set(bmap.filesystems.column("features")[0].as_py().split()) == set(features[1].split()) - {
        "(none)"
    }
    free = re.search(r"Free blocks: +(\d+)", said)
    kind, length = tables.codes(bmap.extents, "kind"), column(bmap, "extents", "length")
    assert free
    assert int(length[kind == tables.FREE].sum()) == int(free[1]) * size


def test_type_as_blkid_says(made: tuple[Flavour, Path, BlockMap]) -> None:
    """ext2, ext3 or ext4."""
    need("blkid", "util-linux")
    _, image, bmap = made
    assert (
        bmap.filesystems.column("type")[0].as_py()
        == run("blkid", "-p", "-o", "value", "-s", "TYPE", image).decode().strip()
    )


class CountingReader(RawReader):
    """Counts what is read."""

    calls = read_bytes = 0

    def _fetch(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.read_bytes += int(lengths.sum())
        return super()._fetch(offsets, lengths)


def test_reads_are_few_and_only_of_metadata(folder: Path, tmp_path: Path) -> None:
    """A map costs a handful of round trips, and not more bytes than the metadata have, but for the head and
    tail that are kept."""
    image = ext_images.make(folder, Flavour("x", "-t ext4 -b 1024 -N 4000"), tmp_path / "x.img")
    reader = CountingReader(str(image))
    found = ext.read(reader, (), Damage())
    reader.close()
    kind, part = tables.codes(found.extents, "kind"), found.extents.column("part").to_pylist()
    used = np.isin(kind, (tables.DIRECTORY, tables.TREE)) & (
        tables.integers(found.extents, "flags") & tables.INLINE == 0
    )
    used |= np.isin(part, ("superblock", "group descriptors", "block bitmap", "inode bitmap", "inode table"))
    needed = int(tables.integers(found.extents, "length")[used].sum())
    assert reader.calls < 12
    assert reader.read_bytes <= 1.2 * needed + HEAD + TAIL


def test_encrypted_directories_keep_their_ciphertext(folder: Path, tmp_path: Path) -> None:
    """An inode with the flag is marked, and its bytes are flagged as ciphertext."""
    image = ext_images.make(folder, Flavour("x", "-t ext4 -b 1024 -O encrypt"), tmp_path / "x.img")
    run("debugfs", "-w", "-R", "set_inode_field /size-5000 flags 0x80800", image)
    bmap = mapped(image)
    inode = tree(bmap, 0)["/size-5000"]
    assert column(bmap, "inodes", "flags")[column(bmap, "inodes", "inode") == inode] & tables.I_ENCRYPTED
    mine = (column(bmap, "extents", "inode") == inode) & (tables.codes(bmap.extents, "kind") == tables.DATA)
    assert (column(bmap, "extents", "flags")[mine] & tables.ENCRYPTED).all()


def test_merkle_tree_is_not_content(folder: Path, tmp_path: Path) -> None:
    """Blocks from the next multiple of 64 KiB behind the end of a verity file are its Merkle tree."""
    file = tmp_path / "d" / "file"
    file.parent.mkdir()
    with open(file, "wb") as out:
        out.write(b"x" * 5000)
        out.seek(65536)
        out.write(b"m" * 9000)
    image = ext_images.make(file.parent, Flavour("x", "-t ext4 -b 1024 -O verity"), tmp_path / "x.img")
    run(
        "debugfs",
        "-w",
        "-f",
        "-",
        image,
        stdin=b"set_inode_field /file flags 0x180000\nset_inode_field /file size 5000\n",
    )
    bmap = mapped(image)
    assert_proven(bmap)
    assert rows_of_parts(bmap)["verity tree"] == 9 * 1024
    assert sum(e.length for e in file_extents(bmap, 0, tree(bmap, 0)["/file"])) == 5 * 1024


def test_times_before_1970_and_after_2038(folder: Path, tmp_path: Path) -> None:
    """The two epoch bits, and nanoseconds; what 64 bits of nanoseconds cannot say becomes the latest they
    can."""
    root = tmp_path / "d"
    root.mkdir()
    times = {
        "old": -(10**9) * 86400 + 5,
        "new": 5_000_000_000 * 10**9 + 123456789,
        "far": 15_000_000_000 * 10**9 + 1,
    }
    for name in times:
        (root / name).write_bytes(b"")
    image = ext_images.make(root, Flavour("x", "-t ext4"), tmp_path / "x.img")
    with mounted(image, "rw") as mount:
        for name, ns in times.items():
            os.utime(mount / name, ns=(ns, ns))
    bmap = mapped(image)
    mtime = dict(
        zip(column(bmap, "inodes", "inode").tolist(), bmap.inodes.column("mtime_ns").to_pylist(), strict=True)
    )
    found = {name: mtime[tree(bmap, 0)[f"/{name}"]] for name in times}
    assert found.pop("far") // 10**9 == inodes.LATEST
    assert found == {name: times[name] for name in found}


def test_probe_is_by_magic_only() -> None:
    """Nothing in zeroes, nothing in an external journal."""
    zero = np.zeros(1 << 20, np.uint8)
    assert not ext.probe(BytesReader(zero))
    zero[0x438:0x43A] = 0x53, 0xEF
    assert ext.probe(BytesReader(zero))
    zero[0x460] = 8
    assert not ext.probe(BytesReader(zero))


@pytest.mark.parametrize("last", [60, 4_000_000_000])
def test_links_are_matched_the_same_way_with_a_table_and_without(last: int) -> None:
    """Numbers that lie close together are looked up in a table; a table for 4,000,000,000 of them would take
    memory that no inode needs."""
    random = np.random.default_rng(5)
    number = np.unique(np.append(random.integers(1, last, 40), last))
    target = np.concatenate([random.choice(number, 30), random.integers(1, last + 10, 30), [last + 1]])
    found, named = owners._each_other(target, number)
    assert found.tolist() == [one in set(number.tolist()) for one in target.tolist()]
    assert named.tolist() == [one in set(target.tolist()) for one in number.tolist()]
