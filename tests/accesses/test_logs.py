"""Logs of other tools: the tools themselves write them, and what was asked of the tools is what must come
out."""

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support import need, run, wait_for_socket
from virt_bmap.accesses.logs import NAMES, parse
from virt_bmap.accesses.traces import read
from virt_bmap.cli import run as cli
from virt_bmap.core.errors import BmapError, MapError, UsageError
from virt_bmap.model.tables import OPS

READ, WRITE, TRIM, ZERO, FLUSH = range(5)


def rows(log) -> list[tuple[str, int, int]]:
    """(operation, offset, length) of each access."""
    a = log.accesses
    return [
        (OPS[op], offset, length)
        for op, offset, length in zip(a.op.tolist(), a.offset.tolist(), a.length.tolist(), strict=True)
    ]


# ---- what the tools themselves write -----------------------------------------------------------------------

COMMANDS = ["read 4096 8192", "write 65536 512", "read 1048576 65536"]
ASKED = [("read", 4096, 8192), ("write", 65536, 512), ("read", 1048576, 65536)]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))
    return image


def test_nbdkit_and_qemu_log_what_a_client_asked_for(disk: Path, tmp_path: Path) -> None:
    """One client, seen from both sides: QEMU's trace and nbdkit's log."""
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    socket, log = tmp_path / "s", tmp_path / "nbdkit.log"
    server = subprocess.Popen(["nbdkit", "-f", "-U", socket, "--filter=log", "file", disk, f"logfile={log}"])
    try:
        wait_for_socket(socket)
        words = [word for command in COMMANDS for word in ("-c", command)]
        trace = run(
            "qemu-io", "-f", "raw", "-t", "none", "-T", "blk_co_p*", *words, f"nbd+unix:///?socket={socket}"
        )
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-T", "blk_co_p*", *words, disk], capture_output=True, check=True
        )
    finally:
        server.terminate()
        server.wait()
    nbdkit = parse(log.read_bytes(), "nbdkit.log")
    assert [row for row in rows(nbdkit) if row in ASKED] == ASKED
    assert nbdkit.format == "nbdkit's log filter"
    assert len(nbdkit.unread) == 0
    qemu = parse(done.stderr + done.stdout + trace, "qemu.log")
    assert rows(qemu)[:3] == ASKED
    assert "no times" in qemu.notes[0]


def test_qemu_with_times(disk: Path) -> None:
    need("qemu-io", "qemu-utils")
    words = ["qemu-io", "-f", "raw", "-T", "blk_co_p*", "-c", "read 0 512", disk]
    done = subprocess.run(words, capture_output=True, check=True)
    stamped = b"".join(
        b"77@1700000000.%06d:" % n + line for n, line in enumerate(done.stderr.splitlines(keepends=True))
    )
    log = parse(stamped, "qemu.log")
    assert rows(log) == [("read", 0, 512)]
    assert log.accesses.time_ns.tolist() == [1_700_000_000 * 10**9]
    assert log.notes == ()


def test_fio_iologs_and_latency_logs_agree(tmp_path: Path, disk: Path) -> None:
    """fio's two kinds of logs of one job say the same; the bytes are those of its report."""
    need("fio", "fio")
    job = [
        "fio",
        "--name=j",
        f"--filename={disk}",
        "--rw=randrw",
        "--bs=4k",
        "--io_size=256k",
        "--size=4M",
        "--ioengine=psync",
        "--log_offset=1",
        f"--write_lat_log={tmp_path}/log",
        f"--write_iolog={tmp_path}/iolog",
        "--output-format=json",
    ]
    run(*job)
    iolog = parse((tmp_path / "iolog").read_bytes(), "iolog")
    values = parse((tmp_path / "log_lat.1.log").read_bytes(), "lat")
    assert len(values.accesses) == 64
    assert set(rows(values)) == {row for row in rows(iolog) if row[0] != "flush"}
    assert len(iolog.unread) == len(values.unread) == 0
    assert (np.diff(iolog.accesses.time_ns) >= 0).all()


BLK_IO_TRACE = struct.Struct("<IIQQIIIIIHH")
"""struct blk_io_trace of linux/blktrace_api.h: magic and version, sequence, time, sector, bytes, action, pid,
device, cpu, error, pdu_len."""
TC_READ, TC_WRITE, TC_QUEUE, TC_ISSUE, TC_COMPLETE, TC_DISCARD = (1 << 16 << n for n in (0, 1, 4, 6, 7, 13))


def test_blkparse_prints_what_the_kernel_would_record(tmp_path: Path) -> None:
    """A recording in the kernel's own format, with known requests, through the real blkparse."""
    need("blkparse", "blktrace")
    wanted = [
        ("read", 2048 * 512, 4096),
        ("write", 8 * 512, 65536),
        ("trim", 4096 * 512, 1 << 20),
        ("read", 0, 512),
    ]
    kind = {"read": TC_READ, "write": TC_WRITE, "trim": TC_WRITE | TC_DISCARD}
    records = []
    for n, (op, offset, length) in enumerate(wanted):
        for step, (action, code) in enumerate(((TC_QUEUE, 1), (TC_ISSUE, 7), (TC_COMPLETE, 8))):
            number = 3 * n + step
            records.append(BLK_IO_TRACE.pack(0x65617407, number + 1, 1000 * (number + 1), offset // 512,
                    length, kind[op] | action | code,
                                             100, 8 << 20, 0, 0, 0))  # fmt: skip
    (tmp_path / "t.blktrace.0").write_bytes(b"".join(records))
    log = parse(run("blkparse", "-i", "t", "-D", str(tmp_path)), "blkparse")
    assert rows(log) == wanted
    assert len(log.unread) == 0
    assert np.diff(log.accesses.time_ns).tolist() == [3000, 3000, 3000]


# ---- formats as they are documented ------------------------------------------------------------------------

SIMPLETRACE = b"""\
blk_co_preadv 0.000 pid=9 blk=0x55d6 bs=0x55d7 offset=0x1000 bytes=0x200 flags=0x0
some_event 100.000 pid=9 x=0x1
blk_co_pwritev 23.5 pid=9 blk=0x55d6 bs=0x55d7 offset=0x2000 bytes=0x400 flags=0x0
"""
BIOSNOOP = b"""\
TIME(s)     COMM           PID    DISK    T SECTOR     BYTES  LAT(ms)
0.000004    web content    1950   xvda1   W 13092560   4096      0.74
1.000000178 supervise      1950   xvda1   R 13092432   512       0.61
"""
CSV = b'"time_us","op","offset","length"\r\n1,read,4096,512\r\n3,write,0,1024\r\n'


@pytest.mark.parametrize(("text", "expected", "times"), [
    (SIMPLETRACE, [("read", 4096, 512), ("write", 8192, 1024)], [0, 123_500]),
    (BIOSNOOP, [("write", 13092560 * 512, 4096), ("read", 13092432 * 512, 512)], [4000, 1_000_000_178]),
    (CSV, [("read", 4096, 512), ("write", 0, 1024)], [1000, 3000]),
    ((b"fio version 2 iolog\n/dev/a add\n/dev/a open\n/dev/a read 0 4096\n/dev/a wait 200\n/dev/a "
        b"write 512 512\n/dev/a sync\n/dev/a close\n"),
     [("read", 0, 4096), ("write", 512, 512), ("flush", 0, 0)], [0, 200_000, 200_000]),
    ((b"  8,0    3        1     0.000000000   697  D FWS [jbd2/sda]\n  8,0    3        2     "
        b"0.000000500   697  D  RA 8 + 8 [a b]\n"),
     [("flush", 0, 0), ("read", 4096, 4096)], [0, 500]),
])  # fmt: skip
def test_documented_formats(text: bytes, expected: list[tuple[str, int, int]], times: list[int]) -> None:
    log = parse(text, "log")
    assert rows(log) == expected
    assert log.accesses.time_ns.tolist() == times
    assert len(log.unread) == 0


def test_lines_that_are_no_part_of_the_format_are_told_by_number() -> None:
    log = parse(CSV + b"4,read,x,1\r\n5,read,7,7\r\n" + b"6,read," + b"9" * 30 + b",1\n", "log")
    assert log.unread.tolist() == [4, 6]
    assert log.line.tolist() == [2, 3, 5]
    assert log.example == "'4,read,x,1'"


def test_a_last_line_that_was_cut_off_is_no_fault() -> None:
    assert len(parse(CSV + b"7,rea", "log").unread) == 0


def test_of_several_devices_one_has_to_be_chosen() -> None:
    text = BIOSNOOP.replace(b"xvda1   R", b"xvdb    R")
    with pytest.raises(
        UsageError, match=r"accesses of several devices: choose one with --device: xvda1, xvdb"
    ):
        parse(text, "log")
    assert rows(parse(text, "log", device="xvdb")) == [("read", 13092432 * 512, 512)]
    with pytest.raises(UsageError, match="no accesses of device sda; there are: xvda1, xvdb"):
        parse(text, "log", device="sda")


@pytest.mark.parametrize(("text", "words"), [
    (b"", "is empty"),
    (b"hello\nworld\n", "is not a log of accesses that is known here"),
    (b"0, 1, 0, 4096, 0\n", "without offsets: run fio with log_offset=1"),
    (b"fio version 9 iolog\n", "only versions 2 and 3"),
    (b"fio version 3 iolog\n1 /a add\n", "holds no access"),
    (b"op,sector,bytes\nx\n", "holds no access.*line 2 is 'x'"),
])  # fmt: skip
def test_bad_logs_say_what_is_wrong(text: bytes, words: str) -> None:
    with pytest.raises(MapError, match=words):
        parse(text, "log")


@given(st.sampled_from([SIMPLETRACE, BIOSNOOP, CSV, (b"1@1.000001:blk_co_preadv blk 0x1 bs 0x1 offset 0 "
    b"bytes 1 flags 0x0\n"),
                        b"2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0x0 count=0x1000 ...\n"]),
       st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=20)), max_size=5))  # fmt: skip
@example(SIMPLETRACE, [(134, b"\0")])  # an access without its pid
def test_mutated_logs_end_in_columns_or_in_words(text: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(text)
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    for format in (None, *NAMES):
        try:
            log = parse(bytes(data), "log", format)
        except BmapError:
            continue
        assert (log.accesses.offset >= 0).all()
        assert (log.accesses.offset + log.accesses.length >= log.accesses.offset).all()


# ---- the command -------------------------------------------------------------------------------------------


def test_trace_import_names_what_was_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("mke2fs", "e2fsprogs")
    image, tree = tmp_path / "disk.img", tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_bytes(os.urandom(10000))
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, image, "8M")
    start = int(run("debugfs", "-R", "blocks /hello", image).split()[0]) * 1024
    assert cli(["map", "-q", "-o", f"{tmp_path}/map.parquet", str(image)]) == 0
    log = tmp_path / "log.csv"
    log.write_text(f"time_ms,op,offset,length\n5,read,{start},4096\n9,write,{start + 4096},1024\nnonsense\n")
    assert (
        cli(["trace", "import", str(log), "-o", f"{tmp_path}/t.parquet", "--map", f"{tmp_path}/map.parquet"])
        == 0
    )
    assert "line 4 left out" in capsys.readouterr().err
    found = read(f"{tmp_path}/t.parquet")
    assert found.sizes == [8 << 20]
    data = [o for row in found.rows.to_pylist() for o in row["objects"] if not o["inline"]]
    assert [(o["path"], o["file_offset"], o["length"]) for o in data] == [
        (b"/hello", 0, 4096),
        (b"/hello", 4096, 1024),
    ]
    log.write_text(f"time_ms,op,offset,length\n5,read,0,1\n9,write,{9 << 20},1024\n")
    with pytest.raises(
        MapError,
        match=r"log.csv: line 3: bytes 0x900000-0x900400 lie beyond the end of disk 1, .* a log of "
        r"another disk",
    ):
        cli(["trace", "import", str(log), "-o", f"{tmp_path}/u.parquet", "--map", f"{tmp_path}/map.parquet"])
    assert not (tmp_path / "u.parquet").exists()
    with pytest.raises(UsageError, match="needs -o"):
        cli(["trace", "import", str(log)])
