"""Profiles, against plain loops over bytes; replays, against the log of the server that they warm."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import need, wait_for_socket
from virt_bmap.accesses.logs import parse
from virt_bmap.accesses.profile import saved
from virt_bmap.accesses.profile.build import build
from virt_bmap.accesses.profile.compare import compare
from virt_bmap.accesses.profile.exports import EXPORTS, write
from virt_bmap.accesses.profile.replay import replay
from virt_bmap.accesses.profile.summary import disk_ranges, files, totals
from virt_bmap.accesses.trace import KEY, SCHEMA
from virt_bmap.accesses.traces import load
from virt_bmap.cli import run as cli
from virt_bmap.core.arrays import first_covers
from virt_bmap.core.errors import BmapError, ImageError, MapError, UsageError
from virt_bmap.model import tables
from virt_bmap.open import open_image

SIZE = 1 << 20
Access = tuple[str, int, int]
"""(operation, first byte, bytes); the objects are files of 16 bytes, one after the other, named by their
number."""
FILE = 16


def write_trace(path: Path, accesses: list[Access], size: int = SIZE) -> str:
    """A trace with an access a second; what each touched is split at the files' borders by a loop."""
    rows = []
    for n, (op, offset, length) in enumerate(accesses):
        objects = []
        at = offset
        while at < offset + length:
            number, end = at // FILE, min(offset + length, (at // FILE + 1) * FILE)
            objects.append(
                {
                    "device": "/dev/sda1",
                    "kind": "data",
                    "path": b"/dir/%d" % number,
                    "part": None,
                    "inode": number,
                    "offset": at,
                    "length": end - at,
                    "file_offset": at - number * FILE,
                    "inline": False,
                    "map": 0,
                    "older": False,
                }
            )
            at = end
        rows.append(
            {
                "disk": 1,
                "time_ns": n * 10**9,
                "connection": 1,
                "op": op,
                "offset": offset,
                "length": length,
                "objects": objects,
            }
        )
    about = {KEY: f'{{"version": 1, "disks": [{size}]}}'}
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(about)), path)
    return str(path)


# ---- against loops -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=20))
def test_first_covers_is_what_a_loop_finds(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([min(pair) for pair in ranges], np.int64)
    ends = np.array([max(pair) for pair in ranges], np.int64)
    expected = [
        next((n for n, (a, b) in enumerate(ranges) if min(a, b) <= slot < max(a, b)), len(ranges))
        for slot in range(40)
    ]
    assert first_covers(starts, ends, 40).tolist() == expected


ACCESSES = st.lists(
    st.tuples(st.sampled_from(["read", "read", "write", "trim"]), st.integers(0, 90), st.integers(1, 40)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACCESSES, min_size=1, max_size=3))
def test_every_byte_is_in_the_runs_that_needed_it(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[Access]]
) -> None:
    """Byte by byte: how many runs read it before they wrote it, when first, and how often."""
    folder = tmp_path_factory.mktemp("runs")
    profile = build(load([write_trace(folder / f"{n}.parquet", run) for n, run in enumerate(runs)]))
    needed: dict[int, tuple[int, int, int]] = {}
    for run in runs:
        for byte in range(150):
            mine = [(n, op) for n, (op, offset, length) in enumerate(run) if offset <= byte < offset + length]
            if mine and mine[0][1] == "read":
                count, first, reads = needed.get(byte, (0, 1 << 60, 0))
                needed[byte] = (
                    count + 1,
                    min(first, mine[0][0] * 10**9),
                    reads + sum(op == "read" for _, op in mine),
                )
    found, bytes_read, order = {}, 0, []
    for row in profile.ranges.to_pylist():
        order.append(row["first_ns"])
        bytes_read += row["read"]
        for byte in range(row["offset"], row["offset"] + row["length"]):
            assert byte not in found
            assert row["path"] == b"/dir/%d" % (byte // FILE)
            assert row["file_offset"] + byte - row["offset"] == byte % FILE
            found[byte] = row["runs"], row["first_ns"]
    assert found == {byte: (count, first) for byte, (count, first, _) in needed.items()}
    assert bytes_read == sum(reads for _, _, reads in needed.values())
    assert order == sorted(order)
    assert sum(total["needed"] for total in totals(profile)) == len(needed)
    assert sum(total["common"] for total in totals(profile)) == sum(
        count == len(runs) for count, _, _ in needed.values()
    )


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    profile = build(load([write_trace(tmp_path / "t", [("read", 0, 100), ("read", 50, 100)])]))
    with open(tmp_path / "p", "wb") as file:
        saved.save(profile, file)
    again = saved.load(str(tmp_path / "p"))
    assert again.ranges.equals(profile.ranges)
    assert (again.runs, again.sizes) == (profile.runs, [SIZE])


# ---- comparing and lists -----------------------------------------------------------------------------------


def test_what_changed_between_two_boots_is_told_as_what_it_is(tmp_path: Path) -> None:
    common = [("read", n * FILE, 8) for n in range(100, 140)]
    old = [("read", 0, FILE), *common, ("read", 3 * FILE, FILE), ("read", 4 * FILE, 4), ("read", 5 * FILE, 8)]
    new = [
        ("read", 3 * FILE, FILE),
        *common,
        ("read", 0, FILE),
        ("read", 4 * FILE, 8),
        ("read", 5 * FILE, 4),
        ("read", 7 * FILE, 16),
    ]
    before, after = (
        build(load([write_trace(tmp_path / str(n), run)]))
        for n, run in enumerate((old, [*new[:-1], new[-1]]))
    )
    found = {(row["change"], row["name"]): row["bytes"] for row in compare(before, after).to_pylist()}
    assert found == {
        ("new", "/dir/7"): 16,
        ("more", "/dir/4"): 4,
        ("less", "/dir/5"): -4,
        ("earlier", "/dir/3"): 0,
        ("later", "/dir/0"): 0,
    }
    assert len(compare(before, before)) == 0
    gone = compare(after, before).to_pylist()[0]
    assert (gone["change"], gone["name"], gone["needed_after"]) == ("gone", "/dir/7", None)


def test_lists_say_the_same_bytes(tmp_path: Path) -> None:
    profile = build(
        load(
            [
                write_trace(tmp_path / str(n), run)
                for n, run in enumerate(([("read", 100, 30), ("read", 8, 40)], [("read", 8, 10)]))
            ]
        )
    )
    lines = {}
    for name in EXPORTS:
        with open(tmp_path / name, "wb") as file:
            assert write(profile, name, file) == 0
        lines[name] = (tmp_path / name).read_bytes().splitlines()
    wanted = set(range(8, 48)) | set(range(100, 130))

    def covered(rows: list[bytes], separator: bytes) -> set[int]:
        pairs = [tuple(map(int, row.split(separator)[:2])) for row in rows]
        return {byte for offset, length in pairs for byte in range(offset, offset + length)}

    assert covered(lines["ranges"][1:], b",") == covered(lines["extentlist"], b" ") == wanted
    assert lines["extentlist"] == [b"8 40", b"100 30"]
    assert lines["files"][:2] == [b"/dir/0", b"/dir/1"]
    assert (tmp_path / "files0").read_bytes().split(b"\0")[:-1] == lines["files"]
    inside = [
        (int(row.split()[2].removeprefix(b"/dir/")) * FILE + int(row.split()[0]), int(row.split()[1]))
        for row in lines["prefetch"]
    ]
    assert {byte for offset, length in inside for byte in range(offset, offset + length)} == wanted
    with open(tmp_path / "common", "wb") as file:
        write(profile, "extentlist", file, common=True)
    assert (tmp_path / "common").read_bytes() == b"8 10\n"


def test_nbdkit_takes_the_extent_list(tmp_path: Path) -> None:
    need("nbdkit", "nbdkit")
    need("nbdinfo", "libnbd-bin")
    profile = build(load([write_trace(tmp_path / "t", [("read", 4096, 8192), ("read", 65536, 4096)])]))
    with open(tmp_path / "list", "wb") as file:
        write(profile, "extentlist", file)
    done = subprocess.run(["nbdkit", "-r", "-U", "-", "--filter=extentlist", "memory", str(SIZE),
            f"extentlist={tmp_path}/list", "--run",
                           'nbdinfo --map "$uri"'], capture_output=True, text=True, check=True)  # fmt: skip
    data = [tuple(map(int, line.split()[:2])) for line in done.stdout.splitlines() if line.split()[2] == "0"]
    assert data == [(4096, 8192), (65536, 4096)]


def test_lookup_takes_the_ranges(tmp_path: Path) -> None:
    from virt_bmap.accesses.ranges import parse as parse_ranges

    profile = build(load([write_trace(tmp_path / "t", [("read", 4096, 8192)])]))
    with open(tmp_path / "list", "wb") as file:
        write(profile, "ranges", file)
    found = parse_ranges((tmp_path / "list").read_bytes(), "list")
    assert int((found.ends - found.starts).sum()) == 8192


# ---- replay ------------------------------------------------------------------------------------------------


def test_a_replay_asks_the_server_for_every_byte_in_few_requests(tmp_path: Path) -> None:
    """The log of a real server has all that was needed, in order of need, in a hundredth of the requests."""
    need("nbdkit", "nbdkit")
    size = 256 << 20
    chooser = np.random.default_rng(1)
    places = [int(n) * 4096 for base in (40_000, 100) for n in chooser.permutation(12_000) + base]
    log = "".join(f"{n},read,{offset},4096\n" for n, offset in enumerate(places))
    (tmp_path / "log").write_text(f"time_us,op,offset,length\n{log}")
    assert cli(["trace", "import", f"{tmp_path}/log", "-o", f"{tmp_path}/t"]) == 0
    profile = build(load([f"{tmp_path}/t"]))
    socket = tmp_path / "s"
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", socket, "--filter=log", "memory", str(size), f"logfile={tmp_path}/served"]
    )
    try:
        wait_for_socket(socket)
        reader = open_image(f"nbd+unix:///?socket={socket}")
        done = replay(profile, reader)
        reader.close()
    finally:
        server.terminate()
        server.wait()
    served = parse((tmp_path / "served").read_bytes(), "served").accesses
    asked = np.zeros(size, bool)
    for offset, length in zip(served.offset.tolist(), served.length.tolist(), strict=True):
        asked[offset : offset + length] = True
    start, end = disk_ranges(profile, 1)
    assert all(asked[a:b].all() for a, b in zip(start.tolist(), end.tolist(), strict=True))
    assert done.needed == len(places) * 4096
    assert len(served) < len(places) / 100
    assert int(served.offset[0]) >= 40_000 * 4096, "what was needed first is read first"


def test_a_replay_of_a_file_reads_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    assert write_trace(tmp_path / "t", [("read", 0, 4096), ("read", 524288, 100)])
    assert cli(["profile", f"{tmp_path}/t", "-o", f"{tmp_path}/p"]) == 0
    assert cli(["replay", "-q", f"{tmp_path}/p", f"{tmp_path}/disk"]) == 0
    done = replay(saved.load(f"{tmp_path}/p"), open_image(f"{tmp_path}/disk"))
    assert (done.needed, done.ranges) == (4196, 2)


# ---- the command, and bad input ----------------------------------------------------------------------------


def test_the_command_shows_files_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t", [("read", 32, 16), ("read", 0, 16)])
    assert cli(["profile", trace, "-o", f"{tmp_path}/p"]) == 0
    out = capsys.readouterr().out
    assert out.index("/dir/2") < out.index("/dir/0")
    assert "2 requests in 1.0 s, 32 B read" in out
    assert cli(["profile", f"{tmp_path}/p", f"{tmp_path}/p"]) == 0
    assert "no changes" in capsys.readouterr().out
    assert cli(["profile", f"{tmp_path}/p", "--export", "files"]) == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["a", "--never-read"], "needs --map MAP"),
    (["a", "b", "--compare", "--export", "files"], "give one of them"),
    (["a", "--compare"], "compares two traces or profiles; given: 1"),
    (["a", "--depth", "1"], "belongs to --never-read"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cli(["profile", *arguments])


def test_bad_traces_say_what_is_wrong(tmp_path: Path) -> None:
    good = write_trace(tmp_path / "t", [("read", 0, 16)])
    data = Path(good).read_bytes()
    cases = {
        "cut": (data[: len(data) // 2], "can't be read as a trace"),
        "text": (b"hello", "can't be read as a trace"),
        "none": (b"", "can't be read as a trace"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MapError, match=re.escape(f"{tmp_path / name}: {words}")):
            load([str(tmp_path / name)])
    empty = tmp_path / "empty"
    pq.write_table(SCHEMA.empty_table(), empty)
    with pytest.raises(MapError, match="is an empty trace: nothing was read or written"):
        load([str(empty)])
    with pytest.raises(ImageError, match="No such file"):
        load([str(tmp_path / "missing")])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other")
    with pytest.raises(MapError, match="is a Parquet file, but not a trace: it has no column 'disk'"):
        load([str(tmp_path / "other")])
    with pytest.raises(MapError, match="a Parquet file, but not a profile"):
        saved.load(str(tmp_path / "other"))
    with pytest.raises(
        MapError, match=r"is a trace of a disk of 512 bytes, but .* of a disk of 1,048,576 bytes"
    ):
        load([good, write_trace(tmp_path / "small", [("read", 0, 16)], size=512)])


def test_a_trace_of_many_row_groups_is_read_whole(tmp_path: Path) -> None:
    """Arrow reads nested columns whose names come in several pieces only group by group."""
    table = pq.read_table(write_trace(tmp_path / "t", [("read", n * 16, 16) for n in range(100)]))
    pq.write_table(table, tmp_path / "groups", row_group_size=7)
    assert totals(build(load([str(tmp_path / "groups")])))[0]["needed"] == 1600


def test_a_disk_of_another_size_is_not_warmed(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    profile = build(load([write_trace(tmp_path / "t", [("read", 0, 16)])]))
    with pytest.raises(
        MapError,
        match="disk: has 4,096 bytes, but the profile is of a disk of 1,048,576: it is another disk's",
    ):
        replay(profile, open_image(f"{tmp_path}/disk"))


def test_damaged_traces_and_profiles_end_in_words(tmp_path: Path) -> None:
    """Parquet with a byte changed here and there: read, or refused with the project's own errors."""
    trace = write_trace(tmp_path / "t", [("read", n * 10, 16) for n in range(50)])
    with open(tmp_path / "p", "wb") as file:
        saved.save(build(load([trace])), file)
    chooser = np.random.default_rng(2)
    for path, read in (
        (tmp_path / "t", lambda name: build(load([name]))),
        (tmp_path / "p", lambda name: files(saved.load(name))),
    ):
        data = path.read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            for at in chooser.integers(0, len(data), 3):
                broken[at] = chooser.integers(0, 256)
            (tmp_path / "broken").write_bytes(broken)
            try:
                read(str(tmp_path / "broken"))
            except BmapError:
                continue


def test_numbers_that_no_disk_has_are_refused(tmp_path: Path) -> None:
    table = pq.read_table(write_trace(tmp_path / "t", [("read", 0, 16)]))
    for name, value, words in (
        ("offset", (1 << 63) - 8, r"beyond byte 2\*\*63"),
        ("length", -1, "the value -1"),
        ("disk", 0, "the value 0"),
    ):
        at = table.schema.get_field_index(name)
        pq.write_table(
            table.set_column(at, table.schema.field(name), pa.array([value], table.schema.field(name).type)),
            tmp_path / "u",
        )
        with pytest.raises(MapError, match=words):
            load([str(tmp_path / "u")])


def test_every_column_of_a_profile_has_a_meaning() -> None:
    assert all(field.metadata[b"meaning"] for field in saved.RANGES)
    assert set(tables.OPS) >= {"read", "write"}
