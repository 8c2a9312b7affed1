"""btrfs against the running kernel, btrfs-progs, the allocator, and damage."""

import os
import re
import stat
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import support
from btrfs_images import FILL, fill, make, mounted_pool
from virt_bmap.ask.check import check
from virt_bmap.core import checksums
from virt_bmap.core.arrays import total
from virt_bmap.formats.filesystems.btrfs import ondisk, owners
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader

OBJECTID = (1 << 40) - 1


def pool(bmap: BlockMap) -> int:
    """The volume that is the first pool."""
    return bmap.volumes.column("kind").to_pylist().index("pool")


def rows_of(bmap: BlockMap, volume: int, **wanted: object) -> list[dict]:
    """The extents of a volume with these values."""
    _, table = bmap.slice_of("extents", volume)
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in wanted.items())]


def compare_with_kernel(images: list[Path], where: Path) -> int:
    """Every object below a mount: name, stat, where it lies by FIEMAP, and its content through the map.

    Returns how many there are.
    """
    bmap = support.mapped(*images)
    support.assert_proven(bmap)
    volume = pool(bmap)
    paths = support.tree(bmap, volume)
    _, inodes = bmap.slice_of("inodes", volume)
    by_number = {row["inode"]: row for row in inodes.to_pylist()}
    compressed = {row["inode"] for row in rows_of(bmap, volume) if row["flags"] & tables.COMPRESSED}
    disks = [RawReader(str(image)) for image in images]
    seen = {"/"}
    for folder, directories, files in os.walk(where):
        for name in directories + files:
            path = os.path.join(folder, name)
            inside = path[len(str(where)) :]
            seen.add(inside)
            inode, found = paths[inside], os.lstat(path)
            row = by_number[inode]
            assert (found.st_ino, found.st_size, found.st_mode) == (
                inode & OBJECTID,
                row["size"],
                row["mode"],
            ), inside
            assert (found.st_uid, found.st_gid, found.st_nlink) == (row["uid"], row["gid"], row["nlink"]), (
                inside
            )
            if found.st_ino != ondisk.EMPTY_SUBVOL_DIR:  # made up by the kernel, with the time of the mount
                assert found.st_mtime_ns == row["mtime_ns"], inside
            if stat.S_ISLNK(found.st_mode):
                assert os.fsencode(os.readlink(path)) == support.content(bmap, disks, volume, inode)
            elif stat.S_ISREG(found.st_mode) and inode in compressed:
                ours = {extent.offset for extent in support.file_extents(bmap, volume, inode)}
                assert {extent.offset for extent in support.fiemap(path)} <= ours, inside
            elif stat.S_ISREG(found.st_mode):
                assert support.fiemap(path) == support.file_extents(bmap, volume, inode), inside
                if found.st_size > 100 or len(seen) % 7 == 0:
                    assert Path(path).read_bytes() == support.content(bmap, disks, volume, inode), inside
    assert seen == set(paths)
    for disk in disks:
        disk.close()
    return len(seen)


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One device with all kinds of files, subvolumes and snapshots."""
    folder = tmp_path_factory.mktemp("btrfs")
    images = make(folder, "300M", "")
    with mounted_pool(images, folder / "mnt") as where:
        fill(where, FILL)
    return images[0]


def test_agrees_with_the_kernel(rich: Path, tmp_path: Path) -> None:
    with mounted_pool([rich], tmp_path / "mnt", "ro") as where:
        assert compare_with_kernel([rich], where) > 600  # the snapshot's files count as well


def test_extents_that_the_kernel_does_not_tell(rich: Path) -> None:
    bmap = support.mapped(rich)
    volume = pool(bmap)
    paths = support.tree(bmap, volume)
    one = {
        name: rows_of(bmap, volume, inode=paths[f"/{name}"])
        for name in ("a/big", "a/prealloc", "a/link", "c-zstd", "c-shared", "t-zlib")
    }
    bookends = [row for row in one["a/big"] if row["part"] == "bookend"]
    assert bookends or rows_of(bmap, volume, part="bookend")
    shared = sum(
        row["length"] for row in one["a/big"] if row["flags"] & tables.SHARED and row["part"] is None
    )
    assert shared == sum(row["length"] for row in one["a/big"] if row["part"] is None), (
        "the read-only snapshot shares all of it"
    )
    assert (
        sum(row["length"] for row in one["a/prealloc"] if row["kind"] == "unwritten") == (1 << 20) - 3 * 4096
    )
    assert [(row["kind"], row["flags"]) for row in one["a/link"]] == [("symlink", tables.INLINE)]
    tiny = [(row["flags"] & ~tables.SHARED, row["file_length"]) for row in one["t-zlib"]]
    assert tiny == [(tables.INLINE | tables.COMPRESSED, 1500)]
    assert all(row["flags"] & tables.COMPRESSED for row in one["c-shared"])
    assert sum(row["file_length"] for row in one["c-shared"]) == -(-700000 // 4096) * 4096
    inner = {paths[name] for name in ("/snap/inner", "/a/readonly/sub", "/a/readonly/sub")}
    assert all(inode & OBJECTID == ondisk.EMPTY_SUBVOL_DIR for inode in inner)


def test_zlib_content_through_the_map(rich: Path) -> None:
    bmap = support.mapped(rich)
    volume = pool(bmap)
    inode = support.tree(bmap, volume)["/c-zlib"]
    data = rich.read_bytes()
    content = b""
    for row in sorted(rows_of(bmap, volume, inode=inode), key=lambda row: row["file_offset"]):
        found = bmap.descend(
            volume, np.array([row["volume_offset"]]), np.array([row["volume_offset"] + row["length"]])
        )
        at = int(found.start[found.role == 0][0])
        content += zlib.decompressobj().decompress(data[at : at + row["length"]])[: row["file_length"]]
    assert content[:700000] == (b"zlib hello world\n" * 50000)[:700000]


def test_every_copy_of_dup_metadata_is_equal(rich: Path) -> None:
    bmap = support.mapped(rich)
    volume = pool(bmap)
    rows = [
        row
        for row in rows_of(bmap, volume, kind="metadata")
        if row["part"] in ("fs tree", "root tree", "extent tree")
    ]
    data = rich.read_bytes()
    start = np.array([row["volume_offset"] for row in rows])
    found = bmap.descend(volume, start, start + np.array([row["length"] for row in rows]))
    pieces: dict[int, list[bytes]] = {}
    for inside, low, high in zip(
        found.inside.tolist(), found.start.tolist(), found.end.tolist(), strict=True
    ):
        pieces.setdefault(inside, []).append(data[low:high])
    assert len(pieces) >= 3
    assert all(len(copies) == 2 and copies[0] == copies[1] for copies in pieces.values())


def test_tree_blocks_are_those_of_dump_tree(rich: Path) -> None:
    """Every block that `dump-tree` prints has the tree's name here, and there is no other."""
    dump = support.run("btrfs", "inspect-internal", "dump-tree", rich).decode(errors="replace")
    told = {
        (int(at), int(size))
        for at, size in re.findall(r"key \((\d+) METADATA_ITEM \d+\)()", dump)
        for size in [16384]
    }
    bmap = support.mapped(rich)
    rows = rows_of(bmap, pool(bmap), kind="metadata")
    ours = {
        at
        for row in rows
        if row["part"].endswith("tree")
        for at in range(row["volume_offset"], row["volume_offset"] + row["length"], 16384)
    }
    assert ours == {at for at, _ in told}


def test_owners_are_those_of_logical_resolve(rich: Path, tmp_path: Path) -> None:
    bmap = support.mapped(rich)
    volume = pool(bmap)
    rows = [
        row
        for row in rows_of(bmap, volume, kind="data")
        if not row["flags"] & tables.INLINE and row["part"] is None
    ]
    number, path = bmap.paths(volume)
    names = dict(zip(number.tolist(), path.to_pylist(), strict=True))
    with mounted_pool([rich], tmp_path / "mnt", "ro") as where:
        for row in rows[:: max(1, len(rows) // 25)]:
            at = row["volume_offset"]
            done = subprocess.run(
                ["btrfs", "inspect-internal", "logical-resolve", str(at), where], capture_output=True
            )
            told = {
                os.fsencode(line)[len(os.fsencode(where)) :] for line in os.fsdecode(done.stdout).splitlines()
            }
            owners = {
                other["inode"]
                for other in rows
                if other["volume_offset"] <= at < other["volume_offset"] + other["length"]
            }
            # it finds no paths in other subvolumes
            top = {names[inode] for inode in owners if inode <= OBJECTID}
            assert top == {
                path
                for path in told
                if path in names.values() and not path.startswith((b"/sub", b"/snap", b"/a/readonly"))
            }, at


def test_free_space_and_size_agree_with_btrfs_check(rich: Path) -> None:
    """`btrfs check` says how many bytes are used: all rows that are not free, reserved or in no chunk."""
    told = subprocess.run(["btrfs", "check", "--readonly", rich], capture_output=True, text=True).stdout
    used = int(re.search(r"found (\d+) bytes used, no error found", told).group(1))
    bmap = support.mapped(rich)
    rows = [
        row
        for row in rows_of(bmap, pool(bmap))
        if row["kind"] not in ("free", "gap") and row["part"] != "superblock"
    ]
    own = [row for row in rows if not row["flags"] & tables.INLINE]
    starts, ends = (
        np.array([row["volume_offset"] + shift * row["length"] for row in own]) for shift in (0, 1)
    )
    assert total(starts, ends) == used


VARIANTS = {
    "4 KiB nodes, no skinny items": "-n 4096 -O ^skinny-metadata,^no-holes -R ^free-space-tree --csum xxhash",
    "64 KiB nodes": "-n 65536 --csum sha256",
    "mixed groups": "-M -n 4096 --csum blake2",
    "single metadata, quota": "-m single -d single -n 8192 -R quota",
    "dup data": "-m dup -d dup -L label",
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_mkfs(options: str, tmp_path: Path) -> None:
    images = make(tmp_path, "250M", options)
    with mounted_pool(images, tmp_path / "mnt") as where:
        script = (
            "mkdir d; for i in $(seq 60); do head -c $((i * 130)) /dev/urandom > d/f$i; done; head "
            "-c 2000000 /dev/urandom > big"
        )
        fill(where, script + "; cp --reflink=always big big2; btrfs -q subvolume snapshot . s; sync -f .")
    with mounted_pool(images, tmp_path / "mnt", "ro") as where:
        assert compare_with_kernel(images, where) == 2 * 64
    bmap = support.mapped(*images)
    assert bmap.filesystems.column("uuid").to_pylist() == [
        support.run("blkid", "-p", "-o", "value", "-s", "UUID", images[0]).decode().strip()
    ]


def test_free_space_cache_v1(tmp_path: Path) -> None:
    images = make(tmp_path, "2G", "-R ^free-space-tree")  # no cache for groups below 100 MB
    with mounted_pool(images, tmp_path / "mnt", "space_cache=v1") as where:
        fill(
            where,
            "head -c 3000000 /dev/urandom > f; sync -f .; rm f; head -c 100000 /dev/urandom > g; sync -f .",
        )
    bmap = support.mapped(*images)
    support.assert_proven(bmap)
    caches = [row for row in rows_of(bmap, pool(bmap)) if row["part"] == "free space cache"]
    types = dict(
        zip(bmap.inodes.column("inode").to_pylist(), bmap.inodes.column("type").to_pylist(), strict=True)
    )
    assert caches
    assert all(row["kind"] == "metadata" and types[row["inode"]] == "metadata" for row in caches)


def test_free_space_bitmaps(tmp_path: Path) -> None:
    """Free space in very many pieces: the free space tree turns to bitmaps, and agrees with the extent tree
    bit by bit."""
    images = make(tmp_path, "250M", "")
    with mounted_pool(images, tmp_path / "mnt") as where:
        for number in range(4000):
            (where / f"f{number}").write_bytes(bytes(4096))
        support.run("sync", "-f", where)
        for number in range(0, 4000, 2):
            (where / f"f{number}").unlink()
    assert b"FREE_SPACE_BITMAP" in support.run(
        "btrfs", "inspect-internal", "dump-tree", "-t", "10", images[0]
    )
    support.assert_proven(support.mapped(*images))


def fsynced(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """A copy with a log tree, and what a mount shows of its files: new ones, one that was changed, one that
    was cut, one under another name; one that is gone."""
    images = make(folder, "160M", "")
    copy = folder / "copy.img"
    with mounted_pool(images, folder / "mnt", "commit=300") as where:
        fill(
            where,
            "mkdir d many; for f in old cut many/old many/gone; do head -c 100000 /dev/urandom > $f; done",
        )
        support.sync(where)
        for name, size in (("new", 50000), ("d/tiny", 300)):
            with open(where / name, "wb") as file:
                file.write(os.urandom(size))
                file.flush()
                os.fsync(file.fileno())
        with open(where / "old", "r+b") as file:
            file.seek(8192)
            file.write(os.urandom(20000))
            file.flush()
            os.fsync(file.fileno())
        with open(where / "cut", "r+b") as file:
            file.truncate(9000)
            os.fsync(file.fileno())
        os.rename(where / "many/old", where / "many/renamed")
        os.unlink(where / "many/gone")
        fsync(where / "many")
        support.run("cp", "--sparse=always", images[0], copy)
        expected = {f"/{path.relative_to(where)}": path.read_bytes() for path in where.rglob("*")
                    if path.is_file()}  # fmt: skip
    return copy, expected


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def test_what_fsync_wrote_after_the_last_commit(tmp_path: Path) -> None:
    copy, expected = fsynced(tmp_path)
    bmap = support.mapped(copy)
    support.assert_proven(bmap)
    volume, disk = pool(bmap), RawReader(str(copy))
    assert bmap.filesystems.column("state").to_pylist() == ["recovered"]
    paths = support.tree(bmap, volume)
    assert paths.keys() == {"/", "/d", "/many", *expected}
    for name, content in expected.items():
        assert support.content(bmap, [disk], volume, paths[name]) == content
    disk.close()


def test_ranges_of_a_directorys_log_that_lie_in_each_other(tmp_path: Path) -> None:
    """A directory that is logged again when its deletions have come into the tree: the range of the first
    time lies inside of that of the second."""
    images = make(tmp_path, "160M", "")
    copy, recovered = tmp_path / "copy.img", tmp_path / "recovered.img"
    with mounted_pool(images, tmp_path / "mnt", "commit=300") as where:
        fill(where, "mkdir d e; for i in $(seq 10 50); do : > d/$i; done")
        support.sync(where)
        (where / "d/30").unlink()
        fsync(where / "d")
        for name in ("29", "31", "32"):
            (where / "d" / name).unlink()
        for number in range(4000):  # so many that the kernel puts what it has delayed into the trees
            (where / f"e/{number}").touch()
        time.sleep(1)
        fsync(where / "d")
        support.run("cp", "--sparse=always", images[0], copy)
    support.run("cp", "--sparse=always", copy, recovered)
    with mounted_pool([recovered], tmp_path / "again") as where:
        theirs = {f"/{path.relative_to(where)}" for path in where.rglob("*")}
    bmap = support.mapped(copy)
    assert set(support.tree(bmap, pool(bmap))) - {"/"} == theirs
    assert not {f"/d/{number}" for number in range(29, 33)} & theirs


def test_a_log_that_is_damaged_is_not_replayed(tmp_path: Path) -> None:
    """Neither does a mount. What lies in the log's extents is not called free."""
    copy, _ = fsynced(tmp_path)
    bmap = support.mapped(copy)
    volume, new = pool(bmap), support.tree(bmap, pool(bmap))["/new"]
    lies = [(row["volume_offset"], row["length"]) for row in rows_of(bmap, volume, inode=new)]
    logs = rows_of(bmap, volume, part="log tree")
    start = np.array([row["volume_offset"] for row in logs])
    found = bmap.descend(volume, start, start + np.array([row["length"] for row in logs]))
    with open(copy, "r+b") as file:
        for low, high in zip(found.start.tolist(), found.end.tolist(), strict=True):
            for block in range(low, high, 16384):
                file.seek(block + 0x65)
                file.write(bytes(0x100))
    bmap = support.mapped(copy)
    assert bmap.filesystems.column("state").to_pylist() == ["needs recovery"]
    assert "not-replayed" in bmap.problems.column("code").to_pylist()
    assert support.tree(bmap, volume).keys() == {
        "/",
        "/d",
        "/many",
        "/old",
        "/cut",
        "/many/old",
        "/many/gone",
    }
    free = {(row["volume_offset"], row["length"]) for row in rows_of(bmap, volume, kind="free")}
    assert lies
    assert all(high <= at or low >= at + size for low, high in free for at, size in lies)


def test_relocation_and_deletion_that_were_interrupted(tmp_path: Path) -> None:
    """Snapshots of the device while a subvolume is being deleted and while a balance runs."""
    images = make(tmp_path, "300M", "-n 4096")
    taken: list[Path] = []
    with mounted_pool(images, tmp_path / "mnt", "commit=1") as where:
        fill(where, "btrfs -q subvolume create s; mkdir s/d")
        for number in range(1000):
            (where / "s" / "d" / str(number)).write_bytes(bytes(3000))
        fill(
            where,
            "head -c 9000000 /dev/urandom > big; sync -f .; btrfs -q subvolume snapshot s t; btrfs "
            "-q subvolume delete s; sync -f .",
        )
        balance = subprocess.Popen(
            ["btrfs", "balance", "start", "--full-balance", where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(2):
            support.run("sync", "-f", where)
            taken.append(tmp_path / f"taken{number}.img")
            frozen = subprocess.run(["fsfreeze", "-f", where], capture_output=True).returncode == 0
            support.run("cp", "--sparse=always", images[0], taken[-1])
            if frozen:
                support.run("fsfreeze", "-u", where)
        balance.wait()
    for image in [*taken, *images]:
        support.assert_proven(support.mapped(image))


def test_what_only_a_relocation_refers_to_is_told_apart() -> None:
    """A relocation's tree refers to what its subvolume refers to, but for what was exchanged already."""
    part = np.array([0, 0, owners.MOVED, owners.MOVED, owners.RELOCATION])
    base = np.array([4096, 8192, 8192, 16384, 20480])
    rows = owners.FileExtents(*(base,) * len(owners.FileExtents._fields))._replace(part=part, base=base)
    assert owners.only_moved(rows).base.tolist() == [4096, 8192, 16384, 20480]


# ---- damage ------------------------------------------------------------------------------------------------


def test_superblock_mirror_is_used(rich: Path) -> None:
    data = np.frombuffer(rich.read_bytes(), np.uint8).copy()
    data[0x10000 + 0x50 : 0x10000 + 0x58] ^= 0xFF  # the primary's root pointer: its checksum no longer fits
    bmap = support.survives(data)
    assert bmap is not None
    assert (
        bmap.problems.filter(
            np.array([code == "superblock" for code in bmap.problems.column("code").to_pylist()])
        ).num_rows
        == 1
    )
    assert bmap.filesystems.column("state").to_pylist() == ["clean"]


def test_second_copy_of_a_tree_block_is_used(rich: Path) -> None:
    clean = support.mapped(rich)
    volume = pool(clean)
    rows = [row for row in rows_of(clean, volume, kind="metadata") if row["part"] == "fs tree"]
    start = np.array([rows[0]["volume_offset"]])
    found = clean.descend(volume, start, start + 16384)
    data = np.frombuffer(rich.read_bytes(), np.uint8).copy()
    first = int(found.start[found.role == 0][0])
    data[first : first + 4096] = 0
    bmap = support.survives(data)
    assert bmap is not None
    assert [row["code"] for row in bmap.problems.to_pylist() if row["severity"] != "note"] == ["copy-used"]
    assert bmap.names.num_rows == clean.names.num_rows


def test_sharing_is_bounded(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where snapshots share more blocks than there is memory for, some of their names are left out: told, and
    no byte loses its owner."""
    whole = support.mapped(rich)
    monkeypatch.setattr("virt_bmap.formats.filesystems.btrfs.tree.MAX_SHARED", 0)
    bmap = support.mapped(rich)
    assert {found.code for found in check(bmap).disagreements} == {"simplified"}
    assert 0 < bmap.names.num_rows < whole.names.num_rows


def test_crc32c() -> None:
    """The examples of RFC 3720, B.4; and long rows, which another implementation takes over where it is
    installed, as the short ones."""
    up = np.arange(32, dtype=np.uint8)
    rows = np.stack([up * 0, up * 0 + 255, up, up[::-1]])
    assert ondisk.checksums(rows, 0).view("<u4")[:, 0].tolist() == [
        0x8A9136AA,
        0x62A8AB43,
        0x46DD794E,
        0x113FDB5C,
    ]
    pytest.importorskip("google_crc32c")
    data = np.random.default_rng(1).integers(0, 256, (5, 4096), np.uint8)
    folded = checksums._folded(checksums._seeded(data, 0x12345678), checksums.CRC32C)
    assert (checksums.crc32c(data, 0x12345678) == folded).all()
    assert (checksums.crc32c(data, np.full(5, 0x12345678, np.uint32)) == folded).all()


# ---- images of others --------------------------------------------------------------------------------------


def corpus_images(corpus: Path) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in (corpus / "INVENTORY.tsv").read_text().splitlines()]
    found = {line[0]: line for line in lines if line[5] == "btrfs" and (corpus / line[0]).exists()}
    # those of syzkaller differ little: an eighth of them; some others are large
    found = {
        name: line
        for name, line in found.items()
        if "syzkaller" not in name or zlib.crc32(name.encode()) % 8 == 0
    }
    return {
        name: line
        for name, line in found.items()
        if int((re.search(r"real=(\d+)", line[6]) or [0, 0])[1]) < 300 << 20
    }


def unpack(packed: Path, image: Path) -> Path:
    """An image of the corpus, with holes where it is zero."""
    command = {".xz": "xz -dc", ".gz": "gzip -dc"}.get(packed.suffix, "cat")
    take = (
        f"{command} {str(packed)!r} | tar -xOf -"
        if packed.name.endswith(".tar.xz")
        else f"{command} {str(packed)!r}"
    )
    support.run("sh", "-c", f"{take} | cp --sparse=always /dev/stdin {str(image)!r}")
    return image


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    """Valid images are proven; damaged ones give problems, not exceptions."""
    images = corpus_images(corpus)
    valid = 0
    for name, line in images.items():
        if "dissect" in name and not re.search("default|nested|snapshot", name):
            continue  # several devices: below
        bmap = support.mapped(unpack(corpus / name, tmp_path / "image"))
        for table in BlockMap.TABLES:
            tables.check(table, getattr(bmap, table))
        assert alone(bmap) == [], name
        if line[-1] == "valid":
            support.assert_proven(bmap)
            assert bmap.filesystems.num_rows == 1, name
            valid += 1
    assert valid > 5


def alone(bmap: BlockMap) -> list[int]:
    """Where bytes are called shared that one row alone has, such as a leaf of a relocation's tree."""
    start, length = tables.integers(bmap.extents, "volume_offset"), tables.integers(bmap.extents, "length")
    shared = (tables.integers(bmap.extents, "flags") & tables.SHARED) != 0
    inodes = tables.integers(bmap.extents, "inode") >= 0
    low, high = start[inodes], (start + length)[inodes]
    rows = zip(start[shared].tolist(), (start + length)[shared].tolist(), strict=True)
    return [at for at, end in rows if np.count_nonzero((low < end) & (high > at)) < 2]


@pytest.mark.parametrize("name", ["btrfs-default", "btrfs-subvolume-snapshot"])
def test_corpus_truth(corpus: Path, tmp_path: Path, name: str) -> None:
    """What a kernel said of the same image: names, sizes, extents."""
    where = next((corpus / "images").glob(f"fox-it+dissect.btrfs/**/{name}.bin.gz"))
    truth = next((corpus / "truth").glob(f"**/{name}.bin.gz.truth.tsv"))
    bmap = support.mapped(unpack(where, tmp_path / "image"))
    volume = pool(bmap)
    paths = support.tree(bmap, volume)
    sizes = dict(
        zip(bmap.inodes.column("inode").to_pylist(), bmap.inodes.column("size").to_pylist(), strict=True)
    )
    told = [line.split("\t") for line in truth.read_text().splitlines() if not line.startswith("#")]
    assert {eval(row[0], {}) for row in told} | {"/"} == set(paths)
    for row in told:
        inode = paths[eval(row[0], {})]
        assert (int(row[2]), int(row[8])) == (sizes[inode], inode & OBJECTID)
        if row[1] == "f":
            told_extents = re.findall(r"(\d+):(\d+)\+(\d+)(\[[^]]*\])?", row[10])
            extents = [tuple(map(int, found[:3])) for found in told_extents if "inline" not in found[3]]
            ours = [
                (extent.file_offset, extent.offset, extent.length)
                for extent in support.file_extents(bmap, volume, inode)
            ]
            assert extents == ours


def test_corpus_pools(corpus: Path, tmp_path: Path) -> None:
    """Pools of several devices, in any order, given all at once: each finds its own members."""
    members = [
        unpack(path, tmp_path / path.name)
        for path in sorted((corpus / "images").glob("fox-it+dissect.btrfs/**/btrfs-raid[015]-[12].bin.gz"))
    ]
    if not members:
        pytest.skip("the corpus has no pools")
    bmap = support.mapped(*reversed(members))
    support.assert_proven(bmap)
    labels = sorted(bmap.filesystems.column("label").to_pylist())
    assert labels == ["btrfs-raid0", "btrfs-raid1", "btrfs-raid5"]
    for volume in bmap.filesystems.column("volume").to_pylist():
        assert "/path/to/a/file.txt" in support.tree(bmap, volume)
