"""Strided rows against brute force, a byte at a time: descending, climbing, reading, and the layouts that are
made of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support import BytesReader, one_by_one
from virt_bmap.core.arrays import ints
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import COPY, DATA, PACKED, PARITY, ZERO, Row, Rows
from virt_bmap.formats.common import stripes
from virt_bmap.formats.common.stripes import Place

VOLUME, PARENT = 7, 3


@st.composite
def rows(draw: st.DrawFn, parents: int = 1) -> Row:
    run, count = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    steps = (draw(st.integers(run, run + 12)), draw(st.integers(run, run + 12))) if count > 1 else (0, 0)
    return Row(draw(st.integers(0, 60)), PARENT + draw(st.integers(0, parents - 1)), draw(st.integers(0, 60)),
        run, count, *steps,
               role=draw(st.sampled_from((DATA, COPY, PARITY, ZERO))))  # fmt: skip


RANGES = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 40)), min_size=1, max_size=6)


def by_hand(found: list[Row]) -> list[tuple[int, int, int]]:
    """(row, volume byte, parent byte) of every byte."""
    return [
        (
            number,
            row.volume_offset + nth * row.volume_step + byte,
            row.parent_offset + nth * row.parent_step + byte,
        )
        for number, row in enumerate(found)
        for nth in range(row.count)
        for byte in range(row.run)
    ]


def split(pieces: object) -> list[tuple[int, int, int, int]]:
    """(query, row, source byte, target byte) of every byte of the pieces."""
    columns = (getattr(pieces, name).tolist() for name in ("query", "row", "source", "target", "length"))
    return sorted(
        (query, row, source + byte, target + byte)
        for query, row, source, target, length in zip(*columns, strict=True)
        for byte in range(length)
    )


@given(st.lists(rows(), max_size=5), RANGES)
@settings(max_examples=300, deadline=None)
def test_down_is_brute_force(found: list[Row], ranges: list[tuple[int, int]]) -> None:
    starts, lengths = ints([start for start, _ in ranges]), ints([length for _, length in ranges])
    pieces = Rows.of(found, VOLUME).down(starts, starts + lengths)
    assert split(pieces) == sorted(
        (query, row, volume, parent)
        for query, (start, length) in enumerate(ranges)
        for row, volume, parent in by_hand(found)
        if start <= volume < start + length
    )


@given(st.lists(rows(), max_size=5), RANGES)
@settings(max_examples=300, deadline=None)
def test_up_is_brute_force(found: list[Row], ranges: list[tuple[int, int]]) -> None:
    starts, lengths = ints([start for start, _ in ranges]), ints([length for _, length in ranges])
    pieces = Rows.of(found, VOLUME).up(starts, starts + lengths)
    assert split(pieces) == sorted(
        (query, row, parent, volume)
        for query, (start, length) in enumerate(ranges)
        for row, volume, parent in by_hand(found)
        if start <= parent < start + length
    )


@given(st.lists(rows(), min_size=1, max_size=5), RANGES)
@settings(max_examples=200, deadline=None)
def test_down_then_up_comes_back(found: list[Row], ranges: list[tuple[int, int]]) -> None:
    columns = Rows.of(found, VOLUME)
    starts, lengths = ints([start for start, _ in ranges]), ints([length for _, length in ranges])
    down = columns.down(starts, starts + lengths)
    back = columns.up(down.target, down.target + down.length)
    same = back.row == down.row[back.query]
    pairs = {(int(query), int(target), int(length)) for query, target, length
             in zip(back.query[same], back.target[same], back.length[same], strict=True)}  # fmt: skip
    for number in range(len(down.query)):
        assert (number, int(down.source[number]), int(down.length[number])) in pairs


@given(st.lists(rows(parents=3), max_size=4), RANGES)
@settings(max_examples=200, deadline=None)
def test_reading_through_rows(found: list[Row], ranges: list[tuple[int, int]]) -> None:
    taken: set[int] = set()
    data = []
    for row in found:  # data rows place each byte once
        mine = {volume for _, volume, _ in by_hand([row])}
        if row.role == DATA and not mine & taken:
            taken |= mine
            data.append(row)
    disks = {
        PARENT + number: np.random.default_rng(number).integers(1, 256, 256, np.uint8) for number in range(3)
    }
    expected = np.zeros(256, np.uint8)
    for number, volume, parent in by_hand(data):
        expected[volume] = disks[data[number].parent][parent]
    readers = {parent: BytesReader(disk) for parent, disk in disks.items()}
    columns = Rows.of(data + [row for row in found if row.role != DATA], VOLUME)
    reader = MappedReader(
        256, "mapped", {parent: readers[parent] for parent in np.unique(columns.parent).tolist()}, columns
    )
    starts, lengths = ints([start for start, _ in ranges]), ints([length for _, length in ranges])
    pieces = [expected[start : start + length] for start, length in ranges]
    assert reader.read_ranges(starts, lengths).tobytes() == np.concatenate(pieces).tobytes()


@given(
    st.integers(1, 5), st.integers(1, 8), st.integers(0, 90), st.integers(0, 4), st.sets(st.integers(0, 4))
)
@settings(max_examples=200, deadline=None)
def test_stripes_of_any_size(members: int, chunk: int, size: int, first: int, gone: set[int]) -> None:
    places = [None if at in gone else Place(at, 100 * at) for at in range(members)]
    found = one_by_one(stripes.rows(stripes.striped(members, first), chunk, size, places, start=11))
    expected = set()
    for byte in range(size):
        number = byte // chunk
        member = (number + first) % members
        if member not in gone:
            expected.add((11 + byte, member, 100 * member + number // members * chunk + byte % chunk))
    assert {(volume, found[row].parent, parent) for row, volume, parent in by_hand(found)} == expected
    assert len(by_hand(found)) == len(expected)


@given(st.lists(rows(), max_size=5), st.integers(0, 150))
@settings(max_examples=200, deadline=None)
def test_rows_are_cut_at_the_end_of_their_parent(found: list[Row], size: int) -> None:
    cut, lost = stripes.bounded(Rows.of(found), {PARENT: size})
    kept = one_by_one(cut)
    inside = sorted((volume, parent) for _, volume, parent in by_hand(found) if parent < size)
    assert sorted((volume, parent) for _, volume, parent in by_hand(kept)) == inside
    assert lost == sum(parent >= size and found[row].role == DATA for row, _, parent in by_hand(found))
    for row in kept:
        assert (row.volume_step, row.parent_step) == (0, 0) or row.count > 1


def test_no_rows() -> None:
    nothing = Rows.of([], VOLUME)
    assert len(nothing.down(ints([0]), ints([10])).query) == 0
    assert MappedReader(100, "empty", {}, nothing).read(0, 100) == bytes(100)


def packed_rows(volume: list[int], run: list[int], parent: list[int], stored: list[int]) -> Rows:
    """Compressed rows of count 1."""
    return Rows.make(ints(volume), 0, ints(parent), ints(run), role=PACKED, parent_run=ints(stored))


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 9), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=5),
)
def test_a_compressed_run_is_one_piece_either_way(found, asked):
    run, gap, stored, space = (list(column) for column in zip(*found, strict=True))
    volume = (np.cumsum(np.add(run, gap)) - run).tolist()
    parent = (np.cumsum(np.add(stored, space)) - stored).tolist()
    rows = packed_rows(volume, run, parent, stored)
    starts = ints([start for start, _ in asked])
    ends = starts + ints([length for _, length in asked])
    for pieces, source, size, target, whole in (
        (rows.down(starts, ends), volume, run, parent, stored),
        (rows.up(starts, ends), parent, stored, volume, run),
    ):
        expected = [
            (query, max(low, at), min(high, at + size[row]), target[row], whole[row])
            for query, (low, high) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
            for row, at in enumerate(source)
            if max(low, at) < min(high, at + size[row])
        ]
        got = zip(
            pieces.query,
            pieces.source,
            pieces.source + pieces.length,
            pieces.target,
            pieces.target_length,
            strict=True,
        )
        assert sorted(tuple(map(int, piece)) for piece in got) == sorted(expected)
