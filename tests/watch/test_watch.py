"""`virt-bmap watch` from the log's text to the command's exit status.

Oracles: the files' own bytes, debugfs, and brute force.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from support import mapped, need, run
from virt_bmap.accesses.accesses import Accesses, LogParser
from virt_bmap.accesses.resolve import Resolver
from virt_bmap.commands.watch import _report
from virt_bmap.model import tables
from virt_bmap.serve.serve import Follower
from virt_bmap.watch.lines import LineLog
from virt_bmap.watch.session import Printer, substituted
from virt_bmap.watch.summary import Summary

BMAP = str(Path(sys.executable).parent / "virt-bmap")
START = 1 << 20
BLOCK = 1024


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A partitioned disk with ext4 and a few files; `files` are their bytes by path."""
    need("sfdisk", "fdisk")
    need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("watch")
    chooser = random.Random(7)
    files = {
        f"/boot/{name}": chooser.randbytes(size)
        for name, size in (("vmlinuz", 3_000_000), ("initrd", 700_001), ("a b\ncd", 5000))
    }
    files |= {f"/many/{number}": chooser.randbytes(chooser.randrange(1, 9000)) for number in range(200)}
    for path, data in files.items():
        target = folder / "tree" / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (folder / "tree/link").symlink_to("boot/vmlinuz")
    image = folder / "disk.img"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    run("sfdisk", "-q", image, stdin=b"start=2048, type=83\n")
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-b",
        str(BLOCK),
        "-E",
        f"offset={START}",
        "-d",
        folder / "tree",
        image,
        "30M",
    )
    return SimpleNamespace(image=image, files=files, map=mapped(image), data=image.read_bytes())


def place(disk: SimpleNamespace, path: str) -> int:
    """Where on the disk a file's first block lies, as debugfs says."""
    blocks = run("debugfs", "-R", f"blocks {path}", f"{disk.image}?offset={START}")
    return START + int(blocks.split()[0]) * BLOCK


# ---- the log -----------------------------------------------------------------------------------------------

LOG = b"""\
2026-11-23 06:19:37.466414 Ready thread_model=3
2026-11-23 06:19:37.522828 Preconnect id=1 readonly=0 ...
2026-11-23 06:19:37.522840 ...Preconnect id=1 return=0
2026-11-23 06:19:37.522999 connection=1 Connect export="" tls=0 size=0x40000000 minsize=0x1 prefsize=0x10000
2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0x0 count=0x1000 ...
2026-11-23 06:19:37.523110 connection=1 Write id=2 offset=0x7fffffffffff000 count=0x200 fua=0 ...
2026-11-23 06:19:37.523120 connection=1 ...Read id=1 return=0
2026-11-23 06:19:37.523121 connection=1 ...Write id=2 return=-1 error=EIO
2026-11-23 06:19:37.523130 connection=12 Flush id=1 ...
2026-11-23 06:19:37.523131 connection=12 Extents id=2 offset=0x0 count=0x1000 req_one=0 ...
2026-11-23 23:59:59.999999 connection=12 Zero id=4 offset=0xabc count=0x10 may_trim=0 fua=0 fast=0 ...
2026-11-23 23:59:59.999999 connection=12 Trim id=5 offset=0xabd count=0xffffffff fua=0 ...
2026-11-23 23:59:59.999999 connection=12 Disconnect transactions=2
"""


def rows(accesses: Accesses) -> list[tuple[int, str, int, int]]:
    """What a test compares."""
    return [
        (c, tables.OPS[op], o, n)
        for c, op, o, n in zip(
            accesses.connection.tolist(),
            accesses.op.tolist(),
            accesses.offset.tolist(),
            accesses.length.tolist(),
            strict=True,
        )
    ]


EXPECTED = [
    (1, "read", 0, 0x1000),
    (1, "write", 0x7FFFFFFFFFFF000, 0x200),
    (12, "flush", 0, 0),
    (12, "zero", 0xABC, 16),
    (12, "trim", 0xABD, 0xFFFFFFFF),
]


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 1 << 20])
def test_log_in_pieces_of_any_size(piece: int) -> None:
    parser, found = LogParser(), []
    for at in range(0, len(LOG), piece):
        found += rows(parser.feed(LOG[at : at + piece]))
    assert found == EXPECTED
    assert (parser.failed, parser.lost, parser.unread, parser.open_connections) == (
        1,
        1,
        0,
        0,
    )  # id=3 of connection 12 never came


def test_log_times_are_utc() -> None:
    parsed = LogParser().feed(LOG)
    moments = parsed.time_ns.astype("M8[ns]")
    assert str(moments[0]) == "2026-11-23T06:19:37.523103000"
    assert str(moments[-1]) == "2026-11-23T23:59:59.999999000"


def test_log_garbage_is_counted_and_survived() -> None:
    chooser = random.Random(3)
    for _ in range(400):
        data = bytearray(LOG)
        for _ in range(chooser.randrange(1, 30)):
            data[chooser.randrange(len(data))] = chooser.choice(b"\n =x-.\xff0zf")
        parsed = LogParser().feed(bytes(data))
        assert (parsed.offset >= 0).all()
        assert (parsed.length >= 0).all()
    parser = LogParser()
    assert (
        len(
            parser.feed(
                b"2026-11-23 06:19:37.523103 connection=1 Read id=1 offset=0xfffffffffffffffff "
                b"count=0x1 ...\n"
            )
        )
        == 0
    )
    assert parser.unread == 1


def test_follower_gives_back_what_was_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    follower = Follower(str(log))
    with open(log, "r+b") as writer:
        written = read = b""
        for number in range(12):
            block = bytes([number]) * (1 << 20)
            writer.write(block)
            writer.flush()
            written += block
            read += follower.read()
    assert read == written
    follower.close()
    assert log.stat().st_blocks * 512 <= 6 << 20


# ---- objects -----------------------------------------------------------------------------------------------


def accesses(ranges: list[tuple[int, int]], op: str = "read") -> Accesses:
    """Requests for [offset, +length)."""
    n = len(ranges)
    offset, length = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    return Accesses(
        np.arange(n, dtype=np.int64) * 1000 + 1,
        np.ones(n, np.int64),
        np.full(n, tables.OPS.index(op)),
        offset,
        length,
    )


def test_pieces_cover_each_access_and_file_offsets_are_right(disk: SimpleNamespace) -> None:
    chooser = random.Random(5)
    size = len(disk.data)
    ranges = [
        (0, size),
        (size - 1, 1),
        *((chooser.randrange(size - 300_000), chooser.randrange(1, 300_000)) for _ in range(200)),
    ]
    resolver = Resolver(disk.map)
    touched = resolver.touched(1, *(np.array(column, np.int64) for column in zip(*ranges, strict=True)))
    labels = resolver.labels(touched.object)
    covered = np.zeros(len(ranges), np.int64)
    np.add.at(covered, touched.access[~touched.inline], (touched.end - touched.start)[~touched.inline])
    # nothing is missing, and nothing owned twice on this disk
    assert covered.tolist() == [length for _, length in ranges]
    names = {"/boot/a b\\x0acd": "/boot/a b\ncd"}
    compared = 0
    for number, start, end, inside in zip(
        touched.object.tolist(),
        touched.start.tolist(),
        touched.end.tolist(),
        touched.file_offset.tolist(),
        strict=True,
    ):
        letter, device, name = labels[number]
        if letter == "f":
            content = disk.files[names.get(name, name)]
            want = content[inside : inside + end - start]
            assert disk.data[start : start + len(want)] == want
            assert device == "/dev/sda1"
            compared += 1
    assert compared > 300


def test_requests_beyond_the_disk_are_clipped(disk: SimpleNamespace) -> None:
    touched = Resolver(disk.map).touched(
        1, np.array([len(disk.data) - 10, len(disk.data) + 5, 1 << 62]), np.array([100, 100, 100])
    )
    assert int((touched.end - touched.start).sum()) == 10
    assert touched.access.tolist() == [0]


def test_text_map_names_files_and_volumes(disk: SimpleNamespace, tmp_path: Path) -> None:
    """The original's maps name files and volumes only, and know no file offsets."""
    from virt_bmap.survey import maps

    text = tmp_path / "bmap"
    text.write_text(
        "1 0 2000000 v /dev/sda\n1 100000 2000000 p /dev/sda1\n1 200000 201000 f /dev/sda1 /Boot/BCD\n"
    )
    resolver = Resolver(maps.load(str(text)))
    lines: list[str] = []
    log = LineLog(resolver, lines.extend)
    asked = accesses([(0x1FF000, 0x3000), (0, 512)])
    log.add(asked, resolver.touched(1, asked.offset, asked.length))
    log.flush()
    assert [line.split("\t")[0] for line in lines] == [
        "read p /dev/sda1", "read f /dev/sda1 /Boot/BCD", "read p /dev/sda1", "read v /dev/sda",
    ]  # fmt: skip


def test_map_of_the_original(corpus: Path) -> None:
    """Bytes of a real Fedora disk are named as the lines of its map name them."""
    from virt_bmap.survey import maps

    path = corpus / "bmap/fedora20.bmap"
    lines = [line.split(" ", 5) for line in path.read_text(errors="surrogateescape").splitlines()]
    files = [(int(line[1], 16), int(line[2], 16), line) for line in lines if line[3] in "fd"]
    starts, ends = (np.array([row[column] for row in files]) for column in (0, 1))
    chooser = random.Random(11)
    points = [chooser.choice(files)[0] + chooser.randrange(0, 512) for _ in range(300)] + [
        chooser.randrange(6 << 30) for _ in range(100)
    ]
    resolver = Resolver(maps.load(str(path)))
    touched = resolver.touched(1, np.array(points, np.int64), np.ones(len(points), np.int64))
    labels = resolver.labels(touched.object)
    for number, point in enumerate(points):
        found = {" ".join(labels[o]) for o in touched.object[touched.access == number].tolist()}
        expected = {
            " ".join(files[row][2][3:]) for row in np.flatnonzero((starts <= point) & (point < ends)).tolist()
        }
        if expected:
            assert found == expected
        else:
            assert all(label.split(" ")[0] in ("v", "p", "l") for label in found)


# ---- lines and sums ----------------------------------------------------------------------------------------


def lines_of(disk: SimpleNamespace, batches: list[Accesses]) -> list[str]:
    """The live log of these accesses."""
    resolver, lines = Resolver(disk.map), []
    log = LineLog(resolver, lines.extend)
    for batch in batches:
        log.add(batch, resolver.touched(1, batch.offset, batch.length))
    log.flush()
    return lines


def test_consecutive_accesses_share_a_line(disk: SimpleNamespace) -> None:
    at = place(disk, "/boot/vmlinuz")
    one = accesses([(at, 4096), (at + 4096, 4096), (at + 65536, 1024)])
    other = accesses([(at + 1024, 1024)])
    expected = ["read f /dev/sda1 /boot/vmlinuz\t0x0-0x2000,0x10000-0x10400\n"]
    assert lines_of(disk, [one]) == expected
    assert (
        lines_of(disk, [one.take(slice(0, 1)), one.take(slice(1, 2)), one.take(slice(2, 3)), other])
        == expected
    )  # type: ignore[arg-type]
    write = accesses([(at, 1024)], "write")
    assert lines_of(disk, [one, write, other]) == [
        *expected,
        "write f /dev/sda1 /boot/vmlinuz\t0x0-0x400\n",
        "read f /dev/sda1 /boot/vmlinuz\t0x400-0x800\n",
    ]


def test_hostile_names_stay_on_one_line(disk: SimpleNamespace) -> None:
    (inode,) = [
        line.split()[0]
        for line in run("debugfs", "-R", "ls -l /boot", f"{disk.image}?offset={START}").splitlines()
        if b"a b" in line
    ]
    at = place(disk, f"<{inode.decode()}>")
    assert lines_of(disk, [accesses([(at, 1024)])]) == ["read f /dev/sda1 /boot/a b\\x0acd\t0x0-0x400\n"]


def test_what_lies_inside_an_inode_table_is_named_only_on_demand(disk: SimpleNamespace) -> None:
    resolver, quiet, full = Resolver(disk.map), [], []
    whole = accesses([(0, len(disk.data))])
    touched = resolver.touched(1, whole.offset, whole.length)
    LineLog(resolver, quiet.extend).add(whole, touched)
    LineLog(resolver, full.extend, inline=True).add(whole, touched)
    assert not any(line.startswith("read s ") for line in quiet)
    assert sum(line.startswith("read s /dev/sda1 /link\t") for line in full) == 1


def test_summary_counts_like_brute_force(disk: SimpleNamespace) -> None:
    at = place(disk, "/boot/initrd")
    resolver = Resolver(disk.map)
    summary = Summary(resolver, 1)
    for batch in (accesses([(at, 4096), (at, 4096), (at + 2048, 4096)]), accesses([(0, 512)], "write")):
        summary.add(batch, resolver.touched(1, batch.offset, batch.length))
    assert summary.share() == {"read": 6144, "written": 512, "trimmed": 0, "size": len(disk.data)}
    (row,) = [row for row in summary.objects().to_pylist() if row["name"] == "/boot/initrd"]
    assert (row["read"], row["written"], row["accesses"], row["size"], row["first_ns"]) == (
        12288,
        0,
        3,
        700_001,
        1,
    )


def test_trims_are_counted_apart_from_writes(disk: SimpleNamespace) -> None:
    at = place(disk, "/boot/initrd")
    resolver = Resolver(disk.map)
    summary = Summary(resolver, 1)
    for op, length in (("write", 512), ("zero", 1024), ("trim", 4096), ("trim", 4096)):
        batch = accesses([(at, length)], op)
        summary.add(batch, resolver.touched(1, batch.offset, batch.length))
    assert summary.share() == {"read": 0, "written": 1024, "trimmed": 4096, "size": len(disk.data)}
    (row,) = summary.objects().to_pylist()
    assert (row["read"], row["written"], row["trimmed"], row["accesses"]) == (0, 1536, 8192, 4)
    text = _report(summary, 5)
    assert "2 trims (8.0 KiB)" in text
    assert "4.0 KiB trimmed" in text


def test_a_stopped_terminal_stops_nothing() -> None:
    gate = threading.Event()

    class Stopped:
        written = 0

        def write(self, text: str) -> None:
            gate.wait()
            self.written += text.count("\n")

        def flush(self) -> None: ...

    terminal = Stopped()
    printer = Printer(terminal)  # type: ignore[arg-type]
    before = time.monotonic()
    for _ in range(5000):
        printer.write(["line\n"])
    assert time.monotonic() - before < 2
    assert printer.dropped > 0
    gate.set()
    printer.close()
    assert terminal.written + printer.dropped == 5000


def test_only_our_names_are_replaced() -> None:
    words = {"uri": "U", "nbd": "N", "uri2": "V"}
    assert (
        substituted("file=$uri,x=${nbd},$uri2,$urix,$$,$HOME,${uri", words)
        == "file=U,x=N,V,$urix,$$,$HOME,${uri"
    )


# ---- the whole command -------------------------------------------------------------------------------------


@pytest.fixture
def tools() -> None:
    need("nbdkit", "nbdkit")
    need("qemu-io", "qemu-utils")
    need("qemu-nbd", "qemu-utils")


def watch(*arguments: object, ok: int = 0) -> tuple[str, str]:
    """Run `virt-bmap watch`: (standard output, standard error)."""
    done = subprocess.run([BMAP, "watch", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == ok, done.stderr
    return done.stdout, done.stderr


def qemu_io(*commands: str) -> list[str]:
    """A client's command line."""
    return ["--", "qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), "$uri"]


@pytest.mark.usefixtures("tools")
def test_watch_names_what_is_read_and_written(disk: SimpleNamespace, tmp_path: Path) -> None:
    before = hashlib.sha256(disk.image.read_bytes()).digest()
    kernel, initrd = place(disk, "/boot/vmlinuz"), place(disk, "/boot/initrd")
    trace = tmp_path / "trace.parquet"
    out, err = watch(
        disk.image,
        "-o",
        trace,
        *qemu_io(f"read {kernel} 64k", f"read {initrd} 4k", f"write -P 1 {initrd} 4k", "read 0 512"),
    )
    lines = out.splitlines()
    assert [line for line in lines if line.startswith(("read f", "write f"))] == [
        "read f /dev/sda1 /boot/vmlinuz\t0x0-0x10000", "read f /dev/sda1 /boot/initrd\t0x0-0x1000",
        "write f /dev/sda1 /boot/initrd\t0x0-0x1000",
    ]  # fmt: skip
    assert err == ""
    assert "3 reads (68.5 KiB), 1 write (4.0 KiB)" in out
    assert hashlib.sha256(disk.image.read_bytes()).digest() == before  # the write was thrown away
    table = pq.read_table(trace)
    assert table.schema.names[:-1] == tables.SCHEMAS["accesses"].names
    found = [
        (
            row["op"],
            row["offset"],
            row["length"],
            [(o["path"], o["file_offset"], o["length"]) for o in row["objects"]],
        )
        for row in table.to_pylist()
    ]
    assert found[:3] == [("read", kernel, 65536, [(b"/boot/vmlinuz", 0, 65536)]),
        ("read", initrd, 4096, [(b"/boot/initrd", 0, 4096)]),
                         ("write", initrd, 4096, [(b"/boot/initrd", 0, 4096)])]  # fmt: skip


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_write_reaches_the_disk_only_when_asked(disk: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"disk.{kind}"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, disk.image, image)
    at = place(disk, "/boot/initrd")
    for options, pattern in (([], disk.files["/boot/initrd"][:512]), (["--write"], b"\x55" * 512)):
        out, _ = watch(*options, image, *qemu_io(f"write -P 0x55 {at} 512"))
        assert "write f /dev/sda1 /boot/initrd\t0x0-0x200" in out
        raw = tmp_path / "raw"
        run("qemu-img", "convert", "-f", kind, "-O", "raw", image, raw)
        assert raw.read_bytes()[at : at + 512] == pattern


@pytest.mark.usefixtures("tools")
def test_watch_an_nbd_uri_with_a_saved_map(disk: SimpleNamespace, tmp_path: Path) -> None:
    saved = tmp_path / "map.parquet"
    run(BMAP, "-o", saved, disk.image)
    with nbdkit(disk.image, tmp_path) as uri:
        out, _ = watch("--map", saved, uri, *qemu_io(f"read {place(disk, '/boot/vmlinuz')} 4k"))
    assert "read f /dev/sda1 /boot/vmlinuz\t0x0-0x1000" in out


@contextlib.contextmanager
def nbdkit(image: Path, folder: Path) -> Iterator[str]:
    """A plain server."""
    process = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-U", folder / "sock", "-P", folder / "pid", "file", str(image)]
    )
    while not (folder / "pid").exists():
        assert process.poll() is None
        time.sleep(0.01)
    try:
        yield f"nbd+unix:///?socket={folder / 'sock'}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.usefixtures("tools")
def test_two_disks(disk: SimpleNamespace, tmp_path: Path) -> None:
    second = tmp_path / "second.img"
    second.write_bytes(disk.data[START:])
    out, _ = watch(
        disk.image,
        "-a",
        second,
        "--",
        "sh",
        "-c",
        'qemu-io -f raw -c "read 1024 1k" $1; qemu-io -f raw -c "read 1024 1k" $uri2',
        "sh",
        "$uri",
    )
    assert "read m /dev/sdb [superblock]\t@0x400-0x800" in out
    assert "read g /dev/sda\t@0x400-0x800" in out


@pytest.mark.usefixtures("tools")
def test_exit_status_environment_and_signals(disk: SimpleNamespace) -> None:
    out, _ = watch(
        disk.image,
        "-q",
        "--",
        "sh",
        "-c",
        'test "$uri" = "$1" && test -S "$unixsocket" && echo "$nbd"; exit 7',
        "sh",
        "$uri",
        ok=7,
    )
    assert out.startswith("nbd:unix:/")
    watch(disk.image, "-q", "--", "sh", "-c", "kill -9 $$", ok=137)
    for options in ([disk.image, "-q"], ["-q", disk.image]):
        out, _ = watch(*options, "--", "echo", "-q", "--", "x", "--summary")
        assert out.startswith("-q -- x --summary\n")
    process = subprocess.Popen(
        [BMAP, "watch", "-q", disk.image, "--", "sh", "-c", "echo up; exec sleep 60"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()


@pytest.mark.usefixtures("tools")
def test_a_guest_in_the_background_is_watched_to_its_end(disk: SimpleNamespace) -> None:
    at = place(disk, "/boot/initrd")
    client = (
        f"(qemu-io -f raw -c 'read 0 512' -c 'sleep 1500' -c 'read {at} 4k' $1 >/dev/null 2>&1 &) ; sleep 0.7"
    )
    out, _ = watch(disk.image, "--", "sh", "-c", client, "sh", "$uri")
    assert "read f /dev/sda1 /boot/initrd\t0x0-0x1000" in out


@pytest.mark.usefixtures("tools")
def test_what_goes_wrong_is_one_line(disk: SimpleNamespace, tmp_path: Path) -> None:
    before = private_folders()
    _, err = watch(disk.image, "--", "no-such-command", ok=1)
    assert err == "virt-bmap: no-such-command: no such command\n"
    _, err = watch(tmp_path / "none.img", "--", "true", ok=1)
    assert err.count("\n") == 1
    other = tmp_path / "other.img"
    other.write_bytes(disk.data + bytes(4096))
    run(BMAP, "-o", tmp_path / "map.parquet", disk.image)
    _, err = watch("--map", tmp_path / "map.parquet", other, "--", "true", ok=1)
    assert err.count("\n") == 1
    assert "is the map of a disk of 33554432 bytes" in err
    # the command's status, and the summary
    out, err = watch("-o", "/dev/full", disk.image, *qemu_io("read 0 512"))
    assert "1 read (512 B)" in out
    assert err == "virt-bmap: /dev/full: can't be written: No space left on device\n"
    assert not [name for name in private_folders() - before if not in_use(f"/dev/shm/{name}")]


def private_folders() -> set[str]:
    """Folders in memory that watches made, also those that were killed before this test."""
    return (
        {name for name in os.listdir("/dev/shm") if name.startswith("virt-bmap-")}
        if os.path.isdir("/dev/shm")
        else set()
    )


def in_use(folder: str) -> bool:
    """Another run, at the same time on this machine, may have a folder of its own."""
    pid = Path(folder, "pid")
    return (
        not pid.exists() or not pid.read_text().strip() or Path(f"/proc/{pid.read_text().strip()}").exists()
    )
