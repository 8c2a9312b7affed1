"""minix against fsck.minix, GRUB's reader, and images that others made."""

import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest

import minix_images
from support import BytesReader, content, mapped, need, run, tree
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey


@pytest.fixture(scope="module", params=minix_images.VERSIONS)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that need trees of pointers of each level, holes, links, a pipe."""
    folder = tmp_path_factory.mktemp(request.param)
    source, chooser = folder / "tree", np.random.default_rng(6)
    (source / "dir/deep").mkdir(parents=True)
    for size in (0, 1, 7 << 10, (7 << 10) + 1, 263 << 10, 300 << 10, 600 << 10):
        (source / f"s{size}").write_bytes(chooser.bytes(size))
    with open(source / "sparse", "wb") as file:
        for block in (0, 9, 300, 262 + 600, 66_000):
            file.seek(block << 10)
            file.write(b"%d" % block)
    (source / "dir/hard").hardlink_to(source / "s1")
    (source / "dir/link").symlink_to("../s7168")
    (source / "dir/deep" / ("n" * 14)).write_bytes(b"the longest name that all have")
    os.mkfifo(source / "fifo")
    for number in range(150):
        (source / "dir" / f"many {number}").write_bytes(b"%d" % number)
    return minix_images.make(folder / "disk.img", request.param, source, 4096)


def test_counts_are_those_of_fsck(image: Path) -> None:
    """Inodes, zones and kinds of files in use."""
    if "4k" in image.parent.name:
        return  # fsck.minix knows no such blocks
    said = run(need("fsck.minix", "util-linux"), "-fv", image).decode()
    count = {words: int(number) for number, words in re.findall(r"(\d+) ([a-z ]+)", said)}
    bmap = mapped(image)
    kinds = bmap.inodes.column("type").to_pylist()
    free = tables.codes(bmap.extents, "kind") == tables.FREE
    used = bmap.filesystems.column("size")[0].as_py() - tables.integers(bmap.extents, "length")[free].sum()
    assert (count["inodes used "], count["zones used "]) == (len(kinds), used // 1024)
    assert count["regular files"] == kinds.count("file")
    assert count["directories"] == kinds.count("directory")
    assert count["symbolic links"] == kinds.count("symlink")


def test_content_is_what_grub_reads(image: Path) -> None:
    tool, bmap, disk = need("grub-fstest", "grub-common"), mapped(image), RawReader(str(image))
    paths = {path: inode for path, inode in tree(bmap, 0).items() if re.match("/s[0-9]", path)}
    assert len(paths) == 7  # in holes it reads block 0
    for path, inode in paths.items():
        assert run(tool, image, "cat", f"(loop0){path}") == content(bmap, [disk], 0, inode), path
    disk.close()


def changed(image: Path, offset: int, data: bytes) -> BlockMap:
    """The map of a volume in which these bytes are others."""
    disk = np.frombuffer(image.read_bytes(), np.uint8).copy()
    disk[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    return survey([BytesReader(disk)])


def test_an_indirect_block_belongs_to_one_file(image: Path) -> None:
    """Of two inodes that have the same one, the first has it."""
    volume = minix_images.Volume(image)
    record = 32 if volume.version == 1 else 64
    table = (2 + volume.imap + volume.zmap) * volume.block
    width = 2 if volume.version == 1 else 4
    place = (14 if volume.version == 1 else 24) + 7 * width
    bmap = mapped(image)
    inodes = sorted({row["inode"] for row in bmap.extents.to_pylist() if row["part"] == "indirect block"})
    one, other = (table + (inode - 1) * record + place for inode in inodes[:2])
    found = changed(image, other, bytes(volume.data[one : one + width]))
    assert "twice" in found.problems.column("code").to_pylist()
    owners = {row["inode"] for row in found.extents.to_pylist() if row["part"] == "indirect block"}
    assert inodes[0] in owners


def test_pointers_that_lead_out_of_the_volume(image: Path) -> None:
    volume = minix_images.Volume(image)
    bmap = mapped(image)
    record = bmap.inodes.column("record_offset").to_pylist()[3]
    found = changed(
        image, record + (14 if volume.version == 1 else 24), b"\xff" * (2 if volume.version == 1 else 4)
    )
    assert "outside" in found.problems.column("code").to_pylist()


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (10, b"\1\0", "s_log_zone_size is 1; only 0 is supported"),
        (4, b"\0\0", "fit the maps"),
        (0, b"\xff\xff", "do not fit"),
    ],
)
def test_superblocks_that_can_t_be(image: Path, offset: int, data: bytes, words: str) -> None:
    """The places are those of versions 1 and 2; in version 3 the last two lie two bytes higher."""
    version = minix_images.Volume(image).version
    found = changed(image, 1024 + (offset + 2 if version == 3 and offset else offset), data)
    assert words in " ".join(found.problems.column("detail").to_pylist())
    assert found.extents.column("kind").to_pylist() == ["content"]


def test_volumes_of_others(corpus: Path, tmp_path: Path) -> None:
    """One is of a big-endian machine: named, not read."""
    folder = corpus / "images/util-linux+util-linux/tests/ts/blkid/images-fs"
    for name, kinds in (("minix-LE", {"boot", "metadata", "directory", "free"}), ("minix-BE", {"content"})):
        (tmp_path / name).write_bytes(lzma.decompress((folder / f"{name}.img.xz").read_bytes()))
        bmap = mapped(tmp_path / name)
        assert bmap.volumes.column("type").to_pylist() == ["minix"]
        assert set(bmap.extents.column("kind").to_pylist()) == kinds
