"""The partition tables of other machines: Apple's, Sun's and SGI's, against sfdisk, parted and mmls."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from support import assert_proven, content, mapped, need, run, tree
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader

MIB = 1 << 20
SIZE = 64 * MIB
CYLINDER = 255 * 63
SUN = (
    f"label: sun\nstart=0,size={CYLINDER},type=2\nstart={CYLINDER},size={3 * CYLINDER},type=83\n"
    f"start={4 * CYLINDER},size={CYLINDER},type=82\n"
)


def made(path: Path, kind: str) -> Path:
    """A disk with this label, and some partitions."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    if kind == "sun":
        need("sfdisk", "fdisk")
        run("sfdisk", "-q", path, stdin=SUN.encode())
        return path
    need("parted", "parted")
    label, part, start = {"mac": ("mac", ["name", "ext2"], "1MiB"), "sgi": ("dvh", ["primary"], "10MiB")}[
        kind
    ]
    first, second = [*part, start, "30MiB"], [*part, "40MiB", "50MiB"]
    run("parted", "-s", path, "mklabel", label, "mkpart", *first, "mkpart", *second)
    return path


def places(bmap: BlockMap) -> dict[int, tuple[int, int]]:
    """Partition number to (start, size) in bytes."""
    names = bmap.volumes.column("name").to_pylist()
    rows = bmap.mappings.to_pylist()
    return {
        int(names[row["volume"]].removeprefix("/dev/sda")): (row["parent_offset"], row["run"]) for row in rows
    }


def by_sfdisk(path: Path) -> dict[int, tuple[int, int]]:
    rows = json.loads(run("sfdisk", "--json", path))["partitiontable"]["partitions"]
    return {int(row["node"].removeprefix(str(path))): (row["start"] * 512, row["size"] * 512) for row in rows}


@pytest.mark.parametrize(("kind", "left_out"), [("sun", ()), ("sgi", (9, 11))])
def test_like_sfdisk(tmp_path: Path, kind: str, left_out: tuple[int, ...]) -> None:
    """SGI's partitions that hold the header and the whole volume are no volumes of their own."""
    path = made(tmp_path / "disk", kind)
    bmap = mapped(path)
    assert bmap.volumes.column("type")[0].as_py() == kind
    expected = by_sfdisk(path)
    assert len(expected) >= 3
    assert places(bmap) == {number: place for number, place in expected.items() if number not in left_out}
    assert_proven(bmap)


def test_like_parted_and_mmls(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "mac")
    bmap = mapped(path)
    rows = [
        line.split(":") for line in run("parted", "-sm", path, "unit", "B", "print").decode().splitlines()[2:]
    ]
    assert places(bmap) == {int(row[0]): (int(row[1][:-1]), int(row[3][:-1])) for row in rows}
    assert bmap.volumes.column("label").to_pylist()[1:] == [row[5] for row in rows]
    need("mmls", "sleuthkit")
    found = re.findall(
        r"^\d+:  \d+ +(\d+) +\d+ +(\d+) +(Apple_(?!Free)\w+)$",
        run("mmls", "-t", "mac", path).decode(),
        re.MULTILINE,
    )
    assert sorted((int(start) * 512, int(size) * 512) for start, size, _ in found) == sorted(
        places(bmap).values()
    )
    assert bmap.volumes.column("detail").to_pylist()[1:] == [kind for *_, kind in found]
    assert_proven(bmap)


@pytest.mark.parametrize("kind", ["mac", "sun", "sgi"])
def test_a_filesystem_inside(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path / "disk", kind)
    number, (start, size) = max(places(mapped(path)).items(), key=lambda item: item[1][1])
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(np.random.default_rng(3).bytes(100_000))
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-d",
        tmp_path / "tree",
        "-E",
        f"offset={start}",
        path,
        f"{size // 1024}k",
    )
    bmap = mapped(path)
    volume = bmap.volume_named(f"/dev/sda{number}")
    assert content(
        bmap, [RawReader(str(path))], volume, tree(bmap, volume)["/file"]
    ) == np.random.default_rng(3).bytes(100_000)
    assert_proven(bmap)


def test_the_first_slice_holds_the_label_and_a_filesystem(tmp_path: Path) -> None:
    """Sun's first slice begins with the disk; an ext4 there leaves the label alone, and the label is not
    found in it again."""
    path = made(tmp_path / "disk", "sun")
    label = path.read_bytes()[:512]
    run("mke2fs", "-q", "-t", "ext4", path, f"{CYLINDER // 2}k")
    with path.open("r+b") as file:
        file.write(label)
    bmap = mapped(path)
    assert bmap.volumes.column("type").to_pylist() == ["sun", "ext4", None, None]
    assert_proven(bmap)


def test_the_files_of_an_sgi_volume_directory(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "sgi")
    data = bytearray(path.read_bytes()[:512])
    data[72:88] = b"sash\0\0\0\0" + (100).to_bytes(4, "big") + (5000).to_bytes(4, "big")
    data[504:508] = bytes(4)
    data[504:508] = (-int(np.frombuffer(bytes(data), ">u4").sum(dtype=np.uint64)) & 0xFFFFFFFF).to_bytes(
        4, "big"
    )
    with path.open("r+b") as file:
        file.write(data)
    bmap = mapped(path)
    rows = [row for row in bmap.extents.to_pylist() if row["part"] == "volume directory: sash"]
    assert [(row["volume_offset"], row["length"]) for row in rows] == [(51200, 5000)]
    assert_proven(bmap)


def test_a_checksum_that_is_wrong_makes_no_table(tmp_path: Path) -> None:
    for kind in ("sun", "sgi"):
        path = made(tmp_path / kind, kind)
        with path.open("r+b") as file:
            file.seek(450)
            file.write(b"\x12")
        bmap = mapped(path)
        assert bmap.volumes.column("type").to_pylist() == [kind]  # named, and in one piece


def test_a_map_that_promises_more_entries_than_it_has(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "mac")
    entries = int.from_bytes(path.read_bytes()[516:520], "big")
    with path.open("r+b") as file:
        file.seek(512 + 4)
        file.write((1 << 31).to_bytes(4, "big"))
    (problem,) = mapped(path).problems.to_pylist()
    assert (problem["code"], problem["volume_offset"]) == ("mapping", (entries + 1) * 512)


def test_a_partition_that_is_the_disk_again_ends(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "sun")
    run("sfdisk", "-q", "--wipe", "always", path, stdin=b"label: dos\nstart=2048,size=4096\n")
    with path.open("r+b") as file:
        file.seek(446 + 8)
        file.write((0).to_bytes(4, "little") + (SIZE // 512).to_bytes(4, "little"))
    assert mapped(path).volumes.column("name").to_pylist() == ["/dev/sda", "/dev/sda1"]


def test_a_slice_may_begin_beyond_what_64_bits_count(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", "sun")
    label = np.frombuffer(path.read_bytes()[:512], ">u2").copy()
    label[[218, 219, 222, 223]] = 0xFFFF  # heads, sectors of a track; where the first slice begins
    label[255] = np.bitwise_xor.reduce(label[:255])
    with path.open("r+b") as file:
        file.write(label.tobytes())
    bmap = mapped(path)
    assert bmap.volumes.column("type")[0].as_py() == "sun"
    assert "outside" in bmap.problems.column("code").to_pylist()
