"""Tiles: each byte of the ranges exactly once, by the precedence that is stated; brute force."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from virt_bmap.core.arrays import ints
from virt_bmap.diff.tiles import InodeRecords, tiles
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair))), max_size=12
)


EXTENT = st.tuples(st.integers(0, 63), st.integers(1, 40),
    st.sampled_from([tables.DATA, tables.FREE, tables.METADATA]),
                   st.integers(0, 3), st.sampled_from([0, tables.INLINE, tables.SHARED]))  # fmt: skip


def map_of(extents) -> BlockMap:
    """A disk of 100 bytes with these extents and nothing else."""
    start, length, kind, inode, flags = (
        ints([row[at] for row in extents]).astype(np.int64) for at in range(5)
    )
    return BlockMap(
        volumes=tables.make("volumes", volume=[0], disk=[1], kind=["disk"], name=["/dev/sda"], size=[100]),
        mappings=tables.empty("mappings"), filesystems=tables.empty("filesystems"),
        inodes=tables.empty("inodes"), names=tables.empty("names"),
        extents=tables.make("extents", volume=0, inode=inode, kind=kind, volume_offset=start, length=length,
            flags=flags) if extents else tables.empty("extents"),
        problems=tables.empty("problems"),
    )  # fmt: skip


@given(
    st.lists(EXTENT, max_size=8),
    RANGES,
    st.lists(st.integers(0, 99), max_size=3),
    st.lists(st.integers(0, 110), max_size=4),
)
def test_each_byte_has_the_owner_that_precedence_says(extents, ranges, records, bounds):
    asked = np.zeros(120, bool)
    for low, high in ranges:
        asked[2 * low : 3 * high] = True
    owner, record = np.full(120, -1), np.full(120, -1)
    for at in range(120):
        here = [
            row
            for row, (start, length, *_) in enumerate(extents)
            if start <= at < start + length and at < 100
        ]
        here.sort(
            key=lambda row: (
                not extents[row][4] & tables.INLINE,
                extents[row][2] == tables.FREE,
                extents[row][3],
                row,
            )
        )
        mine = [number for number, start in enumerate(records) if start <= at < min(start + 7, 100)]
        record[at] = mine[0] if mine else -1
        owner[at] = -1 if mine or not here else here[0]
    low = ints([2 * r[0] for r in ranges]).astype(np.int64)
    high = ints([3 * r[1] for r in ranges]).astype(np.int64)
    keep = high > low
    place = ints(records).astype(np.int64)
    numbers = InodeRecords(place * 0, place, np.minimum(place + 7, 100), np.arange(len(place)))
    found = tiles(map_of(extents), 1, low[keep], high[keep], numbers).cut(
        np.unique(ints(bounds)).astype(np.int64)
    )
    seen = np.zeros(120, np.int64)
    for start, end, inside, extent, number in zip(
        found.start, found.end, found.inside, found.extent, found.record, strict=True
    ):
        assert end > start
        seen[start:end] += 1
        assert (owner[start:end] == extent).all()
        if extent >= 0 or number >= 0:
            assert inside == start
        if number >= 0:  # of records that overlap either may be named
            assert (record[start:end] >= 0).all()
        else:
            assert (record[start:end] == -1).all()
        assert not any(start < bound < end for bound in bounds)
    assert (seen == asked).all()


def test_many_owners_of_the_same_bytes_do_not_multiply():
    bmap = map_of([(0, 90 - at % 40, tables.DATA, at % 7, tables.SHARED) for at in range(100_000)])
    assert tiles(bmap, 1, ints(0), ints(100)).extent.tolist()[0] == 0


def test_ranges_behind_the_disk_belong_to_nothing():
    found = tiles(map_of([(0, 100, tables.DATA, 5, 0)]), 1, ints([90, 200]), ints([150, 300]))
    assert list(zip(found.start.tolist(), found.end.tolist(), found.extent.tolist(), strict=True)) == [
        (90, 100, 0),
        (100, 150, -1),
        (200, 300, -1),
    ]
