"""Saved maps, traces and profiles: what is no file is not waited for, and what a watch leaves or is still
writing is read wherever a trace is."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import need, run
from virt_bmap.accesses import traces
from virt_bmap.accesses.stream import ENDING, Part
from virt_bmap.accesses.trace import SCHEMA
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import BmapError, ImageError, MapError
from virt_bmap.show import sql


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk, its map, a log and a trace of it."""
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("saved")
    (folder / "disk.img").write_bytes(bytes(4 << 20))
    run("mke2fs", "-q", "-F", "-t", "ext4", folder / "disk.img")
    (folder / "log").write_text(
        "fio version 2 iolog\nf add\nf open\n"
        + "".join(f"f read {4096 * (n % 900)} 4096\n" for n in range(500))
    )
    disk, saved_map, trace, log = (
        str(folder / name) for name in ("disk.img", "map.parquet", "trace.parquet", "log")
    )
    bmap(["-q", "-o", saved_map, disk])
    bmap(["trace", "import", log, "-o", trace, "--map", saved_map])
    return folder


@pytest.fixture
def left(saved: Path, tmp_path: Path) -> Iterator[tuple[Path, pa.Table]]:
    """What a watch that was killed leaves of a trace, or one that runs has written by now; and its rows."""
    rows = traces.read(str(saved / "trace.parquet")).rows
    part = Part(str(tmp_path / "trace.parquet"), SCHEMA, {"version": 1, "disks": [4 << 20]})
    for begin in range(0, len(rows), 100):
        part.write(rows.slice(begin, 100), [])
    yield Path(part.path), rows
    part.close()


QUESTIONS = (
    "select count(*), sum(length) from accesses",
    "select path, kind, count(*) from touched group by all order by all",
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_sql_reads_what_a_watch_leaves(left: tuple[Path, pa.Table], saved: Path, question: str) -> None:
    pytest.importorskip("duckdb")
    path, _ = left
    answers = [
        sql.ask(sql.connect([("", str(name))], question), question)
        for name in (path, saved / "trace.parquet")
    ]
    assert answers[0].num_rows
    assert answers[0].to_pylist() == answers[1].to_pylist()


def test_sql_names_what_was_left(left: tuple[Path, pa.Table]) -> None:
    pytest.importorskip("duckdb")
    path, _ = left
    with pytest.raises(ImageError, match=r"is not there \(.*trace.parquet.part was left by a watch"):
        sql.connect([("", str(path).removesuffix(ENDING))])


def test_another_arrow_stream_is_no_trace(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema([("a", pa.int64())])),
    ):
        pass
    with pytest.raises(MapError, match="is an Arrow stream, but not one of a trace"):
        sql.connect([("", str(tmp_path / "x.arrow"))])


WAITING = (
    "profile F", "profile F T", "profile T --map F", "profile --never-read T --map F",
    "profile --export ranges F", "profile F F", "replay F D", "trace recover F -o x.parquet",
    "trace import L --map F -o x.parquet", "report M F -o x.html", "report F -o x.html", "sql Q F",
    "sql Q F.csv", "sql Q a=F", "lookup F 0", "info F", "check F", "diff F M", "diff M F",
    "watch --map F D -- true", "sql Q N",
)  # fmt: skip


@pytest.mark.parametrize("words", WAITING)
def test_no_command_waits_for_what_is_no_file(
    saved: Path, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO that nobody writes to, by its own name and by the names that a trace's part would have."""
    if words.startswith("sql"):
        pytest.importorskip("duckdb")
    if words.startswith("report"):
        pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    for name in ("fifo", "fifo.csv", f"none{ENDING}"):
        os.mkfifo(name)
    names = {
        "F": "fifo",
        "F.csv": "fifo.csv",
        "a=F": "a=fifo",
        "N": "none",
        "Q": "select 1",
        "M": str(saved / "map.parquet"),
        "T": str(saved / "trace.parquet"),
        "D": str(saved / "disk.img"),
        "L": str(saved / "log"),
    }
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        with pytest.raises(BmapError) as told:
            bmap([names.get(word, word) for word in words.split()])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "is a FIFO" in str(told.value) or words == "sql Q N"
    assert not [path for path in ("x.parquet", "x.html") if os.path.exists(path)]


def test_a_fifo_is_neither_a_trace_nor_a_profile(tmp_path: Path) -> None:
    from virt_bmap.accesses.profile.saved import is_profile

    os.mkfifo(tmp_path / "fifo")
    assert not traces.is_trace(str(tmp_path / "fifo"))
    assert not is_profile(str(tmp_path / "fifo"))
    pq.write_table(pa.table({"offset": [1], "op": ["read"], "objects": [[1]]}), tmp_path / "trace")
    assert traces.is_trace(str(tmp_path / "trace"))
