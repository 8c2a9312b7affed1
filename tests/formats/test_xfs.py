"""XFS against the kernel (FIEMAP, GETFSMAP, stat, contents), xfs_db, truth tables of real images, and
damage."""

import ast
import bz2
import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import stat
import struct
from pathlib import Path

import numpy as np
import pytest

import xfs_images
from support import (
    BytesReader,
    assert_proven,
    content,
    fiemap,
    file_extents,
    mapped,
    mounted,
    need,
    need_root,
    run,
    tree,
)  # fmt: skip
from virt_bmap.ask.check import check
from virt_bmap.core.errors import FormatError
from virt_bmap.formats.filesystems import xfs
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

# ---- images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkfs.xfs", "xfsprogs")
    need_root()
    return tmp_path_factory.mktemp("xfs")


@pytest.fixture(scope="session", params=list(xfs_images.RICH))
def rich(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A filesystem with everything in it, unmounted."""
    image = xfs_images.make(folder / request.param, *xfs_images.RICH[request.param])
    with mounted(image) as where:
        xfs_images.populate(where)
    return image


@pytest.fixture(scope="session")
def default(folder: Path) -> Path:
    image = xfs_images.make(folder / "for-damage", *xfs_images.RICH["default"])
    with mounted(image) as where:
        xfs_images.populate(where)
    return image


PROTO = """/
0 0
d--755 0 0
small ---644 1 2 {small}
large ---600 0 0 {large}
link l--777 0 0 {target}
pipe p--644 0 0
char c--644 0 0 1 3
folder d--755 3 4
{entries}
$
$
"""

V4 = {
    "v4": ("-m", "crc=0"),
    "v4-old": (
        "-m",
        "crc=0",
        "-n",
        "ftype=0",
        "-i",
        "attr=1,projid32bit=0,size=256",
        "-l",
        "lazy-count=0,version=1",
        "-b",
        "size=512",
    ),
    "v4-ci": ("-m", "crc=0", "-n", "version=ci"),
    "v4-dirblock": ("-m", "crc=0", "-n", "size=16384", "-b", "size=1024"),
}


@pytest.fixture(scope="session", params=list(V4))
def v4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 4, which this kernel may not mount: filled by mkfs.xfs from a prototype."""
    need("mkfs.xfs", "xfsprogs")
    folder = tmp_path_factory.mktemp("xfs-v4")
    (folder / "small").write_bytes(b"hello")
    (folder / "large").write_bytes(np.random.default_rng(4).bytes(700_000))
    entries = "\n".join(f"{'name' * (n % 50 + 1)}-{n} ---644 0 0 {folder}/small" for n in range(900))
    proto = PROTO.format(small=folder / "small", large=folder / "large", target="t" * 500, entries=entries)
    (folder / "proto").write_text(proto)
    return xfs_images.make(folder / "image", "-p", str(folder / "proto"), *V4[request.param])


# ---- the kernel's word -------------------------------------------------------------------------------------

KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
         stat.S_IFBLK: "block", stat.S_IFSOCK: "socket"}  # fmt: skip


def test_the_map_is_proven(rich: Path) -> None:
    bmap = mapped(rich)
    assert_proven(bmap)
    assert bmap.filesystems.column("state").to_pylist() == ["clean"]
    assert bmap.problems.num_rows == 0


def test_paths_and_inodes_as_the_kernel_sees_them(rich: Path) -> None:
    bmap = mapped(rich)
    paths = tree(bmap, 0)
    rows = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    seen = {"/"}
    with mounted(rich, "ro,norecovery") as where:
        for parent, folders, files in os.walk(where):
            for name in folders + files:
                full = os.path.join(parent, name)
                path = full[len(str(where)) :]
                seen.add(path)
                status, row = os.lstat(full), rows[paths[path]]
                found = (
                    row["inode"],
                    row["mode"],
                    row["uid"],
                    row["gid"],
                    row["size"],
                    row["nlink"],
                    row["mtime_ns"],
                    row["type"],
                )
                assert found == (status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_size,
                    status.st_nlink,
                                 status.st_mtime_ns, KINDS[stat.S_IFMT(status.st_mode)]), path  # fmt: skip
    assert set(paths) == seen


def test_extents_and_contents_of_files(rich: Path) -> None:
    bmap, done = mapped(rich), set()
    paths = tree(bmap, 0)
    reader = RawReader(str(rich))
    with mounted(rich, "ro,norecovery") as where:
        for path, inode in paths.items():
            full = Path(f"{where}{path}")
            status = full.lstat()
            if inode in done:
                continue
            done.add(inode)
            if stat.S_ISREG(status.st_mode):
                assert file_extents(bmap, 0, inode) == fiemap(full), path
                if status.st_size < 1 << 27:
                    assert content(bmap, [reader], 0, inode) == full.read_bytes(), path
            elif stat.S_ISLNK(status.st_mode):
                assert content(bmap, [reader], 0, inode) == os.fsencode(os.readlink(full)), path
    reader.close()


FS_IOC_GETFSMAP = 0xC0C0583B
FMR_PREALLOC, FMR_ATTR_FORK, FMR_EXTENT_MAP, FMR_SHARED, FMR_SPECIAL_OWNER = 1, 2, 4, 8, 16
FREE, FS, LOG, AG, INOBT, INODES, REFC, COW = ("free", "fs", "log", "ag", "inobt", "inodes", "refc", "cow")
SPECIAL = {1: FREE, 0x58 << 32 | 1: FS, 0x58 << 32 | 2: LOG, 0x58 << 32 | 3: AG, 0x58 << 32 | 4: INOBT,
    0x58 << 32 | 5: INODES,
           0x58 << 32 | 6: REFC, 0x58 << 32 | 7: COW}  # fmt: skip
"""include/uapi/linux/fsmap.h and fs/xfs/libxfs/xfs_fs.h."""
PARTS = {
    "superblock": FS,
    "AGF": FS,
    "AGI": FS,
    "AGFL": FS,
    "AG header padding": FS,
    "log": LOG,
    "bnobt": AG,
    "cntbt": AG,
    "rmapbt": AG,
    "inobt": INOBT,
    "finobt": INOBT,
    "refcountbt": REFC,
    "inode chunk": INODES,
    "CoW staging": COW,
}


def getfsmap(where: Path) -> set[tuple[object, ...]]:
    """Everything the kernel says of the device: (start, end, owner...) joined where neighbours have one
    owner."""
    rows: list[tuple[object, ...]] = []
    fd = os.open(where, os.O_RDONLY)
    low, last = (0, 0, 0, 0, 0, 0), False
    top = (0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1, 2**64 - 1, 2**64 - 1, 0)
    while not last:
        key = struct.pack("=IIQQQQ24x", *low) + struct.pack("=IIQQQQ24x", *top)
        buffer = bytearray(struct.pack("=IIII48x", 0, 0, 8192, 0) + key + bytes(8192 * 64))
        fcntl.ioctl(fd, FS_IOC_GETFSMAP, buffer)
        count = struct.unpack_from("=I", buffer, 12)[0]
        last = count == 0
        for n in range(count):
            device, flags, physical, owner, offset, length = struct.unpack_from(
                "=IIQQQQ", buffer, 192 + 64 * n
            )
            low = device, flags, physical, owner, offset, length
            last |= bool(flags & 0x20)
            if flags & FMR_SPECIAL_OWNER:
                rows.append((physical, physical + length, SPECIAL[owner]))
            elif flags & (FMR_ATTR_FORK | FMR_EXTENT_MAP):
                rows.append((physical, physical + length, owner, "map" if flags & FMR_EXTENT_MAP else "attr"))
            else:
                rows.append(
                    (
                        physical,
                        physical + length,
                        owner,
                        offset - physical,
                        flags & (FMR_PREALLOC | FMR_SHARED),
                    )
                )
    os.close(fd)
    return joined(rows)


def joined(rows: list[tuple[object, ...]]) -> set[tuple[object, ...]]:
    """Rows (start, end, owner...) with touching ones of one owner made one."""
    result: dict[tuple[object, ...], list[list[int]]] = {}
    for start, end, *owner in sorted(rows, key=lambda row: (row[0], row[1])):  # type: ignore[arg-type, return-value]
        ranges = result.setdefault(tuple(owner), [])
        if ranges and ranges[-1][1] >= start:  # type: ignore[operator]
            ranges[-1][1] = max(ranges[-1][1], end)  # type: ignore[call-overload]
        else:
            ranges.append([start, end])  # type: ignore[list-item]
    return {(*bounds, *owner) for owner, ranges in result.items() for bounds in ranges}


def our_fsmap(bmap: BlockMap) -> set[tuple[object, ...]]:
    """The block map in GETFSMAP's terms."""
    rows: list[tuple[object, ...]] = []
    for row in bmap.extents.to_pylist():
        start = row["volume_offset"]
        end = row["volume_offset"] + row["length"]
        kind = row["kind"]
        part = row["part"]
        if row["flags"] & tables.INLINE:
            continue
        if kind == "free":
            rows.append((start, end, AG if part == "AGFL" else FREE))
        elif row["inode"] is None:
            rows.append((start, end, PARTS[part]))
        elif kind in ("tree", "xattr"):
            rows.append((start, end, row["inode"], "map" if kind == "tree" else "attr"))
        elif kind in ("data", "unwritten"):
            flags = FMR_PREALLOC * (kind == "unwritten") | FMR_SHARED * bool(row["flags"] & tables.SHARED)
            rows.append((start, end, row["inode"], row["file_offset"] - start, flags))
        else:
            rows.append((start, end, row["inode"], None, 0))
    return joined(rows)


def test_every_block_as_getfsmap_says(rich: Path) -> None:
    bmap = mapped(rich)
    if "rmapbt" not in bmap.filesystems.column("features")[0].as_py():
        pytest.skip("without a reverse map the kernel does not name owners")
    content_of = {row["inode"] for row in bmap.inodes.to_pylist() if row["type"] == "file"}

    def simple(rows: set[tuple[object, ...]]) -> set[tuple[object, ...]]:
        # GETFSMAP gives offsets of directories and symlinks too, and where these lie in their own address
        # space is tested elsewhere
        return joined([row if len(row) < 5 or row[2] in content_of else (*row[:3], None, 0) for row in rows])

    with mounted(rich, "ro,norecovery") as where:
        kernel = getfsmap(where)
    assert simple(our_fsmap(bmap)) == simple(kernel)


# ---- xfs_db's word -----------------------------------------------------------------------------------------


def test_version_4_is_proven_and_xfs_db_agrees(v4: Path) -> None:
    bmap = mapped(v4)
    assert_proven(bmap)
    features = bmap.filesystems.column("features")[0].as_py().split()
    assert "v4" in features
    paths = tree(bmap, 0)
    reader = RawReader(str(v4))
    folder = v4.parent
    assert content(bmap, [reader], 0, paths["/large"]) == (folder / "large").read_bytes()
    assert content(bmap, [reader], 0, paths["/small"]) == b"hello"
    assert content(bmap, [reader], 0, paths["/link"]) == b"t" * 500
    assert len([path for path in paths if path.startswith("/folder/name")]) == 900
    for path in ("/large", "/folder/name-0"):
        assert [
            (e.file_offset, e.offset, e.length) for e in file_extents(bmap, 0, paths[path])
        ] == xfs_db_bmap(v4, paths[path])
    reader.close()


def xfs_db(image: Path, *commands: str) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    return run(need("xfs_db", "xfsprogs"), "-r", *arguments, image).decode()


def xfs_db_bmap(image: Path, inode: int) -> list[tuple[int, int, int]]:
    """(file offset, volume offset, length) of an inode's data fork by xfs_db, in bytes, pieces that continue
    each other joined."""
    size = int(xfs_db(image, "sb 0", "p blocksize").split("=")[1])
    per_group = int(xfs_db(image, "sb 0", "p agblocks").split("=")[1])
    result: list[tuple[int, int, int]] = []
    for line in xfs_db(image, f"inode {inode}", "bmap").splitlines():
        words = line.split()  # data offset 0 startblock 13 (0/13) count 1 flag 0
        group, block = words[5].strip("()").split("/")
        at = int(words[2]) * size
        start = (int(group) * per_group + int(block)) * size
        length = int(words[7]) * size
        if result and result[-1][0] + result[-1][2] == at and result[-1][1] + result[-1][2] == start:
            result[-1] = (*result[-1][:2], result[-1][2] + length)
        else:
            result.append((at, start, length))
    return result


TYPES = {"freelist": "free", "free1": "free", "free2": "free", "data": "data", "dir": "directory",
    "symlink": "symlink", "attr": "xattr",
         "btbmapd": "tree", "btbmapa": "tree", "inode": "inode chunk", "log": "log", "btino": "inobt",
         "btbno": "bnobt", "btcnt": "cntbt", "btfino": "finobt", "btrmap": "rmapbt", "btrefcnt": "refcountbt",
         "rtbitmap": "realtime bitmap", "rtsummary": "realtime summary", "sb": "header", "agf": "header",
         "agi": "header", "agfl": "header"}  # fmt: skip
HEADERS = ("superblock", "AGF", "AGI", "AGFL", "AG header padding")


def test_every_block_as_xfs_db_says(v4: Path) -> None:
    bmap = mapped(v4)
    block = bmap.filesystems.column("block_size")[0].as_py()
    size = bmap.filesystems.column("size")[0].as_py() // block
    groups = int(xfs_db(v4, "sb 0", "p agcount").split("=")[1])
    ours = np.full(size, -1, np.int64)
    owner = np.full(size, -1, np.int64)
    names = sorted(set(TYPES.values()))
    for row in bmap.extents.to_pylist():
        if row["flags"] & tables.INLINE:
            continue
        name = row["kind"]
        if name == "metadata":
            name = "header" if row["part"] in HEADERS else row["part"]
        low, high = row["volume_offset"] // block, -(-(row["volume_offset"] + row["length"]) // block)
        ours[low:high], owner[low:high] = names.index(name), -1 if row["inode"] is None else row["inode"]
    per_group = -(-size // groups)
    for group in range(groups):
        # some thousand blocks of each group, those at its start, where all metadata of these images lies
        first, count = group * per_group, min(3000, size - group * per_group)
        said = xfs_db(
            v4, "blockget -n", f"fsblock {group << (per_group - 1).bit_length()}", f"blockuse -c {count}"
        )
        for number, line in enumerate(said.splitlines()):
            words = line.replace("(", " ").replace(")", "").split()  # block 12 (0/12) type data inode 133
            kind = words[4]
            # to xfs_db, blocks of fork B-trees are what the inode is
            if names[ours[first + number]] != "tree":
                assert names[ours[first + number]] == TYPES[kind], line
            if "inode" in words[5:]:
                assert owner[first + number] == int(words[words.index("inode", 5) + 1]), line


# ---- features that need a history --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def crowded(folder: Path) -> Path:
    """Free space in pieces of 16 KiB: inode chunks, of 32 KiB, must be sparse; and a file with thousands of
    extents."""
    image = xfs_images.make(folder / "crowded", "-m", "rmapbt=0,finobt=0,reflink=0")
    with mounted(image) as where:
        with open(where / "filler", "wb") as file:
            end, length = 0, 16 << 20
            while length >= 4096:
                try:
                    xfs_images.fallocate(file.fileno(), 0, end, length)
                    end += length
                except OSError:
                    length //= 2
            for at in range(0, end - 32768, 32768):
                xfs_images.fallocate(
                    file.fileno(), xfs_images.FALLOC_PUNCH_HOLE | xfs_images.FALLOC_KEEP_SIZE, at, 16384
                )
        # what the filesystem had kept for itself, and now gives away as one run
        with open(where / "rest", "wb") as file:
            for length in (13 << 20, 256 << 10, 64 << 10, 32 << 10):
                xfs_images.fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size, length)
        for number in range(7000):
            os.mknod(where / f"tiny-{number}")
    return image


def test_sparse_inode_chunks_and_deep_fork_trees(crowded: Path) -> None:
    chunks = "".join(xfs_db(crowded, f"agi {group}", "addr root", "p recs") for group in range(4))
    if not re.search(r":\[\d+,0x", chunks):  # [startino,holemask,count,freecount,free]
        pytest.skip("this kernel found room for whole inode chunks")
    bmap = mapped(crowded)
    assert_proven(bmap)
    assert bmap.names.num_rows == 7002
    inode = tree(bmap, 0)["/filler"]
    with mounted(crowded, "ro,norecovery") as where:
        extents = fiemap(where / "filler")
        assert len(extents) > 5000
        assert file_extents(bmap, 0, inode) == extents
        assert {os.lstat(where / f"tiny-{n}").st_ino for n in range(7000)} < set(tree(bmap, 0).values())


# ---- real images -------------------------------------------------------------------------------------------

UNPACK = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def unpacked(packed: Path, folder: Path) -> Path:
    target = folder / packed.stem
    if packed.suffix == ".zst":
        run(need("zstd", "zstd"), "-q", "-d", "-f", packed, "-o", target)
    else:
        with UNPACK[packed.suffix](packed) as source, open(target, "wb") as file:
            while block := source.read(1 << 20):
                if block.count(0) == len(block):
                    file.seek(len(block), os.SEEK_CUR)
                else:
                    file.write(block)
            file.truncate(file.tell())
    return target


def test_real_images_are_proven_and_as_the_kernel_read_them(corpus: Path, tmp_path: Path) -> None:
    packed = [path for path in (corpus / "images").glob("**/*xfs*") if path.suffix in (*UNPACK,
            ".zst") and "vxfs" not in path.name
              and "vhdx" not in path.name]  # fmt: skip
    assert len(packed) > 20
    compared = 0
    for path in packed:
        image = unpacked(path, tmp_path)
        bmap = mapped(image)
        assert check(bmap).disagreements == [], path
        assert bmap.filesystems.column("type").to_pylist() == ["xfs"], path
        truth = corpus / "truth" / path.relative_to(corpus / "images")
        if (table := truth.with_name(f"{path.name}.truth.tsv")).exists():
            compared += compare_with_truth(bmap, image, table)
        image.unlink()
    assert compared > 50


def compare_with_truth(bmap: BlockMap, image: Path, truth: Path) -> int:
    """Compare a map with a table read through a mount: 'path' type size mode uid gid mtime nlink inode
    sha256/target extents."""
    rows = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    paths, compared = tree(bmap, 0), 0
    reader = RawReader(str(image))
    lines = [
        line for line in truth.read_text(errors="surrogateescape").splitlines() if not line.startswith("#")
    ]
    some = max(1, len(lines) // 60)  # every so manieth content: each takes a search of the whole map
    for line in lines:
        path, kind, size, mode, uid, gid, mtime, nlink, inode, digest, extents = line.split("\t")
        name = ast.literal_eval(path)
        row = rows[paths[name]]
        found = tuple(row[key] for key in ("size", "mode", "uid", "gid", "mtime_ns", "nlink", "inode"))
        assert found == (int(size), int(mode, 8), int(uid), int(gid), int(mtime), int(nlink), int(inode)), (
            truth,
            line,
        )
        if kind == "f" and int(size) < 64 << 20 and compared % some == 0:
            assert hashlib.sha256(content(bmap, [reader], 0, int(inode))).hexdigest() == digest, (truth, line)
            spans = [
                part.split("[")[0].split(":")[1].split("+") for part in extents.split(",") if ":" in part
            ]
            assert [(e.offset, e.length) for e in file_extents(bmap, 0, int(inode))] == [
                (int(a), int(b)) for a, b in spans
            ], (
                truth,
                line,
            )
        elif kind == "l":
            assert content(bmap, [reader], 0, int(inode)) == ast.literal_eval(digest), (truth, line)
        compared += 1
    reader.close()
    return compared


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(folder: Path) -> bytes:
    """A filesystem as small as mkfs.xfs makes them for tests, so that thousands of copies can be damaged."""
    image = xfs_images.make(
        folder / "small", "--unsupported", "-d", "agcount=1", *xfs_images.RICH["default"], size=24 << 20
    )
    with mounted(image) as where:
        xfs_images.populate(where, 10)
    return image.read_bytes()


def test_a_truncated_volume_is_read_as_far_as_it_goes(small: bytes) -> None:
    bmap = mapped_bytes(small[: 16 << 20])
    assert "truncated" in bmap.problems.column("code").to_pylist()
    assert "/files" in tree(bmap, 0)


@pytest.mark.parametrize(("offset", "value", "words"), [
    (0x04, b"\0\0\x10\x01", "sb_blocksize at byte 0x4 is 4097"),
    (0x58, b"\0\0\0\x07", "sb_agcount at byte 0x58 is 7, but should be 1"),
    (0xD8, b"\0\0\x01\x0b", "metadir"),
    (0xD8, b"\x80\0\0\x0b", "incompat-0x80000000"),
    (0x64, b"\xb4\xa7", "version 7"),
])  # fmt: skip
def test_what_is_refused_is_said(small: bytes, offset: int, value: bytes, words: str) -> None:
    data = bytearray(small[: 1 << 20])
    data[offset : offset + len(value)] = value
    with pytest.raises(FormatError, match=words):
        xfs.read(BytesReader(np.frombuffer(bytes(data), np.uint8)), (), Damage())


def mapped_bytes(data: bytes) -> BlockMap:
    return survey([BytesReader(np.frombuffer(data, np.uint8))])


# ---- inodes that no directory names ------------------------------------------------------------------------


def parts(bmap: BlockMap, part: str) -> list[tuple[int, int, int]]:
    """(inode, volume offset, length) of all rows of one part."""
    return [
        (row["inode"], row["volume_offset"], row["length"])
        for row in bmap.extents.to_pylist()
        if row["part"] == part
    ]


def test_a_realtime_device_is_named_and_its_bitmap_mapped(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfsprogs")
    with open(tmp_path / "device", "wb") as file:
        file.truncate(300 << 20)
    image = xfs_images.make(tmp_path / "image", "-r", f"rtdev={tmp_path / 'device'},size=256m")
    bmap = mapped(image)
    assert_proven(bmap)
    for part, field in (("realtime bitmap", "rbmino"), ("realtime summary", "rsumino")):
        inode = int(xfs_db(image, "sb 0", f"p {field}").split("=")[1])
        assert [(0, at, n) for _, at, n in parts(bmap, part)] == xfs_db_bmap(image, inode)


def test_content_on_the_realtime_device_is_a_note(default: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("cp", "--sparse=always", default, image)
    inode = tree(mapped(image), 0)["/files/plain-100000"]
    run("xfs_db", "-x", "-c", f"inode {inode}", "-c", "write -d core.realtime 1", image)
    bmap = mapped(image)
    assert "elsewhere" in bmap.problems.column("code").to_pylist()
    assert file_extents(bmap, 0, inode) == []


def test_quota_inodes_are_metadata(default: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("cp", "--sparse=always", default, image)
    inode = tree(mapped(image), 0)["/files/plain-100000"]
    version = int(xfs_db(image, "sb 0", "p versionnum").split("=")[1], 16)
    run(
        "xfs_db",
        "-x",
        "-c",
        "sb 0",
        "-c",
        f"write -d uquotino {inode}",
        "-c",
        f"write -d versionnum {version | 0x40:#x}",
        image,
    )
    with contextlib.closing(RawReader(str(image))) as reader:  # unproven: a plain file is no quota file
        bmap = survey([reader])
    assert_proven(bmap)
    assert sum(length for _, _, length in parts(bmap, "user quota")) == -(-100_000 // 4096) * 4096
    assert {row["type"] for row in bmap.inodes.to_pylist() if row["inode"] == inode} == {"metadata"}
