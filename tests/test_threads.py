"""Reading ahead: the same results, in the same order, as one part after the other; one part ahead and no more."""

import threading
import time

import numpy as np
import pytest

from virt_bmap import threads
from virt_bmap.arrays import ints
from virt_bmap.errors import Corrupt
from virt_bmap.reader import Reader


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_results_are_in_the_order_of_the_parts(count):
    assert list(threads.ahead(lambda part: part * part, iter(range(count)))) == [part * part for part in range(count)]


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
