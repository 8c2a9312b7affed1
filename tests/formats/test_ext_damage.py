"""Damaged ext filesystems: backups are used, problems are named, and thousands of mutations end in tables or
a clear refusal."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ext_images
from ext_images import Flavour
from support import BytesReader, mapped, need, run, tree
from virt_bmap.ask.check import check
from virt_bmap.core.checksums import crc16, crc32c, crc32c_each
from virt_bmap.formats.filesystems import ext
from virt_bmap.formats.filesystems.ext import extents, owners
from virt_bmap.formats.filesystems.ext.allocator import ones
from virt_bmap.formats.filesystems.ext.superblock import read_superblock
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage
from virt_bmap.survey.survey import survey


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller tree than the flavours hold."""
    need("mke2fs", "e2fsprogs")
    path = tmp_path_factory.mktemp("ext-damage") / "tree"
    path.mkdir()
    ext_images.fill(path, names=60)
    return path


def data_of(folder: Path, tmp_path: Path, options: str, size: str = "8M") -> np.ndarray:
    """The bytes of an image."""
    image = ext_images.make(folder, Flavour("x", options, size), tmp_path / "x.img")
    return np.fromfile(image, np.uint8)


def codes(bmap: BlockMap) -> list[str]:
    """Codes of all problems."""
    found: list[str] = bmap.problems.column("code").to_pylist()
    return found


# ---- backups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "-t ext4 -b 1024",
        "-t ext2 -b 1024",
        "-t ext4 -b 2048",
        "-t ext4 -b 1024 -O meta_bg,^resize_inode -g 8192",
    ],
)
def test_backup_superblock_is_used(folder: Path, tmp_path: Path, options: str) -> None:
    """Where the first one was wiped, or is nonsense though its magic is right."""
    data = data_of(folder, tmp_path, options, "40M")
    whole = tree(survey([BytesReader(data)]), 0)
    for damage in (slice(1024, 2048), slice(1024 + 0x18, 1024 + 0x30), slice(1024 + 0x38, 1024 + 0x3A)):
        damaged = data.copy()
        damaged[damage] = 0
        bmap = survey([BytesReader(damaged)])
        assert "copy-used" in codes(bmap), damage
        assert tree(bmap, 0) == whole
        assert bmap.filesystems.column("state").to_pylist() == ["damaged"]


def test_backup_of_another_filesystem_is_not_used(folder: Path, tmp_path: Path) -> None:
    """Leftovers of an ext filesystem under a new one do not count."""
    data = data_of(folder, tmp_path, "-t ext4 -b 1024", "20M")
    data[1024:2048] = 7
    assert not ext.probe(BytesReader(data))
    assert survey([BytesReader(data)]).filesystems.num_rows == 0


def test_backup_descriptors_are_used(folder: Path, tmp_path: Path) -> None:
    """A zeroed descriptor table is read from its first copy."""
    data = data_of(folder, tmp_path, "-t ext4 -b 1024", "20M")
    whole = tree(survey([BytesReader(data)]), 0)
    data[2048:3072] = 0
    bmap = survey([BytesReader(data)])
    assert "copy-used" in codes(bmap)
    assert tree(bmap, 0) == whole


@pytest.mark.parametrize("options", ["-t ext4 -b 1024", "-t ext4 -b 1024 -O uninit_bg,^metadata_csum"])
def test_wrong_checksums_are_named(folder: Path, tmp_path: Path, options: str) -> None:
    """Of the superblock (metadata_csum only) and of group descriptors."""
    data = data_of(folder, tmp_path, options, "20M")
    descriptors = data.copy()
    descriptors[2048 + 0x0C] ^= 1  # bg_free_blocks_count of the first group
    assert codes(survey([BytesReader(descriptors)])) == ["checksum"]
    if "metadata_csum" not in options:
        data[1024 + 0x34] ^= 1  # s_mnt_count
        assert codes(survey([BytesReader(data)])) == ["copy-used"]


def test_truncated_volume_is_named(folder: Path, tmp_path: Path) -> None:
    """Half of it is gone: what is left is mapped, the rest counted."""
    data = data_of(folder, tmp_path, "-t ext4 -b 1024 -g 1024", "16M")
    bmap = survey([BytesReader(data[: 9 << 20])])
    assert "truncated" in codes(bmap)
    end = tables.integers(bmap.extents, "volume_offset") + tables.integers(bmap.extents, "length")
    assert int(end.max()) <= 9 << 20


def test_two_owners_are_named(folder: Path, tmp_path: Path) -> None:
    """A file whose pointer was turned to another file's block."""
    ext_images.make(folder, Flavour("x", "-t ext2 -b 1024", "8M"), image := tmp_path / "x.img")
    victim = run("debugfs", "-R", "bmap /size-5000 0", image).split()[-1].decode()
    run("debugfs", "-w", "-R", f"set_inode_field /size-4096 block[0] {victim}", image)
    bmap = mapped(image)
    assert "two-owners" in codes(bmap)
    assert {d.code for d in check(bmap).disagreements} >= {"two-owners", "unowned"}


def test_flags_of_unused_reserved_inodes_do_no_harm(folder: Path, tmp_path: Path) -> None:
    """An empty reserved record with nothing but the flag for inline data is no inode, and no other takes its
    place."""
    ext_images.make(
        folder,
        Flavour("x", "-t ext4 -b 1024 -O inline_data,^metadata_csum", "8M"),
        image := tmp_path / "x.img",
    )
    before = mapped(image)
    run("debugfs", "-w", "-R", "set_inode_field <9> flags 0x10000000", image)
    after = mapped(image)
    assert after.extents.equals(before.extents)
    assert after.names.equals(before.names)


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_checksums_have_the_published_values() -> None:
    """The check values of CRC-32/ISCSI and CRC-16/MODBUS for "123456789", and lengths that are no power of
    two."""
    assert int(crc16(np.frombuffer(b"123456789", np.uint8)[None, :])[0]) == 0x4B37
    zeroes, ones_ = np.zeros((1, 32), np.uint8), np.full((1, 32), 255, np.uint8)
    assert int(crc32c(zeroes)[0]) ^ 0xFFFFFFFF == 0x8A9136AA  # RFC 3720, B.4
    assert int(crc32c(ones_)[0]) ^ 0xFFFFFFFF == 0x62A8AB43
    ascending = np.arange(32, dtype=np.uint8)[None, :]
    assert int(crc32c(ascending)[0]) ^ 0xFFFFFFFF == 0x46DD794E
    starts, counts = np.array([0, 3, 8, 2]), np.array([8, 0, 5, 1])
    words, seeds = np.arange(16, dtype="<u4") * 0x01010101, np.array([0xFFFFFFFF, 7, 0, 1], np.uint32)
    for start, count, seed, found in zip(
        starts, counts, seeds, crc32c_each(words, starts, counts, seeds), strict=True
    ):
        assert found == (
            crc32c(words[start : start + count].view(np.uint8)[None, :], seed)[0] if count else seed
        )
    head = crc32c(ascending[:, :12])
    assert int(crc32c(ascending[:, 12:], head)[0]) ^ 0xFFFFFFFF == 0x46DD794E


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_ones_equals_a_loop(bits: list[bool]) -> None:
    """Runs of ones in a bitmap of whole words."""
    padded = np.zeros(-(-len(bits) // 64) * 64, bool)
    padded[: len(bits)] = bits
    low, high = ones(np.packbits(padded, bitorder="little"))
    covered = np.zeros(len(padded), int)
    for a, b in zip(low, high, strict=True):
        covered[a:b] += 1
    assert (covered == padded).all()
    assert (low[1:] > high[:-1]).all()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 12 + 256 + 65536 + 70000), min_size=1, max_size=40, unique=True), st.randoms())
def test_block_pointers_equal_a_loop(logical: list[int], rng: object) -> None:
    """Files of random shape written to memory with block pointers, read back."""
    superblock, data = _tiny()
    free = list(range(200, len(data) // 1024))
    rng.shuffle(free)  # type: ignore[attr-defined]
    data = data.copy()
    words = data.view("<u4").reshape(-1, 256)
    root = np.zeros(15, "<u4")
    expected = {}
    for at in logical:
        expected[at] = _write(root, words, at, free)
    runs, nodes = extents.read_blocks_of(
        BytesReader(data), superblock, root.view(np.uint8)[None, :], np.zeros(0, np.int64),
        np.zeros(1, np.int64), np.zeros(1, np.int64), damage := Damage(),
    )  # fmt: skip
    found = {
        int(low) + i: int(start) + i
        for low, start, n in zip(runs.logical, runs.start, runs.count, strict=True)
        for i in range(n)
    }
    assert (found, damage.problems()) == (expected, [])
    assert len(nodes[1]) == (words[200:] != 0).any(axis=1).sum()


def _write(root: np.ndarray, words: np.ndarray, logical: int, free: list[int]) -> int:
    """Put a block at a place in the file, the slow way; the number it got."""
    if logical < 12:
        path, node = [logical], root
    else:
        rest = logical - 12
        for height in (1, 2, 3):
            if rest < 256**height:
                break
            rest -= 256**height
        path, node = [11 + height, *(rest // 256**power % 256 for power in range(height - 1, -1, -1))], root
    for step in path[:-1]:
        if not node[step]:
            node[step] = free.pop()
        node = words[node[step]]
    node[path[-1]] = free.pop()
    return int(node[path[-1]])


def _tiny() -> tuple[ext.superblock.Superblock, np.ndarray]:
    data = np.zeros(1024 * 1024, np.uint8)
    fields = {0x00: 16, 0x04: 1024, 0x14: 1, 0x18: 0, 0x20: 8192, 0x24: 8192, 0x28: 16, 0x38: 0xEF53}
    for at, value in fields.items():
        data[1024 + at : 1024 + at + 4] = np.frombuffer(int(value).to_bytes(4, "little"), np.uint8)
    return read_superblock(BytesReader(data), Damage()), data


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=12))
def test_shared_blocks_are_flagged_exactly(pieces: list[tuple[int, int]]) -> None:
    """Runs of several owners over the same blocks, cut so that the flag covers the shared ones and no
    others."""
    n = len(pieces)
    start, count = np.array([a for a, _ in pieces]), np.array([b for _, b in pieces])
    runs = extents.Runs(np.arange(n), np.arange(n) * 100, start, count, np.zeros(n, bool))
    cut, flags = owners._shared(runs)
    users = np.bincount(np.concatenate([np.arange(a, a + b) for a, b in pieces]))
    found = {
        (int(o), int(s) + i): (int(p) + i, bool(f & tables.SHARED))
        for o, p, s, c, f in zip(cut.owner, cut.logical, cut.start, cut.count, flags, strict=True)
        for i in range(c)
    }
    expected = {
        (k, a + i): (k * 100 + i, users[a + i] > 1) for k, (a, b) in enumerate(pieces) for i in range(b)
    }
    assert found == expected
