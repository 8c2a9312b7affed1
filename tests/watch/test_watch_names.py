"""When a name is certain: the rule on a guest in a few arrays, against brute force, and by a judge on this
machine's kernel as the guest."""

import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from test_watch_refresh import READ, SUPERBLOCK, WRITE, disks, guest  # noqa: F401 - fixtures

import watch_guest
import watch_judge
from support import need, need_root
from virt_bmap.accesses.accesses import Accesses, LogParser
from virt_bmap.accesses.resolve import CONFIRMED, GUESSED, KNOWN, OLDER, UNCONFIRMED, Resolver
from virt_bmap.core.arrays import EMPTY
from virt_bmap.core.columns import stack
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.watch import naming as naming_module
from virt_bmap.watch.naming import Naming
from virt_bmap.watch.refresh import Refreshed
from virt_bmap.watch.sinks import EachDisk, Sinks
from virt_bmap.watch.summary import Summary
from virt_bmap.watch.under_way import UnderWay
from virt_bmap.watch.verdict import NOTHING, Asked, Writes, clean, judge

MS = 1_000_000


def told(guest: SimpleNamespace, name: str) -> list[int]:
    """The states of all pieces of this name, in order."""
    return [piece[4] for piece in sorted(guest.kept.pieces) if piece[3] == name]


def lines(guest: SimpleNamespace) -> list[list[str]]:
    guest.log.flush()
    return [
        [line.split("\t")[0].split(" ", 3)[-1], *line.rstrip("\n").split("\t")[2:]] for line in guest.lines
    ]


# ---- the rule ----------------------------------------------------------------------------------------------


def test_of_two_writes_to_the_same_bytes_only_the_last_is_the_owners(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    """A file is written and deleted, and another one takes its blocks, all before a map is read."""
    guest.access(WRITE, (disks.comes, 4096))
    guest.access(WRITE, SUPERBLOCK)
    guest.access(WRITE, (disks.comes, 4096))
    guest.access(WRITE, SUPERBLOCK)
    guest.after(100)
    guest.give(disks.maps[1], guest.clock.now)
    assert told(guest, "/comes") == [OLDER, KNOWN]


def test_a_map_is_believed_only_from_the_end_of_its_reading_on(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    """What is read while metadata is written may be of either time: the next map tells."""
    guest.access(WRITE, SUPERBLOCK)
    guest.after(100)
    begun = guest.clock.now
    guest.after(5)
    guest.access(READ, (disks.moved, 1024))
    guest.access(WRITE, SUPERBLOCK)
    guest.after(5)
    guest.maps.next = Refreshed(begun, 0.01, Resolver(disks.maps[0], 1, begun, guest.clock.now))
    guest.naming.tick()
    assert told(guest, "/old name") == told(guest, "/new name") == []
    guest.after(300)
    guest.give(disks.maps[1], guest.clock.now)
    assert told(guest, "/new name") == [KNOWN]


def test_where_the_next_map_agrees_the_mark_goes(
    disks: SimpleNamespace, guest: SimpleNamespace, tmp_path: Path
) -> None:
    summary = Summary(guest.naming.resolver, 1)
    guest.naming.sinks = Sinks([guest.kept, EachDisk({1: summary}), EachDisk({1: guest.log})])
    guest.access(WRITE, SUPERBLOCK)
    guest.access(READ, (disks.stays, 1024))
    guest.after(100)
    guest.after(naming_module.PATIENCE // MS)
    assert told(guest, "/stays") == [GUESSED]
    guest.give(disks.maps[1], guest.clock.now)
    assert told(guest, "/stays") == [CONFIRMED]
    assert lines(guest) == [["[superblock]"], ["/stays", "older map"]]  # said once
    # and counted once
    assert [row["read"] for row in summary.objects().to_pylist() if row["name"] == "/stays"] == [1024]


def test_a_late_name_corrects_a_guess(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    guest.access(WRITE, SUPERBLOCK)
    guest.access(READ, (disks.moved, 1024))
    guest.after(100)
    guest.after(naming_module.PATIENCE // MS)
    guest.give(disks.maps[1], guest.clock.now)
    assert lines(guest)[1:] == [["/old name", "older map"], ["/new name", "late"]]
    assert (told(guest, "/old name"), told(guest, "/new name")) == ([], [KNOWN])


def test_what_was_read_and_is_gone_is_named_by_the_map_before(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    guest.access(WRITE, SUPERBLOCK)
    guest.access(READ, (disks.goes, 1024))
    guest.after(100)
    guest.give(disks.maps[1], guest.clock.now)
    assert told(guest, "/goes") == [KNOWN]
    guest.naming.finish()
    assert told(guest, "/goes") == [KNOWN]


def test_what_was_written_over_before_it_was_read_is_not(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    guest.access(WRITE, SUPERBLOCK)
    guest.access(WRITE, (disks.goes, 1024))
    guest.access(READ, (disks.goes, 1024))
    guest.after(100)
    guest.give(disks.maps[1], guest.clock.now)
    guest.naming.finish()
    assert KNOWN not in told(guest, "/goes")


def test_without_a_refresher_names_are_marked_from_the_first_change_on(disks: SimpleNamespace) -> None:
    resolver = Resolver(disks.maps[0])
    got: list[int] = []
    naming = Naming(
        resolver,
        Sinks([SimpleNamespace(add=lambda disk, accesses, touched: got.extend(touched.state.tolist()))]),
    )  # type: ignore[list-item]
    for number, (op, offset) in enumerate([(READ, disks.stays), (WRITE, 1024), (READ, disks.stays)], 1):
        naming.add(1, Accesses(*(np.array([value]) for value in (10**18 + number, 1, op, offset, 1024))))
    assert got == [KNOWN, KNOWN, OLDER]


def test_two_maps_that_agree_are_not_always_enough(
    disks: SimpleNamespace,
    guest: SimpleNamespace,
) -> None:
    """A file gives its blocks away and takes them again (a journal of SQLite's, and a letter): metadata
    before the letter's write and before the file's."""
    for metadata_between in (True, False):
        guest.access(WRITE, SUPERBLOCK)
        guest.access(WRITE, (disks.stays, 1024))
        if metadata_between:
            guest.access(WRITE, SUPERBLOCK)
        guest.access(WRITE, (disks.stays, 1024))
        guest.after(300)
        guest.give(disks.maps[0], guest.clock.now)
        guest.after(300)
        states, guest.kept.pieces = told(guest, "/stays"), []
        assert states == (
            [UNCONFIRMED if metadata_between else CONFIRMED, CONFIRMED]
            if GUESSED in states
            else [OLDER if metadata_between else KNOWN, KNOWN]
        )


def test_that_bytes_are_nobodys_is_certain_only_where_no_owner_can_come(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    """A file that is written and deleted before its metadata is in no map."""
    guest.access(WRITE, (disks.comes, 1024))
    guest.after(naming_module.CLAIM // MS + 10)
    assert told(guest, "") == [KNOWN]  # long ago, and no metadata was written since
    guest.access(WRITE, (disks.comes, 1024))
    guest.access(WRITE, SUPERBLOCK)
    guest.after(300)
    guest.give(disks.maps[0], guest.clock.now)
    guest.after(naming_module.CLAIM // MS + 10)
    assert told(guest, "") == [KNOWN, OLDER]
    guest.access(WRITE, (disks.comes, 1024))
    guest.naming.finish()  # its owner may have been in memory
    assert told(guest, "") == [KNOWN, OLDER, OLDER]


def test_without_a_refresher_nobodys_bytes_are_marked(disks: SimpleNamespace) -> None:
    got: list[int] = []
    naming = Naming(
        Resolver(disks.maps[0]),
        Sinks([SimpleNamespace(add=lambda disk, accesses, touched: got.extend(touched.state.tolist()))]),
    )  # type: ignore[list-item]
    naming.add(1, Accesses(*(np.array([value]) for value in (10**18, 1, WRITE, disks.comes, 1024))))
    assert got == [OLDER]


def test_metadata_that_only_the_next_map_knows_is_noticed(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    """mkfs puts the log elsewhere: what is written to it before a map knows the place is a change of the map
    all the same."""
    guest.access(WRITE, SUPERBLOCK)
    guest.after(300)
    begun = guest.clock.now
    guest.access(WRITE, (disks.comes, 1024))
    guest.after(5)
    moved = _with_metadata(disks.maps[1], disks.comes)
    guest.maps.next = Refreshed(begun, 0.01, Resolver(moved, 1, begun, guest.clock.now))
    guest.naming.tick()
    assert guest.naming.resolver.number == 1
    assert not guest.naming.is_settled
    guest.after(300)
    assert guest.maps.asked == 2


def _with_metadata(bmap: BlockMap, offset: int) -> BlockMap:
    """The map with the extent at this byte as a piece of metadata."""
    table = bmap.extents
    kind = tables.codes(table, "kind").copy()
    kind[tables.integers(table, "volume_offset") == offset] = tables.METADATA
    at = table.schema.get_field_index("kind")
    return replace(
        bmap,
        extents=table.set_column(
            at, table.field(at), pa.DictionaryArray.from_arrays(pa.array(kind), pa.array(tables.KINDS))
        ),
    )


def _with_problem(bmap: BlockMap, severity: str, code: str, detail: str) -> BlockMap:
    """The map of a disk on which this is wrong."""
    row = {
        "severity": severity,
        "format": "xfs",
        "volume": 0,
        "volume_offset": None,
        "code": code,
        "detail": detail,
    }
    return replace(bmap, problems=pa.Table.from_pylist([row], bmap.problems.schema))


def test_a_map_that_was_torn_by_writes_is_not_used(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    """Parts of a tree were given back and written over while it was read."""
    damaged = _with_problem(disks.maps[1], "error", "tree", "2 nodes are not what their parent says")
    differing = _with_problem(disks.maps[1], "error", "owned-but-free", "1 range is owned, but free")
    begun = guest.clock.now + 10 * MS
    guest.access(WRITE, SUPERBLOCK)
    guest.after(300)
    guest.access(WRITE, SUPERBLOCK)
    guest.give(damaged, begun)
    assert guest.naming.resolver.number == 0
    assert "was written while it was read: 2 nodes" in guest.naming.failure
    guest.after(2000)
    guest.give(differing, begun)  # two accounts of the same, read one after the other
    assert guest.naming.resolver.number == 1
    guest.after(2000)
    guest.give(damaged, guest.clock.now)  # nothing is written: the disk is like that
    assert guest.naming.resolver.number == 2
    guest.access(WRITE, SUPERBLOCK)
    guest.after(2000)
    guest.give(damaged, guest.clock.now - 1900 * MS)  # and was so before
    assert guest.naming.resolver.number == 3


def test_a_map_without_its_journal_is_not_used(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    stale = _with_problem(disks.maps[1], "warning", "not-replayed", "was not replayed")
    guest.access(WRITE, SUPERBLOCK)
    guest.after(300)
    guest.give(stale, guest.clock.now)
    assert (guest.naming.resolver.number, guest.naming.failure) == (0, "was not replayed")


def test_a_map_that_was_begun_while_metadata_was_under_way_is_of_no_one_moment(
    disks: SimpleNamespace,
    guest: SimpleNamespace,
) -> None:
    """On a slow disk a write is logged long before it is done."""
    guest.access(WRITE, SUPERBLOCK)
    guest.after(300)
    begun = guest.clock.now
    guest.after(300)
    ended = Accesses(*(np.array([value]) for value in (guest.clock.now, 1, WRITE, *SUPERBLOCK)))
    guest.naming.ended(1, ended)
    guest.give(disks.maps[1], begun)
    guest.access(READ, (disks.moved, 1024))
    assert told(guest, "/new name") == []
    guest.after(300)
    guest.give(disks.maps[1], guest.clock.now)
    assert told(guest, "/new name") == [KNOWN]


def test_writes_are_under_way_until_the_log_says_that_they_ended() -> None:
    chooser = random.Random(8)
    parser, under_way = LogParser(), UnderWay()
    lines, wanted, open = [], [], {}
    stamp = "2026-11-23 06:19:{:02d}.{:06d} connection={} "
    for step in range(4000):
        ms = 10 * step
        when = (ms // 1000, ms % 1000 * 1000)
        connection, number = chooser.randrange(1, 4), step + 1
        what = chooser.choice(["Read", "Write", "Trim", "Zero"])
        lines.append(
            stamp.format(*when, connection) + f"{what} id={number} offset=0x{step:x} count=0x200 ..."
        )
        if what != "Read":
            open[connection, number] = (step, ms)
        for key in [key for key in open if chooser.random() < 0.1]:
            offset, begun = open.pop(key)
            lines.append(stamp.format(*when, key[0]) + f"...Write id={key[1]} return=0")
            if ms - begun > 150:
                wanted.append((offset, ms))
    data, found = "".join(f"{line}\n" for line in lines).encode(), []
    base = None
    while data:
        size = chooser.randrange(1, 5000)
        accesses = parser.feed(data[:size])
        data = data[size:]
        if len(accesses) and base is None:
            base = int(accesses.time_ns[0])
        late = under_way.feed(accesses, parser.numbers, parser.ended)
        found += [
            (at, (ns - base) // MS)
            for at, ns in zip(late.offset.tolist(), late.time_ns.tolist(), strict=True)
        ]
    assert sorted(found) == sorted(wanted)
    assert len(wanted) > 100
    assert (under_way.oldest_ns - base) // MS == min(ms for _, ms in open.values())


# ---- against brute force -----------------------------------------------------------------------------------


def test_a_verdict_is_what_the_rule_says_byte_by_byte(disks: SimpleNamespace) -> None:
    """Random accesses, metadata writes and writes around two maps: the states of all bytes, as a loop over
    each of them finds them."""
    chooser = random.Random(9)
    base, sector = 10**18, 512
    places = sorted({disks.comes, disks.stays, disks.goes, disks.moved, 1024, disks.size - 8192})
    compared = 0
    for _ in range(150):
        before = Resolver(disks.maps[0], 0, base - 900 * MS, base - 890 * MS)
        after = Resolver(disks.maps[1], 1, base, base + 50 * MS)
        changes = np.array(
            sorted(base + chooser.randrange(-800, 80) * MS for _ in range(chooser.randrange(3))), np.int64
        )
        rows = sorted((base - chooser.randrange(1, 700) * MS, chooser.choice([READ, WRITE]),
                chooser.choice(places) + chooser.randrange(4) * sector,
                       chooser.randrange(1, 6) * sector) for _ in range(6))  # fmt: skip
        later = sorted(
            (base + chooser.randrange(60) * MS, WRITE, chooser.choice(places), 4 * sector) for _ in range(2)
        )
        everything = rows + later
        accesses = Accesses(
            *(
                np.array(column)
                for column in (
                    [row[0] for row in rows],
                    [1] * 6,
                    *([row[at] for row in rows] for at in (1, 2, 3)),
                )
            )
        )
        writes = Writes(
            *(
                np.array(column, np.int64)
                for column in zip(
                    *(
                        (number, t, offset, offset + length)
                        for number, (t, op, offset, length) in enumerate(everything)
                        if op == WRITE
                    ),
                    strict=True,
                )
            )
        )
        said = before.touched(1, accesses.offset, accesses.length)
        asked = Asked(np.arange(6), accesses, np.zeros(6, bool), before, said)
        verdict = judge(asked, 1, after, changes, writes)
        for number in range(6):
            t, op, offset, length = rows[number]
            for byte in range(offset, offset + length, sector):
                mine = _at(after, verdict.after, number, byte)
                theirs = _at(before, verdict.before, number, byte)
                assert mine or theirs
                new, old = (
                    _at(which, which.touched(1, accesses.offset, accesses.length), number, byte)
                    for which in (after, before)
                )
                last = not any(
                    o == WRITE and p <= byte < p + n and when <= after.ended_ns
                    for when, o, p, n in everything[number + 1 :]
                )
                quiet = not any(
                    t <= m <= after.ended_ns or after.begun_ns - 150 * MS <= m <= after.ended_ns
                    for m in changes.tolist()
                )
                for name, kind, place, state in mine:
                    agrees = any(
                        name == other and place == where and kind in (was, "data")
                        for other, was, where, _ in old
                    )
                    rewritten = [
                        w
                        for w, o, p, n in everything[number + 1 :]
                        if o == WRITE and p <= byte < p + n and w <= after.ended_ns
                    ]
                    until = max([t, *rewritten]) if kind == "data" else after.ended_ns
                    moved = any(before.begun_ns - 150 * MS <= m < t for m in changes.tolist()) and any(
                        t < m <= until for m in changes.tolist()
                    )
                    certain = (
                        quiet or (agrees and (not moved or kind == "metadata")) or (last and kind == "data")
                    )
                    assert (state == KNOWN) == certain, (rows, number, byte, name, kind)
                    compared += 1
                for name, kind, place, state in theirs:
                    assert (name, kind, place) in [row[:3] for row in old]
                    unknown = [m for m in changes.tolist() if m >= before.begun_ns - 150 * MS]
                    fresh = not any(
                        o == WRITE and p <= byte < p + n and unknown and when >= unknown[0]
                        for when, o, p, n in everything[:number]
                    )
                    assert (state == KNOWN) == (op == READ and kind == "data" and fresh)
                    assert not any(row[3] == KNOWN for row in mine)
                if not mine:
                    assert not quiet
                    assert not last or all(kind != "data" for _, kind, _, _ in new)
    assert compared > 2000


def _at(resolver: Resolver, touched, number: int, byte: int) -> list[tuple[tuple[str, str], str, int, int]]:  # type: ignore[no-untyped-def]
    """Who has a byte of an access: (device and name, kind, place in the file, state)."""
    from virt_bmap.model import tables

    here = touched.take(
        (touched.access == number) & (touched.start <= byte) & (byte < touched.end) & ~touched.inline
    )
    labels = resolver.labels(here.object)
    kinds = [tables.KINDS[kind] if kind >= 0 else "volume" for kind in resolver.kind_of(here.object).tolist()]
    columns = (
        here.object.tolist(),
        kinds,
        here.start.tolist(),
        here.file_offset.tolist(),
        here.state.tolist(),
    )
    return [
        (labels[o][1:], kind, place + byte - start if place >= 0 else -1, state)
        for o, kind, start, place, state in zip(*columns, strict=True)
    ]


def test_a_time_is_clean_where_no_change_lies_between(disks: SimpleNamespace) -> None:
    resolver = Resolver(disks.maps[0], 1, 1000 * MS, 1100 * MS)
    for changes, times in (
        ([], {0: True, 1050: True, 2000: True}),
        ([500], {400: False, 600: True, 1050: True, 2000: True}),  # before the map, which knows it
        # it may still have been under way when the map was read
        ([900], {800: False, 1050: False, 2000: False}),
        ([1050], {600: False, 1020: False, 1200: False}),
        ([1500], {600: True, 1400: True, 1500: True, 1600: False}),
    ):
        found = clean(np.array(changes, np.int64) * MS, resolver, np.array(list(times), np.int64) * MS)
        assert dict(zip(times, found.tolist(), strict=True)) == times


def test_of_nothing_nothing_is_said(disks: SimpleNamespace) -> None:
    asked = Asked(EMPTY, stack(Accesses, []), EMPTY.astype(bool), None, NOTHING)
    assert not len(judge(asked, 1, Resolver(disks.maps[0]), EMPTY, Writes(EMPTY, EMPTY, EMPTY, EMPTY)).after)


# ---- a kernel as the guest ---------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> None:
    need_root()
    need("nbdkit", "nbdkit")
    need("qemu-storage-daemon", "qemu-utils")
    if not Path("/dev/fuse").exists():
        pytest.skip("needs FUSE (/dev/fuse)")


def _judged(folder: Path, kind: str, seed: int, seconds: float) -> watch_judge.Judged:
    need(watch_guest.MAKE[kind][0], {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}[kind])
    begin = time.monotonic()
    found = watch_judge.judge(
        folder, watch_judge.watched(folder, kind, seed, seconds, list(watch_guest.SCENARIOS))
    )
    print(f"{kind} seed {seed}, {time.monotonic() - begin:.0f} s: {found}")
    return found


@pytest.mark.guest
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", watch_guest.MAKE)
def test_a_name_without_a_mark_is_right(tmp_path: Path, kind: str) -> None:
    found = _judged(tmp_path, kind, 1, 14)
    assert not found.wrong, found.wrong[:5]
    assert found.maps > 5
    # and names are given, marks and all: nothing is right where nothing is said
    certain = sum(
        count
        for (op, how, marked), count in found.blocks.items()
        if (op, how, marked) == ("write", "right", False)
    )
    assert certain > 100


@pytest.mark.slow
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", watch_guest.MAKE)
def test_no_name_without_a_mark_is_wrong_for_long(tmp_path: Path, kind: str, seed: int) -> None:
    found = _judged(tmp_path, kind, seed, 180)
    assert not found.wrong, found.wrong[:5]
