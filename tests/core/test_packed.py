"""The reader of what compressed units unpack to, against the bytes that were packed."""

import random
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virt_bmap.core import lost, packed
from virt_bmap.core.arrays import ints
from virt_bmap.core.codecs import deflated
from virt_bmap.core.packed import Units, UnpackedReader
from virt_bmap.core.reader import BytesReader
from virt_bmap.core.salvage import read_known


def reader_of(contents: list[bytes], seed: int, damage: dict[int, bytes] | None = None) -> UnpackedReader:
    """Each content is a unit: packed by zlib, cut into one to three ranges, which are put on a disk in any
    order; `damage` is packed in the place of a unit's own."""
    chooser = random.Random(seed)
    pieces: list[list[bytes]] = []
    for number, content in enumerate(contents):
        data = (damage or {}).get(number, zlib.compress(content))
        cuts = sorted(chooser.sample(range(1, len(data)), min(len(data) - 1, chooser.randrange(3))))
        pieces.append([data[low:high] for low, high in zip([0, *cuts], [*cuts, None], strict=True)])
    every = [(unit, nth) for unit, parts in enumerate(pieces) for nth in range(len(parts))]
    chooser.shuffle(every)
    disk, where = bytearray(), {}
    for unit, nth in every:
        where[unit, nth] = len(disk) + 3
        disk += b"???" + pieces[unit][nth]
    in_order = [(unit, nth) for unit, parts in enumerate(pieces) for nth in range(len(parts))]
    units = Units(
        ints([len(content) for content in contents]),
        ints([chooser.randrange(2) for _ in contents]),
        np.append(0, np.cumsum([len(parts) for parts in pieces])),
        ints([where[key] for key in in_order]),
        ints([len(pieces[unit][nth]) for unit, nth in in_order]),
    )
    codecs = [lambda data, size: deflated(data, size, zlib.MAX_WBITS)] * 2
    return UnpackedReader(BytesReader(np.frombuffer(bytes(disk), np.uint8), "disk"), units, codecs)


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=12),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(),
    st.sampled_from([1, 50, packed.BATCH]),
)
def test_ranges_of_units_are_what_was_packed(
    contents: list[bytes], wanted: list[tuple[float, float]], seed: int, batch: int
) -> None:
    whole = b"".join(contents)
    pairs = [sorted((int(a * len(whole)), int(b * len(whole)))) for a, b in wanted]
    starts, lengths = ints([low for low, _ in pairs]), ints([high - low for low, high in pairs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "BATCH", batch)
        found = reader_of(contents, seed).read_ranges(starts, lengths)
    assert found.tobytes() == b"".join(whole[low:high] for low, high in pairs)


@pytest.mark.parametrize(
    "damage", [b"no stream of zlib", zlib.compress(b"too little"), zlib.compress(bytes(200))[:-9]]
)
def test_a_damaged_unit_is_lost_and_no_other(damage: bytes) -> None:
    contents = [bytes([number]) * 100 for number in range(5)]
    reader = reader_of(contents, 1, {2: damage})
    data, gone = read_known(reader, ints([50, 220]), ints([300, 10]))
    expected = bytearray(b"".join(contents))
    expected[200:300] = bytes(100)
    assert data.tobytes() == bytes(expected[50:350] + expected[220:230])
    assert [column.tolist() for column in gone] == [[200], [300], [lost.DAMAGED]]
    # asked again, and asked first
    again = reader_of(contents, 1, {2: damage}).lost(ints([0, 290]), ints([210, 500]))
    assert list(zip(again.starts.tolist(), again.ends.tolist(), strict=True)) == [(200, 210), (290, 300)]


def test_no_unit_gives_more_than_its_size() -> None:
    bomb = zlib.compress(bytes(50 << 20))
    reader = reader_of([bytes(100)], 1, {0: bomb})
    assert reader.read(0, reader.size) == bytes(100)
