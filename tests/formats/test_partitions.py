"""GPT and MBR against sfdisk, damaged on purpose, and as a hostile guest would write them."""

import json
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from support import BytesReader, assert_proven, mapped, need, run
from virt_bmap.ask.check import check
from virt_bmap.model import tables
from virt_bmap.survey.survey import survey

MIB = 1 << 20


def partitioned(path: Path, script: str, size: int = 64 * MIB, *options: str) -> Path:
    need("sfdisk", "fdisk")
    with open(path, "wb") as file:
        file.truncate(size)
    run("sfdisk", "-q", *options, path, stdin=script.encode())
    return path


def by_sfdisk(path: Path, *options: str) -> dict[int, tuple[int, int]]:
    """Partition number to (start, size) in bytes, extended partitions left out."""
    found = json.loads(run("sfdisk", "--json", *options, path))["partitiontable"]
    sector = found.get("sectorsize", 512)
    return {
        int(row["node"].removeprefix(str(path)).removeprefix("p")): (
            row["start"] * sector,
            row["size"] * sector,
        )
        for row in found["partitions"]
        if row["type"] not in ("5", "f", "85")
    }


def by_us(bmap) -> dict[int, tuple[int, int]]:
    rows = zip(
        bmap.mappings.column("volume").to_pylist(),
        bmap.mappings.column("parent_offset").to_pylist(),
        bmap.mappings.column("run").to_pylist(),
        strict=True,
    )
    names, detail = bmap.volumes.column("name").to_pylist(), bmap.volumes.column("detail").to_pylist()
    return {
        int(names[v].removeprefix("/dev/sda")): (start, run)
        for v, start, run in rows
        if "Extended" not in detail[v]
    }


GPT = (
    "label: gpt\nsize=10M,name=first\nsize=1M,type=21686148-6449-6E6F-744E-656564454649\nstart=30M,size=5M\n"
)
MBR = "label: dos\nsize=10M,type=83,bootable\nsize=30M,type=5\nsize=5M,type=82\nsize=6M\nsize=7M\nsize=2M\n"


@pytest.mark.parametrize(
    "script", [GPT, MBR, "label: gpt\nstart=2048,size=2048\n", "label: dos\nstart=63,size=1000\n"]
)
def test_like_sfdisk(tmp_path, script):
    path = partitioned(tmp_path / "disk", script)
    bmap = mapped(path)
    assert by_us(bmap) == by_sfdisk(path)
    assert_proven(bmap)


def test_gpt_facts(tmp_path):
    path = partitioned(tmp_path / "disk", GPT)
    bmap = mapped(path)
    truth = json.loads(run("sfdisk", "--json", path))["partitiontable"]
    assert bmap.volumes.column("type")[0].as_py() == "gpt"
    assert bmap.volumes.column("uuid").to_pylist() == [
        truth["id"].lower(),
        *(row["uuid"].lower() for row in truth["partitions"]),
    ]
    assert bmap.volumes.column("label").to_pylist() == [
        None,
        *(row.get("name") for row in truth["partitions"]),
    ]
    assert bmap.volumes.column("name").to_pylist() == ["/dev/sda", "/dev/sda1", "/dev/sda2", "/dev/sda3"]


def test_gpt_with_4096_byte_sectors(tmp_path):
    """sfdisk can't make one on a file; built here from UEFI 2.10, section 5.3."""
    disk = np.zeros(64 * MIB, np.uint8)
    sectors = len(disk) // 4096

    def put(at, data):
        disk[at : at + len(data)] = np.frombuffer(data, np.uint8)

    entries = struct.pack(
        "<16s16sQQQ72s",
        b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4",
        b"u" * 16,
        256,
        2047,
        0,
        "vier".encode("utf-16-le"),
    )
    entries = entries.ljust(128 * 128, b"\0")
    for here, there, array in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 5)):
        header = struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x10000,
            92,
            0,
            0,
            here,
            there,
            6,
            sectors - 6,
            b"g" * 16,
            array,
            128,
            128,
            zlib.crc32(entries),
        )
        header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
        put(here * 4096, header)
        put(array * 4096, entries)
    put(446, struct.pack("<B3xB3xII", 0, 0xEE, 1, sectors - 1))
    put(510, b"\x55\xaa")
    bmap = survey([BytesReader(disk)])
    assert by_us(bmap) == {1: (MIB, 7 * MIB)}
    assert bmap.volumes.column("label")[1].as_py() == "vier"
    assert_proven(bmap)


@pytest.mark.parametrize(
    ("at", "code"),
    [
        (512, "copy-used"),
        (1024 + 40, "copy-used"),
        (-512 + 20, "copy-missing"),
        (-33 * 512 + 40, "copy-missing"),
    ],
)
def test_one_damaged_gpt_is_survived_and_said(tmp_path, at, code):
    path = partitioned(tmp_path / "disk", GPT)
    truth = by_sfdisk(path)
    with open(path, "r+b") as file:
        file.seek(at, 0 if at > 0 else 2)
        file.write(b"\xff\xfe\xfd")
    bmap = mapped(path)
    assert by_us(bmap) == truth
    assert [row["code"] for row in bmap.problems.to_pylist()] == [code]
    assert [d.code for d in check(bmap).disagreements] == [code]


def test_both_damaged_is_corrupt_and_one_piece(tmp_path):
    path = partitioned(tmp_path / "disk", GPT)
    with open(path, "r+b") as file:
        file.seek(512 + 24)
        file.write(b"\xff" * 8)
        file.seek(-500, 2)
        file.write(b"\xff" * 8)
    bmap = mapped(path)
    assert bmap.volumes.num_rows == 1
    (problem,) = bmap.problems.to_pylist()
    assert "neither GPT header is valid" in problem["detail"]
    assert "checksum is wrong" in problem["detail"]


def test_gpt_without_protective_mbr_does_not_count(tmp_path):
    """As in the kernel: a leftover of an older table."""
    path = partitioned(tmp_path / "disk", GPT)
    old = path.read_bytes()
    fresh = partitioned(tmp_path / "new", "label: dos\nsize=3M\n")
    data = bytearray(old)
    data[:512] = fresh.read_bytes()[:512]
    path.write_bytes(data)
    assert by_us(mapped(path)) == by_sfdisk(fresh)


def test_hybrid_mbr_is_a_gpt(tmp_path):
    need("sgdisk", "gdisk")
    path = partitioned(tmp_path / "disk", GPT)
    run("sgdisk", "--hybrid=1:3", path)
    bmap = mapped(path)
    assert bmap.volumes.column("type")[0].as_py() == "gpt"
    assert set(by_us(bmap)) == {1, 2, 3}


def test_a_loop_of_logical_partitions_ends(tmp_path):
    path = partitioned(tmp_path / "disk", MBR)
    data = bytearray(path.read_bytes())
    first = 0x100000 + 10 * MIB
    while data[first + 446 + 16 + 4]:
        first = 11 * MIB + struct.unpack_from("<I", data, first + 446 + 16 + 8)[0] * 512
    data[first + 446 + 16 : first + 446 + 32] = struct.pack("<B3xB3xII", 0, 5, 0, 99)
    path.write_bytes(data)
    bmap = mapped(path)
    assert "twice" in bmap.problems.column("code").to_pylist()


def test_a_truncated_disk_says_which_partition(tmp_path):
    path = partitioned(tmp_path / "disk", MBR)
    with open(path, "r+b") as file:
        file.truncate(8 * MIB)
    bmap = mapped(path)
    assert {"truncated", "outside"} <= set(bmap.problems.column("code").to_pylist())
    assert any(
        "/dev/sda1 ends at byte 0xb00000, but the disk ends at 0x800000" in detail
        for detail in bmap.problems.column("detail").to_pylist()
    )
    assert all(d.code != "untiled" for d in check(bmap).disagreements)


def test_grub_behind_the_mbr_is_boot_code(tmp_path):
    path = partitioned(tmp_path / "disk", MBR)
    with open(path, "r+b") as file:
        file.seek(512)
        file.write(b"GRUB" * 1000)
    extents = mapped(path).extents
    rows = extents.filter(np.array(extents.column("part").to_pylist()) == "gap behind the MBR").to_pylist()
    assert [(row["kind"], row["volume_offset"], row["length"]) for row in rows] == [("boot", 512, MIB - 512)]


@pytest.mark.parametrize(
    "maker", [("mkfs.fat", "-C", "{}", "20000"), ("mkntfs", "-Fqf", "{}"), ("mkfs.exfat", "{}")]
)
def test_a_filesystem_on_the_whole_disk_is_not_a_partition_table(tmp_path, maker):
    need(maker[0], {"mkfs.fat": "dosfstools", "mkntfs": "ntfs-3g", "mkfs.exfat": "exfatprogs"}[maker[0]])
    path = tmp_path / "disk"
    if maker[0] != "mkfs.fat":
        path.write_bytes(bytes(20 * MIB))
    subprocess.run(
        [part.format(path) for part in maker],
        check=True,
        capture_output=True,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
    )
    assert mapped(path).volumes.num_rows == 1


def small(script: str, tmp_path: Path) -> bytes:
    """A disk of 1 MiB, so that thousands of damaged copies take seconds."""
    return partitioned(tmp_path / "small", script, MIB).read_bytes()


def test_what_lies_in_no_partition_is_a_gap(tmp_path):
    bmap = mapped(partitioned(tmp_path / "disk", "label: gpt\nstart=30M,size=5M\n"))
    _, own = bmap.slice_of("extents", 0)
    gaps = own.filter(tables.codes(own, "kind") == tables.GAP)
    assert sum(gaps.column("length").to_pylist()) == 64 * MIB - 5 * MIB - 34 * 512 - 33 * 512
