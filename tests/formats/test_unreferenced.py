"""What merely nothing refers to is never given away: CD images with more than their newest tree, physical
volumes of no known group, formats without allocator.

The judges are the tools that find again what the map does not refer to: xorriso, isoinfo, sgdisk, the kernel.
"""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_lvm import Group, group, loops, with_text  # noqa: F401  (group is a fixture: two disks in a group)
from test_udf import mkudffs

from support import BytesReader, assert_proven, mapped, mounted, need, run
from udf_images import sealed
from virt_bmap.ask.space import free_space
from virt_bmap.cli import run as bmap
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.survey.maps import load
from virt_bmap.survey.survey import _believed, survey

MIB = 1 << 20
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"


def bytes_of(found: BlockMap, kind: str, volume: int = 0) -> int:
    """How many bytes of a volume are of a kind."""
    table = found.slice_of("extents", volume)[1]
    return int(
        tables.integers(table, "length")[tables.codes(table, "kind") == tables.KINDS.index(kind)].sum()
    )


def sparsified(image: Path) -> Path:
    """A copy without free space, and the image itself after it gave back what is free."""
    out = image.with_suffix(".copy")
    assert bmap(["sparsify", "-q", str(image), str(out)]) == 0
    assert bmap(["sparsify", "-q", "--in-place", str(image)]) == 0
    assert out.read_bytes() == image.read_bytes()
    return out


# ---- CD images ---------------------------------------------------------------------------------------------


def tree_of(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def hybrid(folder: Path) -> Path:
    """An image for discs and sticks: its partition 1 has descriptors of its own, partition 2 boots, and there
    is a GPT."""
    need("xorriso", "xorriso"), need("mkfs.vfat", "dosfstools")
    boot, image = folder / "boot.img", folder / "live.iso"
    run("mkfs.vfat", "-C", boot, "2048")
    run(
        "xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-r",
        "-V",
        "LIVE",
        "-o",
        image,
        "-partition_offset",
        "16",
        "-append_partition",
        "2",
        ESP,
        boot,
        "-appended_part_as_gpt",
        "-e",
        "--interval:appended_partition_2:all::",
        "-no-emul-boot",
        tree_of(folder / "tree", readme=b"words\n" * 999),
    )
    return image


def test_both_trees_of_a_hybrid_image_stay(tmp_path: Path) -> None:
    need("isoinfo", "genisoimage"), need("sgdisk", "gdisk")
    image = hybrid(tmp_path)
    before = image.read_bytes()
    entry = before[1024 : 1024 + 128]
    first, last = struct.unpack_from("<QQ", entry, 32)
    found = mapped(image)
    assert_proven(found)
    assert bytes_of(found, "free") == 0
    assert bytes_of(found, "unreferenced") > 16 * 2048
    out = sparsified(image)
    assert out.read_bytes() == before
    part = tmp_path / "part"
    part.write_bytes(out.read_bytes()[first * 512 : (last + 1) * 512])
    assert run("isoinfo", "-R", "-x", "/readme", "-i", part) == b"words\n" * 999
    assert b"No problems found" in run("sgdisk", "-v", out)


def test_older_sessions_stay(tmp_path: Path) -> None:
    need("xorriso", "xorriso")
    image = tmp_path / "disc.img"
    old = np.random.default_rng(1).bytes(300_000)
    run(
        "xorriso",
        "-dev",
        f"stdio:{image}",
        "-map",
        tree_of(tmp_path / "one", old=old),
        "/",
        "-commit",
        "-end",
    )
    run(
        "xorriso",
        "-dev",
        f"stdio:{image}",
        "-rm",
        "/old",
        "--",
        "-map",
        tree_of(tmp_path / "two", new=b"new"),
        "/",
        "-commit",
        "-end",
    )
    found = mapped(image)
    assert bytes_of(found, "unreferenced") >= 300_000
    assert bmap(["explain", str(image), str(image.read_bytes().index(old[:64]))]) == 0
    sparsified(image)
    run(
        "xorriso",
        "-osirrox",
        "on",
        "-load",
        "session",
        "1",
        "-indev",
        f"stdio:{image}",
        "-extract",
        "/",
        tmp_path / "out",
    )
    assert hashlib.sha256((tmp_path / "out/old").read_bytes()).digest() == hashlib.sha256(old).digest()


def test_explain_and_the_text_map_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = hybrid(tmp_path)
    at = int(
        tables.integers(mapped(image).extents, "volume_offset")[
            tables.codes(mapped(image).extents, "kind") == tables.UNREFERENCED
        ][0]
    )
    assert bmap(["explain", str(image), str(at)]) == 0
    assert "nothing refers to it, but no allocator says that it is free" in capsys.readouterr().out
    assert bmap(["-o", str(tmp_path / "map"), str(image)]) == 0
    assert f"1 {at:x} " in (lines := (tmp_path / "map").read_text())
    assert re.search(rf"^1 {at:x} [0-9a-f]+ o /dev/sda$", lines, re.MULTILINE)
    assert bmap(["-o", str(tmp_path / "map.parquet"), str(image)]) == 0
    for saved in ("map", "map.parquet"):
        assert bytes_of(load(str(tmp_path / saved)), "unreferenced") == bytes_of(
            mapped(image), "unreferenced"
        )
    assert bmap(["sparsify", "--estimate", "--json", str(image)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert not any(row["given_back"] for row in rows)


def persistent(image: Path, start: int) -> None:
    """Put an ext4 with a file, and with space that a deleted file had, at byte `start`."""
    run("mke2fs", "-q", "-t", "ext4", "-E", f"offset={start}", image, "24M")
    with mounted(image, "", start) as root:
        (root / "mine").write_bytes(b"persistent")
        (root / "gone").write_bytes(bytes(range(1, 256)) * 20_000)
        run("sync", "-f", root)
        (root / "gone").unlink()


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_a_partition_behind_a_hybrid_image(tmp_path: Path, table: str) -> None:
    """It is shown and read, its own allocator's free space is given back, and nothing else changes."""
    need("sgdisk", "gdisk"), need("sfdisk", "fdisk")
    if table == "gpt":
        image, number = hybrid(tmp_path), 4
        run("truncate", "-s", "64M", image)
        run("sgdisk", "-e", "-n", "4:0:0", "-t", "4:8300", image)
        start = int(re.search(rb"start=\s*(\d+)", run("sfdisk", "-d", image).splitlines()[-1])[1]) * 512  # type: ignore[index]
    else:
        need("xorriso", "xorriso")
        image, number, start = tmp_path / "live.iso", 2, 16 * MIB
        run(
            "xorriso",
            "-as",
            "mkisofs",
            "-quiet",
            "-r",
            "-o",
            image,
            tree_of(tmp_path / "tree", readme=b"words"),
        )
        run("truncate", "-s", "64M", image)
        entries = [
            struct.pack("<B3sB3sII", 0, b"", 0x17, b"", 0, 2048),
            struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 32768, 98304),
        ]
        with image.open("r+b") as file:
            file.seek(446)
            file.write(b"".join(entries))
            file.seek(510)
            file.write(b"\x55\xaa")
    persistent(image, start)
    found = mapped(image)
    names = found.volumes.column("name").to_pylist()
    assert found.volumes.column("type").to_pylist()[names.index(f"/dev/sda{number}")] == "ext4"
    assert_proven(found)
    before = np.fromfile(image, np.uint8)
    sparsified(image)
    changed = np.flatnonzero(before != np.fromfile(image, np.uint8))
    assert len(changed) >= 4_000_000
    assert start <= changed[0] < changed[-1] < start + 24 * MIB
    with mounted(image, "ro", start) as root:
        assert (root / "mine").read_bytes() == b"persistent"
    run("e2fsck", "-fn", f"{image}?offset={start}")


# ---- UDF ---------------------------------------------------------------------------------------------------


def test_a_bitmap_speaks_only_where_it_can_be_written(tmp_path: Path) -> None:
    """Free as the space bitmap says; of a partition that is closed nothing is (its descriptor's access type,
    with a right checksum)."""
    image = tmp_path / "x.udf"
    mkudffs(image, "hd", "2.01", 512)
    free = bytes_of(mapped(image), "free")
    assert free > 20 * MIB
    data = bytearray(image.read_bytes())
    blocks = [
        at
        for at in range(0, len(data), 512)
        if data[at : at + 2] == b"\x05\0" and data[at + 25 : at + 31] == b"+NSR03"
    ]
    assert len(blocks) == 2, "a partition descriptor in both sequences"
    for at in blocks:
        assert struct.unpack_from("<I", data, at + 184) == (4,), "overwritable"
        struct.pack_into("<I", data, at + 184, 1)
        data[at : at + 512] = sealed(data[at : at + 512])
    image.write_bytes(data)
    closed = mapped(image)
    assert_proven(closed)
    assert bytes_of(closed, "free") == 0
    assert bytes_of(closed, "unreferenced") >= free


# ---- LVM ---------------------------------------------------------------------------------------------------


def test_a_physical_volume_of_no_known_group_keeps_its_bytes(tmp_path: Path) -> None:
    need("pvcreate", "lvm2")
    image = tmp_path / "pv.img"
    run("truncate", "-s", "16M", image)
    with loops(image) as (devices, options):
        run("pvcreate", *options[:2], devices[0])
    found = mapped(image)
    assert bytes_of(found, "free") == 0
    assert bytes_of(found, "unreferenced") >= 14 * MIB


def test_a_volume_that_is_not_read_takes_extents_that_nobody_may_have(group: Group) -> None:
    """A segment of an unknown type may lie on any disk of the group, also on those without a problem."""
    disks = [np.fromfile(disk, np.uint8) for disk in group.disks]
    raw = disks[1][4096 + 40 : 4096 + 56].view("<u8")
    text = disks[1][4096 + raw[0] : 4096 + raw[0] + raw[1]].tobytes()
    found = survey([with_text(disk, text) for disk in disks])
    free = sum(bytes_of(found, "free", volume) for volume in found.disks)
    assert free > 0
    other = re.sub(rb'(type = )"striped"', rb'\1"writecache-of-2040"', text, count=1)
    found = survey([with_text(disk, other) for disk in disks])
    assert sum(bytes_of(found, "free", volume) for volume in found.disks) == 0
    assert sum(bytes_of(found, "unreferenced", volume) for volume in found.disks) > free


# ---- formats -----------------------------------------------------------------------------------------------


def test_without_an_allocator_nothing_is_free() -> None:
    rows = tables.ExtentRows()
    rows.add(tables.FREE, 0, 4096)
    rows.add(tables.DATA, 4096, 4096)
    assert _believed(rows.table(0), "the bitmap").column("kind").to_pylist() == ["free", "data"]
    assert _believed(rows.table(0), None).column("kind").to_pylist() == ["unreferenced", "data"]


def test_a_map_saved_before_there_was_the_kind_is_read(tmp_path: Path) -> None:
    """Codes of kinds are words in a file: a dictionary that ends earlier is the same map."""
    words = [kind for kind in tables.KINDS if kind != "unreferenced"]
    rows = tables.ExtentRows()
    rows.add(tables.FREE, 0, 4096)
    table = rows.table(0)
    old = pa.DictionaryArray.from_arrays(table.column("kind").combine_chunks().indices, pa.array(words))
    table = table.set_column(table.schema.get_field_index("kind"), table.schema.field("kind"), old)
    assert tables.codes(tables.recode(table), "kind").tolist() == [tables.FREE]


def test_an_empty_disk_has_nothing_to_give() -> None:
    found = survey([BytesReader(np.zeros(MIB, np.uint8))])
    assert len(free_space(found, 0).all()[0]) == 0


def test_what_a_format_without_allocator_does_not_name(tmp_path: Path) -> None:
    """It is not called allocated, for who would have done that; it is a contradiction all the same."""
    need("mksquashfs", "squashfs-tools")
    image = tmp_path / "image"
    run(
        "mksquashfs",
        tree_of(tmp_path / "tree", one=bytes(range(256)) * 999),
        image,
        "-quiet",
        "-no-progress",
        "-noD",
        "-noI",
        "-noF",
    )
    data = image.read_bytes()
    start, end = struct.unpack_from("<Q", data, 64)[0], len(data)
    assert 0 < start < end
    rows = mapped(image).extents.to_pylist()
    assert not [row for row in rows if row["kind"] in ("free", "unreferenced", "unknown")]
    changed = bytearray(data)
    struct.pack_into(
        "<I", changed, data.index(struct.pack("<I", 1 << 24 | 255744 % 131072), start), 1 << 24 | 4096
    )
    found = survey([BytesReader(np.frombuffer(bytes(changed), np.uint8))])
    assert bytes_of(found, "unreferenced") > 0
    assert bytes_of(found, "unknown") == 0
    assert "unreferenced" in found.problems.column("code").to_pylist()
