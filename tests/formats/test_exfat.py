"""exFAT: volumes filled through exfat-fuse, against The Sleuth Kit, fsck.exfat and the contents that were put
in."""

import os
import random
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fat_images import corpus_images, head
from support import (
    assert_proven,
    content,
    file_extents,
    mapped,
    mounted,
    need,
    run,
    survives,
    tree,
)
from virt_bmap.ask.check import check
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader

SIZES = {"512": "-c 512", "4k": "-c 4k", "64k": "-c 64k"}


def fill(folder: Path) -> dict[str, bytes]:
    """Files in one piece and in several, gaps, long and short names, directories of several clusters; {path:
    content}."""
    chooser = random.Random(1)
    contents = {f"/file {i}.dat": chooser.randbytes(i * 700 + 1) for i in range(20)}
    for path, data in contents.items():
        (folder / path[1:]).write_bytes(data)
    for i in range(0, 20, 2):
        (folder / f"file {i}.dat").unlink()
        del contents[f"/file {i}.dat"]
    more = {"/in pieces.bin": chooser.randbytes(90000), "/empty": b"", "/" + "x" * 255: b"x",
        "/y" * 1 + "y" * 14: b"y",
            "/日本 語.txt": b"z" * 5000, "/emoji 😀.txt": b"e"}  # fmt: skip
    (folder / "a dir" / "deeper").mkdir(parents=True)
    more |= {f"/a dir/deeper/one of many files {i}.txt": b"%d" % i * 50 for i in range(100)}
    for path, data in more.items():
        (folder / path[1:]).write_bytes(data)
    return contents | more


@pytest.fixture(scope="module", params=SIZES)
def volume(request, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    need("mount.exfat-fuse", "exfat-fuse")
    need("mkfs.exfat", "exfatprogs")
    image = tmp_path_factory.mktemp("exfat") / f"exfat-{request.param}.img"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mkfs.exfat", "-L", "Läbel", *SIZES[request.param].split(), image, env={"LC_ALL": "C.UTF-8"})
    with mounted(image, kind="exfat-fuse") as folder:
        contents = fill(folder)
    return image, contents


def by_path(bmap: BlockMap) -> dict[str, int]:
    return {path: inode for path, inode in tree(bmap, 0).items() if path != "/"}


def codes(bmap: BlockMap) -> set[str]:
    return {row["code"] for row in bmap.problems.to_pylist()}


def fsck(image: Path) -> tuple[bool, str]:
    """(clean, words) of fsck.exfat without repairs."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    command = ["fsck.exfat", "-n", image]
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path}, text=True
    )
    return done.returncode == 0, done.stdout


# ---- sound volumes -----------------------------------------------------------------------------------------


def test_every_byte_has_the_owner_that_the_bitmap_says(volume):
    bmap = mapped(volume[0])
    # fsck.exfat 1.2 never ends where an entry set spans more than two clusters
    if "512" not in volume[0].name:
        assert fsck(volume[0])[0]
    assert_proven(bmap)
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))
    assert bmap.filesystems.column("label").to_pylist() == ["Läbel"]
    assert bmap.filesystems.column("uuid").to_pylist() == [
        run("blkid", "-p", "-o", "value", "-s", "UUID", volume[0]).decode().strip()
    ]


def test_names_and_contents_are_those_that_were_put_in(volume):
    image, contents = volume
    bmap, reader = mapped(image), RawReader(str(image))
    inodes = by_path(bmap)
    assert set(inodes) == set(contents) | {"/a dir", "/a dir/deeper"}
    for path, data in contents.items():
        assert content(bmap, [reader], 0, inodes[path]) == data, path
    reader.close()


def test_sectors_are_those_of_the_sleuth_kit(volume):
    image, contents = volume
    need("istat", "sleuthkit")
    bmap = mapped(image)
    inodes = by_path(bmap)
    listed = re.findall(r"^r/r (\d+):\t(.*)$", run("fls", "-rpu", "-f", "exfat", image).decode(), re.M)
    found = [(number, "/" + path) for number, path in listed if contents.get("/" + path)]
    assert len(found) > 100
    for number, path in [*found[:14], *found[20::20]]:
        words = run("istat", "-f", "exfat", image, number).decode()
        theirs = [int(word) for word in words[words.index("Sectors:") + 8 :].split()]
        mine = [
            at // 512
            for e in file_extents(bmap, 0, inodes[path])
            for at in range(e.offset, e.offset + e.length, 512)
        ]
        count = -(-len(contents[path]) // 512)
        assert mine[:count] == theirs[:count], path
    assert len(file_extents(bmap, 0, inodes["/in pieces.bin"])) > 1 or "64k" in image.name


def test_modification_times_are_those_of_the_mount(volume):
    with mounted(volume[0], "ro", kind="exfat-fuse") as folder:
        theirs = {path: (folder / path[1:]).stat().st_mtime_ns for path in volume[1]}
    bmap = mapped(volume[0])
    mine = dict(
        zip(*(tables.integers(bmap.inodes, name).tolist() for name in ("inode", "mtime_ns")), strict=True)
    )
    assert all(
        abs(mine[inode] - theirs[path]) < 2 * 10**9 for path, inode in by_path(bmap).items() if path in theirs
    )


# ---- changes -----------------------------------------------------------------------------------------------


@pytest.fixture
def image(volume) -> np.ndarray:
    return np.frombuffer(volume[0].read_bytes(), np.uint8).copy()


def entry_of(data: np.ndarray, path: str) -> int:
    """Byte offset of a file's entry set."""
    return by_path(survives(data))[path] * 32


def entries_in_root(data: np.ndarray) -> range:
    """Where the entries of the root directory's first cluster lie."""
    heap, root = struct.unpack_from("<I", data, 88)[0], struct.unpack_from("<I", data, 96)[0]
    sector, cluster = 1 << int(data[108]), 1 << int(data[108]) + int(data[109])
    start = heap * sector + (root - 2) * cluster
    return range(start, start + cluster, 32)


def seal(data: np.ndarray, at: int) -> None:
    """Compute the checksum of the entry set at `at` anew, as the specification says it."""
    checksum = 0
    for i, byte in enumerate(data[at : at + 32 * (1 + int(data[at + 1]))].tolist()):
        if i not in (2, 3):
            checksum = ((checksum << 15 | checksum >> 1) + byte) & 0xFFFF
    data[at + 2 : at + 4] = np.frombuffer(struct.pack("<H", checksum), np.uint8)


def test_what_was_never_written_is_unwritten(image):
    at = entry_of(image, "/in pieces.bin")
    cluster = 1 << int(image[108]) + int(image[109])
    image[at + 32 + 8 : at + 32 + 16] = np.frombuffer(struct.pack("<Q", 10), np.uint8)
    seal(image, at)
    bmap = survives(image)
    assert codes(bmap) == set()
    extents = file_extents(bmap, 0, at // 32)
    assert sum(e.length for e in extents if not e.unwritten) == cluster
    assert sum(e.length for e in extents if e.unwritten) == -(-90000 // cluster) * cluster - cluster


def test_old_links_in_free_clusters_do_not_matter(image):
    before = survives(image)
    fat = struct.unpack_from("<I", image.tobytes(), 80)[0] * 512
    count = struct.unpack_from("<I", image.tobytes(), 92)[0]
    heap = struct.unpack_from("<I", image.tobytes(), 88)[0] * 512
    size = 1 << int(image[108]) + int(image[109])
    entries = image[fat : fat + 4 * (count + 2)].view("<u4")
    for row in before.extents.to_pylist():
        if row["kind"] == "free":
            low = (row["volume_offset"] - heap) // size + 2
            entries[low : low + row["length"] // size] = np.random.default_rng(1).integers(
                0, count + 2, row["length"] // size
            )
    after = survives(image)
    assert after.extents.equals(before.extents)
    assert_proven(after)


def test_marks_in_the_boot_sector(image):
    for flags, state in ((0, "clean"), (2, "in use"), (4, "damaged")):
        image[106] = flags
        bmap = survives(image)
        assert bmap.filesystems.column("state").to_pylist() == [state]
        assert ("marked-damaged" in codes(bmap)) == (flags == 4)
    image[106], image[120] = 0, image[120] ^ 1
    assert codes(survives(image)) == {"checksum"}


def test_a_wrong_checksum_and_a_broken_set(image):
    path = next(
        path for path, inode in by_path(survives(image)).items() if path.endswith(".dat") and inode % 16 < 13
    )
    at = entry_of(image, path)  # whose set lies in one cluster
    image[at + 4] ^= 0x20
    assert codes(survives(image)) == {"checksum"}
    image[at + 32] = 0x40  # the stream entry is gone
    bmap = survives(image)
    assert codes(bmap) == {"directory", "unowned"}
    assert path not in by_path(bmap)


def test_a_bitmap_that_forgets_a_file(image):
    offset = next(
        row["volume_offset"]
        for row in survives(image).extents.to_pylist()
        if row["part"] == "allocation bitmap"
    )
    image[offset : offset + 2] = 0
    assert "owned-but-free" in {row.code for row in check(survives(image)).disagreements}
    image[offset : offset + 2] = 0xFF
    image[offset + 20 : offset + 24] = 0xFF
    assert codes(survives(image)) <= {"unowned"}


def test_a_bitmap_larger_than_the_clusters_need(volume, image, tmp_path):
    """What it claims beyond is nobody's, as fsck.exfat and drivers have it: the next clusters are others'."""
    before = survives(image)
    at = next(at for at in entries_in_root(image) if image[at] == 0x81)
    image[at + 24 : at + 28] = np.frombuffer(struct.pack("<I", 3 << 16), np.uint8)
    image.tofile(tmp_path / "image")
    if "512" not in volume[0].name:
        assert fsck(tmp_path / "image")[0]
    assert_proven(bmap := mapped(tmp_path / "image"))
    assert bmap.extents.equals(before.extents)


def test_a_root_directory_that_is_nowhere(image):
    image[96:100] = 0xFF
    assert "corrupt" in codes(survives(image))


def test_cut_off_volumes(image):
    assert "truncated" in codes(survives(image[: len(image) // 2]))
    assert codes(survives(image[:65536])) == {"truncated"}


def test_volumes_that_others_made(corpus, tmp_path):
    """What fsck.exfat calls clean agrees with its bitmap and has as many files, and the paths that The Sleuth
    Kit lists."""
    need("fsck.exfat", "exfatprogs")
    need("fls", "sleuthkit")
    proven = 0
    for name, image in corpus_images(corpus, tmp_path, "exfat"):
        if head(image)[3:8] != b"EXFAT":
            continue
        bmap = mapped(image)
        found = {row.code for row in check(bmap).disagreements}
        clean, words = fsck(image)
        if not clean:
            continue
        assert found <= {"unowned"}, name  # fsck.exfat 1.2 does not look for lost clusters
        listed = run("fls", "-rpu", "-f", "exfat", image, ok=(0, 1)).decode(errors="surrogateescape")
        theirs = {
            path for kind, path in re.findall(r"^(\S+) \d+:\t(.*)$", listed, re.M) if kind in ("r/r", "d/d")
        }
        theirs = {
            path for path in theirs if not path.startswith("$") and not path.endswith("(Volume Label Entry)")
        }
        mine = {path[1:] for path in by_path(bmap)}
        directories = np.count_nonzero(tables.codes(bmap.inodes, "type") == tables.T_DIRECTORY)
        assert f"directories {directories}, files {len(mine) + 1 - directories}" in words, name
        assert mine <= theirs, name  # The Sleuth Kit goes on behind the end of a directory
        assert mine == theirs or "unused-dentries" in name, name
        proven += 1
    assert proven >= 7
