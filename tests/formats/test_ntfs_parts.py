"""NTFS piece by piece: names, run lists and bitmaps against plain loops; damaged, dirty and odd volumes made
by patching bytes."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ntfs_images
from ntfs_images import fuse
from support import BytesReader, assert_proven, mapped, need, run, tree
from virt_bmap.core.arrays import bit_runs
from virt_bmap.formats.filesystems.ntfs.allocator import log_is_clean
from virt_bmap.formats.filesystems.ntfs.extents import HOLE, decode
from virt_bmap.formats.filesystems.ntfs.text import utf8
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.survey.survey import survey

# ---- parts -------------------------------------------------------------------------------------------------

UNIT = st.one_of(st.integers(0, 0x7F), st.integers(0, 0xFFFF), st.integers(0xD800, 0xDFFF))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(UNIT, max_size=12), max_size=8))
def test_names_become_utf8_as_python_makes_it(names: list[list[int]]) -> None:
    units = np.array([unit for name in names for unit in name], np.uint16)
    found = utf8(units, np.array([len(name) for name in names], np.int64)).strings()
    wanted = [struct.pack(f"<{len(name)}H", *name).decode("utf-16-le", "surrogatepass") for name in names]
    assert found == [name.encode("utf-8", "surrogatepass") for name in wanted]


def plain_decode(data: bytes, clusters: int) -> tuple[list[tuple[int, int, int]], bool]:
    """Runs (vcn, lcn, count) of a run list up to its end or first fault, and whether there is a fault."""
    runs, at, vcn, lcn = [], 0, 0, 0
    while at < len(data) and data[at]:
        n_count, n_lcn = data[at] & 15, data[at] >> 4
        if not 1 <= n_count <= 8 or n_lcn > 8 or at + 1 + n_count + n_lcn > len(data):
            return runs, True
        count = int.from_bytes(data[at + 1 : at + 1 + n_count], "little", signed=True)
        lcn += int.from_bytes(data[at + 1 + n_count : at + 1 + n_count + n_lcn], "little", signed=True)
        hole = n_lcn == 0 or lcn == -1
        if count <= 0 or count > (1 << 62) // 512 - vcn or not (hole or 0 <= lcn <= clusters - count):
            return runs, True
        runs.append((vcn, HOLE if hole else lcn, count))
        vcn, at = vcn + count, at + 1 + n_count + n_lcn
    return runs, at >= len(data)


def encoded(runs: list[tuple[int, int]]) -> bytes:
    """(lcn or HOLE, count) as a run list."""
    result, last = b"", 0
    for lcn, count in runs:
        size = (count.bit_length() + 8) // 8
        delta = (
            b""
            if lcn == HOLE
            else (lcn - last).to_bytes(((lcn - last).bit_length() + 8) // 8, "little", signed=True)
        )
        result += bytes([size | len(delta) << 4]) + count.to_bytes(size, "little") + delta
        last = last if lcn == HOLE else lcn
    return result + b"\0"


RUN = st.tuples(st.one_of(st.just(HOLE), st.integers(0, 1 << 40)), st.integers(1, 1 << 30))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.lists(RUN, max_size=6).map(encoded), st.binary(max_size=12)), max_size=6))
def test_run_lists_decode_as_one_by_one(lists: list[bytes]) -> None:
    clusters = 1 << 41
    lengths = np.array([len(data) for data in lists], np.int64)
    found = decode(
        np.frombuffer(b"".join(lists), np.uint8), lengths, np.zeros(len(lists), np.int64), clusters, 512
    )
    runs = found.runs
    for number, data in enumerate(lists):
        wanted, fault = plain_decode(data, clusters)
        mine = runs.row == number
        assert (
            list(
                zip(runs.vcn[mine].tolist(), runs.lcn[mine].tolist(), runs.count[mine].tolist(), strict=True)
            )
            == wanted
        )
        assert bool(found.bad[number] or found.outside[number]) == fault
        assert found.reach[number] == sum(count for _, _, count in wanted)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40), st.integers(0, 7), st.booleans())
def test_runs_of_bits_are_found_as_one_by_one(data: bytes, less: int, value: bool) -> None:
    bits = max(0, len(data) * 8 - less)
    starts, ends = bit_runs(np.frombuffer(data, np.uint8), bits, value)
    wanted = {bit for bit in range(bits) if bool(data[bit // 8] >> bit % 8 & 1) == value}
    assert {
        bit for low, high in zip(starts.tolist(), ends.tolist(), strict=True) for bit in range(low, high)
    } == wanted
    assert (starts[1:] > ends[:-1]).all()


def restart_page(lsn: int, client: int, flags: int) -> bytes:
    page = bytearray(4096)
    page[:4], page[0x18:0x1A] = b"RSTR", struct.pack("<H", 0x30)
    page[0x30:0x40] = struct.pack("<QHHHH", lsn, 1, 0, client, flags)
    return bytes(page)


@pytest.mark.parametrize(
    ("pages", "clean"),
    [
        (b"\xff" * 8192, True),
        (restart_page(5, 0xFFFF, 0) + restart_page(4, 0, 0), True),
        (restart_page(5, 0xFFFF, 0) + restart_page(6, 0, 0), False),
        (restart_page(5, 0, 2) + restart_page(5, 0, 2), True),
        (restart_page(5, 0, 0) + b"\xff" * 4096, False),
        (b"RCRD" + bytes(8188), False),
    ],
)
def test_the_log_is_clean_when_nobody_uses_it(pages: bytes, clean: bool) -> None:
    assert log_is_clean(pages) == clean


# ---- patched volumes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small volume with a few files."""
    need("mkntfs", "ntfs-3g")
    need("ntfs-3g", "ntfs-3g")
    made = ntfs_images.make(tmp_path_factory.mktemp("ntfs-parts") / "image", 5, 512, 512)
    with fuse(made.image, "rw") as root:
        (root / "long").write_bytes(b"\xaa" * 20000)
        (root / "folder").mkdir()
        for number in range(60):
            (root / f"folder/{number}").write_bytes(b"%d" % number * 300)
        with open(root / "sparse", "wb", buffering=0) as file:
            for at in range(512, 40 * 1024, 1024):
                file.seek(at)
                file.write(b"\xbb" * 512)
    return made.image


Patch = Callable[[bytearray, BlockMap], None]


@pytest.fixture
def patched(image: Path) -> Callable[[Patch], BlockMap]:
    """Maps a copy in memory after a patch."""

    def build(patch: Patch) -> BlockMap:
        data = bytearray(image.read_bytes())
        patch(data, mapped(image))
        return survey([BytesReader(np.frombuffer(bytes(data), np.uint8))])

    return build


def record_of(bmap: BlockMap, inode: int) -> int:
    """Where an inode's record lies."""
    offsets = tables.integers(bmap.inodes, "record_offset")
    return int(offsets[tables.integers(bmap.inodes, "inode") == inode][0])


def attribute(data: bytearray, record: int, kind: int) -> int:
    """Where the first attribute of a type lies."""
    at = record + struct.unpack_from("<H", data, record + 0x14)[0]
    while struct.unpack_from("<I", data, at)[0] != kind:
        assert struct.unpack_from("<I", data, at)[0] != 0xFFFFFFFF
        at += struct.unpack_from("<I", data, at + 4)[0]
    return at


def codes(bmap: BlockMap) -> set[str]:
    return set(bmap.problems.column("code").to_pylist())


def state(bmap: BlockMap) -> str:
    found: str = bmap.filesystems.column("state")[0].as_py()
    return found


def test_a_wiped_boot_sector_is_replaced_by_its_copy(
    patched: Callable[[Patch], BlockMap], image: Path
) -> None:
    def wipe(data: bytearray, bmap: BlockMap) -> None:
        data[11:512] = bytes(501)

    found, whole = patched(wipe), mapped(image)
    assert "copy-used" in codes(found)
    assert found.extents.equals(whole.extents)
    assert found.names.equals(whole.names)


def test_a_lost_first_record_is_read_from_the_mirror(
    patched: Callable[[Patch], BlockMap], image: Path
) -> None:
    def wipe(data: bytearray, bmap: BlockMap) -> None:
        data[record_of(bmap, 0) : record_of(bmap, 0) + 1024] = bytes(1024)

    found, whole = patched(wipe), mapped(image)
    assert codes(found) == {"copy-used"}
    assert found.extents.equals(whole.extents)
    assert state(found) == "damaged"


def test_a_first_record_without_a_run_list_is_read_from_the_mirror(
    patched: Callable[[Patch], BlockMap], image: Path
) -> None:
    def rename(data: bytearray, bmap: BlockMap) -> None:
        data[attribute(data, record_of(bmap, 0), 0x80)] = 0x81

    found = patched(rename)
    assert "copy-used" in codes(found)
    assert found.extents.equals(mapped(image).extents)


@pytest.mark.parametrize(("tag", "wanted"),
    [(0xA000000C, "symlink"), (0xA0000003, "symlink"), (0xA000001D, "symlink"), (0x80000023, "socket"),
                                             (0x80000024, "fifo"), (0x80000025, "char"),
                                             (0x80000026, "block"), (0x80000017, "file"),
                                             (0x80000013, "file"), (0x9000001A, "file")])  # fmt: skip
def test_reparse_points_say_what_a_file_is(tag: int, wanted: str, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "image"
    copy.write_bytes(image.read_bytes())
    with fuse(copy, "rw") as root:
        (root / "point").touch()
        os.setxattr(
            root / "point", "system.ntfs_reparse_data", struct.pack("<IHH", 0x80000017, 24, 0) + bytes(24)
        )
    data = bytearray(copy.read_bytes())  # ntfs-3g checks what it knows
    at = attribute(data, record_of(mapped(copy), tree(mapped(copy), 0)["/point"]), 0xC0)
    struct.pack_into("<I", data, at + struct.unpack_from("<H", data, at + 0x14)[0], tag)
    copy.write_bytes(data)
    bmap = mapped(copy)
    assert_proven(bmap)
    inode = tree(bmap, 0)["/point"]
    row = next(row for row in bmap.inodes.to_pylist() if row["inode"] == inode)
    assert row["type"] == wanted
    assert bool(row["flags"] & tables.I_COMPRESSED) == (tag == 0x80000017)
    assert codes(bmap) == ({"elsewhere"} if tag == 0x80000013 else set())
    parts = [(row["kind"], row["part"]) for row in bmap.extents.to_pylist() if row["inode"] == inode]
    assert parts == [("symlink", None) if wanted == "symlink" else ("metadata", "$REPARSE_POINT")]


def test_a_mirror_that_differs_is_reported(patched: Callable[[Patch], BlockMap]) -> None:
    def change(data: bytearray, bmap: BlockMap) -> None:
        row = next(row for row in bmap.extents.to_pylist() if row["part"] == "$MFTMirr")
        data[row["volume_offset"] + 0x48] ^= 1

    assert codes(patched(change)) == {"copy-differs"}


def test_a_torn_record_loses_its_file_and_says_so(patched: Callable[[Patch], BlockMap]) -> None:
    def tear(data: bytearray, bmap: BlockMap) -> None:
        data[record_of(bmap, tree(bmap, 0)["/long"]) + 1022] ^= 1

    found = patched(tear)
    assert codes(found) == {"inode", "unowned"}
    assert "/long" not in tree(found, 0)
    assert "/folder/7" in tree(found, 0)


def test_what_was_never_written_is_unwritten_to_the_byte(patched: Callable[[Patch], BlockMap]) -> None:
    def shorten(data: bytearray, bmap: BlockMap) -> None:
        at = attribute(data, record_of(bmap, tree(bmap, 0)["/long"]), 0x80)
        data[at + 0x38 : at + 0x40] = struct.pack("<Q", 7000)

    found = patched(shorten)
    assert_proven(found)
    rows = [row for row in found.extents.to_pylist() if row["inode"] == tree(found, 0)["/long"]]
    assert sorted(
        (row["kind"], row["file_offset"], row["length"]) for row in rows if row["kind"] == "unwritten"
    ) == [("unwritten", 7000, 20480 - 7000)]
    assert sum(row["length"] for row in rows if row["kind"] == "data") == 7000


def test_bad_clusters_are_named(patched: Callable[[Patch], BlockMap]) -> None:
    found = patched(lambda data, bmap: None)
    free = max(
        (row for row in found.extents.to_pylist() if row["kind"] == "free"), key=lambda row: row["length"]
    )
    cluster = free["volume_offset"] // 512 + 5

    def wear_out(data: bytearray, bmap: BlockMap) -> None:
        at = attribute(data, record_of(bmap, 8), 0x80)
        at += struct.unpack_from("<I", data, at + 4)[0]  # $Bad follows the unnamed one
        pairs = at + struct.unpack_from("<H", data, at + 0x20)[0]
        all_of_it = 5 * 2048 - 1
        words = encoded([(HOLE, cluster), (cluster, 3), (HOLE, all_of_it - cluster - 3)])
        room = struct.unpack_from("<I", data, at + 4)[0] - (pairs - at)
        grow = -(-max(0, len(words) - room) // 8) * 8
        record = record_of(bmap, 8)
        used = struct.unpack_from("<I", data, record + 0x18)[0]
        end = at + struct.unpack_from("<I", data, at + 4)[0]
        data[end + grow : record + used + grow] = data[end : record + used]
        data[pairs : pairs + len(words)] = words
        struct.pack_into("<I", data, at + 4, end - at + grow)
        struct.pack_into("<I", data, record + 0x18, used + grow)
        row = next(row for row in bmap.extents.to_pylist() if row["part"] == "$Bitmap")
        for bad in range(cluster, cluster + 3):
            data[row["volume_offset"] + bad // 8] |= 1 << bad % 8

    found = patched(wear_out)
    assert_proven(found)
    rows = [row for row in found.extents.to_pylist() if row["part"] == "$BadClus:$Bad"]
    assert [(row["volume_offset"], row["length"], row["kind"]) for row in rows] == [
        (cluster * 512, 1536, "metadata")
    ]


def test_the_mft_is_followed_through_its_extension_records(
    patched: Callable[[Patch], BlockMap], image: Path
) -> None:
    """Half of the $MFT's run list moved into record 23, as Windows does when its own record is full: the map
    stays the same."""

    def move(data: bytearray, bmap: BlockMap) -> None:
        record = record_of(bmap, 0)
        at = attribute(data, record, 0x80)
        pairs = at + struct.unpack_from("<H", data, at + 0x20)[0]
        highest = struct.unpack_from("<Q", data, at + 0x18)[0]
        lists = bytes(data[pairs : at + struct.unpack_from("<I", data, at + 4)[0]])
        lengths = np.array([len(lists)], np.int64)
        runs = decode(np.frombuffer(lists, np.uint8), lengths, np.zeros(1, np.int64), 1 << 40, 512).runs
        flat = [
            (lcn + step, vcn + step)
            for vcn, lcn, n in zip(runs.vcn, runs.lcn, runs.count, strict=True)
            for step in range(0, n, 64)
        ]
        ends = [vcn for _, vcn in flat[1:]] + [highest + 1]
        pieces = [(int(lcn), int(end - vcn)) for (lcn, vcn), end in zip(flat, ends, strict=True)]
        first, rest = encoded(pieces[:1]), encoded(pieces[1:])
        data[pairs : pairs + len(first)] = first
        struct.pack_into("<Q", data, at + 0x18, pieces[0][1] - 1)
        for copy in (
            record,
            next(r["volume_offset"] for r in bmap.extents.to_pylist() if r["part"] == "$MFTMirr"),
        ):
            data[copy : copy + 1024] = data[record : record + 1024]
        other = record + 23 * 1024
        length = 0x40 + -(-len(rest) // 8) * 8
        head = struct.pack(
            "<IIBBHHHQQHBxI24x", 0x80, length, 1, 0, 0x40, 0, 0, pieces[0][1], highest, 0x40, 0, 0
        )
        start = other + struct.unpack_from("<H", data, other + 0x14)[0]
        body = head + rest.ljust(length - 0x40, b"\0") + b"\xff\xff\xff\xff\0\0\0\0"
        assert start + len(body) < other + 510
        data[start : start + len(body)] = body
        struct.pack_into("<HI", data, other + 0x16, 1, start - other + len(body))
        struct.pack_into("<Q", data, other + 0x20, 1 << 48)

    found, whole = patched(move), mapped(image)
    assert found.problems.to_pylist() == []
    assert found.names.equals(whole.names)
    assert found.inodes.equals(whole.inodes)
    assert_proven(found)


@pytest.mark.parametrize(
    ("content", "name", "wanted"),
    [
        (b"hibr", "hiberfil.sys", "hibernated"),
        (b"HIBR", "HIBERFIL.SYS", "hibernated"),
        (b"WAKE", "hiberfil.sys", "clean"),
        (b"hibr", "other", "clean"),
    ],
)
def test_windows_that_sleeps_is_noticed(content: bytes, name: str, wanted: str, tmp_path: Path) -> None:
    need("mkntfs", "ntfs-3g")
    made = ntfs_images.make(tmp_path / "image", 4, 4096, 512)
    with fuse(made.image, "rw") as root:
        (root / name).write_bytes(content.ljust(5000, b"\0"))
    assert state(mapped(made.image)) == wanted


def test_a_dirty_volume_and_an_open_log_are_noticed(patched: Callable[[Patch], BlockMap]) -> None:
    def dirty(data: bytearray, bmap: BlockMap) -> None:
        for record in (
            record_of(bmap, 3),
            next(r["volume_offset"] for r in bmap.extents.to_pylist() if r["part"] == "$MFTMirr") + 3072,
        ):
            at = attribute(data, record, 0x70)
            data[at + struct.unpack_from("<H", data, at + 0x14)[0] + 10] |= 1

    def unclean(data: bytearray, bmap: BlockMap) -> None:
        row = next(row for row in bmap.extents.to_pylist() if row["part"] == "$LogFile")
        data[row["volume_offset"] : row["volume_offset"] + 4096] = restart_page(1, 0, 0)

    assert state(patched(dirty)) == "in use"
    assert state(patched(unclean)) == "needs recovery"


def test_two_files_on_the_same_clusters_are_reported(patched: Callable[[Patch], BlockMap]) -> None:
    def cross(data: bytearray, bmap: BlockMap) -> None:
        row = next(row for row in bmap.extents.to_pylist() if row["inode"] == tree(bmap, 0)["/long"])
        at = attribute(data, record_of(bmap, tree(bmap, 0)["/sparse"]), 0x80)
        pairs = at + struct.unpack_from("<H", data, at + 0x20)[0]
        words = encoded([(row["volume_offset"] // 512, 80)])
        data[pairs : pairs + len(words)] = words

    assert "two-owners" in codes(patched(cross))


def test_a_truncated_image_is_mapped_as_far_as_it_goes(image: Path) -> None:
    data = np.frombuffer(image.read_bytes(), np.uint8)
    found = survey([BytesReader(data[: len(data) - (1 << 20)])])
    assert "truncated" in codes(found)
    start, length = tables.integers(found.extents, "volume_offset"), tables.integers(found.extents, "length")
    assert int((start + length).max()) <= len(data) - (1 << 20)
    assert "/long" in tree(found, 0)


# ---- indexes -----------------------------------------------------------------------------------------------


def without_entry(record: bytearray, name: str) -> bytearray:
    """The record of a small directory without the entry for this name in its index."""
    start, count = struct.unpack_from("<HH", record, 4)
    number, kept = record[start : start + 2], record[start + 2 : start + 2 * count]
    for sector in range(count - 1):
        record[510 + 512 * sector : 512 + 512 * sector] = kept[2 * sector : 2 * sector + 2]
    entry = record.index(name.encode("utf-16-le"), record.index("$I30".encode("utf-16-le"))) - 66 - 16
    header = record.index("$I30".encode("utf-16-le")) + 8 + 16
    length, used = (
        struct.unpack_from("<H", record, entry + 8)[0],
        struct.unpack_from("<I", record, header + 4)[0],
    )
    end = header + used
    record[entry:end] = record[entry + length : end] + bytes(length)
    struct.pack_into("<I", record, header + 4, used - length)
    for sector in range(count - 1):
        last = 510 + 512 * sector
        record[start + 2 + 2 * sector : start + 4 + 2 * sector] = record[last : last + 2]
        record[last : last + 2] = number
    return record


def test_names_that_an_index_lacks_are_noted(tmp_path: Path) -> None:
    """A driver finds files by the index alone, so ntfs-3g does not show it."""
    image = tmp_path / "n.img"
    run("truncate", "-s", "16M", image)
    run(need("mkntfs", "ntfs-3g"), "-q", "-F", image)
    with fuse(image, "rw") as root:
        (root / "small").mkdir(), (root / "large").mkdir()
        (root / "small/gone").touch(), (root / "small/kept").touch()
        for number in range(700):
            (root / f"large/a name of some length, number {number}").touch()
    bmap = mapped(image)
    assert_proven(bmap)
    assert "directory" not in bmap.problems.column("code").to_pylist()
    rows = {row["inode"]: row["record_offset"] for row in bmap.inodes.to_pylist()}
    paths = tree(bmap, 0)
    data = bytearray(image.read_bytes())
    at = rows[paths["/small"]]
    data[at : at + 1024] = without_entry(data[at : at + 1024], "gone")
    image.write_bytes(data)
    with fuse(image, "ro") as root:
        assert os.listdir(root / "small") == ["kept"]
    (found,) = [row for row in mapped(image).problems.to_pylist() if row["code"] == "directory"]
    assert found["severity"] == "note"
    assert found["detail"].startswith("1 name is in its file's record alone")
    assert found["volume_offset"] == rows[paths["/small/gone"]]
    block = next(
        row["volume_offset"]
        for row in bmap.extents.to_pylist()
        if row["inode"] == paths["/large"] and row["kind"] == "directory" and not row["flags"]
    )
    data[block + 510] ^= 1  # a torn block, and all names in it
    image.write_bytes(data)
    details = [row["detail"] for row in mapped(image).problems.to_pylist() if row["code"] == "directory"]
    assert any(words.startswith("1 block of indexes is torn") for words in details), details
