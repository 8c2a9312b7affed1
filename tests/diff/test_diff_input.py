"""`virt-bmap diff` as a person meets it: what it prints and writes, bad input in one line, maps over time,
resized overlays, long chains."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from support import need, run, wait_for_socket
from virt_bmap import cli
from virt_bmap.core.errors import BmapError


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small ext4 disks made without mounting: old and new, their maps, an overlay with nothing in it, one
    chain of two, another disk, one of another size."""
    for tool, package in (
        ("mke2fs", "e2fsprogs"),
        ("debugfs", "e2fsprogs"),
        ("qemu-img", "qemu-utils"),
        ("qemu-nbd", "qemu-utils"),
    ):
        need(tool, package)
    folder = tmp_path_factory.mktemp("disks")
    (folder / "tree" / "etc").mkdir(parents=True)
    for name in ("passwd", "hosts"):
        (folder / "tree" / "etc" / name).write_bytes(name.encode() * 3000)
    (folder / "more").write_bytes(b"new" * 10_000)
    for name, size in (("old.img", "16M"), ("other.img", "16M"), ("small.img", "8M")):
        run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", folder / "tree", folder / name, size)
    shutil.copyfile(folder / "old.img", folder / "new.img")
    run(
        "debugfs",
        "-w",
        "-f",
        "-",
        folder / "new.img",
        stdin=f"write {folder}/more /etc/more\nrm /etc/hosts\n".encode(),
    )
    for name in ("old", "new", "other"):
        command(f"-q -o {folder}/{name}.parquet {folder}/{name}.img")
    command(f"-q -o {folder}/old.bmap {folder}/old.img")
    (folder / "ranges.csv").write_text("offset,length\n0,65536\n")
    (folder / "bad.csv").write_text("offset,length\n0,65536\nzero,1\n")
    (folder / "far.csv").write_text("offset,length\n0x40000000,65536\n")
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        folder / "old.img",
        "-F",
        "raw",
        folder / "first.qcow2",
        "32M",
    )
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        folder / "first.qcow2",
        "-F",
        "qcow2",
        folder / "second.qcow2",
    )
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 24M 64k", folder / "first.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 28M 128k", folder / "second.qcow2")
    run("qemu-img", "convert", "-O", "qcow2", folder / "new.img", folder / "alone.qcow2")
    return folder


def command(line: str) -> int:
    return cli.run(line.split())


BAD = [
    ("{d}/old.img {d}/small.img", "old.img has 16,777,216 bytes, .*small.img 8,388,608: .*--force compares"),
    ("{d}/old.img {d}/other.img", "are of different disks: .*--force compares"),
    ("{d}/old.parquet {d}/other.parquet", "are of different disks"),
    ("{d}/other.parquet {d}/new.img --ranges {d}/ranges.csv", "are of different disks"),
    ("{d}/old.parquet", "is only one map; name two, or a map and a disk"),
    ("{d}/old.bmap {d}/new.parquet", "old.bmap: is a text map, which holds no inodes to compare"),
    ("{d}/alone.qcow2", "alone.qcow2: has no backing file; name what to compare it with"),
    ("{d}/new.img", "new.img: has no backing file"),
    ("{d}/first.qcow2", "its qcow2 header refers to .*--references"),
    ("--bitmap b0 {d}/alone.qcow2", "Bitmap 'b0' is not found"),
    ("--bitmap b0 {d}/new.img", "is a raw disk, which has no dirty-bitmap:b0"),
    ("--bitmap b0 {d}/new.parquet", "is a saved map, which has no dirty-bitmap:b0"),
    ("--bitmap b0 --ranges {d}/ranges.csv {d}/new.img", "--bitmap and --ranges both say what changed"),
    ("{d}/old.img {d}/new.img --ranges {d}/bad.csv", "bad.csv: line 3: 'zero,1' is not offset,length"),
    ("{d}/old.img {d}/new.img --ranges {d}/far.csv", "far.csv: line 2: .*lie beyond the end of disk 1"),
    ("{d}/old.img {d}/new.img --ranges {d}/none.csv", "none.csv: can't be read: No such file"),
    ("{d}/new.img --ranges {d}/ranges.csv --verify", "--verify reads both sides, but nothing older"),
    ("{d}/old.parquet {d}/new.img --ranges {d}/ranges.csv --verify", ("--verify reads both sides, but "
        ".*old.parquet is a saved map")),
    ("{d}/old.parquet {d}/new.parquet --disk 2", "there is no disk 2 in .*parquet, which has 1"),
    ("{d}/old.img {d}/new.img --depth 1", "--depth is a number of levels"),
    ("{d}/old.img {d}/new.img --by directory --depth -1", "--depth is a number of levels"),
    ("{d}/old.img {d}/new.img --limit -1", "--limit is a number of rows"),
    ("{d}/old.img {d}/new.img -o {d}/out.txt", "the end of the name says what to write"),
    ("{d}/new.img --old-format raw", "--old-format is the format of OLD"),
    ("{d}/none.img {d}/new.img", "none.img: can't be opened: No such file"),
    ("{d}/old.img {d}/none.img", "none.img: can't be opened: No such file"),
    ("nbd+unix:///?socket={d}/none", "can't connect"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_clear_line(disks: Path, line: str, words: str) -> None:
    with pytest.raises(BmapError, match=words) as caught:
        command("diff " + line.format(d=disks))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "{d}/old.img {d}/small.img",
        "{d}/small.img {d}/old.img",
        "{d}/old.img {d}/other.img",
        "{d}/old.parquet {d}/other.parquet",
    ],
)
def test_force_compares_them_all_the_same(disks: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("diff --force --json " + line.format(d=disks)) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(row) for row in out.splitlines()]
    assert sum(row["bytes"] for row in rows) == int(err.split()[0].replace(",", "")) > 0


def test_what_is_printed(disks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(f"diff {disks}/old.img {disks}/new.img")
    out = capsys.readouterr().out
    assert any(line.split()[1:] == ["added", "file", "/dev/sda", "/etc/more"] for line in out.splitlines())
    assert any(line.split()[1:] == ["deleted", "file", "/dev/sda", "/etc/hosts"] for line in out.splitlines())
    assert "changed: both images read and compared" in out
    command(f"diff {disks}/old.img {disks}/new.img --limit 1")
    assert "more rows; --limit 0 shows all" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["file", "directory", "change", "kind", "filesystem"])
def test_rows_added_up_in_any_way_are_the_delta(
    disks: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(f"diff {disks}/old.img {disks}/new.img --json --by {by}")
    out, err = capsys.readouterr()
    assert sum(json.loads(row)["bytes"] for row in out.splitlines()) == int(err.split()[0].replace(",", ""))


@pytest.mark.parametrize(("depth", "expected"), [("", "/etc/"), ("--depth 1", "/etc/"), ("--depth 0", "/")])
def test_directories_are_cut_at_the_depth(
    disks: Path, depth: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(f"diff {disks}/old.img {disks}/new.img --json --by directory {depth}")
    rows = {row["path"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert expected in rows
    assert rows[expected]["files"] >= 2


def test_files_hold_the_rows_that_json_prints(
    disks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(f"diff {disks}/old.img {disks}/new.img --json")
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    for ending in ("csv", "parquet", "jsonl"):
        command(f"diff {disks}/old.img {disks}/new.img -o {tmp_path}/out.{ending}")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows
    assert [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    with open(tmp_path / "out.csv", newline="") as file:
        assert [(int(row["bytes"]), row["change"], row["path"]) for row in csv.DictReader(file)] == [
            (row["bytes"], row["change"], row["path"] or "") for row in rows
        ]


def test_maps_over_time_without_any_disk(disks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(f"diff {disks}/old.parquet {disks}/new.parquet --json")
    rows = {
        (row["path"], row["change"]): row for row in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert rows["/etc/more", "added"]["size"] == 30_000
    assert rows["/etc/hosts", "deleted"]["size"] is None
    assert not any(path == "/etc/passwd" for path, _ in rows)
    blocks = {
        name: run("debugfs", "-R", f"blocks /etc/{name}", disks / f"{image}.img").split()
        for name, image in (("more", "new"), ("hosts", "old"))
    }
    assert rows["/etc/more", "added"]["bytes"] == 4096 * len(blocks["more"])
    assert rows["/etc/hosts", "deleted"]["bytes"] == 4096 * len(set(blocks["hosts"]) - set(blocks["more"]))
    command(f"diff {disks}/old.parquet {disks}/new.img")  # a map and a disk
    assert (
        "fragmentation: 1.00 pieces a file before (2 files with content), 1.00 now (2 files)"
        in capsys.readouterr().out
    )


def test_an_overlay_may_be_larger_than_its_backing_file(
    disks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(f"diff --references {disks}/first.qcow2 --json")
    out, err = capsys.readouterr()
    assert err.startswith("65,536 bytes")
    assert [(json.loads(row)["bytes"], json.loads(row)["change"]) for row in out.splitlines()] == [
        (65536, "free")
    ]


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("{d}/second.qcow2", 131_072),
        ("{d}/first.qcow2 {d}/second.qcow2", 131_072),
        ("{d}/old.img {d}/second.qcow2", 196_608),
    ],
)
def test_all_layers_above_the_older_image_are_the_delta(
    disks: Path, line: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command("diff --references --json " + line.format(d=disks))
    assert capsys.readouterr().err.startswith(f"{size:,} bytes")


def test_verify_drops_clusters_that_are_equal(
    disks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        disks / "old.img",
        "-F",
        "raw",
        tmp_path / "same.qcow2",
    )
    data = (disks / "old.img").read_bytes()[: 1 << 20]
    (tmp_path / "start").write_bytes(data)
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {tmp_path}/start 0 1M", tmp_path / "same.qcow2")
    command(f"diff --references --json {tmp_path}/same.qcow2")
    assert capsys.readouterr().err.startswith("1,048,576 bytes")
    command(f"diff --references --json --verify {tmp_path}/same.qcow2")
    out, err = capsys.readouterr()
    assert (out, err[:8]) == ("", "0 bytes ")


def test_a_served_overlay_tells_its_own_layer_and_a_bitmap_that_is_not_there(
    disks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = tmp_path / "socket"
    server = subprocess.Popen(
        [
            need("qemu-nbd", "qemu-utils"),
            "-r",
            "-t",
            "-A",
            "-f",
            "qcow2",
            "-k",
            socket,
            disks / "second.qcow2",
        ]
    )
    try:
        wait_for_socket(socket)
        command(f"diff --json nbd+unix:///?socket={socket}")
        out, err = capsys.readouterr()
        assert err.startswith("131,072 bytes")
        assert sum(json.loads(row)["bytes"] for row in out.splitlines()) == 131_072
        with pytest.raises(
            BmapError, match="has no qemu:dirty-bitmap:b0; it has: base:allocation, qemu:allocation-depth"
        ):
            command(f"diff --bitmap b0 nbd+unix:///?socket={socket}")
    finally:
        server.terminate()
        server.wait(20)
