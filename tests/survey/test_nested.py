"""Disk images that are files of a guest's disk: what is in them is found, owned and read through both
filesystems."""

import json
from pathlib import Path

import numpy as np
import pytest

from support import assert_proven, content, need, run, tree
from virt_bmap.cli import run as cli
from virt_bmap.core.errors import UsageError
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import nested
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.nested import MAX_LEVELS
from virt_bmap.survey.survey import survey

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 that holds a partitioned image with an ext4, a qcow2, noise, and an ext4 without a table."""
    need("mke2fs", "e2fsprogs"), need("sfdisk", "fdisk"), need("qemu-img", "qemu-utils")
    folder = tmp_path_factory.mktemp("nested")
    inner, outer = folder / "inner", folder / "outer"
    for path in (inner, outer, outer / "images"):
        path.mkdir()
    (inner / "file").write_bytes(np.random.default_rng(3).bytes(700_000))
    with (outer / "images/table.img").open("wb") as file:
        file.truncate(8 * MIB)
    run("sfdisk", "-q", outer / "images/table.img", stdin=b"label: gpt\nstart=2048\n")
    run("mke2fs", "-q", "-t", "ext4", "-d", inner, "-E", "offset=1048576", outer / "images/table.img", "6m")
    run("mke2fs", "-q", "-t", "ext4", "-d", inner, outer / "plain.img", "5m")
    run("qemu-img", "create", "-q", "-f", "qcow2", outer / "images/other.qcow2", "1G")
    with (outer / "images/other.qcow2").open("r+b") as file:
        file.truncate(2 * MIB)
    (outer / "noise").write_bytes(np.random.default_rng(4).bytes(2 * MIB))
    run("mke2fs", "-q", "-t", "ext4", "-d", outer, folder / "disk", "40m")
    return folder / "disk"


def mapped(disk: Path, *options: str) -> BlockMap:
    return survey([RawReader(str(disk))], nested=nested(list(options)))


def test_not_unless_asked_for(disk: Path) -> None:
    assert mapped(disk).volumes.num_rows == 1


def test_a_file_by_its_path(disk: Path) -> None:
    bmap = mapped(disk, "/images/table.img")
    names = bmap.volumes.column("name").to_pylist()
    assert names == ["/dev/sda", "/dev/sda:/images/table.img", "/dev/sda:/images/table.img1"]
    assert_proven(bmap)
    volume = bmap.volume_named(names[2])
    expected = np.random.default_rng(3).bytes(700_000)
    inode = tree(bmap, volume)["/file"]
    assert content(bmap, [RawReader(str(disk))], volume, inode) == expected


def test_a_file_that_is_not_there(disk: Path) -> None:
    with pytest.raises(UsageError, match="on any filesystem of these disks"):
        mapped(disk, "/plain.img", "none.img")


def test_all_of_them(disk: Path) -> None:
    bmap = mapped(disk, "all")
    found = {row["name"]: row["type"] for row in bmap.volumes.to_pylist() if row["kind"] == "image"}
    assert found == {
        "/dev/sda:/images/table.img": "gpt",
        "/dev/sda:/plain.img": "ext4",
        "/dev/sda:/images/other.qcow2:file": "qcow2",
        "/dev/sda:/images/other.qcow2": None,
    }
    assert_proven(bmap)


def test_a_byte_is_explained_on_both_levels(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What explain says of a byte in the middle of the inner file is what both filesystems' own tools say."""
    # a block of 1024 bytes in the midst of the partition
    block = int(run("debugfs", "-R", "bmap /images/table.img 2600", disk))
    assert cli(["explain", "--json", "--nested", "/images/table.img", str(disk), str(block * 1024 + 3)]) == 0
    outer = json.loads(capsys.readouterr().out)["layer"]
    assert outer["owners"][0]["inode"]["path"] == "/images/table.img"
    place = outer["owners"][0]["file_offset"]
    assert place == 2600 * 1024 + 3
    (image,) = outer["layers"]
    assert (image["device"], image["kind"], image["offset"]) == ("/dev/sda:/images/table.img", "image", place)
    assert (
        run("debugfs", "-R", "cat /images/table.img", disk)[place : place + 64]
        == disk.read_bytes()[block * 1024 + 3 :][:64]
    )


def test_an_inner_volume_is_copied_out(disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        cli(
            [
                "dump",
                "-q",
                "--nested",
                "/images/table.img",
                str(disk),
                "/dev/sda:/images/table.img1",
                str(out),
            ]
        )
        == 0
    )
    assert out.read_bytes() == run("debugfs", "-R", "cat /images/table.img", disk)[MIB:][: 6 * MIB]


def test_owners_of_both_levels(disk: Path) -> None:
    bmap = mapped(disk, "plain.img")
    volume = bmap.volume_named("/dev/sda:/plain.img")
    inode = tree(bmap, volume)["/file"]
    _, extents = bmap.slice_of("extents", volume)
    row = next(row for row in extents.to_pylist() if row["inode"] == inode and row["kind"] == "data")
    start = np.array([row["volume_offset"]])
    where = bmap.descend(volume, start, start + 1)
    owners = bmap.owners(1, where.start, where.end)
    both = {
        (int(number), bmap.extents.column("inode")[int(at)].as_py())
        for number, at in zip(owners.volume, owners.extent, strict=True)
        if at >= 0
    }
    assert both == {(0, tree(bmap, 0)["/plain.img"]), (volume, inode)}


def test_images_in_images_end(tmp_path: Path) -> None:
    need("mke2fs", "e2fsprogs")
    content_of, size = tmp_path / "0", 2
    content_of.mkdir()
    for level in range(1, MAX_LEVELS + 3):
        folder = tmp_path / str(level)
        folder.mkdir()
        run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / str(level - 1), folder / "image", f"{size}m")
        size *= 2
    bmap = mapped(tmp_path / str(MAX_LEVELS + 2) / "image", "all")
    assert bmap.volumes.column("kind").to_pylist() == ["disk"] + ["image"] * MAX_LEVELS
    assert_proven(bmap)
