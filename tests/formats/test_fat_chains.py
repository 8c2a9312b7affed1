"""Chains of clusters, followed all at once, against following them one by one."""

import time

import numpy as np
import pytest

from virt_bmap.formats.filesystems.fat.allocator import (
    BAD,
    BROKEN,
    CUT,
    END,
    FREE,
    LOOP,
    NOTHING,
    TANGLED,
    WHOLE,
    chains_of,
    read_runs,
)


def one_by_one(table: np.ndarray, first: int) -> tuple[list[int], int]:
    """(clusters, fate) of the chain from `first`; table[0] is cluster 2."""
    found: list[int] = []
    seen = set()
    cluster = first
    while True:
        if not 2 <= cluster < len(table) + 2 or table[cluster - 2] in (FREE, BAD):
            return found, CUT if found else NOTHING
        if cluster in seen:
            return found, LOOP
        found.append(cluster)
        seen.add(cluster)
        link = int(table[cluster - 2])
        if link in (END, BROKEN):
            return found, WHOLE if link == END else CUT
        cluster = link


def all_at_once(table: np.ndarray, first: np.ndarray, batch: int) -> list[tuple[list[int], int]]:
    runs = read_runs(table[at : at + batch] for at in range(0, len(table), batch))
    found = chains_of(runs).follow(first)
    result = [([], int(fate)) for fate in found.fate]
    for query, cluster, count, before in zip(
        found.query.tolist(), found.cluster.tolist(), found.count.tolist(), found.before.tolist(), strict=True
    ):
        assert before == len(result[query][0])
        result[query][0].extend(range(cluster, cluster + count))
    assert [len(clusters) for clusters, _ in result] == found.length.tolist()
    return result


def sound_table(random: np.random.Generator, n: int, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of n clusters where chains are in pieces, some clusters free, and none shared; and where chains
    begin."""
    table = np.zeros(n, np.int64)
    cuts = np.unique(random.integers(0, n, pieces))
    parts = [part for part in np.split(np.arange(2, n + 2), cuts) if len(part)]
    random.shuffle(parts)
    firsts = []
    while parts:
        take = int(random.integers(1, 6))
        chain, parts = parts[:take], parts[take:]
        if random.random() < 0.2:
            continue  # free
        clusters = np.concatenate(chain)
        table[clusters[:-1] - 2] = clusters[1:]
        table[clusters[-1] - 2] = END
        firsts.append(clusters[0])
    return table, np.array(firsts, np.int64)


@pytest.mark.parametrize("seed", range(40))
def test_sound_tables(seed):
    random = np.random.default_rng(seed)
    table, first = sound_table(random, int(random.integers(1, 400)), int(random.integers(1, 100)))
    batch = int(random.integers(1, 500))
    assert all_at_once(table, first, batch) == [one_by_one(table, int(cluster)) for cluster in first]
    free = np.flatnonzero(table == FREE) + 2
    runs = read_runs(table[at : at + batch] for at in range(0, len(table), batch))
    assert [c for low, high in zip(*runs.free, strict=True) for c in range(low, high)] == free.tolist()


@pytest.mark.parametrize("seed", range(60))
def test_tables_full_of_nonsense(seed):
    """Random links: chains meet and go round.

    What is followed to the end is right, and nothing is followed for ever.
    """
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 60))
    table = random.integers(2, n + 2, n)
    straight = random.random(n) < 0.5
    table[straight] = np.arange(3, n + 3)[straight]
    table[table == n + 2] = END
    for value, share in ((FREE, 0.1), (END, 0.1), (BAD, 0.05), (BROKEN, 0.05)):
        table[random.random(n) < share] = value
    first = np.arange(0, n + 4)
    for (clusters, fate), (theirs, expected) in zip(
        all_at_once(table, first, 7), [one_by_one(table, c) for c in first.tolist()], strict=True
    ):
        if expected == LOOP:
            assert fate == LOOP
            assert len(set(clusters)) <= len(set(theirs))
        else:
            assert (clusters, fate) == (theirs, expected)


def test_a_chain_in_a_quarter_of_a_million_pieces_takes_a_moment():
    n = 1 << 18
    order = np.random.default_rng(1).permutation(n) + 2
    table = np.zeros(n, np.int64)
    table[order[:-1] - 2], table[order[-1] - 2] = order[1:], END
    start = time.process_time()
    found = chains_of(read_runs([table])).follow(order[:1])
    # 0.3 s on a quiet machine; a step a piece would take a quarter of a minute
    assert time.process_time() - start < 5
    assert np.repeat(found.cluster, found.count).shape == (
        n - int((np.diff(order) == 1).sum()) + int((found.count - 1).sum()),
    )
    assert found.length.tolist() == [n]
    assert found.fate.tolist() == [WHOLE]


def test_thousands_of_files_on_one_chain_end_somewhere():
    n = 50000
    order = np.random.default_rng(1).permutation(n) + 2
    table = np.zeros(n, np.int64)
    table[order[:-1] - 2], table[order[-1] - 2] = order[1:], END
    found = chains_of(read_runs([table])).follow(np.arange(2, n + 2))
    assert len(found.query) < 10 * n
    assert TANGLED in found.fate
