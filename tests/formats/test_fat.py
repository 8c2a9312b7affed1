"""FAT12, FAT16, FAT32: against mtools, fsck.fat and The Sleuth Kit, and against the contents that were put
in."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from fat_images import FLAVOURS, LARGEST, UTF8, Fat, corpus_images, fill, fsck, head, make, mshowfat
from support import (
    BytesReader,
    assert_proven,
    content,
    file_extents,
    mapped,
    need,
    run,
    survives,
    tree,
)
from virt_bmap.ask.check import check
from virt_bmap.formats.filesystems.fat import looks_like_fat
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """Made when first asked for, and kept."""
    return {}


@pytest.fixture(params=FLAVOURS)
def volume(request, volumes, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    if request.param not in volumes:
        folder = tmp_path_factory.mktemp("fat")
        image = make(folder, request.param)
        volumes[request.param] = image, fill(image, folder)
    return volumes[request.param]


def by_path(bmap: BlockMap) -> dict[str, int]:
    return {path: inode for path, inode in tree(bmap, 0).items() if path != "/"}


def owned(bmap: BlockMap) -> int:
    """Bytes of clusters that files and directories own or that are bad."""
    kind, length = tables.codes(bmap.extents, "kind"), tables.integers(bmap.extents, "length")
    mine = np.isin(kind, (tables.DATA, tables.DIRECTORY, tables.UNWRITTEN)) & (
        tables.integers(bmap.extents, "file_offset") >= 0
    )
    return int(length[mine].sum())


def codes(bmap: BlockMap, severity: str = "") -> set[str]:
    return {row["code"] for row in bmap.problems.to_pylist() if not severity or row["severity"] == severity}


def says(bmap, code, words):
    """Is there an error with this code and these words?"""
    rows = [row for row in bmap.problems.to_pylist() if (row["severity"], row["code"]) == ("error", code)]
    return any(words in row["detail"] for row in rows)


# ---- sound volumes -----------------------------------------------------------------------------------------


def test_every_byte_has_the_owner_that_the_fat_says(volume):
    bmap = mapped(volume[0])
    assert bmap.filesystems.column("type").to_pylist() == ["vfat"]
    assert_proven(bmap)
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))


def test_names_are_those_that_were_put_in(volume):
    image, contents = volume
    assert set(by_path(mapped(image))) == set(contents)


def test_contents_by_the_map_are_those_that_were_put_in(volume):
    image, contents = volume
    bmap, reader = mapped(image), RawReader(str(image))
    for path, inode in by_path(bmap).items():
        if "." in path or path == "/empty":
            assert content(bmap, [reader], 0, inode) == contents[path], path
    reader.close()


def test_clusters_are_those_of_mtools(volume):
    image, contents = volume
    bmap, inodes = mapped(image), by_path(mapped(image))
    fat = bmap.filesystems.to_pylist()[0]["block_size"]
    start = Heap(image).start
    for path, pieces in mshowfat(
        image, [path for path in contents if path.isascii() and contents[path]]
    ).items():
        mine = [(e.offset, e.length) for e in file_extents(bmap, 0, inodes[path])]
        theirs = [(start + (low - 2) * fat, (high - low + 1) * fat) for low, high in pieces if low]
        assert mine == joined(theirs), path


class Heap:
    """Where the clusters begin, computed from the boot sector for all widths."""

    def __init__(self, image: Path) -> None:
        boot = head(image)
        sector, _, reserved, fats, root = struct.unpack_from("<HBHBH", boot, 11)
        size = struct.unpack_from("<H", boot, 22)[0] or struct.unpack_from("<I", boot, 36)[0]
        self.start = (reserved + fats * size) * sector + -(-root * 32 // sector) * sector


def joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, length in pieces:
        if result and sum(result[-1]) == start:
            result[-1] = result[-1][0], result[-1][1] + length
        else:
            result.append((start, length))
    return result


def test_used_clusters_are_as_many_as_fsck_counts(volume):
    clean, words, used = fsck(volume[0])
    assert clean or "Free cluster summary wrong" in words, words  # mtools count bad clusters as free
    bmap = mapped(volume[0])
    system = bmap.filesystems.to_pylist()[0]
    root = 0 if system["features"] == "FAT32" else sum(e.length for e in file_extents(bmap, 0, 0))
    bad = sum(row["length"] for row in bmap.extents.to_pylist() if row["part"] == "bad clusters")
    assert (bad > 0) == ("bad" in volume[0].name)
    assert used == (owned(bmap) - root + bad) // system["block_size"]


def test_sectors_are_those_of_the_sleuth_kit(volume):
    image, contents = volume
    need("istat", "sleuthkit")
    bmap, inodes = mapped(image), by_path(mapped(image))
    sector = struct.unpack_from("<H", head(image), 11)[0]
    listed = re.findall(r"^r/r (\d+):\t(.*)$", run("fls", "-rpu", "-f", "fat", image).decode(), re.M)[::7]
    seen = 0
    for number, path in listed:
        if "/" + path not in contents or not contents["/" + path]:
            continue
        words = run("istat", "-f", "fat", image, number).decode()
        theirs = [int(word) for word in words[words.index("Sectors:") + 8 :].split()]
        mine = [
            at // sector
            for e in file_extents(bmap, 0, inodes["/" + path])
            for at in range(e.offset, e.offset + e.length, sector)
        ]
        count = -(-len(contents["/" + path]) // sector)  # behind the end of the file it says 0
        assert mine[:count] == theirs[:count], path
        seen += 1
        if seen == 12:
            break
    assert seen == 12


@pytest.mark.parametrize("flavour", ["fat32", "fat16"])
def test_label_serial_and_times(flavour, volumes, tmp_path):
    image = make(tmp_path, flavour)
    run("mlabel", "-i", image, "::LÄBEL", env=UTF8)
    source = tmp_path / "file"
    source.write_bytes(b"x")
    run("touch", "-d", "2001-02-03 04:05:06 UTC", source)
    run("mcopy", "-m", "-i", image, source, "::/", env=UTF8 | {"TZ": "UTC"})
    bmap = mapped(image)
    assert bmap.filesystems.to_pylist()[0]["uuid"] == "1234-ABCD"
    assert bmap.inodes.to_pylist()[1]["mtime_ns"] == 981173106 * 10**9
    # mtools write the label in code page 850, of which 437 differs in few letters
    assert bmap.filesystems.to_pylist()[0]["label"] == "LÄBEL"


def test_state_says_what_kernel_and_windows_mark(tmp_path):
    image = make(tmp_path, "fat16")
    assert mapped(image).filesystems.to_pylist()[0]["state"] == "clean"
    fat = Fat(image.read_bytes())
    fat.set(1, 0x7FFF)
    assert survives(fat.data).filesystems.to_pylist()[0]["state"] == "in use"
    fat.set(1, 0xBFFF)
    assert survives(fat.data).filesystems.to_pylist()[0]["state"] == "damaged"
    fat.set(1, 0xFFFF)
    fat.data[37] = 1  # as Linux does
    assert survives(fat.data).filesystems.to_pylist()[0]["state"] == "in use"


def test_an_active_fat_without_mirroring_is_the_one_that_is_read(tmp_path):
    image = make(tmp_path, "fat32")
    contents = fill(image, tmp_path)
    fat = Fat(image.read_bytes())
    size = fat.tables[1] - fat.tables[0]
    fat.data[fat.tables[0] : fat.tables[0] + size] = 0
    fat.data[40] = 0x81  # BPB_ExtFlags: FAT 2 is active, no mirroring
    bmap = survives(fat.data)
    assert set(by_path(bmap)) == set(contents)
    assert_proven(bmap)


@pytest.mark.parametrize("flavour", ["fat12-atari", "fat32-small"])
def test_volumes_that_mtools_do_not_read(flavour, tmp_path):
    image = make(tmp_path, flavour)
    data = bytearray(image.read_bytes())
    wide = flavour == "fat32-small"
    assert_proven(mapped(image))
    bmap = mapped(image)
    starts = {row["part"]: row["volume_offset"] for row in bmap.extents.to_pylist()}
    fat, root = starts["FAT 1"], file_extents(bmap, 0, 0)[0].offset
    other = starts["FAT 2"]
    for table in (fat, other):  # clusters 4 and 5
        if wide:
            data[table + 16 : table + 24] = struct.pack("<II", 5, 0x0FFFFFFF)
        else:
            data[table + 6 : table + 9] = (5 | 0xFFF << 12).to_bytes(3, "little")
    data[root : root + 32] = entry(
        b"TWO CL     ", cluster=4, size=bmap.filesystems.to_pylist()[0]["block_size"] + 1
    )
    image.write_bytes(data)
    bmap = mapped(image)
    assert_proven(bmap)
    assert names_of(bmap) == [b"TWO CL"]
    size = bmap.filesystems.to_pylist()[0]["block_size"]
    heap = Heap(image).start
    assert [(e.offset, e.length) for e in file_extents(bmap, 0, by_path(bmap)["/TWO CL"])] == [
        (heap + 2 * size, 2 * size)
    ]
    if wide:
        assert "1 files, 3/" in fsck(image)[1] or "2 files, 3/" in fsck(image)[1]


# ---- what is a FAT volume at all ---------------------------------------------------------------------------


def test_a_partition_table_is_no_fat_and_a_fat_no_partition_table(tmp_path):
    sector = head(make(tmp_path, "fat32"))
    assert looks_like_fat(sector)
    assert looks_like_fat(head(make(tmp_path, "fat32-mbr")))  # whose table names the volume itself
    table = bytearray(sector)
    table[446:462] = struct.pack("<B3xB3xII", 0x80, 0x0C, 2048, 100000)
    assert not looks_like_fat(bytes(table))
    assert not looks_like_fat(bytes(510) + b"\x55\xaa")
    assert not looks_like_fat(sector[:3] + b"-FVE-FS-" + sector[11:])
    for at, byte in ((11, 1), (13, 3), (14, 0), (16, 0), (21, 0x12)):
        wrong = bytearray(sector)
        wrong[at] = byte
        assert not looks_like_fat(bytes(wrong)), at


# ---- names -------------------------------------------------------------------------------------------------


def slots(name: str, short: bytes) -> bytes:
    """The entries of a long name for a short one, as fatgen103 describes them."""
    checksum = 0
    for byte in short:
        checksum = ((checksum & 1) << 7 | checksum >> 1) + byte & 255
    units = name.encode("utf-16-le", "surrogatepass")
    units += b"\0\0" if len(units) % 26 else b""
    units += b"\xff" * (-len(units) % 26)
    parts = [units[i : i + 26] for i in range(0, len(units), 26)]
    result = b""
    for number in range(len(parts), 0, -1):
        part, last = parts[number - 1], 0x40 if number == len(parts) else 0
        result += struct.pack(
            "<B10sBBB12sH4s", number | last, part[:10], 0x0F, 0, checksum, part[10:22], 0, part[22:]
        )
    return result


def entry(short: bytes, attribute: int = 0x20, case: int = 0, cluster: int = 0, size: int = 0) -> bytes:
    return struct.pack(
        "<11sBB7xHHHHI", short, attribute, case, cluster >> 16, 0, 0x2A21, cluster & 0xFFFF, size
    )


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> bytes:
    return make(tmp_path_factory.mktemp("fat"), "fat16").read_bytes()


def in_root(empty: bytes, entries: bytes) -> BlockMap:
    """The map of a FAT16 volume with these entries in its root directory."""
    fat = Fat(empty)
    at = fat.tables[-1] + fat.tables[1] - fat.tables[0]
    fat.data[at : at + len(entries)] = np.frombuffer(entries, np.uint8)
    return survives(fat.data)


def names_of(bmap: BlockMap) -> list[bytes]:
    return bmap.names.column("name").to_pylist()


SHORT = b"SHORT~1 TXT"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (entry(SHORT), [b"SHORT~1.TXT"]),
        (entry(b"NOEXT      "), [b"NOEXT"]),
        (entry(b"A B     C  "), [b"A B.C"]),
        (entry(b"LOWER   TXT", case=0x08), [b"lower.TXT"]),
        (entry(b"LOWER   TXT", case=0x10), [b"LOWER.txt"]),
        (entry(b"\x9aBER    TXT", case=0x18), ["über.txt".encode()]),
        (entry(b"\x05MEGA   TXT"), ["σMEGA.TXT".encode()]),
        (entry(b".          ") + entry(b"..         "), []),
        (entry(b"\xe5ELETED TXT") + entry(SHORT), [b"SHORT~1.TXT"]),
        (entry(SHORT) + bytes(32) + entry(b"BEHIND     "), [b"SHORT~1.TXT"]),
        (slots("a long name.text", SHORT) + entry(SHORT), [b"a long name.text"]),
        (slots("x" * 13, SHORT) + entry(SHORT), [b"x" * 13]),
        (slots("y" * 255, SHORT) + entry(SHORT), [b"y" * 255]),
        (slots("ä😀ß", SHORT) + entry(SHORT), ["ä😀ß".encode()]),
        (slots("lone \ud83d end", SHORT) + entry(SHORT), [b"lone \xed\xa0\xbd end"]),
        (
            slots("a", SHORT) + entry(SHORT) + entry(b"B          ") + slots("ccc", SHORT) + entry(SHORT),
            [b"a", b"B", b"ccc"],
        ),
        (slots("wrong checksum", b"OTHER      ") + entry(SHORT), [b"SHORT~1.TXT"]),
        (slots("two slots long", SHORT)[32:] + entry(SHORT), [b"SHORT~1.TXT"]),
        (slots("two slots long", SHORT)[:32] + entry(SHORT), [b"SHORT~1.TXT"]),
        (slots("old name that is gone", SHORT) + slots("new", SHORT) + entry(SHORT), [b"new"]),
        (slots("apart", SHORT) + entry(b"\xe5          ") + entry(SHORT), [b"SHORT~1.TXT"]),
        (slots("", SHORT) + entry(SHORT), [b"SHORT~1.TXT"]),
        (entry(b"A LABEL    ", 0x08) + entry(SHORT), [b"SHORT~1.TXT"]),
    ],
)
def test_names_by_the_specification(empty, entries, expected):
    assert names_of(in_root(empty, entries)) == expected


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A FAT16 volume with a few files in pieces."""
    folder = tmp_path_factory.mktemp("fat")
    image = make(folder, "fat16")
    fill(image, folder)
    return image.read_bytes()


def clusters_of(data: np.ndarray, path: str) -> tuple[Fat, list[int]]:
    fat, bmap = Fat(data.tobytes()), survey([BytesReader(data)])
    pieces = file_extents(bmap, 0, by_path(bmap)[path])
    found = [
        (at - fat.start) // fat.cluster_size + 2
        for e in pieces
        for at in range(e.offset, e.offset + e.length, fat.cluster_size)
    ]
    return fat, found


def damaged(small: bytes, tmp_path: Path, path: str, change) -> BlockMap:
    """Change the chain of a file; fsck.fat must find something, too."""
    fat, found = clusters_of(np.frombuffer(small, np.uint8), path)
    change(fat, found)
    image = tmp_path / "damaged.img"
    image.write_bytes(fat.data.tobytes())
    assert not fsck(image)[0]
    bmap = survives(fat.data)
    assert bmap is not None
    return bmap


BIG, OTHER = "/A longer name than eight.html", "/x" + "x" * 12


def test_a_chain_that_goes_round(small, tmp_path):
    bmap = damaged(small, tmp_path, BIG, lambda fat, c: fat.set(c[-1], c[1]))
    assert says(bmap, "twice", "leads back into itself")


def test_a_chain_into_a_free_cluster(small, tmp_path):
    bmap = damaged(small, tmp_path, BIG, lambda fat, c: fat.set(c[2], 0))
    assert says(bmap, "extents", "the rest is lost")
    assert "unowned" in codes(bmap)  # the rest of the chain


def test_a_chain_to_a_cluster_that_does_not_exist(small, tmp_path):
    bmap = damaged(small, tmp_path, BIG, lambda fat, c: fat.set(c[2], 0xFFF0))
    assert says(bmap, "extents", "the rest is lost")


def test_a_chain_that_ends_too_early(small, tmp_path):
    bmap = damaged(small, tmp_path, BIG, lambda fat, c: fat.set(c[2], 0xFFFF))
    assert says(bmap, "extents", "fewer clusters")


def test_two_files_that_share_a_tail(small, tmp_path):
    other = clusters_of(np.frombuffer(small, np.uint8), OTHER)[1]
    bmap = damaged(small, tmp_path, BIG, lambda fat, c: fat.set(c[2], other[1]))
    assert "two-owners" in codes(bmap, "error")
    assert "two-owners" in {row.code for row in check(bmap).disagreements}


def test_a_chain_that_is_too_long_is_unwritten_behind_the_end(small, tmp_path):
    def lengthen(fat: Fat, c: list[int]) -> None:
        free = next(number for number in range(2, 5000) if fat.get(number) == 0)
        fat.set(c[-1], free)
        fat.set(free, 0xFFFF)

    bmap = damaged(small, tmp_path, BIG, lengthen)
    assert codes(bmap, "warning") == {"extents"}
    assert tables.UNWRITTEN in tables.codes(bmap.extents, "kind")


def test_a_lost_chain_is_allocated_but_not_owned(small, tmp_path):
    def lose(fat: Fat, c: list[int]) -> None:
        free = next(number for number in range(2, 5000) if fat.get(number) == fat.get(number + 1) == 0)
        fat.set(free, free + 1)
        fat.set(free + 1, 0xFFFF)

    fat, found = clusters_of(np.frombuffer(small, np.uint8), BIG)
    lose(fat, found)
    bmap = survives(fat.data)
    assert codes(bmap) >= {"unowned"}
    unknown = tables.codes(bmap.extents, "kind") == tables.UNKNOWN
    assert tables.integers(bmap.extents, "length")[unknown].tolist() == [2 * fat.cluster_size]


def test_a_directory_that_contains_itself(empty):
    fat = Fat(empty)
    root = fat.tables[-1] + fat.tables[1] - fat.tables[0]
    here = entry(b"LOOP       ", 0x10, cluster=2)
    fat.data[root : root + 32] = np.frombuffer(here, np.uint8)
    fat.data[fat.offset(2) : fat.offset(2) + 32] = np.frombuffer(here, np.uint8)
    fat.set(2, 0xFFFF)
    bmap = survives(fat.data)
    assert "twice" in codes(bmap, "error")
    assert names_of(bmap) == [b"LOOP", b"LOOP"]


@pytest.mark.parametrize(
    ("cluster", "code", "words"),
    [
        (0, "extents", "no first cluster"),
        (60000, "outside", "does not exist"),
        (1, "outside", "does not exist"),
        (9, "extents", "free or bad"),
    ],
)
def test_a_first_cluster_that_can_not_be(empty, cluster, code, words):
    bmap = in_root(empty, entry(SHORT, cluster=cluster, size=5))
    assert codes(bmap, "error") == {code}
    assert says(bmap, code, words)


def test_a_volume_that_is_cut_off(small):
    data = np.frombuffer(small, np.uint8)
    bmap = survives(data[: len(data) // 2])
    assert "truncated" in codes(bmap, "error")
    assert "outside" not in {row.code for row in check(bmap).disagreements}
    assert codes(survives(data[:20000]), "error") == {"truncated"}  # inside the FATs: nothing can be read


@pytest.mark.parametrize(("flavour", "at"), [("fat16", 22), ("fat32-small", 36)])
def test_fats_too_short_for_the_volume(tmp_path, flavour, at):
    """fsck.fat gives up on it; the kernel takes the clusters that have entries."""
    image = make(tmp_path, flavour)
    data = bytearray(image.read_bytes())
    struct.pack_into("<H", data, at, struct.unpack_from("<H", data, at)[0] // 2)
    image.write_bytes(data)
    assert not fsck(image)[0]
    bmap = survives(np.frombuffer(bytes(data), np.uint8))
    assert says(bmap, "superblock", "a FAT has entries for")
    assert bmap.filesystems.column("state").to_pylist() == [tables.DAMAGED]


def test_a_root_directory_that_is_nowhere(tmp_path):
    data = np.frombuffer(make(tmp_path, "fat32-small").read_bytes(), np.uint8).copy()
    for cluster in 0, 1, 9, 0xFFFFFFFF:
        data[44:48] = np.frombuffer(struct.pack("<I", cluster), np.uint8)
        bmap = survives(data)
        assert codes(bmap, "error") == {"extents"}
        assert "unowned" in codes(bmap)


# ---- real volumes ------------------------------------------------------------------------------------------


def test_volumes_that_others_made(corpus, tmp_path):
    """What fsck.fat calls clean has no problem in the map, as many clusters in use, and the paths that The
    Sleuth Kit lists."""
    need("fls", "sleuthkit")
    proven = 0
    for name, image in corpus_images(corpus, tmp_path, "fat"):
        if not looks_like_fat(head(image)):
            continue
        bmap = mapped(image)
        clean, words, used = fsck(image)
        if found := check(bmap).disagreements:
            assert not clean, (name, found)
            continue
        if bmap.filesystems.num_rows == 0 or used < 0:
            continue
        system = bmap.filesystems.to_pylist()[0]
        root = 0 if system["features"] == "FAT32" else sum(e.length for e in file_extents(bmap, 0, 0))
        assert used == (owned(bmap) - root) // system["block_size"], (name, words)
        mine = set(by_path(bmap))
        proven += 1
        if not mine or image.stat().st_size > LARGEST:  # The Sleuth Kit looks at every cluster
            continue
        listed = run("fls", "-rpu", "-f", "fat", image, ok=(0, 1)).decode(errors="surrogateescape")
        theirs = {
            path
            for kind, path in re.findall(r"^(\S+) \d+:\t(.*)$", listed, re.M)
            if kind[0] in "rd" and "$" not in path
        }
        if listed and all(path.isascii() for path in mine):
            assert {path.strip("/ ") for path in mine} >= {
                path for path in theirs if not path.endswith("(Volume Label Entry)")
            }, name
        proven += 1
    assert proven >= 40
