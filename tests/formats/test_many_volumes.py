"""Thousands of volumes: the cost of a map grows as their number does, and a table without end comes to
one."""

import json
import resource
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from btrfs_images import loops
from recipes.made import blank
from recipes.volumes import LINEAR, write_lvm_text
from support import mapped, need, run
from virt_bmap.survey import survey

SECTOR, FIRST, LENGTH = 512, 2048, 8


def gpt(path: Path, count: int) -> Path:
    """A disk with `count` partitions of 4 KiB each, written by hand: sfdisk takes minutes for thousands."""
    entries = b"".join(
        uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le
        + uuid.uuid5(uuid.NAMESPACE_OID, str(n)).bytes_le
        + struct.pack("<QQQ72x", FIRST + n * LENGTH, FIRST + n * LENGTH + LENGTH - 1, 0)
        for n in range(count)
    )
    sectors = FIRST + count * LENGTH + 4096
    behind = sectors - 1 - -(-len(entries) // SECTOR)

    def header(mine: int, other: int, table: int) -> bytes:
        def packed(crc: int) -> bytes:
            return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, mine, other, FIRST,
                behind - 1,
                               uuid.UUID(int=7).bytes_le, table, count, 128, zlib.crc32(entries))  # fmt: skip

        return packed(zlib.crc32(packed(0)))

    with open(path, "wb") as file:
        file.truncate(sectors * SECTOR)
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, sectors - 1) + bytes(48) + b"\x55\xaa")
        for mine, other, table in ((1, sectors - 1, 2), (sectors - 1, 1, behind)):
            file.seek(mine * SECTOR)
            file.write(header(mine, other, table))
            file.seek(table * SECTOR)
            file.write(entries)
    return path


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def seconds(path: Path) -> float:
    before = cpu()
    mapped(path)
    return cpu() - before


def test_four_times_the_partitions_take_not_much_more_than_four_times_as_long(tmp_path: Path) -> None:
    few, many = gpt(tmp_path / "few", 512), gpt(tmp_path / "many", 2048)
    mapped(few)
    assert seconds(many) < 8 * seconds(few)


def test_each_partition_has_its_bytes_and_its_number(tmp_path: Path) -> None:
    bmap = mapped(gpt(tmp_path / "disk", 2048))
    assert bmap.volumes.column("name").to_pylist()[1:] == [f"/dev/sda{n}" for n in range(1, 2049)]
    assert bmap.rows_into(0).parent_offset.tolist() == [(FIRST + n * LENGTH) * SECTOR for n in range(2048)]
    assert bmap.depth.tolist() == [0] + [1] * 2048


def test_what_is_too_much_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "MAX_VOLUMES", 100)
    bmap = mapped(gpt(tmp_path / "disk", 128))
    assert bmap.volumes.num_rows == 100
    (problem,) = bmap.problems.to_pylist()
    assert (problem["code"], problem["volume"], problem["severity"]) == ("too-many", 0, "error")
    assert "128 volumes lie in it" in problem["detail"]


# ---- logical volumes ---------------------------------------------------------------------------------------

GROUP = """
many {{ id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa" seqno = 5
format = "lvm2" status = ["RESIZEABLE", "READ", "WRITE"] flags = []
extent_size = 8 max_lv = 0 max_pv = 0 metadata_copies = 0
physical_volumes {{ pv0 {{ id = "{pv}" device = "/dev/sda" status = ["ALLOCATABLE"] flags = []
dev_size = {sectors} pe_start = {start} pe_count = {count} }} }}
logical_volumes {{
{volumes}
}} }}
contents = "Text Format Volume Group"
version = 1
description = ""
creation_host = "here"
creation_time = 1
"""


def group(folder: Path, count: int) -> tuple[Path, int]:
    """A group of so many logical volumes of an extent of 4 KiB each, the last one first; and where extents
    begin."""
    need("pvcreate", "lvm2")
    image = blank(folder / f"{count}.img", (16 << 20) + count * 4096)
    with loops([image]) as (device,):
        options = ["--config", f'devices{{filter=["a|{device}$|","r|.*|"]}}']
        run("pvcreate", *options, "--metadatasize", "12m", device)
        words = ("--reportformat", "json", "--units", "s", "--nosuffix", "-o", "pv_uuid,pe_start")
        (pv,) = json.loads(run("pvs", *options, *words, device))["report"][0]["pv"]
    volumes = "\n".join(
        LINEAR.format(
            name=f"lv{n}", id="-".join((f"{n:06}", *["bbbb"] * 5, "cccccc")), visible=', "VISIBLE"', count=1,
            at=count - 1 - n,
        )
        for n in range(count)
    )  # fmt: skip
    sectors = image.stat().st_size // SECTOR
    start = int(pv["pe_start"])
    text = GROUP.format(pv=pv["pv_uuid"], sectors=sectors, start=start, count=count, volumes=volumes)
    write_lvm_text(image, text.encode())
    return image, start * SECTOR
    return image


@pytest.mark.slow
def test_ten_thousand_logical_volumes(tmp_path: Path) -> None:
    """Their names are those of lvs, and each has the extent that is its own."""
    image, start = group(tmp_path, 10_000)
    with loops([image]) as (device,):
        options = ["--config", f'devices{{filter=["a|{device}$|","r|.*|"]}}', "--driverloaded", "n"]
        said = run("lvs", *options, "--noheadings", "-o", "lv_name,seg_pe_ranges").decode()
    bmap = mapped(image)
    told = {}
    for line in said.splitlines():
        name, ranges = line.split()
        told[f"/dev/many/{name}"] = start + int(ranges.partition(":")[2].partition("-")[0]) * 4096
    names = bmap.volumes.column("name").to_pylist()[1:]
    assert len(told) == 10_000
    assert dict(zip(names, bmap.rows_into(0).parent_offset.tolist(), strict=True)) == told
    assert not bmap.problems.num_rows


def test_the_cost_of_logical_volumes_grows_as_their_number(tmp_path: Path) -> None:
    (few, _), (many, _) = group(tmp_path, 512), group(tmp_path, 2048)
    mapped(few)
    assert seconds(many) < 8 * seconds(few)
