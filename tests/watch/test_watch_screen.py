"""`watch --tui`: what is counted (brute force), how it is drawn, the keys (Textual's pilot), and the command
on a real terminal (a pty)."""

import asyncio
import csv
import os
import pty
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from textual.pilot import Pilot
from textual.widgets import Input, RichLog, Static

from support import mapped, need, run
from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import Resolver
from virt_bmap.core.errors import ImageError
from virt_bmap.model import tables
from virt_bmap.watch.activity import BINS, SORTS, Activity, ObjectRow, Strip
from virt_bmap.watch.cells import (
    BOTH,
    READS,
    TOUCHED,
    WRITES,
    Light,
    rows_lines,
    shortened,
    spark,
    strip_lines,
)
from virt_bmap.watch.screen import CommandOutput, Watching, plain
from virt_bmap.watch.session import Outcome, Runner

BMAP = str(Path(sys.executable).parent / "virt-bmap")
BLOCK = 1024
READ, WRITE = tables.OPS.index("read"), tables.OPS.index("write")
HOSTILE = "[bold red]x[end] \x1b[2J"
ESCAPED = "[bold red]x[end] \\x1b[2J"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small ext4 with a few files, one of them with a hostile name."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("screen")
    (folder / "tree/usr/share/a rather long folder name").mkdir(parents=True)
    names = ["one", "two", HOSTILE, "usr/share/a rather long folder name/and a file in it"]
    for name in names:
        (folder / "tree" / name).write_bytes(random.Random(name).randbytes(20_000))
    image = folder / "disk.img"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-d", folder / "tree", image)
    bmap = mapped(image)
    inode, paths = bmap.paths(0)
    where = {}
    for number, path in zip(inode.tolist(), paths.to_pylist(), strict=True):
        mine = (tables.integers(bmap.extents, "inode") == number) & (
            tables.codes(bmap.extents, "kind") == tables.DATA
        )
        if mine.any():
            where[path.decode()] = int(tables.integers(bmap.extents, "volume_offset")[mine][0])
    return SimpleNamespace(image=image, map=bmap, where=where, size=16 << 20)


def accesses(op: int, *ranges: tuple[int, int]) -> Accesses:
    offset, length = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    n = len(ranges)
    return Accesses(time.time_ns() + np.arange(n), np.ones(n, np.int64), np.full(n, op), offset, length)


def feed(activity: Activity, resolver: Resolver, found: Accesses) -> None:
    activity.add(1, found, resolver.touched(1, found.offset, found.length))


# ---- counting ----------------------------------------------------------------------------------------------


def test_sums_are_those_of_brute_force_and_outlive_a_map(disk: SimpleNamespace) -> None:
    chooser = random.Random(2)
    activity, read, written = Activity(Resolver(disk.map)), {}, {}
    place = np.zeros((2, BINS), bool)
    for number in range(6):
        resolver = Resolver(disk.map, number)
        activity.renew(resolver)
        for _ in range(5):
            op, name = chooser.choice([READ, WRITE]), chooser.choice(list(disk.where))
            offset, length = disk.where[name] + chooser.randrange(4) * BLOCK, chooser.randrange(1, 9) * BLOCK
            feed(activity, resolver, accesses(op, (offset, length)))
            sums = read if op == READ else written
            sums[name] = sums.get(name, 0) + length
            place[int(op != READ), offset * BINS // disk.size : (offset + length) * BINS // disk.size + 1] = (
                True
            )
    rows = {row.name: row for row in activity.rows(100)}
    assert {name: row.read for name, row in rows.items() if row.read} == {
        name.replace("\x1b", "\\x1b"): n for name, n in read.items()
    }
    assert {name: row.written for name, row in rows.items() if row.written} == {
        name.replace("\x1b", "\\x1b"): n for name, n in written.items()
    }
    view = activity.look()
    assert (view.bytes[READ], view.bytes[WRITE], view.requests.sum()) == (
        sum(read.values()),
        sum(written.values()),
        30,
    )
    (strip,) = view.strips
    assert (strip.was_read == place[0]).all()
    assert (strip.was_written == place[1]).all()
    assert ((strip.reads > 0) == place[0]).all()
    assert not activity.look().strips[0].reads.any()  # nothing since


@pytest.mark.parametrize("sort", SORTS)
def test_rows_are_sorted_filtered_and_counted(disk: SimpleNamespace, sort: str) -> None:
    resolver = Resolver(disk.map)
    activity = Activity(resolver)
    for number, name in enumerate(disk.where):
        feed(activity, resolver, accesses(READ, *[(disk.where[name], BLOCK * (number + 1))] * (4 - number)))
        feed(activity, resolver, accesses(WRITE, (disk.where[name], BLOCK * (5 - number))))
    rows = activity.rows(3, sort)
    key: dict[str, Callable[[ObjectRow], Any]] = {
        "bytes": lambda row: -row.read - row.written, "read": lambda row: -row.read,
        "written": lambda row: -row.written, "accesses": lambda row: -row.accesses,
        "recent": lambda row: -row.last_ns, "name": lambda row: row.name,
    }  # fmt: skip
    everything = activity.rows(100)
    assert [key[sort](row) for row in rows] == sorted(key[sort](row) for row in everything)[:3]
    assert [row.name for row in activity.rows(10, sort, "FOLDER name")] == [
        "/usr/share/a rather long folder name/and a file in it"
    ]
    assert activity.rows(10, sort, since_ns=time.time_ns() + 10**9) == []
    assert activity.table().num_rows == len(everything)


# ---- drawing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1, 1), (38, 3), (118, 3), (5000, 1)])
def test_the_strip_shows_where_and_how(width: int, height: int) -> None:
    none = np.zeros(BINS, np.int64)
    reads, writes = none.copy(), none.copy()
    reads[[0, BINS // 2]] = 1
    writes[[BINS // 2, BINS - 1]] = 3
    ever = np.zeros(BINS, bool)
    ever[BINS // 4] = True
    light = Light()
    strip = Strip("/dev/sda", 1 << 30, reads, writes, ever, ever)
    light.fade(strip)
    lines = strip_lines(strip, light, width, height).plain.split("\n")
    assert [cell_len(line) for line in lines] == [width] * height
    cells = "".join(lines)
    if len(cells) > 100:
        assert cells[0] == READS
        assert cells[-1] == WRITES
        assert cells[len(cells) // 2] == BOTH
        assert cells[len(cells) // 4] == TOUCHED
    for _ in range(20):
        light.fade(Strip("/dev/sda", 1 << 30, none, none, ever, ever))
    assert set(strip_lines(strip, light, width, height).plain) <= {" ", TOUCHED, "\n"}  # it fades


def test_names_are_cut_to_any_width() -> None:
    for name in (
        "/a/b",
        "/usr/share/zoneinfo/America/Argentina/Buenos_Aires",
        "/中文" * 40,
        "a" * 5000,
        "e\u0301" * 100,
    ):
        for width in range(60):
            assert cell_len(shortened(name, width)) <= width or cell_len(name) == 0
        assert shortened(name, cell_len(name)) == name
    assert shortened("/usr/share/zoneinfo/America/Argentina/Buenos_Aires", 20).endswith("Buenos_Aires")


@pytest.mark.parametrize("width", [20, 40, 64, 200])
def test_lists_fit(width: int) -> None:
    rows = [
        ObjectRow("f", "/dev/vg/root", "/中文/" * 30, 1 << 40, 3, 10**9, 1),
        ObjectRow("v", "/dev/sda", "", 0, 0, 1, 1),
    ]
    for sort in SORTS:
        assert all(cell_len(line) <= width for line in rows_lines(rows, sort, width).plain.split("\n"))


def test_bars() -> None:
    assert spark([], 5) == "     "
    assert spark([0, 1, 4, 8], 4) == " ▁▄█"
    assert spark([9.0] * 100, 3) == "███"
    assert spark([1.0], 0) == ""


# ---- the screen --------------------------------------------------------------------------------------------


class Stage:
    """The app with a watch that the test plays itself."""

    def __init__(
        self, disk: SimpleNamespace, size: tuple[int, int], fail: BaseException | None = None
    ) -> None:
        self.resolver = Resolver(disk.map)
        self.activity = Activity(self.resolver)
        self.over = threading.Event()
        self.fail = fail
        self.app = Watching(self.activity, self.go)
        self.size = size

    def go(self, run: Runner) -> Outcome:
        if self.fail:
            raise self.fail
        with run(
            ["sh", "-c", "printf '\\033[31mred\\033[0m \\033[2J[bold]\\n'; echo last"], dict(os.environ)
        ) as child:
            child.wait()
        self.over.wait(30)
        return Outcome(status=3)

    def play(self, act: "Callable[[Pilot[None]], Coroutine[Any, Any, None]]") -> Outcome:
        async def main() -> None:
            async with self.app.run_test(size=self.size) as pilot:
                await act(pilot)
                self.over.set()

        try:
            asyncio.run(main())
        finally:
            self.over.set()
        return self.app.finish()

    def text(self, part: str) -> str:
        found = self.app.query_one(part, Static)
        return "\n".join(
            "".join(segment.text for segment in found.render_line(y)) for y in range(found.size.height)
        )


async def until(pilot: "Pilot[None]", true: Callable[[], bool]) -> None:
    for _ in range(100):
        if true():
            return
        await pilot.pause(0.05)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("size", [(120, 40), (40, 24), (40, 12)])
def test_lists_keys_and_output(
    disk: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = Stage(disk, size)
    room = size[1] >= 24

    async def act(pilot: "Pilot[None]") -> None:
        feed(
            stage.activity,
            stage.resolver,
            accesses(READ, (disk.where["/one"], 4096), (disk.where[f"/{HOSTILE}"], 2048)),
        )
        feed(stage.activity, stage.resolver, accesses(WRITE, (disk.where["/two"], 8192)))
        await until(
            pilot, lambda: "12.0 KiB" in stage.text("#status") or "8.0 KiB written" in stage.text("#status")
        )
        if room:
            await until(pilot, lambda: "/two" in stage.text("#top"))
            assert ESCAPED in stage.text("#now") or "…" in stage.text("#now")  # as it is, no markup
        assert set(stage.text("#strips")) & {READS, WRITES, BOTH}
        output = stage.app.query_one("#output", RichLog)
        await until(pilot, lambda: output.display and len(output.lines) >= 2)
        assert [line.text.strip() for line in output.lines] == ["red [bold]", "last"]
        await pilot.press("o")
        assert not output.display
        await pilot.press("s")
        assert stage.app.sort == "read"
        await pilot.press("slash", "T", "w", "o")
        assert stage.app.words == "Two"
        assert stage.app.query_one("#filter", Input).display
        await pilot.press("enter")
        assert not stage.app.query_one("#filter", Input).display
        await until(pilot, lambda: "only Two" in stage.text("#status"))
        if room:
            await until(pilot, lambda: "/one" not in stage.text("#top") and "/two" in stage.text("#top"))
        await pilot.press("escape")
        assert stage.app.words == ""
        await pilot.press("w")
        await until(pilot, lambda: any(tmp_path.glob("watch-*.csv")))
        await pilot.press("space")
        assert stage.app.paused
        feed(stage.activity, stage.resolver, accesses(READ, (0, 1 << 20)))
        await pilot.pause(0.6)
        assert "superblock" not in stage.text("#now")
        await pilot.press("space", "q")  # the watch still goes on
        await pilot.pause()
        assert stage.app.is_running
        stage.over.set()
        await until(pilot, lambda: not stage.app.is_running)

    assert stage.play(act).status == 3
    (saved,) = tmp_path.glob("watch-*.csv")
    with open(saved, newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["/two"]["written"] == "8192"
    assert rows[f"/{ESCAPED}"]["read"] == "2048"


def test_nothing_happens_and_the_end_is_shown(disk: SimpleNamespace) -> None:
    stage = Stage(disk, (80, 24))

    async def act(pilot: "Pilot[None]") -> None:
        await pilot.pause(0.5)
        stage.over.set()
        await until(pilot, lambda: "ended, status 3" in stage.text("#status"))
        await pilot.press("q")
        await until(pilot, lambda: not stage.app.is_running)

    assert stage.play(act).status == 3


def test_a_watch_that_fails_takes_the_screen_away_and_its_words_come_through(disk: SimpleNamespace) -> None:
    stage = Stage(disk, (80, 24), ImageError("disk.img: can't be served"))

    async def act(pilot: "Pilot[None]") -> None:
        await until(pilot, lambda: not stage.app.is_running)

    with pytest.raises(ImageError, match="can't be served"):
        stage.play(act)


def test_output_is_kept_harmless_and_never_stalls_the_command() -> None:
    assert plain(b"\x1b]0;title\x07a\x1b[1;31mb\x1b(B\tc\x9b\r") == "ab    c\\x9b"
    output = CommandOutput()
    with output.run(
        ["sh", "-c", "yes x | head -c 3000000; printf 'no end of line'"], dict(os.environ)
    ) as child:
        assert child.wait(20) == 0
    assert output.count == 1_500_001
    assert list(output.lines)[-2:] == ["x", "no end of line"]
    output = CommandOutput()
    with output.run(["head", "-c", "10000000", "/dev/zero"], dict(os.environ)) as child:
        child.wait(20)
    assert 1000 < sum(map(len, output.lines)) < 10_000_000


# ---- the command -------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines(disk: SimpleNamespace) -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    command = [
        BMAP,
        "watch",
        "--tui",
        disk.image,
        "--",
        "qemu-io",
        "-f",
        "raw",
        "-c",
        f"read {disk.where['/one']} 1k",
        "$uri",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stderr == "virt-bmap: --tui needs a terminal: plain lines instead\n"
    assert "read f /dev/sda /one\t0x0-0x400\n" in done.stdout


def test_on_a_terminal_of_40_columns(disk: SimpleNamespace) -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    client = f"qemu-io -f raw -c 'read {disk.where['/one']} 4k' $1; echo said; exit 5"
    main, ours = pty.openpty()
    run("stty", "-F", os.ttyname(ours), "rows", "24", "cols", "40")
    process = subprocess.Popen(
        [BMAP, "watch", "--tui", disk.image, "--", "sh", "-c", client, "sh", "$uri"],
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(ours)
    shown, asked = b"", False
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([main], [], [], 0.2)[0]:
            try:
                data = os.read(main, 65536)
            except OSError:
                break
            shown += data
        if not asked and b"ended, status 5" in shown:
            os.write(main, b"q")
            asked = True
    os.close(main)
    assert process.wait(20) == 5
    screen, _, after = shown.partition(b"\x1b[?1049l")
    assert b"\x1b[?1049h" in screen  # on the alternate screen, and off it again
    assert b"Traceback" not in shown
    assert b"said" in after  # the last words of a command that failed
    assert b"/dev/sda: 1 read (4.0 KiB)" in after or b"/one" in after


@pytest.mark.parametrize("hang_up", [True, False])
def test_a_terminal_that_goes_away_ends_the_watch_and_keeps_the_trace(
    disk: SimpleNamespace, tmp_path: Path, hang_up: bool
) -> None:
    """With the signal that a terminal's own session gets, and without."""
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    client = f"qemu-io -f raw -c 'read {disk.where['/one']} 4k' $1; exec sleep 60"
    main, ours = pty.openpty()
    trace = tmp_path / "trace.parquet"
    take = (
        "import fcntl, termios, os; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        if hang_up
        else "import os; os.setsid()"
    )
    command = [BMAP, "watch", "--tui", disk.image, "-o", trace, "--", "sh", "-c", client, "sh", "$uri"]
    start = f"{take}; os.execv({str(BMAP)!r}, {[str(word) for word in command]!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        stdin=ours,
        stdout=ours,
        stderr=ours,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(ours)
    shown, until = b"", time.monotonic() + 60
    while b"4.0 KiB read" not in shown and time.monotonic() < until:
        if select.select([main], [], [], 0.2)[0]:
            shown += os.read(main, 65536)
    os.close(main)
    process.wait(30)
    assert pq.read_table(trace).num_rows >= 1
