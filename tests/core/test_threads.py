"""Reading ahead: the same results, in the same order, as one part after the other; one part ahead and no
more."""

import threading
import time

import numpy as np
import pytest

from support import BytesReader
from virt_bmap.core import threads
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapped import MappedReader, Patch, PatchedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.open.raw import RawReader


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_results_are_in_the_order_of_the_parts(count):
    assert list(threads.ahead(lambda part: part * part, iter(range(count)))) == [
        part * part for part in range(count)
    ]


def test_the_next_part_is_begun_while_one_is_looked_at_and_no_further_one():
    begun = []
    started = threading.Event()

    def work(part):
        begun.append(part)
        started.set()
        return part

    for part in threads.ahead(work, range(5)):
        last = min(part + 1, 4)
        while last not in begun:
            assert started.wait(30)
        assert begun == list(range(last + 1))
        started.clear()


def test_a_failure_comes_in_its_place():
    def work(part):
        if part == 3:
            raise Corrupt("part 3", 3)
        return part

    seen = []
    with pytest.raises(Corrupt, match="part 3"):
        seen += threads.ahead(work, range(9))
    assert seen == [0, 1, 2]


def test_whoever_stops_early_finds_nothing_at_work():
    """What is read from may be closed afterwards."""
    at_work = []

    def work(part):
        at_work.append(part)
        time.sleep(0.05)
        at_work.remove(part)
        return part

    found = threads.ahead(work, range(9))
    assert next(found) == 0
    found.close()
    assert at_work == []


def test_a_backend_that_knows_no_threads_is_never_asked_by_two():
    class Alone(Reader):
        inside = 0

        def _fetch(self, offsets, lengths):
            self.inside += 1
            time.sleep(0.001)
            assert self.inside == 1
            self.inside -= 1
            return np.zeros(int(lengths.sum()), np.uint8)

    reader = Alone(10 << 20, "disk")
    for part in threads.ahead(lambda part: reader.read_ranges(ints(1 << 20), ints(100 + part)), range(40)):
        assert len(reader.read_ranges(ints(2 << 20), ints(5))) == 5
        assert len(part) >= 100
    assert (reader.rounds, reader.requested) == (80, 40 * 5 + sum(100 + part for part in range(40)))


@pytest.mark.parametrize("near", [False, True])
def test_what_is_only_copied_comes_in_small_batches_and_without_a_thread(near):
    """The blocks are the same either way, as those of one read are."""
    disk = np.random.default_rng(4).integers(0, 256, 4 << 20, dtype=np.uint8)
    asked = []

    class Noting(BytesReader):
        def _fetch(self, offsets, lengths):
            asked.append((int(lengths.sum()), threading.current_thread() is threading.main_thread()))
            return super()._fetch(offsets, lengths)

    reader = Noting(disk)
    reader.near = near
    offsets = np.arange(300, 900, dtype=np.int64) * 4096
    found = list(reader.batches(offsets, 4096, 200 * 4096, 64 * 4096))
    assert np.array_equal(
        np.concatenate([data for _, data in found]), disk[300 * 4096 : 900 * 4096].reshape(-1, 4096)
    )
    assert [offsets[part].tolist() for part, _ in found] == [
        offsets[at : at + (64 if near else 200)].tolist() for at in range(0, 600, 64 if near else 200)
    ]
    assert [size for size, _ in asked] == ([64 * 4096] * 9 + [24 * 4096] if near else [200 * 4096] * 3)
    assert all(main for _, main in asked) == near


def test_a_volume_is_near_where_all_below_it_is(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(8 << 20))
    file, far = RawReader(str(tmp_path / "disk")), Reader(8 << 20, "far")
    assert file.near
    for parents, near in (({0: file}, True), ({0: file, 1: far}, False)):
        rows = [Row(at * 4096, number, 0, 4096) for at, number in enumerate(parents)]
        volume = MappedReader(4096 * len(rows), "volume", parents, Rows.of(rows, 2))
        assert volume.near == near
        assert PatchedReader(volume, Patch(ints([]), np.zeros((0, 512), np.uint8))).near == near
