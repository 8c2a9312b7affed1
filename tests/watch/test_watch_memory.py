"""A watch's memory follows its map, and not the time watched: paths of few inodes without joining all, and
what is kept of accesses, maps and objects."""

import gc
import random
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_watch_refresh import READ, SUPERBLOCK, WRITE, disks, guest  # noqa: F401 - fixtures

from virt_bmap.accesses import resolve
from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import Resolver
from virt_bmap.model import paths, tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.watch import naming as naming_module
from virt_bmap.watch import summary
from virt_bmap.watch import verdict as verdict_module
from virt_bmap.watch.sinks import EachDisk, Sinks
from virt_bmap.watch.summary import OTHERS, Summary

# ---- paths -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 9)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, st.sampled_from([b"a", b"b", b"c/d", b"\0"])), max_size=16),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.lists(NUMBERS, max_size=6),
)
def test_a_climb_finds_the_first_path_that_joining_all_finds(
    rows: list[tuple[int, int, bytes]], folders: list[bool], wanted: list[int]
) -> None:
    """Any names: loops, several names of one inode, directories that nothing leads to, names in files."""
    parent, inode = (np.array([row[at] for row in rows], np.int64) for at in (0, 1))
    names = pa.table(
        {"parent": parent, "inode": inode, "name": pa.array([row[2] for row in rows], pa.binary())}
    )
    kinds = np.array(
        [tables.T_DIRECTORY, *(tables.T_DIRECTORY if folder else tables.T_FILE for folder in folders)],
        np.uint8,
    )
    inodes = tables.make("inodes", volume=0, inode=np.arange(1, 10), type=kinds, size=0, nlink=1, flags=0)
    joined = pa.concat_arrays(
        [paths.of_names(names, inodes, 1), pa.array([b"/"], pa.large_binary())]
    ).to_pylist()
    known = list(zip([*inode.tolist(), 1], joined, strict=True))
    expected = [
        next((path for number, path in known if number == one and path is not None), None) for one in wanted
    ]
    assert paths.Climb(names, inodes, 1).paths(np.array(wanted, np.int64)).to_pylist() == expected


def test_a_batch_joins_only_the_paths_that_it_names(
    disks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockMap, "paths", lambda *_: pytest.fail("all paths are joined"))
    bmap = BlockMap(**{name: getattr(disks.maps[0], name) for name in BlockMap.TABLES})
    resolver = Resolver(bmap)
    touched = resolver.touched(1, np.array([disks.stays, disks.goes, 1024]), np.full(3, 1024))
    assert {label[2] for label in resolver.labels(touched.object).values()} >= {"/stays", "/goes"}
    assert b"/stays" in resolver.paths(touched.object).to_pylist()


# ---- what is kept ------------------------------------------------------------------------------------------


def test_a_guest_that_never_rests_fills_no_memory(
    disks: SimpleNamespace,
    guest: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half an hour of writes to files, to free space and to metadata, with maps and without: whatever waits
    or is remembered stays within its bounds."""
    for module, name, value in (
        (naming_module, "MOST_WAITING", 200), (naming_module, "MOST_WRITES", 400),
        (naming_module, "MOST_CHANGES", 300), (verdict_module, "MOST", 500),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    sums = Summary(guest.naming.resolver, 1)
    guest.naming.sinks = Sinks([EachDisk({1: sums})])
    chooser = random.Random(8)
    places = [disks.comes, disks.stays, disks.goes, disks.moved, disks.size - (1 << 20)]
    written = 0
    for step in range(900):
        for _ in range(chooser.randrange(1, 6)):
            ranges = [(chooser.choice(places) + 512 * chooser.randrange(8), 512) for _ in range(20)]
            guest.access(chooser.choice([READ, WRITE, WRITE]), SUPERBLOCK, *ranges)
            written += 21
        guest.after(chooser.choice([1, 20, 200, 2000]))
        if guest.maps.busy and (step // 100) % 2:
            guest.give(disks.maps[step % 2], guest.clock.now)
        naming = guest.naming
        assert sum(len(asked) for _, asked in naming._waiting) <= 200 + 5 * 21
        assert sum(len(asked) for parts in naming._open.values() for asked in parts) <= 200 + 5 * 21 * 21
        assert (
            sum(len(part.number) for parts in naming._writes.values() for part in parts) <= 400 + 5 * 21 * 21
        )
        assert len(naming._changes) <= 2 * 300 + 5 * 21
    guest.naming.finish()
    assert int(sums.requests.sum()) == written
    assert sum(row["accesses"] for row in sums.objects().to_pylist()) >= written


def test_maps_that_are_no_longer_asked_go(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    alive: list[weakref.ref[Resolver]] = []
    for number in range(8):
        guest.access(WRITE, SUPERBLOCK, (disks.comes, 1024), (disks.stays, 1024))
        guest.after(300)
        guest.give(disks.maps[number % 2], guest.clock.now)
        alive.append(weakref.ref(guest.naming.resolver))
        guest.after(300)
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 2


def test_a_summary_of_more_objects_than_it_tells_apart_adds_up_all_the_same(
    disks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(summary, "MOST_OBJECTS", 2)
    monkeypatch.setattr(summary, "OBJECT_TABLES", 2)
    resolvers = [Resolver(bmap, number) for number, bmap in enumerate(disks.maps)]
    found = Summary(resolvers[0], 1)
    chooser = random.Random(3)
    total = 0
    for number in range(40):
        resolver = resolvers[number % 2]
        found.renew(resolver)
        offset = np.array([chooser.randrange(disks.size // 1024 - 1) * 1024 for _ in range(20)])
        accesses = Accesses(
            np.full(20, time.time_ns()), np.ones(20, np.int64), np.full(20, READ), offset, np.full(20, 1024)
        )
        found.add(accesses, resolver.touched(1, accesses.offset, accesses.length))
        total += 20 * 1024
    rows = found.objects().to_pylist()
    assert any(row["name"] == OTHERS for row in rows)
    assert sum(row["read"] for row in rows) == total


def test_a_summary_of_nothing_takes_a_new_map(disks: SimpleNamespace) -> None:
    """The second disk of a guest that never touches it."""
    found = Summary(Resolver(disks.maps[0]), 1)
    found.renew(Resolver(disks.maps[1], 1))
    assert found.objects().num_rows == 0


def test_labels_are_kept_within_bounds(disks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MOST_LABELS", 3)
    resolver = Resolver(disks.maps[0])
    for number in range(resolver.named):
        assert number in resolver.labels(np.array([number]))
    assert len(resolver.labels(np.array([0]))) <= 5
