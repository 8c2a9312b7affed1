"""Batches of reads: any order, overlaps and layers give the same bytes as slicing."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import BytesReader
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt, ImageError
from virt_bmap.core.mapped import MappedReader, Patch, PatchedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import HEAD, TAIL
from virt_bmap.open.raw import RawReader

SIZE = HEAD + TAIL + 100_000
DISK = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
ranges = st.lists(
    st.tuples(
        st.one_of(st.integers(0, SIZE), st.sampled_from([0, HEAD - 5, HEAD, SIZE - TAIL - 3, SIZE - 8])),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=12,
)


def check(reader, expected, wanted):
    wanted = [(o, min(n, len(expected) - o)) for o, n in wanted if o <= len(expected)]
    if not wanted:
        return
    got = reader.read_ranges(ints([o for o, _ in wanted]), ints([n for _, n in wanted]))
    assert got.tobytes() == b"".join(expected[o : o + n].tobytes() for o, n in wanted)


@given(ranges)
def test_ranges_in_any_order(wanted):
    check(BytesReader(DISK), DISK, wanted)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=20), st.sampled_from([1, 512, 700]))
def test_blocks_of_equal_size(blocks, size):
    got = BytesReader(DISK).read_blocks(ints(blocks) * size, size)
    assert got.shape == (len(blocks), size)
    assert all((got[i] == DISK[b * size : (b + 1) * size]).all() for i, b in enumerate(blocks))


@given(ranges)
def test_through_stripes_and_holes(wanted):
    """Two disks in stripes of 1,000 bytes, then a hole, then a piece of the first."""
    rows = [
        Row(0, 0, 50, 1000, 100, 2000, 1000),
        Row(1000, 1, 70, 1000, 100, 2000, 1000),
        Row(210_000, 0, 5, 30_000),
    ]
    expected = np.zeros(250_000, np.uint8)
    other = DISK[::-1].copy()
    for i in range(100):
        expected[2000 * i : 2000 * i + 1000] = DISK[50 + 1000 * i : 1050 + 1000 * i]
        expected[2000 * i + 1000 : 2000 * i + 2000] = other[70 + 1000 * i : 1070 + 1000 * i]
    expected[210_000:240_000] = DISK[5:30_005]
    check(
        MappedReader(
            len(expected), "striped", {0: BytesReader(DISK), 1: BytesReader(other)}, Rows.of(rows, 9)
        ),
        expected,
        wanted,
    )


@given(ranges, st.sets(st.integers(0, SIZE // 512 - 1), max_size=20))
def test_patches_replace_blocks(wanted, blocks):
    offsets = ints(sorted(blocks)) * 512 if blocks else ints([])
    new = np.full((len(offsets), 512), 7, np.uint8)
    expected = DISK.copy()
    for offset in offsets:
        expected[offset : offset + 512] = 7
    check(PatchedReader(BytesReader(DISK), Patch(offsets, new)), expected, wanted)


def test_each_byte_is_asked_for_once():
    reader = BytesReader(DISK)
    reader.read_ranges(ints([HEAD + 200, HEAD + 100, HEAD + 150]), ints([100, 100, 100]))
    assert (reader.rounds, reader.requested) == (1, 200)


def test_outside_is_corrupt_and_says_where():
    with pytest.raises(Corrupt, match="0x10\\+0x30"):
        BytesReader(np.zeros(32, np.uint8), "small").read(16, 48)
    with pytest.raises(Corrupt):
        BytesReader(np.zeros(32, np.uint8)).read(-1, 2)


def test_a_file_that_shrinks_says_so(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    reader = RawReader(str(path))
    os.truncate(path, 4096)
    with pytest.raises(ImageError, match="it shrank while it was read"):
        reader.read(0, 100)
    reader.close()


def test_what_is_not_a_disk(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "empty": "is empty",
        "missing": "No such file",
        ".": "is a directory",
        "pipe": "a FIFO",
    }.items():
        with pytest.raises(ImageError, match=words):
            RawReader(str(tmp_path / name))
