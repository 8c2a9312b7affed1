"""Traces survive: a stream that is cut anywhere gives its whole batches, a killed watch leaves one, a full
disk stops the trace and nothing else."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_watch import disk, place  # noqa: F401
from test_watch_serving import EVER, PATCHED, client, patched, tools  # noqa: F401

from support import mapped, need, need_root, run, unmount
from virt_bmap.accesses import traces
from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.resolve import HELD, Resolver
from virt_bmap.accesses.trace import SCHEMA, Parquet, Part, Trace, about, save
from virt_bmap.core.errors import MapError, OutputError

BMAP = str(Path(sys.executable).parent / "virt-bmap")
SOON = """
import virt_bmap.accesses.trace as t, virt_bmap.watch.naming as n
n.CLAIM = t.CLAIM = t.MARGIN = 100_000_000
t.EVERY = 0.1
"""
"""What takes most of a minute takes some tenths of a second."""


def some(resolver: Resolver, count: int, seed: int) -> tuple[Accesses, object]:
    """Random reads, and what they touch."""
    chooser = np.random.default_rng(seed)
    offset = chooser.integers(0, (32 << 20) - 65536, count) // 512 * 512
    accesses = Accesses(
        10**18 + seed * 10**9 + np.arange(count),
        np.ones(count, np.int64),
        np.zeros(count, np.int64),
        offset,
        np.full(count, 4096),
    )
    return accesses, resolver.touched(1, accesses.offset, accesses.length)


@pytest.fixture
def left(disk: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A stream of five batches, the same rows as Parquet, and where each batch ends."""
    resolver = Resolver(disk.map)
    part = Part(str(tmp_path / "trace.parquet"), SCHEMA, about(resolver))
    whole = tmp_path / "whole.parquet"
    ends = []
    with open(whole, "wb") as file:
        writer = Parquet(file, about(resolver))
        for number in range(5):
            kept: list[pa.Table] = []
            trace = Trace(
                resolver, SimpleNamespace(write=lambda table, maps, kept=kept: kept.append(table), rows=None)
            )  # type: ignore[arg-type]
            trace.add(1, *some(resolver, 50 + number, number))  # type: ignore[arg-type]
            trace.close()
            part.write(kept[0], [{"map": number, "begun_ns": number}])
            ends.append(os.stat(part.path).st_size)
            writer.write(kept[0], [])
        writer.close([])
    yield SimpleNamespace(part=part, path=Path(part.path), whole=whole, ends=ends)
    part.close()


def rows(path: Path) -> list[dict[str, object]]:
    file = pq.ParquetFile(path)
    return [row for number in range(file.num_row_groups) for row in file.read_row_group(number).to_pylist()]


def test_a_stream_becomes_the_same_trace(left: SimpleNamespace, tmp_path: Path) -> None:
    made = tmp_path / "made.parquet"
    with open(made, "wb") as file:
        assert save(left.part.rows(), {"version": 1, "disks": [32 << 20]}, file) == 260
    assert rows(made) == rows(left.whole)
    assert pq.read_schema(made).equals(pq.read_schema(left.whole))
    assert [said["map"] for said in json.loads(pq.read_metadata(made).metadata[b"virt-bmap-maps"])] == list(
        range(5)
    )


def test_a_stream_that_is_cut_anywhere_gives_its_whole_batches(left: SimpleNamespace, tmp_path: Path) -> None:
    data, cut = left.path.read_bytes(), tmp_path / "cut.part"
    chooser = random.Random(4)
    counts = np.cumsum([50 + number for number in range(5)])
    for length in sorted(
        {
            *left.ends,
            *(end - 1 for end in left.ends),
            *(chooser.randrange(left.ends[0], len(data)) for _ in range(60)),
        }
    ):
        cut.write_bytes(data[:length])
        expected = int(np.append(0, counts)[np.searchsorted(left.ends, length, "right")])
        if expected:
            assert traces.read(str(cut)).rows.num_rows == expected
        else:
            with pytest.raises(MapError, match="empty"):
                traces.read(str(cut))


def test_a_damaged_stream_is_one_of_our_errors(left: SimpleNamespace, tmp_path: Path) -> None:
    data, damaged = left.path.read_bytes(), tmp_path / "damaged.part"
    chooser = random.Random(5)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(chooser.randrange(1, 20)):
            changed[chooser.randrange(4, len(changed))] = chooser.randrange(256)
        damaged.write_bytes(changed)
        try:
            traces.load([str(damaged)])
        except MapError:
            continue


def test_profile_report_and_recover_take_what_is_left(
    left: SimpleNamespace, disk: SimpleNamespace, tmp_path: Path
) -> None:
    saved = tmp_path / "map.parquet"
    run(BMAP, "-o", saved, disk.image)
    run(BMAP, "profile", left.path, "-o", tmp_path / "boot.profile")
    run(BMAP, "report", saved, left.path, "-o", tmp_path / "disk.html")
    run(BMAP, "trace", "recover", left.path, "-o", tmp_path / "again.parquet")
    assert rows(tmp_path / "again.parquet") == rows(left.whole)
    said = subprocess.run([BMAP, "profile", tmp_path / "trace.parquet"], capture_output=True, text=True)
    assert said.returncode == 1
    assert f"{left.path} was left by a watch that was killed" in said.stderr
    said = subprocess.run(
        [BMAP, "trace", "recover", saved, "-o", tmp_path / "no.parquet"], capture_output=True, text=True
    )
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)


def test_two_watches_do_not_write_one_trace(left: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="another watch"):
        Part(str(tmp_path / "trace.parquet"), SCHEMA, {})
    data = left.path.read_bytes()
    left.part.close(keep=True)  # as when it is killed
    other = Part(str(tmp_path / "trace.parquet"), SCHEMA, {})
    assert Path(other.moved).read_bytes() == data
    other.close()
    assert not left.path.exists()


# ---- watches that end in bad ways --------------------------------------------------------------------------


def test_what_a_killed_watch_traced_is_there(disk: SimpleNamespace, tmp_path: Path) -> None:
    trace, part = tmp_path / "trace.parquet", tmp_path / "trace.parquet.part"
    words = [
        sys.executable,
        "-c",
        PATCHED.format(faults=SOON),
        "watch",
        "-q",
        "-o",
        str(trace),
        str(disk.image),
        *client(disk, 30),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    until = time.monotonic() + 60
    size = 0
    while time.monotonic() < until and size < 20_000:
        time.sleep(0.1)
        size = part.stat().st_size if part.exists() else 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)  # the guest
    assert not trace.exists()
    found = traces.load([str(part)], disk.map)
    assert {"/boot/vmlinuz", "/boot/initrd"} <= set(found.labels())
    done = patched("", "-q", "-o", trace, disk.image, "--", "true")
    assert done.returncode == 0, done.stderr
    assert (
        f"{part}: was left by a watch that was killed; it is kept as {tmp_path}/trace.parquet.1.part"
        in done.stderr
    )
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("trace")) == [
        "trace.parquet",
        "trace.parquet.1.part",
    ]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of 256 KiB."""
    need_root()
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256k", "none", folder)
    yield folder
    unmount(folder)


def test_a_full_disk_stops_the_trace_and_nothing_else(disk: SimpleNamespace, small: Path) -> None:
    (small / "filler").write_bytes(bytes(200 << 10))
    # a few at first, which fit
    counts = (50, 5000, 5000, 5000)
    scattered = "; ".join(
        f"qemu-img bench -f raw -c {count} -d 8 -s 512 -S 6656 -o 0 $uri > /dev/null && sleep 1"
        for count in counts
    )
    need("qemu-img", "qemu-utils")
    done = patched(
        SOON, "-q", "-o", small / "trace.parquet", disk.image, "--", "sh", "-c", f"{scattered}; exit 6"
    )
    assert done.returncode == 6, done.stderr
    assert "15,050 reads" in done.stdout or "15050 reads" in done.stdout
    assert "the trace is not complete: No space left on device" in done.stderr
    if (small / "trace.parquet").exists():
        assert 0 < len(rows(small / "trace.parquet")) < 15_050
    else:
        assert "is kept in" in done.stderr
        (small / "filler").unlink()
        run(BMAP, "trace", "recover", small / "trace.parquet.part", "-o", small / "again.parquet")
        assert 0 < len(rows(small / "again.parquet")) < 15_050


def test_a_trace_keeps_no_more_in_memory_than_its_last_minute(
    disk: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests go to the disk when their time has come, however few they are."""
    from virt_bmap.accesses import trace as module

    monkeypatch.setattr(module, "EVERY", -1.0)
    resolver = Resolver(mapped(disk.image))
    part = Part(str(tmp_path / "trace.parquet"), SCHEMA, about(resolver))
    trace = Trace(resolver, part, often=True)
    for number in range(20):
        trace.add(1, *some(resolver, 10, number))  # type: ignore[arg-type]
        trace.beat()
        assert not trace._waiting
    part.close()


def test_an_open_piece_that_comes_again_in_parts_is_whole_in_the_end(disk: SimpleNamespace) -> None:
    """Random parts of open pieces come again, in any order, between looks at what is ready: each byte is in
    the trace once, where it belongs."""
    resolver, chooser = Resolver(disk.map), random.Random(6)
    for _ in range(40):
        accesses, touched = some(resolver, 20, chooser.randrange(10**6))
        kept: list[pa.Table] = []
        trace = Trace(
            resolver, SimpleNamespace(write=lambda table, maps, kept=kept: kept.append(table), rows=None)
        )  # type: ignore[arg-type]
        trace.add(1, accesses, replace(touched, state=np.full(len(touched), HELD, np.uint8)))  # type: ignore[type-var]
        parts = [
            (number, at, 512)
            for number, offset in enumerate(accesses.offset.tolist())
            for at in range(offset, offset + 4096, 512)
            if chooser.random() < 0.7
        ]
        chooser.shuffle(parts)
        while parts:
            number, offset, length = (np.array(column) for column in zip(*sorted(parts[-9:]), strict=True))
            parts = parts[:-9]
            pieces = replace(accesses.take(number), offset=offset, length=length)
            trace.late(1, number, pieces, resolver.touched(1, offset, length))
            trace._flush(0, 1)
        trace.close()
        rows = pa.concat_tables(kept).to_pylist()
        wanted = resolver.touched(1, accesses.offset, accesses.length)
        for number, row in enumerate(rows):
            found = sorted(
                (o["offset"], o["length"], o["path"], o["file_offset"])
                for o in row["objects"]
                if not o["inline"]
            )
            assert sum(length for _, length, _, _ in found) == 4096
            mine = wanted.take((wanted.access == number) & ~wanted.inline)
            paths = resolver.paths(mine.object).to_pylist()
            for offset, length, path, inside in found:
                at = int(np.searchsorted(mine.start, offset, "right")) - 1
                begin = int(mine.file_offset[at])
                assert offset + length <= mine.end[at]
                assert (path, inside) == (
                    paths[at],
                    begin + offset - int(mine.start[at]) if begin >= 0 else None,
                )
