"""NTFS against ntfs-3g (contents, ntfsinfo, ntfscluster), The Sleuth Kit, $Bitmap, and real images made by
Windows."""

import gzip
import lzma
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

import ntfs_images
from ntfs_images import NotMounted, Volume, fuse, unpack_lznt1
from support import assert_proven, mapped, need, run, tree
from virt_bmap.formats.filesystems.ntfs import ondisk
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

METADATA = set(ondisk.SYSTEM_FILES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkntfs", "ntfs-3g")
    need("ntfs-3g", "ntfs-3g")
    if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
        pytest.skip("needs root and FUSE to fill a volume")
    return tmp_path_factory.mktemp("ntfs")


@pytest.fixture(scope="session", params=list(ntfs_images.VARIANTS))
def volume(request: pytest.FixtureRequest, folder: Path) -> Volume:
    mebibytes, cluster, sector = ntfs_images.VARIANTS[request.param]
    return ntfs_images.fill(ntfs_images.make(folder / request.param, mebibytes, cluster, sector), cluster)


class Contents:
    """Files and streams read from the image where the map says, and decompressed where it says so."""

    def __init__(self, bmap: BlockMap, image: Path) -> None:
        self.image = np.memmap(image, np.uint8, "r")
        self.size = dict(
            zip(
                tables.integers(bmap.inodes, "inode").tolist(),
                tables.integers(bmap.inodes, "size").tolist(),
                strict=True,
            )
        )
        self.rows: dict[tuple[int, str | None], list[dict[str, int]]] = {}
        for row in bmap.extents.to_pylist():
            if row["kind"] == "data":
                self.rows.setdefault((row["inode"], row["part"]), []).append(row)

    def of(self, inode: int, stream: str | None = None) -> bytes:
        """All bytes of a file; of a stream up to the end of its last cluster."""
        units: dict[int, bytes] = {}
        sizes = {}
        for row in self.rows.get((inode, stream and f"stream:{stream}"), []):
            at, low = row["file_offset"], row["volume_offset"]
            units[at] = units.get(at, b"") + self.image[low : low + row["length"]].tobytes()
            sizes[at] = row["file_length"] if row["flags"] & tables.COMPRESSED else 0
        end = (
            max((at + max(len(data), sizes[at]) for at, data in units.items()), default=0)
            if stream
            else self.size[inode]
        )
        result = bytearray(end)
        for at, data in units.items():
            plain = unpack_lznt1(data, sizes[at]) if sizes[at] else data
            result[at : at + len(plain)] = plain[: max(0, end - at)]
        return bytes(result)


# ---- volumes made here -------------------------------------------------------------------------------------


def test_every_byte_has_one_owner_and_the_bitmap_agrees(volume: Volume) -> None:
    bmap = mapped(volume.image)
    assert_proven(bmap)
    assert bmap.problems.num_rows == 0
    system = bmap.filesystems.to_pylist()[0]
    assert (system["state"], system["label"], system["type"], system["features"]) == (
        "clean",
        "тест",
        "ntfs",
        "ntfs3.1",
    )
    words = run("blkid", "-p", "-o", "export", volume.image).decode()
    assert f"UUID={system['uuid']}" in words


def test_contents_by_the_map_are_what_was_written(volume: Volume) -> None:
    bmap = mapped(volume.image)
    inode_of, by_map = tree(bmap, 0), Contents(bmap, volume.image)
    assert not {"/" + path for path in volume.files} - set(inode_of)
    wrong = [path for path, data in volume.files.items() if by_map.of(inode_of["/" + path]) != data]
    assert wrong == []


def test_streams_by_the_map_are_what_was_written(volume: Volume) -> None:
    bmap = mapped(volume.image)
    inode_of, by_map = tree(bmap, 0), Contents(bmap, volume.image)
    for (path, stream), data in volume.streams.items():
        assert by_map.of(inode_of["/" + path], stream)[: len(data)] == data


def test_sizes_times_and_links_are_those_of_stat(volume: Volume) -> None:
    bmap = mapped(volume.image)
    about = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    inode_of = tree(bmap, 0)
    with fuse(volume.image) as root:
        for folder, directories, files in os.walk(root):
            for name in directories + files:
                path = os.path.join(folder, name)
                found, row = os.lstat(path), about[inode_of["/" + os.path.relpath(path, root)]]
                assert (row["inode"], row["nlink"], row["mtime_ns"]) == (
                    found.st_ino,
                    found.st_nlink,
                    found.st_mtime_ns,
                ), path
                assert row["type"] == (
                    "symlink" if os.path.islink(path) else "directory" if os.path.isdir(path) else "file"
                )
                if row["type"] == "file":  # ntfs-3g is of two minds about directories
                    assert row["size"] == found.st_size, path


def test_names_are_those_that_fls_finds(volume: Volume) -> None:
    need("fls", "sleuthkit")
    if volume.image.name == "c1m":
        pytest.skip("The Sleuth Kit takes no clusters of more than 64 KiB")
    lines = run("fls", "-r", "-p", "-u", volume.image).decode(errors="replace").splitlines()
    found = {
        (int(number), path)
        for number, path in re.findall(r"^\S+ (\d+)-\d+-\d+:\t(.*)$", "\n".join(lines), re.M)
    }
    found = {(number, re.sub(r":[^/]*$", "", path)) for number, path in found}  # one line a stream
    bmap = mapped(volume.image)
    dead = set(deleted(bmap))
    names = {
        (inode, path[1:].replace("\n", "^"))
        for path, inode in tree(bmap, 0).items()
        if path != "/" and inode not in dead
    }
    odd = re.compile("new|€|\ufffd")  # it changes line ends and cuts long names
    assert {name for name in names if not odd.search(name[1])} == {
        name for name in found if not odd.search(name[1])
    }


def deleted(bmap: BlockMap) -> list[int]:
    flags = tables.integers(bmap.inodes, "flags")
    return tables.integers(bmap.inodes, "inode")[flags & tables.I_DELETED != 0].tolist()


def test_deleted_files_keep_their_names_and_claim_nothing(volume: Volume) -> None:
    bmap = mapped(volume.image)
    inode_of, dead = tree(bmap, 0), deleted(bmap)
    found = [path for path in volume.deleted if "/" + path in inode_of]
    assert found  # a record may have been used again
    for path in found:
        assert inode_of["/" + path] in dead
    assert not np.isin(tables.integers(bmap.extents, "inode"), dead).any()


def test_clusters_are_those_that_ntfsinfo_lists(volume: Volume) -> None:
    bmap = mapped(volume.image)
    size = bmap.filesystems.column("block_size")[0].as_py()
    inode, start, length = (
        tables.integers(bmap.extents, name) for name in ("inode", "volume_offset", "length")
    )
    own = (tables.integers(bmap.extents, "flags") & tables.INLINE == 0) & (inode >= 0)
    numbers = np.unique(inode[own])
    for number in np.append(numbers[numbers < 64], numbers[numbers >= 64][::9]).tolist():
        words = run("ntfsinfo", "-v", "-i", str(number), volume.image, ok=(0, 1)).decode(errors="replace")
        told = set()
        for lcn, count in re.findall(r"^\t+0x[0-9a-f]+\t+0x([0-9a-f]+)\t+0x([0-9a-f]+)\s*$", words, re.M):
            told |= set(range(int(lcn, 16), int(lcn, 16) + int(count, 16)))
        mine = set()
        for low, n in zip(
            start[own & (inode == number)].tolist(), length[own & (inode == number)].tolist(), strict=True
        ):
            mine |= set(range(low // size, -(-(low + n) // size)))
        assert mine == told, number


def test_ntfscluster_names_the_same_owners(volume: Volume) -> None:
    bmap = mapped(volume.image)
    size = bmap.filesystems.column("block_size")[0].as_py()
    rows = [
        row
        for row in bmap.extents.to_pylist()
        if not row["flags"] & tables.INLINE and (row["inode"] is not None or row["kind"] == "free")
    ]
    for row in rows[:: max(1, len(rows) // 60)]:
        first, last = row["volume_offset"] // size, (row["volume_offset"] + row["length"] - 1) // size
        words = run("ntfscluster", "-q", "-c", f"{first}-{last}", volume.image, ok=(0, 1)).decode(
            errors="replace"
        )
        found = {int(number) for number in re.findall(r"^Inode (\d+) ", words, re.M)}
        assert found == ({row["inode"]} if row["inode"] is not None else set()), row


def test_the_awkward_things_were_really_made(folder: Path) -> None:
    """That the images hold what the tests above claim to have tested."""
    made = ntfs_images.fill(ntfs_images.make(folder / "awkward", *ntfs_images.VARIANTS["c512"]), 512)
    bmap = mapped(made.image)
    inode_of = tree(bmap, 0)
    inode, kind, flags = (
        tables.integers(bmap.extents, "inode"),
        bmap.extents.column("kind").to_pylist(),
        tables.integers(bmap.extents, "flags"),
    )
    part = bmap.extents.column("part").to_pylist()
    assert (inode == inode_of["/frag/every second"]).sum() > 500
    assert part.count("$MFT") > 20
    assert "tree" in kind
    assert "unwritten" in kind
    packed = inode == inode_of["/packed/mixed"]
    assert {bool(f & tables.COMPRESSED) for f in flags[packed]} == {True, False}
    straddling = [
        row["volume_offset"]
        for row in bmap.extents.to_pylist()
        if row["part"] == "$MFT" and row["length"] % 1024
    ]
    assert straddling, "no record lies in two pieces"
    offsets = tables.integers(bmap.inodes, "record_offset")
    assert len(np.unique(offsets)) == len(offsets)


# ---- volumes made by Windows and others --------------------------------------------------------------------

REAL = (
    "fox-it+dissect.ntfs/tests/_data/ntfs.bin.gz",
    "ColinFinck+ntfs/testdata/testfs1.xz",
    pytest.param("msuhanov+ntfs-samples/ntfs-2m.raw.gz", marks=pytest.mark.slow),
    "msuhanov+dfir_ntfs/test_data/ntfs3_attrlist.raw.gz",
    "msuhanov+dfir_ntfs/test_data/ntfs_index.raw.gz",
    "jnode+jnode/fs/src/test/org/jnode/test/fs/ntfs/test.ntfs.gz",
    "fox-it+dissect.hypervisor/tests/_data/disk/vhd/fixed.vhd.gz",
    "util-linux+util-linux/tests/ts/blkid/images-fs/ntfs.img.xz",
    "sleuthkit+sleuthkit_test_data/from_brian/7-undel-ntfs.zip",
    *(
        f"google+syzkaller/sys/linux/test/syz_mount_image_ntfs3_{n}.img.xz"
        for n in (1, 3, 5, 6, 10, 11, 12, 15)
    ),
    *(
        f"google+syzkaller/sys/linux/test/syz_mount_image_ntfs_{n}.img.xz"
        for n in (0, 2, 5, 7, 8, 10, 11, 13, 14, 16)
    ),
)


def unpacked(source: Path, target: Path) -> Path:
    """A copy with its zeroes left out."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dd"))
            target.write_bytes(archive.read(name))
        return target
    with (gzip.open if source.suffix == ".gz" else lzma.open)(source) as packed, open(target, "wb") as file:
        size = 0
        while data := packed.read(1 << 20):
            if data.count(0) == len(data):
                file.seek(len(data), os.SEEK_CUR)
            else:
                file.write(data)
            size += len(data)
        file.truncate(size)
    return target


@pytest.mark.parametrize("name", REAL)
def test_real_volumes(name: str, corpus: Path, tmp_path: Path) -> None:
    """Each is proven, and each file that ntfs-3g can read has the same bytes by the map."""
    image = unpacked(corpus / "images" / name, tmp_path / "image")
    bmap = mapped(image)
    assert_proven(bmap)
    system = bmap.filesystems.to_pylist()[-1]
    assert system["type"] == "ntfs"
    if bmap.volumes.num_rows > 1 or not compare_with_mount(bmap, image):
        return
    image.unlink()


def compare_with_mount(bmap: BlockMap, image: Path) -> int:
    """Compare every file with what ntfs-3g reads; how many there were."""
    need("ntfs-3g", "ntfs-3g")
    inode_of, by_map, count = tree(bmap, 0), Contents(bmap, image), 0
    try:
        with fuse(image) as root:
            for folder, _, files in os.walk(root):
                for name in files:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) < 8 << 20:
                        inode = inode_of["/" + os.path.relpath(path, root)]
                        assert by_map.of(inode) == Path(path).read_bytes(), path
                        count += 1
    except NotMounted:
        return 0
    return count


PARTITIONS = (
    "msuhanov+dfir_ntfs/test_data/ntfs_index.raw.gz",
    "msuhanov+ntfs-samples/ntfs-lastaccess.raw.gz",
    pytest.param("msuhanov+ntfs-samples/ntfs-ramslack.raw.gz", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_made_by_windows_has_the_contents_that_ntfs3g_reads(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    source = corpus / "images" / name
    disk = unpacked(source, tmp_path / "disk")
    whole = mapped(disk)
    row = next(row for row in whole.mappings.to_pylist() if row["volume"] == 1)
    run("dd", f"if={disk}", f"of={tmp_path / 'partition'}", "bs=64K", f"skip={row['parent_offset']}",
        f"count={row['run']}",
        "iflag=skip_bytes,count_bytes", "conv=sparse", "status=none")  # fmt: skip
    bmap = mapped(tmp_path / "partition")
    assert_proven(bmap)
    assert compare_with_mount(bmap, tmp_path / "partition") > 0


def test_metadata_of_a_windows_volume_is_named(corpus: Path, tmp_path: Path) -> None:
    bmap = mapped(unpacked(corpus / "images" / REAL[0], tmp_path / "image"))
    parts = set(bmap.extents.column("part").to_pylist())
    assert {
        "$MFT", "$MFT:$BITMAP", "$MFTMirr", "$LogFile", "$AttrDef", "$Bitmap", "$Boot", "$Secure:$SDS",
        "$Secure:$SDH", "$Secure:$SII", "$UpCase", "$ObjId:$O", "$Quota:$Q", "$Quota:$O", "$Reparse:$R",
        "boot sector copy",
    } <= parts  # fmt: skip
    types = dict(
        zip(
            tables.integers(bmap.inodes, "inode").tolist(),
            bmap.inodes.column("type").to_pylist(),
            strict=True,
        )
    )
    names = tree(bmap, 0)
    assert types[names["/$Extend/$ObjId"]] == "metadata"
    assert types[names["/$Extend"]] == "directory"
    assert {types[names["/" + name]] for name in METADATA - {".", "$Extend"}} == {"metadata"}
