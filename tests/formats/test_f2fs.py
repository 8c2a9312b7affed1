"""F2FS against its own tools, a real kernel in the appliance, real images, and damage."""

import hashlib
import lzma
import os
import random
import re
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import f2fs_images
from support import (
    BytesReader,
    assert_proven,
    content,
    file_extents,
    lz4_block,
    mapped,
    need,
    run,
    tree,
)
from virt_bmap.core import checksums
from virt_bmap.formats.filesystems.f2fs import allocator, ondisk
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

MIB = 1 << 20
LAYOUTS = {
    "plain": (),
    "extra": ("-O", "extra_attr,inode_checksum,sb_checksum,inode_crtime"),
    "android": (
        "-O",
        "encrypt,quota,project_quota,verity,extra_attr,sb_checksum,casefold,compression",
        "-C",
        "utf8",
    ),
    "sections": ("-s", "2", "-z", "2"),
    "large-nat": ("-i",),
    "read-only": ("-O", "ro"),
    "found": ("-O", "lost_found", "-l", "Größe ✓", "-U", "01234567-89ab-cdef-0123-456789abcdef"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all sizes, a directory of several levels, links."""
    root = tmp_path_factory.mktemp("f2fs-source")
    dice = random.Random(7)
    for i in range(60):
        (root / f"file {i}").write_bytes(
            dice.randbytes(dice.choice([0, 1, 3000, 3400, 3488, 3692, 4096, 4097, 70_000]))
        )
    (root / "large").write_bytes(dice.randbytes(12 * MIB + 17))
    many = root / "many"
    many.mkdir()
    for i in range(900):
        (many / f"{i:04}{'n' * (i % 240)}").touch()
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/leaf").write_bytes(b"leaf")
    (root / "a/ümlaut").write_bytes(b"u")
    (root / "short").symlink_to("a/b")
    (root / "long").symlink_to("x" * 3900)
    return root


def build(source: Path, image: Path, *options: str, size: int = 200 * MIB) -> Path:
    """An image made by mkfs.f2fs and filled by sload.f2fs."""
    need("sload.f2fs", "f2fs-tools")
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.f2fs", "-q", "-f", *options, image)
    run("sload.f2fs", "-P", "-f", source, image)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few files for small volumes."""
    folder = tmp_path_factory.mktemp("f2fs-small")
    (folder / "tree/many").mkdir(parents=True)
    for i in range(300):
        (folder / f"tree/many/{i}{'n' * (i % 90)}").write_bytes(b"inline" * (i % 7))
    (folder / "tree/large").write_bytes(bytes(range(256)) * 20_000)
    (folder / "tree/link").symlink_to("many")
    return folder


@pytest.fixture(scope="module")
def small(folder: Path) -> bytes:
    """A small volume whose inodes have checksums."""
    return build(folder / "tree", folder / "small", *LAYOUTS["extra"], size=72 * MIB).read_bytes()


@pytest.fixture(scope="module")
def plain(folder: Path) -> bytes:
    """Likewise without any feature."""
    return build(folder / "tree", folder / "plain", size=72 * MIB).read_bytes()


def assert_contents(bmap: BlockMap, image: Path, source: Path) -> None:
    """Names, modes, sizes, times and content as they were put in."""
    found, reader = tree(bmap, 0), RawReader(os.fspath(image))
    rows = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    walk = [Path(folder) / name for folder, folders, files in os.walk(source) for name in folders + files]
    wanted = {"/" + str(path.relative_to(source)): path for path in walk}
    assert set(wanted) == set(found) - {"/", "/lost+found"}
    for name, path in wanted.items():
        row, info = rows[found[name]], path.lstat()
        assert row["mode"] == info.st_mode
        if not stat.S_ISDIR(info.st_mode):
            assert row["size"] == info.st_size
            data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            assert content(bmap, [reader], 0, found[name]) == data, name
    reader.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, source: Path, tmp_path: Path) -> None:
    image = build(source, tmp_path / "image", *LAYOUTS[layout])
    bmap = mapped(image)
    assert_proven(bmap)
    assert bmap.filesystems.column("type").to_pylist() == ["f2fs"]
    assert bmap.filesystems.column("state").to_pylist() == ["clean"]
    assert_contents(bmap, image, source)
    assert_counts(bmap, image)


def assert_counts(bmap: BlockMap, image: Path) -> None:
    """As many inodes, nodes and blocks as fsck.f2fs finds."""
    said = run("fsck.f2fs", "--dry-run", image).decode()
    counted = {
        name: int(value, 16)
        for name, value in re.findall(r"(valid_\w+_count) match\w+ with CP.*\[0x([0-9a-f]+)\]", said)
    }
    rows = [
        row
        for row in bmap.extents.to_pylist()
        if row["inode"] is not None and not row["flags"] & tables.INLINE
    ]
    nodes = [
        row
        for row in rows
        if row["part"] in ("inode", "direct node", "indirect node") or row["kind"] == "xattr"
    ]
    assert counted == {"valid_block_count": sum(row["length"] for row in rows) // 4096,
        "valid_node_count": len(nodes),
                       "valid_inode_count": bmap.inodes.num_rows}  # fmt: skip


def test_every_block_is_where_dump_f2fs_says(source: Path, tmp_path: Path) -> None:
    """Nodes by the NAT; and the summary area, which the reader does not read, knows the node that refers to
    each block."""
    bmap = mapped(build(source, tmp_path / "image", *LAYOUTS["extra"]))
    run("sh", "-c", f"cd {tmp_path}; dump.f2fs -n 0~-1 image; dump.f2fs -a 0~-1 image")
    nat = {
        nid: (ino, block * 4096)
        for nid, ino, block in (
            map(int, found)
            for found in re.findall(
                r"nid:\s*(\d+)\s+ino:\s*(\d+)\s+offset:\s*\d+\s+blkaddr:\s*(\d+)",
                (tmp_path / "dump_nat").read_text(),
            )
        )
    }
    rows = bmap.extents.to_pylist()
    nodes = {
        row["volume_offset"]: row["inode"]
        for row in rows
        if row["part"] in ("inode", "direct node", "indirect node")
    }
    assert nodes == {place: ino for nid, (ino, place) in nat.items() if nid not in (1, 2)}
    assert any(row["part"] == "indirect node" for row in rows)
    main = int(
        np.frombuffer((tmp_path / "image").read_bytes()[1024:4096], ondisk.SUPERBLOCK)["main_blkaddr"][0]
    )
    summary = {}
    for number, body in re.findall(
        r"segno: ([0-9a-f]+), (?:Current )?Data\n([^s]*)", (tmp_path / "dump_ssa").read_text()
    ):
        for place, nid in re.findall(r"\[\s*(\d+):\s*([0-9a-f]+)\]", body):
            summary[(main + int(number, 16) * 512 + int(place)) * 4096] = int(nid, 16)
    blocks = [
        (place, row["inode"])
        for row in rows
        if row["kind"] in ("data", "directory", "symlink") and not row["flags"] & tables.INLINE
        for place in range(row["volume_offset"], row["volume_offset"] + row["length"], 4096)
    ]
    assert len(blocks) > 2000
    assert [inode for _, inode in blocks] == [nat[summary[place]][0] for place, _ in blocks]


def test_words_of_the_superblock(source: Path, tmp_path: Path) -> None:
    row = mapped(build(source / "a", tmp_path / "image", *LAYOUTS["found"])).filesystems.to_pylist()[0]
    assert (row["uuid"], row["label"], row["features"]) == (
        "01234567-89ab-cdef-0123-456789abcdef",
        "Größe ✓",
        "lost_found",
    )
    assert row["size"] == 200 * MIB


def test_parts_are_where_dump_f2fs_says(source: Path, tmp_path: Path) -> None:
    image = build(source / "a", tmp_path / "image")
    said = dict(
        re.findall(r"^(\w+)\s+\[0x\s*([0-9a-f]+) :", run("dump.f2fs", "-d", "1", image).decode(), re.M)
    )
    number = {name: int(value, 16) for name, value in said.items()}
    rows = {row["part"]: row for row in mapped(image).extents.to_pylist()}
    for part, name, count in (("SIT", "sit_blkaddr", "segment_count_sit"),
        ("NAT", "nat_blkaddr", "segment_count_nat"),
                              ("SSA", "ssa_blkaddr", "segment_count_ssa")):  # fmt: skip
        assert (rows[part]["volume_offset"], rows[part]["length"]) == (
            number[name] * 4096,
            number[count] * 2 * MIB,
        )
    assert rows["checkpoint pack 1"]["volume_offset"] == number["cp_blkaddr"] * 4096
    assert (
        sum(row["kind"] == "metadata" and row["part"] == "inode" for row in mapped(image).extents.to_pylist())
        == number["valid_inode_count"]
    )


# ---- behind the checkpoint ---------------------------------------------------------------------------------


def newest(image: bytes) -> tuple[np.void, np.void, int]:
    """(superblock, newer checkpoint, its first block)."""
    super_ = np.frombuffer(image, ondisk.SUPERBLOCK, 1, 1024)[0]
    starts = [int(super_["cp_blkaddr"]) + at for at in (0, 512)]
    packs = [(np.frombuffer(image, ondisk.CHECKPOINT, 1, start * 4096)[0], start) for start in starts]
    return super_, *max(packs, key=lambda pack: int(pack[0]["checkpoint_ver"]))


def synced(
    image: bytes, changes: list[tuple[int, bytes]], node: bytes, version: int | None = None
) -> np.ndarray:
    """The volume with one more node behind the checkpoint, as fsync writes it; `changes` are made in the
    node."""
    data = np.frombuffer(image, np.uint8).copy()
    super_, pack, _ = newest(image)
    at = int(super_["main_blkaddr"]) + int(pack["cur_node_segno"][1]) * 512 + int(pack["cur_node_blkoff"][1])
    block = np.frombuffer(node, np.uint8).copy()
    flag = int.from_bytes(node[4080:4084], "little") | 0x6
    footer = struct.pack("<IQI", flag, int(pack["checkpoint_ver"]) if version is None else version, at + 1)
    for offset, value in (*changes, (4080, footer)):
        block[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    data[at * 4096 : at * 4096 + 4096] = block
    return data


@pytest.mark.parametrize("unmounted", [True, False])
def test_journals_in_plain_summaries(unmounted: bool, plain: bytes) -> None:
    """An entry of the NAT and one of the SIT are moved into the journals; a checkpoint without unmount has no
    summaries of nodes."""
    before = survey([BytesReader(np.frombuffer(plain, np.uint8))])
    data = np.frombuffer(plain, np.uint8).copy()
    super_, pack, start = newest(plain)
    assert not int(pack["ckpt_flags"]) & allocator.COMPACT_SUM
    assert not np.frombuffer(plain[start * 4096 + 192 :][:128], np.uint8).any(), (
        "all blocks of both tables are in their first places"
    )
    inode = tree(before, 0)["/large"]
    nat = int(super_["nat_blkaddr"]) * 4096 + inode // 455 * 4096 + inode % 455 * 9
    sit = int(super_["sit_blkaddr"]) * 4096
    total = 8 if unmounted else 5
    sums = (start + total - (7 if unmounted else 4)) * 4096
    for at, number, entry, size in ((sums, inode, nat, 9), (sums + 2 * 4096, 0, sit, 74)):
        journal = struct.pack("<HI", 1, number) + plain[entry : entry + size]
        data[at + 3584 : at + 3584 + len(journal)] = np.frombuffer(journal, np.uint8)
        data[entry : entry + size] = 0
    head = np.frombuffer(plain, ondisk.CHECKPOINT, 1, start * 4096).copy()
    head["ckpt_flags"] &= 0xFFFFFFFF if unmounted else ~np.uint32(allocator.UMOUNT)
    head["cp_pack_total_block_count"] = total
    block = data[start * 4096 : start * 4096 + 4096]
    block[: head.itemsize] = np.frombuffer(head.tobytes(), np.uint8)
    block[4092:] = np.frombuffer(struct.pack("<I", ondisk.crc(block[:4092].tobytes())), np.uint8)
    data[(start + total - 1) * 4096 : (start + total) * 4096] = block
    bmap = survey([BytesReader(data)])
    assert_proven(bmap)
    assert bmap.filesystems.column("state").to_pylist() == ["clean" if unmounted else "frozen"]
    assert bmap.inodes.equals(before.inodes)
    assert bmap.extents.equals(before.extents)


def test_a_synced_inode_takes_the_place_of_the_older_one(plain: bytes) -> None:
    before = survey([BytesReader(np.frombuffer(plain, np.uint8))])
    inode = tree(before, 0)["/many/7nnnnnnn"]
    old = next(row for row in before.inodes.to_pylist() if row["inode"] == inode)
    node = plain[old["record_offset"] :][:4096]
    bmap = survey([BytesReader(synced(plain, [(16, struct.pack("<Q", 33))], node))])
    assert_proven(bmap)
    assert bmap.filesystems.column("state").to_pylist() == ["recovered"]
    assert tree(bmap, 0) == tree(before, 0)
    new = next(row for row in bmap.inodes.to_pylist() if row["inode"] == inode)
    assert new["size"] == 33
    assert new["record_offset"] != old["record_offset"]
    free = [row for row in bmap.extents.to_pylist() if row["kind"] == "free"]
    assert any(
        row["volume_offset"] <= old["record_offset"] < row["volume_offset"] + row["length"] for row in free
    )
    # of an older checkpoint, and of no file: no mount would read these
    for data in (
        synced(plain, [], node, version=5),
        synced(plain, [(4076, struct.pack("<I", 60_000))], node),
    ):
        same = survey([BytesReader(data)])
        assert same.inodes.equals(before.inodes)
        assert same.extents.equals(before.extents)


def test_a_synced_new_file_has_the_name_that_it_bears(plain: bytes) -> None:
    before = survey([BytesReader(np.frombuffer(plain, np.uint8))])
    found, root = tree(before, 0), before.filesystems.column("root")[0].as_py()
    old = next(row for row in before.inodes.to_pylist() if row["inode"] == found["/many/7nnnnnnn"])
    ids = struct.pack("<II", 50_000, 50_000)
    for parent, name, expected in ((root, b"born", "/born"), (found["/many"], b"3nnn", "/many/3nnn")):
        changes = [(84, struct.pack("<II", parent, len(name)) + name), (4072, ids)]
        bmap = survey([BytesReader(synced(plain, changes, plain[old["record_offset"] :][:4096]))])
        assert_proven(bmap)
        assert tree(bmap, 0) == found | {expected: 50_000}
        deleted = [row["inode"] for row in bmap.inodes.to_pylist() if row["flags"] & tables.I_DELETED]
        assert deleted == ([found[expected]] if expected in found else [])


# ---- damage ------------------------------------------------------------------------------------------------


def changed(image: bytes, offset: int, data: bytes) -> BlockMap:
    found = np.frombuffer(image, np.uint8).copy()
    found[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    return survey([BytesReader(found)])


def codes(bmap: BlockMap) -> list[str]:
    return bmap.problems.column("code").to_pylist()


@pytest.mark.parametrize("offset", [1024, 1024 + 36, 1024 + 72, 1024 + 3000])
def test_the_copy_of_the_superblock_is_used(offset: int, small: bytes) -> None:
    bmap = changed(small, offset, b"\xff\xff\xff\xff")
    assert "superblock" in codes(bmap)
    assert set(tree(bmap, 0)) == set(tree(survey([BytesReader(np.frombuffer(small, np.uint8))]), 0))


def test_a_copy_alone_is_no_filesystem_where_another_one_was_made(small: bytes) -> None:
    bmap = changed(small, 0, bytes(32) + b"NXSB" + bytes(1024 - 36 + 4))
    assert bmap.volumes.column("type").to_pylist() == ["apfs"]


def test_a_damaged_checkpoint_gives_way_to_the_other(small: bytes) -> None:
    before = survey([BytesReader(np.frombuffer(small, np.uint8))])
    super_ = np.frombuffer(small, ondisk.SUPERBLOCK, 1, 1024)[0]
    packs = [int(super_["cp_blkaddr"]) * 4096 + pack * 2 * MIB for pack in (0, 1)]
    newer = max(packs, key=lambda at: int.from_bytes(small[at : at + 8], "little"))
    older = sum(packs) - newer
    assert tree(changed(small, older, bytes(4096)), 0) == tree(before, 0)
    assert "copy-used" in codes(changed(small, newer, bytes(4096)))
    data = np.frombuffer(small, np.uint8).copy()
    for at in packs:
        data[at : at + 4096] = 0
    assert "superblock" in codes(survey([BytesReader(data)]))


def test_what_is_not_read_is_refused_by_name(small: bytes) -> None:
    for at, value, words in (
        (16, 14, "blocks of 2^14"),
        (2180, 0x8000, "0x8000"),
        (2201 + 68, 0x2F, "several devices"),
    ):
        data = np.frombuffer(small, np.uint8).copy()
        for start in ondisk.SUPERBLOCKS:
            data[start + at : start + at + 4] = np.frombuffer(struct.pack("<I", value), np.uint8)
            if at != 2180:
                data[start + 3068 : start + 3072] = np.frombuffer(
                    struct.pack("<I", ondisk.crc(data[start : start + 3068].tobytes())), np.uint8
                )
            else:
                data[start + 2180 : start + 2184] = np.frombuffer(struct.pack("<I", 0x8000), np.uint8)
        assert words in survey([BytesReader(data)]).problems.column("detail")[0].as_py()


def test_a_compressed_cluster_in_pieces(folder: Path) -> None:
    """By hand: of the first four blocks the first and the third become a compressed cluster, a released one,
    and one of the next four is promised."""
    image = build(folder / "tree", folder / "packed", *LAYOUTS["android"], size=72 * MIB).read_bytes()
    before = survey([BytesReader(np.frombuffer(image, np.uint8))])
    inode = tree(before, 0)["/large"]
    place = next(row["record_offset"] for row in before.inodes.to_pylist() if row["inode"] == inode)
    node = np.frombuffer(image, ondisk.NODE, 1, place).copy()
    assert node["i_extra_isize"][0] == 36
    block = file_extents(before, 0, inode)[0].offset // 4096
    node["i_flags"] |= 0x4
    node["i_log_cluster_size"] = 2
    node["i_addr"][0, 9:17] = (
        ondisk.COMPRESS_ADDR,
        block,
        block + 2,
        0,
        block + 4,
        block + 5,
        0xFFFFFFFF,
        block + 7,
    )
    bmap = changed(image, place, node.tobytes())
    rows = [row for row in bmap.extents.to_pylist() if row["inode"] == inode and row["kind"] == "data"]
    found = [
        (
            row["file_offset"],
            row["file_length"],
            row["volume_offset"] // 4096 - block,
            row["length"],
            row["flags"],
        )
        for row in rows
    ]
    assert found[:4] == [(0, 16384, 0, 4096, tables.COMPRESSED), (0, 16384, 2, 4096, tables.COMPRESSED),
        (16384, 8192, 4, 8192, 0),
                         (28672, found[3][1], 7, found[3][3], 0)]  # fmt: skip
    assert {block + 1, block + 3, block + 6} <= {
        at for row in bmap.extents.to_pylist() if row["kind"] == "unknown"
        for at in range(row["volume_offset"] // 4096, (row["volume_offset"] + row["length"]) // 4096)
    }  # fmt: skip


def test_damaged_nodes_are_named_and_the_rest_is_read(small: bytes) -> None:
    bmap = survey([BytesReader(np.frombuffer(small, np.uint8))])
    found = tree(bmap, 0)
    place = {row["inode"]: row["record_offset"] for row in bmap.inodes.to_pylist()}
    at = place[found["/large"]]
    assert "checksum" in codes(changed(small, at + 16, b"\x01"))
    assert {"tree", "dangling-name"} <= set(codes(changed(small, at + 4072, b"\x01\x02")))
    assert "outside" in codes(changed(small, at + 500, b"\xf0\xff\xff\xff"))
    assert "tree" in codes(changed(small, at + 4052, struct.pack("<I", 4)))
    assert "two-owners" in codes(changed(small, at + 500, small[at + 504 : at + 508]))


def test_the_checksum_of_many_records_is_that_of_zlib() -> None:

    random_ = np.random.default_rng(3)
    for share in (1.0, 0.02, 0.0):
        data = random_.integers(0, 256, (50, 4096), np.uint8) * (random_.random((50, 4096)) < share)
        expected = [~zlib.crc32(row.tobytes(), 0xFFFFFFFF) & 0xFFFFFFFF for row in data]
        assert checksums.crc32(data, 0).tolist() == expected
        expected = [~zlib.crc32(row.tobytes()) & 0xFFFFFFFF for row in data]
        assert checksums.crc32(data).tolist() == expected


# ---- real images -------------------------------------------------------------------------------------------


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    seen = 0
    for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]:
        path, kind = line.split("\t")[0], line.split("\t")[5]
        if kind != "f2fs":
            continue
        image = tmp_path / "image"
        image.write_bytes(lzma.decompress((corpus / path).read_bytes()))
        bmap = mapped(image)
        assert_proven(bmap)
        found = {name.rpartition("/")[2] for name in tree(bmap, 0)}
        assert "syz_mount" not in path or {"file0", "file1"} <= found
        seen += 1
    assert seen


@pytest.mark.slow
def test_what_a_kernel_says_of_an_aged_volume() -> None:
    image, told = f2fs_images.aged()
    bmap, reader = mapped(image), RawReader(os.fspath(image))
    assert_proven(bmap)
    found = tree(bmap, 0)
    rows = {row["inode"]: row for row in bmap.inodes.to_pylist()}
    assert set(found) == set(told.stat)
    for name, (inode, mode, nlink, size, uid, gid, mtime) in told.stat.items():
        row = rows[inode]
        assert found[name] == inode
        assert (row["mode"], row["nlink"], row["size"], row["uid"], row["gid"]) == (
            mode,
            nlink,
            size,
            uid,
            gid,
        ), name
        assert row["mtime_ns"] // 10**9 == mtime, name
    for name, said in told.extents.items():
        assert file_extents(bmap, 0, found[name]) == said, name
    numbers = "".join(f"{i}\n" for i in range(1, 2001)).encode()
    far = file_extents(bmap, 0, found["/frag/far"])
    assert [extent.file_offset // 4096 for extent in far] == [1000, 900_000, 2_200_000]
    assert all(reader.read(extent.offset, len(numbers)) == numbers for extent in far)
    packed = [inode for inode, row in rows.items() if row["flags"] & tables.I_COMPRESSED]
    assert len(packed) > 5
    assert sum(row["flags"] & tables.COMPRESSED != 0 for row in bmap.extents.to_pylist()) > 20
    for name, digest in told.sums.items():
        data = (
            unpacked(bmap, image, found[name])
            if found[name] in packed
            else content(bmap, [reader], 0, found[name])
        )
        assert hashlib.sha256(data).hexdigest() == digest, name
    reader.close()


def unpacked(bmap: BlockMap, image: Path, inode: int) -> bytes:
    """A file's bytes where some of its clusters are compressed with LZ4 (fs/f2fs/compress.c: clen, five
    words, then the stream)."""
    mine = [row for row in bmap.extents.to_pylist() if row["inode"] == inode and row["kind"] == "data"]
    size = next(row["size"] for row in bmap.inodes.to_pylist() if row["inode"] == inode)
    result, disk = bytearray(size), image.read_bytes()
    clusters: dict[int, bytes] = {}
    for row in mine:
        stored = disk[row["volume_offset"] : row["volume_offset"] + row["length"]]
        if row["flags"] & tables.COMPRESSED:
            clusters[row["file_offset"]] = clusters.get(row["file_offset"], b"") + stored
            length = row["file_length"]
            data = clusters[row["file_offset"]]
            size_ = int.from_bytes(data[:4], "little")
            stored = lz4_block(data[24 : 24 + size_])[:length] if len(data) >= 24 + size_ else b""
        end = min(size, row["file_offset"] + len(stored))
        result[row["file_offset"] : end] = stored[: max(0, end - row["file_offset"])]
    return bytes(result)


def size_of(last: int) -> int:
    """Bytes that `seq 1 LAST` prints."""
    return sum(len(str(number)) + 1 for number in range(1, last + 1))


@pytest.mark.slow
def test_copies_of_a_mounted_volume_are_mapped_as_the_kernel_recovers_them() -> None:
    states = {}
    for name, (copy, back, told) in f2fs_images.crashed().items():
        bmap, recovered, reader = mapped(copy), mapped(back), RawReader(os.fspath(copy))
        assert_proven(bmap)
        assert_proven(recovered)
        states[name] = bmap.filesystems.column("state")[0].as_py()
        found, rows = tree(bmap, 0), {row["inode"]: row for row in bmap.inodes.to_pylist()}
        assert found == tree(recovered, 0)
        assert set(found) == set(told.stat)
        for path, (inode, mode, nlink, size, uid, gid, mtime) in told.stat.items():
            row = rows[inode]
            assert (row["mode"], row["nlink"], row["size"], row["uid"], row["gid"]) == (
                mode,
                nlink,
                size,
                uid,
                gid,
            ), (name, path)
            assert row["type"] == "directory" or row["mtime_ns"] // 10**9 == mtime, (name, path)
        for path, said in told.extents.items():
            assert file_extents(bmap, 0, found[path]) == said, (name, path)
        for path, digest in told.sums.items():
            assert hashlib.sha256(content(bmap, [reader], 0, found[path])).hexdigest() == digest, (name, path)
        deleted = sorted(row["size"] for row in rows.values() if row["flags"] & tables.I_DELETED)
        assert deleted == sorted([size_of(30_000)] + [size_of(350), size_of(77)] * (name == "again")), name
        reader.close()
    assert states == {
        name: "frozen" if name in ("none", "moved") else "recovered" for name in f2fs_images.CRASHES
    }
