"""Range arithmetic against brute force over small numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from virt_bmap.core import arrays

SIZE = 40
pairs = st.lists(
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda p: (min(p), max(p))), max_size=8
)


def columns(ranges):
    return arrays.ints([low for low, _ in ranges]), arrays.ints([high for _, high in ranges])


def painted(ranges):
    count = np.zeros(SIZE + 1, int)
    for low, high in ranges:
        count[low:high] += 1
    return count


def as_bytes(starts, ends):
    assert (starts[1:] > ends[:-1]).all(), "sorted and merged"
    return painted(zip(starts.tolist(), ends.tolist(), strict=True)) > 0


@given(pairs)
def test_union_covers_what_any_range_covers(ranges):
    assert (as_bytes(*arrays.union(*columns(ranges))) == (painted(ranges) > 0)).all()


@given(pairs, st.integers(0, 5))
def test_union_with_gap_leaves_no_smaller_gap(ranges, gap):
    starts, ends = arrays.union(*columns(ranges), gap)
    assert (starts[1:] - ends[:-1] > gap).all()
    assert (as_bytes(starts, ends) >= (painted(ranges) > 0)).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, SIZE), st.integers(1, 9)), max_size=12))
def test_union_by_is_the_union_of_each_group(rows):
    group, low, size = (arrays.ints([row[column] for row in rows]) for column in range(3))
    of, starts, ends = arrays.union_by(group, low, low + size)
    assert (np.diff(of) >= 0).all()
    for number in range(4):
        for mine, theirs in zip(
            (starts[of == number], ends[of == number]),
            arrays.union(low[group == number], (low + size)[group == number]),
            strict=True,
        ):
            assert mine.tolist() == theirs.tolist()


@given(pairs)
def test_complement(ranges):
    assert (
        as_bytes(*arrays.complement(*columns(ranges), 0, SIZE))[:SIZE] == (painted(ranges) == 0)[:SIZE]
    ).all()


@given(pairs, pairs)
def test_intersect_and_subtract(a, b):
    inside, outside = arrays.intersect(*columns(a), *columns(b)), arrays.subtract(*columns(a), *columns(b))
    assert (as_bytes(*inside) == ((painted(a) > 0) & (painted(b) > 0))).all()
    assert (as_bytes(*outside) == ((painted(a) > 0) & (painted(b) == 0))).all()


@given(pairs)
def test_covered_twice(ranges):
    assert (as_bytes(*arrays.covered_twice(*columns(ranges))) == (painted(ranges) > 1)).all()


@given(pairs, pairs)
def test_intervals_find_every_overlap_and_no_other(ranges, queries):
    found = arrays.Intervals(*columns(ranges)).overlaps(*columns(queries))
    expected = {
        (q, r) for q, (a, b) in enumerate(queries) for r, (c, d) in enumerate(ranges) if max(a, c) < min(b, d)
    }
    pairs_found = list(zip(*(side.tolist() for side in found), strict=True))
    assert set(pairs_found) == expected
    assert len(pairs_found) == len(expected)


@given(st.lists(st.booleans(), max_size=70))
def test_bit_runs(bits):
    bitmap = np.packbits(np.array(bits, np.uint8), bitorder="little")
    for value in (True, False):
        starts, ends = arrays.bit_runs(bitmap, len(bits), value)
        covered = [i for low, high in zip(starts, ends, strict=True) for i in range(low, high)]
        assert covered == [i for i, bit in enumerate(bits) if bit is value]


@given(st.lists(st.integers(0, 5), max_size=10))
def test_expand(counts):
    row, step = arrays.expand(arrays.ints(counts) if counts else arrays.EMPTY)
    assert list(zip(row.tolist(), step.tolist(), strict=True)) == [
        (i, k) for i, n in enumerate(counts) for k in range(n)
    ]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=10))
def test_gather(ranges):
    data = np.arange(30, dtype=np.uint8)
    found = arrays.gather(data, arrays.ints([s for s, _ in ranges]), arrays.ints([n for _, n in ranges]))
    assert found.tolist() == [b for s, n in ranges for b in range(s, s + n)]
