"""sparsify --estimate: what it promises is what punching holes frees, and files are none the worse for it."""

import ctypes
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from test_dump import digests, disk  # noqa: F401  (a fixture: GPT, a half empty ext4, a partition of unknown content)

from support import mapped, mounted, need, run
from virt_bmap.act.sparsify.estimate import host_of
from virt_bmap.act.sparsify.plan import whole_blocks
from virt_bmap.ask.space import free_space
from virt_bmap.cli import run as bmap
from virt_bmap.show.report.space import gains

MIB = 1 << 20
PUNCH_HOLE_KEEP_SIZE = 3


def estimate(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> list[dict[str, object]]:
    assert bmap(["sparsify", "--estimate", "--json", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_punching_frees_what_was_promised(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "full.img"
    image.write_bytes(disk.read_bytes())
    with image.open("r+b") as file:
        os.fsync(file.fileno())
    rows = estimate(capsys, image)
    free = next(row for row in rows if row["what"] == "free")
    assert (free["device"], free["disk"]) == ("/dev/sda1", 1)
    with mounted(image, "ro", MIB) as root:
        before = digests(root)
        about = os.statvfs(root)
    host = host_of(str(image))
    assert host
    low, high = whole_blocks(free_space(mapped(image), 0).all(), host.block)
    used = image.stat().st_blocks * 512
    with image.open("r+b") as file:
        for start, end in zip(low.tolist(), high.tolist(), strict=True):
            done = ctypes.CDLL(None, use_errno=True).fallocate(
                file.fileno(), PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(start), ctypes.c_long(end - start)
            )
            if done:
                pytest.skip(f"this filesystem can't punch holes: {os.strerror(ctypes.get_errno())}")
        os.fsync(file.fileno())
    freed = used - image.stat().st_blocks * 512
    assert freed >= 2 * MIB
    assert abs(freed - free["host_bytes"]) <= 16 * host.block, "the host's own extent tree grows a little"  # type: ignore[operator]
    assert free["bytes"] == about.f_bfree * about.f_frsize
    with mounted(image, "ro", MIB) as root:
        assert digests(root) == before
    assert next(row for row in estimate(capsys, image) if row["what"] == "free")["host_bytes"] == 0
    out = tmp_path / "part"
    bmap(["dump", "-q", str(image), "/dev/sda1", str(out)])
    run("e2fsck", "-fn", out)


def test_gaps_slack_and_swap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("mkswap", "util-linux"), need("mke2fs", "e2fsprogs")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    run("sfdisk", "-q", image, stdin=b"label: dos\n2048,8M,83\n,8M,82\n")
    run("mke2fs", "-q", "-t", "ext4", "-E", f"offset={MIB}", image, "6M")
    swap = tmp_path / "swap"
    swap.write_bytes(np.random.default_rng(1).bytes(8 * MIB))
    run("mkswap", swap)
    with image.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(swap.read_bytes())
    rows = {(row["what"], row["device"]): row for row in estimate(capsys, image)}
    assert rows["swap", "/dev/sda2"]["bytes"] == 8 * MIB - 4096
    assert rows["swap", "/dev/sda2"]["host_bytes"] == 8 * MIB - 4096
    assert rows["slack", "/dev/sda1"]["bytes"] == 2 * MIB
    assert rows["gap", "/dev/sda"]["bytes"] >= 15 * MIB
    assert {row["what"] for row in rows.values() if row["given_back"]} == {"free"}
    given = {(row["what"], row["device"]) for row in estimate(capsys, image, "--swap") if row["given_back"]}
    assert given == {("free", "/dev/sda1"), ("swap", "/dev/sda2")}
    assert {(row["what"], row["given_back"]) for row in gains(mapped(image), 1)["gains"]} == {
        ("free", True), ("swap", False), ("slack", False), ("gap", False)}  # fmt: skip
    assert bmap(["sparsify", "--estimate", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(
        at for at, line in enumerate(lines) if line.endswith("in all of /dev/sda would be given back")
    )
    assert lines[total].split()[:2] == lines[1].split()[:2], "what is free is all"
    assert all(line.endswith("would be kept") for line in lines[total + 1 :])
    assert len(lines) == total + 4
    with image.open("r+b") as file:  # the signature of a system that sleeps in its swap (kernel/power/swap.c)
        file.seek(9 * MIB + 4096 - 10)
        file.write(b"S1SUSPEND\0")
    assert bmap(["sparsify", "--estimate", str(image)]) == 0
    shown = capsys.readouterr()
    assert "swap of" not in shown.out
    assert "free of /dev/sda1" not in shown.out, "a system that sleeps has its filesystems open"
    assert "/dev/sda1: left as it is: the machine sleeps: /dev/sda2 is hibernated" in shown.err


def test_only_raw_files_have_a_host(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("qemu-img", "qemu-utils"), need("qemu-nbd", "qemu-utils")
    other = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, other)
    raw, packed = estimate(capsys, disk), estimate(capsys, other)
    assert [row["bytes"] for row in raw] == [row["bytes"] for row in packed]
    assert {row["host_bytes"] for row in packed} == {None}
    assert bmap(["sparsify", "--estimate", str(other)]) == 0
    assert "not known" in capsys.readouterr().out


def test_host_blocks_against_brute_force(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in (0, 1 * MIB, 3 * MIB + 100):
            file.seek(at)
            file.write(b"x" * 5000)
        file.truncate(5 * MIB)
        os.fsync(file.fileno())
    host = host_of(str(path))
    assert host
    assert int((host.data[1] - host.data[0]).sum()) == path.stat().st_blocks * 512
    assert host_of("/dev/null") is None
    low, high = whole_blocks((np.array([1, 4096, 9000, 4000]), np.array([4095, 8192, 20000, 9000])), 4096)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [(4096, 8192), (12288, 16384), (4096, 8192)]


def test_overlapping_partitions_give_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.img"
    run("truncate", "-s", "20M", image)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", f"offset={MIB}", image, "16M")
    with image.open("r+b") as file:
        file.seek(446)
        for start, size in ((2048, 32768), (2048, 32768)):
            file.write(struct.pack("<B3sB3sII", 0, b"", 0x83, b"", start, size))
        file.seek(510)
        file.write(b"\x55\xaa")
    assert sum(row["bytes"] for row in estimate(capsys, image)) <= 20 * MIB  # type: ignore[misc]
