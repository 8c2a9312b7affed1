"""XFS' log while a kernel writes it: what is found of it is never older than the search."""

import random

import numpy as np

from virt_bmap.formats.filesystems.xfs.log import _search


def test_the_head_is_found_while_it_moves_on() -> None:
    """A log that is written while it is searched: each look finds more of it written.

    What was its head when the search began is behind its head.
    """
    blocks, chooser = 131072, random.Random(3)
    for _ in range(50):
        head = begun = chooser.randrange(1, blocks - 5000)

        def cycles(at: np.ndarray) -> np.ndarray:
            nonlocal head
            head += chooser.choice([0, 1, 40, 1000])
            return np.where(at < head, 2, 1)

        assert begun <= _search(cycles, lambda cycle: cycle != 2, blocks) <= head
