"""The map that keeps up with the guest.

Oracles: a kernel's own writes, whose content says which file they belong to, and brute force.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import kernel_guest
from support import mapped, need, need_root, run
from virt_bmap.accesses.accesses import Accesses, LogParser
from virt_bmap.accesses.resolve import OPEN, Resolver, Touched
from virt_bmap.accesses.trace import Trace
from virt_bmap.model import tables
from virt_bmap.open.disks import Disks
from virt_bmap.serve.serve import Source, private_folder, serve
from virt_bmap.watch import naming as naming_module
from virt_bmap.watch.lines import LineLog
from virt_bmap.watch.naming import Naming, lost, signatures
from virt_bmap.watch.refresh import MOST_DEATHS, Refreshed, Refresher, load, save
from virt_bmap.watch.sinks import EachDisk, Sinks
from virt_bmap.watch.summary import Summary

BMAP = str(Path(sys.executable).parent / "virt-bmap")
MS = 1_000_000
WRITE, READ = tables.OPS.index("write"), tables.OPS.index("read")

# ---- a kernel as the guest ---------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> None:
    need_root()
    need("nbdkit", "nbdkit")
    need("qemu-storage-daemon", "qemu-utils")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs FUSE (/dev/fuse)")


TRIES = 3
"""What is asked is how soon names come: a machine that stands still for a second in the wrong place spoils a
try, not three."""


@pytest.mark.guest
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("kind", "make", "package"),
    [("ext4", ["mke2fs", "-q", "-t", "ext4"], "e2fsprogs"), ("xfs", ["mkfs.xfs", "-q"], "xfsprogs")],
)
def test_files_that_a_kernel_writes_are_named(
    tmp_path: Path, kind: str, make: list[str], package: str
) -> None:
    need(make[0], package)
    failures: list[AssertionError] = []
    for number in range(TRIES):
        (tmp_path / str(number)).mkdir()
        try:
            _write_and_compare(tmp_path / str(number), make)
        except AssertionError as error:
            failures.append(error)
        else:
            return
    raise failures[-1]


def _write_and_compare(tmp_path: Path, make: list[str]) -> None:
    """A kernel writes files to a watched disk: what the log and the trace name is what was written, and
    when."""
    image, count = tmp_path / "disk.img", 300
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    run(*make, image)
    trace, log = tmp_path / "trace.parquet", tmp_path / "log"
    command = [
        BMAP,
        "watch",
        "--write",
        "-o",
        trace,
        "--log",
        log,
        image,
        "--",
        sys.executable,
        kernel_guest.__file__,
        "$unixsocket",
        tmp_path,
        str(count),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "can't be exported" in done.stderr:
        pytest.skip("qemu-storage-daemon has no FUSE export here")

    disk = image.read_bytes()
    number_of = {kernel_guest.path(n): n for n in range(count)} | {
        kernel_guest.moved(n): n for n in range(kernel_guest.MOVED)
    }
    rows = pq.read_table(trace, columns=["time_ns", "op", "objects"]).to_pylist()
    pieces = [
        (row["time_ns"] / 1e9, piece)
        for row in rows
        if row["op"] == "write"
        for piece in row["objects"]
        if piece["kind"] == "data"
    ]
    deleted = {
        kernel_guest.path(n)
        for n in range(kernel_guest.MOVED + kernel_guest.GROWN, kernel_guest.MOVED + 2 * kernel_guest.GROWN)
    }
    wrong, last = 0, {}
    for when, piece in pieces:
        name = piece["path"].decode()
        data = kernel_guest.final(number_of[name])[piece["file_offset"] :][: piece["length"]]
        if name not in deleted:  # their bytes may be another file's by now
            wrong += disk[piece["offset"] : piece["offset"] + len(data)] != data
        last[name] = when
    assert wrong <= len(pieces) // 100, (
        f"{wrong} of {len(pieces)} pieces are not the file's that they are named for"
    )
    steps = [line.split("\t") for line in (tmp_path / "written").read_text().splitlines()]
    named = [name for _, name in steps if name in last]
    assert len(named) >= 0.99 * len(steps)
    # what was appended after the rename has the new name
    begin = float(steps[count][0]) - kernel_guest.REST / 2
    late = {piece["path"].decode() for when, piece in pieces if when > begin}
    assert late == {name for _, name in steps[count:]}
    # the live log has the same names, in the order in which they were written (those that came late aside)
    lines = [line.split("\t") for line in log.read_text().splitlines() if line.startswith("write f ")]
    logged = [line[0].split(" ", 3)[3] for line in lines]
    assert set(logged) >= set(named)
    in_time = [name for name, line in zip(logged, lines, strict=True) if line[2:] != ["late"]]
    order = list(dict.fromkeys(name for name in in_time if name in number_of))
    created = [name for name in order if not name.startswith("/moved")]
    assert created == sorted(created, key=number_of.__getitem__)


# ---- a guest in a few arrays -------------------------------------------------------------------------------

BLOCK = 1024


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One ext4 twice: before and after a file was added, a file renamed, and a file deleted, with the maps of
    both."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("refresh")
    for name in ("stays", "goes", "old name"):
        (folder / "tree").mkdir(exist_ok=True)
        (folder / "tree" / name).write_bytes(random.Random(name).randbytes(9000))
    before, after = folder / "before.img", folder / "after.img"
    with open(before, "wb") as file:
        file.truncate(8 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-d", folder / "tree", before)
    after.write_bytes(before.read_bytes())
    (folder / "new").write_bytes(random.Random("new").randbytes(20_000))
    run("debugfs", "-w", "-R", f"write {folder / 'new'} comes", after)
    run("debugfs", "-w", "-R", 'ln "/old name" "/new name"', after)
    run("debugfs", "-w", "-R", 'unlink "/old name"', after)
    run("debugfs", "-w", "-R", "rm /goes", after)

    def place(image: Path, path: str) -> int:
        return int(run("debugfs", "-R", f'blocks "{path}"', image).split()[0]) * BLOCK

    maps = mapped(before), mapped(after)
    return SimpleNamespace(
        before=before,
        after=after,
        maps=maps,
        size=8 << 20,
        comes=place(after, "/comes"),
        stays=place(before, "/stays"),
        goes=place(before, "/goes"),
        moved=place(before, "/old name"),
    )


class Kept:
    """A sink that keeps what it is given, by name, with its state."""

    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self.pieces: list[tuple[int, int, int, str, int]] = []
        self.added = 0

    def add(self, disk: int, accesses: Accesses, touched: Touched) -> None:
        self._keep(self.added + touched.access, touched)
        self.added += len(accesses)

    def late(self, disk: int, number: np.ndarray, accesses: Accesses, touched: Touched) -> None:
        for n, offset, length in zip(
            number.tolist(), accesses.offset.tolist(), accesses.length.tolist(), strict=True
        ):
            self._give_way(n, offset, offset + length)
        self._keep(number[touched.access], touched)

    def _give_way(self, number: int, start: int, end: int) -> None:
        """Bytes that come again were open before, all of them."""
        left, covered = [], 0
        for piece in self.pieces:
            low, high = max(piece[1], start), min(piece[2], end)
            if piece[0] != number or low >= high:
                left.append(piece)
                continue
            assert piece[4] in OPEN
            covered += high - low
            left += [
                (number, *part, *piece[3:])
                for part in ((piece[1], low), (high, piece[2]))
                if part[0] < part[1]
            ]
        assert covered == end - start
        self.pieces = left

    def renew(self, resolver: Resolver) -> None:
        self.resolver = resolver

    def _keep(self, number: np.ndarray, touched: Touched) -> None:
        labels = self.resolver.labels(touched.object)
        own = ~touched.inline
        columns = (number, touched.start, touched.end, touched.object, touched.state)
        self.pieces += [
            (n, start, end, labels[o][2], state)
            for n, start, end, o, state in zip(*(c[own].tolist() for c in columns), strict=True)
        ]


class Maps:
    """A refresher whose maps are given out by hand."""

    def __init__(self) -> None:
        self.busy = self.ended = False
        self.next: Refreshed | None = None
        self.asked = 0

    def begin(self) -> None:
        self.busy, self.asked = True, self.asked + 1

    def result(self) -> Refreshed | None:
        if not self.busy or self.next is None:
            return None
        found, self.next, self.busy = self.next, None, False
        return found


@pytest.fixture
def guest(disks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A naming with a clock (`clock.now`, ns) and maps that the test hands out."""
    clock = SimpleNamespace(now=10**18)
    monkeypatch.setattr(naming_module.time, "time_ns", lambda: clock.now)
    resolver = Resolver(disks.maps[0], 0, clock.now)
    clock.now += 10**9
    kept, lines, maps = Kept(resolver), [], Maps()
    log = LineLog(resolver, lines.extend)
    naming = Naming(resolver, Sinks([kept, EachDisk({1: log})]), maps)

    def access(op: int, *ranges: tuple[int, int]) -> None:
        offset, length = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
        n = len(ranges)
        clock.now += MS
        naming.add(
            1, Accesses(clock.now + np.arange(n), np.ones(n, np.int64), np.full(n, op), offset, length)
        )

    def give(bmap: object, begun: int) -> None:
        maps.next = Refreshed(begun, 0.01, Resolver(bmap, naming.resolver.number + 1, begun))
        naming.tick()

    def after(ms: int) -> None:
        clock.now += ms * MS
        naming.tick()

    return SimpleNamespace(
        clock=clock,
        naming=naming,
        kept=kept,
        lines=lines,
        maps=maps,
        access=access,
        give=give,
        after=after,
        log=log,
    )


SUPERBLOCK = (1024, 1024)


def test_reads_with_a_map_that_is_up_to_date_pass_at_once(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    guest.access(READ, (disks.stays, 4096), (disks.goes, 1024), (0, 4096))
    assert {piece[3] for piece in guest.kept.pieces} >= {"/stays", "/goes", "[superblock]"}
    guest.after(1000)
    assert guest.maps.asked == 0


def test_writes_of_files_that_exist_ask_for_no_map(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    guest.access(WRITE, (disks.stays, 4096))
    guest.after(1000)
    assert guest.maps.asked == 0


def test_what_follows_a_metadata_write_is_named_by_the_new_map(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    guest.access(WRITE, SUPERBLOCK, (disks.moved, 1024), (disks.comes, 1024))
    assert [piece[3] for piece in guest.kept.pieces] == ["[superblock]"]
    guest.after(200)
    assert guest.maps.asked == 1
    guest.give(disks.maps[1], guest.clock.now)
    guest.log.flush()
    assert [line.split("\t")[0].split(" ", 3)[3] for line in guest.lines] == [
        "[superblock]",
        "/new name",
        "/comes",
    ]
    assert not any("older" in line for line in guest.lines)
    assert guest.naming.is_settled


def test_content_that_comes_before_its_metadata_is_named_late(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    guest.access(WRITE, (disks.comes, 4096))
    guest.access(READ, (disks.stays, 1024))
    assert [line.split("\t")[0] for line in guest.lines] == []  # held; the read is still an open line
    guest.after(100)
    guest.access(WRITE, SUPERBLOCK)
    guest.after(200)
    guest.give(disks.maps[1], guest.clock.now)
    guest.log.flush()
    names = [
        (line.split("\t")[0].split(" ", 3)[3], line.rstrip("\n").split("\t")[2:]) for line in guest.lines
    ]
    assert names == [("/stays", []), ("[superblock]", []), ("/comes", ["late"])]


def test_no_one_waits_long_and_older_names_are_marked(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    guest.access(WRITE, SUPERBLOCK)
    guest.access(READ, (disks.moved, 1024))
    guest.after(100)
    assert guest.maps.asked == 1
    guest.after(naming_module.PATIENCE // MS - 200)
    assert len(guest.kept.pieces) == 1
    guest.after(200)
    guest.log.flush()
    assert guest.lines[-1].split("\t") == ["read f /dev/sda /old name", "0x0-0x400", "older map\n"]


def test_what_nobody_claims_is_free_space_in_the_end(disks: SimpleNamespace, guest: SimpleNamespace) -> None:
    guest.access(WRITE, (disks.comes, 4096))
    guest.after(naming_module.CLAIM // MS - 10)
    assert guest.lines == []
    guest.after(20)
    assert [line.split("\t")[0] for line in guest.lines] == ["write e /dev/sda"]


def test_a_map_that_fails_or_lost_a_filesystem_is_not_used(
    disks: SimpleNamespace, guest: SimpleNamespace, tmp_path: Path
) -> None:
    blank = tmp_path / "blank.img"
    with open(blank, "wb") as file:
        file.truncate(disks.size)
    guest.access(WRITE, SUPERBLOCK)
    guest.after(200)
    guest.maps.next = Refreshed(guest.clock.now, 0.1, error="can't be read")
    guest.naming.tick()
    assert (guest.naming.failures, guest.naming.resolver.number) == (1, 0)
    guest.after(100)
    assert guest.maps.asked == 1  # not at once again
    guest.after(2000)
    assert guest.maps.asked == 2
    begun = guest.clock.now
    guest.after(10)
    guest.access(WRITE, SUPERBLOCK)  # it is being written while it is read
    guest.give(mapped(blank), begun)
    assert (guest.naming.failures, guest.naming.resolver.number) == (2, 0)
    assert "/dev/sda" in guest.naming.failure
    guest.after(5000)
    assert guest.maps.asked == 3
    guest.give(mapped(blank), guest.clock.now)  # nothing is written any more: the disk is like that
    assert guest.naming.resolver.number == 1


def test_a_guest_that_never_rests_gets_maps_all_the_same(
    disks: SimpleNamespace, guest: SimpleNamespace
) -> None:
    for _ in range(200):
        guest.access(WRITE, SUPERBLOCK)
        guest.after(5)
        if guest.maps.busy:
            guest.give(disks.maps[0], guest.clock.now - MS)
    assert guest.maps.asked >= 8


def test_every_byte_is_named_once_whatever_happens(
    disks: SimpleNamespace, guest: SimpleNamespace, tmp_path: Path
) -> None:
    """Random accesses, maps that change, come late or fail: brute force counts the bytes of each access;
    trace and summary agree."""
    chooser = random.Random(4)
    summary = Summary(guest.naming.resolver, 1)
    with open(tmp_path / "trace.parquet", "wb") as file:
        trace = Trace(guest.naming.resolver, file)
        guest.naming.sinks = Sinks([guest.kept, EachDisk({1: summary}), trace])
        asked = []
        for _ in range(300):
            ranges = [
                (chooser.randrange(0, disks.size - 9000) & ~511, chooser.randrange(1, 17) * 512)
                for _ in range(chooser.randrange(1, 5))
            ]
            guest.access(chooser.choice([READ, WRITE]), *ranges)
            asked += ranges
            guest.after(chooser.choice([0, 1, 30, 300, 3000]))
            if guest.maps.busy and chooser.random() < 0.3:
                if chooser.random() < 0.2:
                    guest.maps.next = Refreshed(guest.clock.now, 0.1, error="no")
                else:
                    guest.give(chooser.choice(disks.maps), guest.clock.now - chooser.randrange(100) * MS)
        guest.naming.finish()
        trace.close()
    counted = np.zeros(len(asked), np.int64)
    for number, start, end, _, _ in guest.kept.pieces:
        counted[number] += end - start
        assert asked[number][0] <= start < end <= sum(asked[number])
    assert counted.tolist() == [length for _, length in asked]
    rows = pq.read_table(tmp_path / "trace.parquet").to_pylist()
    assert [(row["offset"], row["length"]) for row in rows] == asked
    in_trace = [
        (n, o["offset"], o["offset"] + o["length"])
        for n, row in enumerate(rows)
        for o in row["objects"]
        if not o["inline"]
    ]
    assert sorted(in_trace) == sorted(piece[:3] for piece in guest.kept.pieces)
    objects = summary.objects().to_pylist()
    assert sum(row["read"] + row["written"] for row in objects) == sum(length for _, length in asked)
    assert len({(row["kind"], row["name"]) for row in objects}) == len(objects)
    assert {row["name"] for row in objects if row["kind"] == "data"} == {
        piece[3]
        for piece in guest.kept.pieces
        if piece[3].startswith("/") and piece[3] not in ("/", "/lost+found")
    }


def test_a_new_filesystem_is_noticed_by_its_signature(tmp_path: Path) -> None:
    blank = tmp_path / "blank.img"
    with open(blank, "wb") as file:
        file.truncate(8 << 20)
    index = signatures(mapped(blank), 1)
    hit, _ = index.overlaps(
        np.array([1024, 4 << 20, (8 << 20) - 512]), np.array([2048, (4 << 20) + 512, 8 << 20])
    )
    assert hit.tolist() == [0, 2]


def test_lost_names_the_filesystems_that_are_gone(disks: SimpleNamespace) -> None:
    assert lost(*disks.maps) == ""


# ---- the other process -------------------------------------------------------------------------------------


def test_tables_and_paths_come_back_as_they_were(disks: SimpleNamespace, tmp_path: Path) -> None:
    save(disks.maps[0], str(tmp_path / "map"))
    found = load(str(tmp_path / "map"))
    for name in found.TABLES:
        assert getattr(found, name).equals(getattr(disks.maps[0], name))
    for mine, theirs in zip(found.paths(0), disks.maps[0].paths(0), strict=True):
        assert mine.tolist() == theirs.tolist() if isinstance(mine, np.ndarray) else mine.equals(theirs)


@pytest.fixture
def served(disks: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """(folder, URI) of a server."""
    need("nbdkit", "nbdkit")
    with (
        private_folder() as folder,
        serve(Source(str(disks.after), "raw", disks.size), folder, False) as server,
    ):
        yield folder, server.address.uri("virt-bmap-test")


def wait(refresher: Refresher) -> Refreshed:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if found := refresher.result():
            return found
        time.sleep(0.01)
    raise AssertionError("no map came")


def test_the_map_comes_from_the_server_and_the_guest_is_not_blamed(
    disks: SimpleNamespace, served: tuple[str, str]
) -> None:
    folder, uri = served
    refresher = Refresher(Disks([]))
    refresher.serve(folder, [uri])
    try:
        for number in (1, 2):
            refresher.begin()
            found = wait(refresher)
            assert found.resolver
            assert found.resolver.number == number
            assert found.resolver.bmap.extents.equals(disks.maps[1].extents)
    finally:
        refresher.close()
    log = Path(folder, "log").read_bytes()
    assert b" Read " in log
    parser = LogParser("virt-bmap-test")
    assert len(parser.feed(log)) == 0
    assert (parser.open_connections, parser.lost, parser.unread) == (0, 0, 0)
    assert len(LogParser("virt-bmap-other").feed(log)) > 0
    assert not [name for name in os.listdir(folder) if name.startswith("map")]


def test_what_can_not_be_read_is_said_and_tried_again(served: tuple[str, str]) -> None:
    folder, _ = served
    refresher = Refresher(Disks([]))
    refresher.serve(folder, [f"nbd+unix:///?socket={folder}/nobody"])
    try:
        for _ in range(2):
            refresher.begin()
            assert "nobody" in wait(refresher).error
    finally:
        refresher.close()


def test_a_process_that_is_killed_is_started_again_a_few_times(served: tuple[str, str]) -> None:
    folder, uri = served
    refresher = Refresher(Disks([]))
    refresher.serve(folder, [uri])
    refresher.begin()
    refresher._process.kill()
    found = wait(refresher)
    assert "ended" in found.error
    assert not refresher.ended
    refresher.begin()
    assert wait(refresher).resolver
    for _ in range(MOST_DEATHS):
        assert not refresher.ended
        refresher.begin()
        refresher._process.kill()
        assert wait(refresher).error
    assert refresher.ended
    refresher.close()
    assert not [name for name in os.listdir(folder) if name.startswith("map")]


# ---- a real guest ------------------------------------------------------------------------------------------


@pytest.mark.guest
def test_files_that_a_real_guest_writes_are_named(tmp_path: Path) -> None:
    """A Linux in QEMU writes files with fsync to an ext4: the bytes on the disk say whose each of the named
    pieces is."""
    for tool, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("nbdkit", "nbdkit"),
        ("mke2fs", "e2fsprogs"),
        ("cpio", "cpio"),
    ):
        need(tool, package)
    import qemu_guest

    image, count = tmp_path / "disk.img", 300
    with open(image, "wb") as file:
        file.truncate(128 << 20)
    run("mke2fs", "-q", "-t", "ext4", image)
    try:
        command = qemu_guest.command(tmp_path, "ext4", count)
    except SystemExit as error:
        pytest.skip(f"the guest's package can't be had here: {str(error)[-200:]}")
    trace, log = tmp_path / "trace.parquet", tmp_path / "log"
    watched = [BMAP, "watch", "--write", "-o", trace, "--log", log, image, "--", *command]
    done = subprocess.run(watched, capture_output=True, text=True, timeout=240)
    console = (tmp_path / "console.txt").read_text(errors="replace")
    assert done.returncode == 0, done.stderr + console[-500:]
    assert "written" in console
    disk, number_of = image.read_bytes(), {qemu_guest.path(n): n for n in range(count)}
    wrong, named, pieces = 0, set(), 0
    for row in pq.read_table(trace, columns=["op", "objects"]).to_pylist():
        for piece in row["objects"] if row["op"] == "write" else ():
            if piece["kind"] == "data":
                name, inside = piece["path"].decode(), piece["file_offset"]
                data = qemu_guest.content(number_of[name])[inside : inside + piece["length"]]
                wrong += disk[piece["offset"] : piece["offset"] + len(data)] != data
                named.add(name)
                pieces += 1
    assert wrong <= pieces // 100
    assert len(named) >= 0.99 * count
    logged = {
        line.split("\t")[0].split(" ", 3)[3]
        for line in log.read_text().splitlines()
        if line.startswith("write f ")
    }
    assert len(logged & set(number_of)) >= 0.99 * count
