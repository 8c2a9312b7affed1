"""One wrong bit in each kind of XFS metadata, and order in its trees: seen by `check`, and by xfs_repair."""

from pathlib import Path

import numpy as np
import pytest
from test_proven import complains, flipped, one_of_each, verdicts

import xfs_images
from support import assert_proven, mapped, mounted, need, need_root
from virt_bmap.ask.check import check
from virt_bmap.core.checksums import crc32c_without


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a kernel makes, the reverse map included; unmounted."""
    need("mkfs.xfs", "xfsprogs")
    need_root()
    made = xfs_images.make(
        tmp_path_factory.mktemp("xfs") / "x.img", "-m", "rmapbt=1,reflink=1", "-d", "agcount=3"
    )
    with mounted(made) as where:
        xfs_images.populate(where, 4)
    return made


CHECKED = {
    "metadata superblock", "metadata AGF", "metadata AGI", "metadata AGFL", "metadata bnobt",
    "metadata cntbt", "metadata inobt", "metadata finobt", "metadata rmapbt", "metadata refcountbt",
    "metadata inode chunk", "tree None", "directory None", "directory leaf", "directory free index",
    "xattr None", "symlink symlink header",
}  # fmt: skip
UNSEEN = ("metadata AGFL",)
"""xfs_repair -n rebuilds free lists without a word on their checksums."""


def test_one_wrong_bit_in_each_kind_of_metadata_is_seen(image: Path) -> None:
    bmap = mapped(image)
    assert_proven(bmap)
    assert verdicts(bmap, 0)["checksums"] == "proven"
    assert not complains("xfs_repair", "-n", image)
    seen = set()
    for name, offset in one_of_each(bmap, 4096):
        if name not in CHECKED:
            continue
        inside = {"metadata superblock": 0x90, "metadata inode chunk": 0x20, "metadata AGFL": 28}.get(
            name, 60
        )
        copy = flipped(image, offset + inside, 2)
        found = check(mapped(copy)).disagreements
        assert any("checksum" in row.detail for row in found), (name, found)
        assert name in UNSEEN or complains("xfs_repair", "-n", copy), name
        seen.add(name)
    assert seen >= CHECKED, CHECKED - seen


def sealed(data: np.ndarray, offset: int, size: int, crc: int) -> None:
    """The block's checksum made right again."""
    block = data[offset : offset + size].reshape(1, -1)
    block[0, crc : crc + 4] = np.frombuffer((~crc32c_without(block, crc)).astype("<u4").tobytes(), np.uint8)


@pytest.mark.parametrize(
    ("part", "crc", "code"),
    [("bnobt", 52, "tree"), ("cntbt", 52, "tree"), ("leaf", 12, "directory")],
)
def test_records_out_of_order_are_seen_though_the_checksum_is_right(
    image: Path, tmp_path: Path, part: str, crc: int, code: str
) -> None:
    """The first two records of a block changed places."""
    data = np.fromfile(image, np.uint8)
    header, size = {"bnobt": (56, 8), "cntbt": (56, 8), "leaf": (64, 8)}[part]
    for name, offset in one_of_each(mapped(image), 4096):
        if name.split()[1] == part:
            at = offset + header
            first = data[at : at + size].copy()
            assert (first != data[at + size : at + 2 * size]).any()
            data[at : at + size] = data[at + size : at + 2 * size]
            data[at + size : at + 2 * size] = first
            sealed(data, offset, 4096, crc)
    copy = tmp_path / "copy"
    data.tofile(copy)
    codes = {row.code for row in check(mapped(copy)).disagreements}
    assert code in codes
    assert "checksum" not in codes
    assert complains("xfs_repair", "-n", copy)


@pytest.mark.parametrize(
    ("part", "inside", "size", "crc", "code"),
    [("AGI", 0x3F, 512, 0x138, "orphan-list"), ("symlink header", 11, 4096, 12, "symlink"),
        ("cntbt", 63, 4096, 52, "allocator")],
)  # fmt: skip
def test_numbers_that_contradict_others_are_seen(
    image: Path, tmp_path: Path, part: str, inside: int, size: int, crc: int, code: str
) -> None:
    """The head of a list of orphans, the length of a link's target, the length of free space by size;
    checksums made right again."""
    data = np.fromfile(image, np.uint8)
    offset = next(
        offset for name, offset in one_of_each(mapped(image), 4096) if name.split(" ", 1)[1] == part
    )
    data[offset + inside] ^= 0x70
    if part == "symlink header":
        data[offset + inside - 2] = 1
    sealed(data, offset, size, crc)
    copy = tmp_path / "copy"
    data.tofile(copy)
    codes = {row.code for row in check(mapped(copy)).disagreements}
    assert code in codes
    assert "checksum" not in codes
    assert complains("xfs_repair", "-n", copy)
