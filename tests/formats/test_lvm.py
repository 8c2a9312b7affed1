"""LVM2: volumes made by LVM's own tools on loop devices, checked against what `lvs` and `pvs` say and by
content."""

import contextlib
import gzip
import json
import lzma
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support import (
    BytesReader,
    assert_proven,
    content,
    mapped,
    need,
    need_root,
    run,
    tree,
)
from virt_bmap.ask.check import check
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.volumes.lvm.label import _crc
from virt_bmap.formats.volumes.lvm.text import parse
from virt_bmap.formats.volumes.lvm.thin import read_pool
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

MIB = 1 << 20


@contextlib.contextmanager
def loops(*images: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Loop devices, and the options with which LVM's tools see only these and need no device-mapper."""
    need_root()
    devices: list[str] = []
    try:
        for image in images:
            devices.append(run("losetup", "-f", "--show", image).decode().strip())
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        yield devices, ["--config", f'devices{{filter=[{accept},"r|.*|"]}}', "--driverloaded", "n"]
    finally:
        for device in devices:
            run("losetup", "-d", device)


@dataclass(frozen=True)
class Group:
    """Images of the physical volumes of a group, and for each logical volume what `lvs` says of its
    segments."""

    disks: list[Path]
    segments: list[dict[str, str]]
    pe_start: dict[str, int]

    def pieces(self, name: str) -> Iterator[tuple[int, int, int, int]]:
        """(offset in the volume, disk, offset on it, bytes) of every stripe, from the words of `lvs`: brute
        force."""
        for segment in self.segments:
            if segment["lv_name"] != name:
                continue
            at, size = int(segment["seg_start"]), int(segment["seg_size"])
            areas = []
            for area in segment["seg_pe_ranges"].split():
                device, _, extents = area.rpartition(":")
                areas.append((device, self.pe_start[device] + int(extents.partition("-")[0]) * MIB))
            chunk = int(segment["stripe_size"]) or size
            devices = list(self.pe_start)
            for number in range(size // chunk):
                device, start = areas[number % len(areas)]
                yield at + number * chunk, devices.index(device), start + number // len(areas) * chunk, chunk


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Two disks of 48 MiB, one with two metadata areas; a linear, a striped and a two-segment volume, each
    with an ext4 in it."""
    need("lvcreate", "lvm2"), need("mke2fs", "e2fsprogs")
    folder = tmp_path_factory.mktemp("lvm")
    disks = [folder / "one.img", folder / "two.img"]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(48 * MIB)
    with loops(*disks) as (devices, options):
        run("pvcreate", *options[:2], "--metadatacopies", "2", devices[0])
        run("pvcreate", *options[:2], devices[1])
        run("vgcreate", *options, "-s", "1M", "my-vg", *devices)
        create = ("lvcreate", *options, "-an", "-Zn", "-Wn", "my-vg")
        run(*create, "-n", "line-ar", "-L", "10M")
        run(*create, "-n", "striped", "-i2", "-I64k", "-L16M")
        run(*create, "-n", "two_segments", "-l", "60")
        columns = "lv_name,seg_start,seg_size,stripes,stripe_size,seg_pe_ranges"
        units = ("--units", "b", "--nosuffix", "--reportformat", "json")
        segments = json.loads(run("lvs", *options, *units, "-o", columns))["report"][0]["lv"]
        pvs = json.loads(run("pvs", *options, *units, "-o", "pv_name,pe_start"))["report"][0]["pv"]
    starts = {pv["pv_name"]: int(pv["pe_start"]) for pv in pvs}
    # as the disks: loop devices come in any order
    found = Group(disks, segments, {device: starts[device] for device in devices})
    for name in ("line-ar", "striped", "two_segments"):
        _fill(found, name, folder)
    return found


def files(name: str) -> dict[str, bytes]:
    """What the ext4 in a volume holds."""
    chance = random.Random(name)
    return {f"{name}-{number}": chance.randbytes(chance.randrange(1, 600_000)) for number in range(6)}


def _fill(group: Group, name: str, folder: Path) -> None:
    size = sum(length for *_, length in group.pieces(name))
    source, image = folder / f"{name}.d", folder / f"{name}.ext4"
    source.mkdir()
    for path, data in files(name).items():
        (source / path).write_bytes(data)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", source, image, f"{size // 1024}k")
    data = image.read_bytes()
    for at, disk, where, length in group.pieces(name):
        with group.disks[disk].open("r+b") as file:
            file.seek(where)
            file.write(data[at : at + length])


def volume(bmap: BlockMap, name: str) -> int:
    return bmap.volume_named(f"/dev/my-vg/{name}")


def test_names_sizes_and_files(group: Group) -> None:
    bmap = mapped(*group.disks)
    names = bmap.volumes.column("name").to_pylist()
    assert names == [
        "/dev/sda",
        "/dev/sdb",
        "/dev/my-vg/line-ar",
        "/dev/my-vg/striped",
        "/dev/my-vg/two_segments",
    ]
    assert bmap.volumes.column("type").to_pylist() == ["LVM2_member"] * 2 + ["ext4"] * 3
    disks = [RawReader(str(disk)) for disk in group.disks]
    for name in ("line-ar", "striped", "two_segments"):
        inodes = tree(bmap, volume(bmap, name))
        for path, data in files(name).items():
            assert content(bmap, disks, volume(bmap, name), inodes[f"/{path}"]) == data
    assert_proven(bmap)


def test_every_stripe_lies_where_lvs_says(group: Group) -> None:
    bmap = mapped(*group.disks)
    for name in ("line-ar", "striped", "two_segments"):
        at, disk, where, length = (np.array(column) for column in zip(*group.pieces(name), strict=True))
        found = bmap.descend(volume(bmap, name), at, at + length)
        order = np.argsort(found.query)
        assert len(order) == len(at)
        assert (found.volume[order] == disk).all()
        assert (found.start[order] == where).all()
        assert (found.end[order] == where + length).all()


def test_free_extents_are_those_of_pvs(group: Group) -> None:
    bmap = mapped(*group.disks)
    with loops(*group.disks) as (devices, options):
        report = (
            run("pvs", *options, "--units", "b", "--nosuffix", "--noheadings", "-o", "pv_name,pv_free")
            .decode()
            .split()
        )
    for number, device in enumerate(devices):
        totals = check(bmap).totals[number]
        assert totals.by_kind.get("free", 0) == int(report[report.index(device) + 1])


def test_a_missing_disk_is_named_and_the_rest_is_read(group: Group) -> None:
    bmap = mapped(group.disks[0])
    details = [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "missing-member"]
    assert len(details) == 2
    assert all("is missing" in detail for detail in details)
    linear = volume(bmap, "line-ar")
    assert f"/{next(iter(files('line-ar')))}" in tree(bmap, linear)
    _, extents = bmap.slice_of("extents", linear)
    assert extents.num_rows > 3


def test_the_second_metadata_area_helps_when_the_first_is_overwritten(group: Group, tmp_path: Path) -> None:
    disk = tmp_path / "one.img"
    shutil.copy(group.disks[0], disk)
    with disk.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(64 << 10))
    bmap = mapped(disk, group.disks[1])
    assert bmap.volumes.num_rows == 5
    assert "copy-differs" in bmap.problems.column("code").to_pylist()
    for row in bmap.mappings.to_pylist():
        assert row in mapped(*group.disks).mappings.to_pylist()


def test_the_order_of_disks_does_not_matter(group: Group) -> None:
    bmap = mapped(*reversed(group.disks))
    disks = [RawReader(str(disk)) for disk in reversed(group.disks)]
    inodes = tree(bmap, volume(bmap, "two_segments"))
    for path, data in files("two_segments").items():
        assert content(bmap, disks, volume(bmap, "two_segments"), inodes[f"/{path}"]) == data


def test_a_copy_of_a_disk_is_named(group: Group) -> None:
    bmap = mapped(*group.disks, group.disks[0])
    assert bmap.volumes.num_rows == 6
    assert [(row["code"], row["volume"]) for row in bmap.problems.to_pylist()] == [
        ("duplicate", 0),
        ("unused-member", 2),
    ]


def with_text(disk: np.ndarray, text: bytes) -> BytesReader:
    """The disk with another metadata text in its first area, and checksums that are right."""
    start, size = 8192, len(text)
    data = disk.copy()
    data[start : start + size] = np.frombuffer(text, np.uint8)
    locator = struct.pack("<QQII", start - 4096, size, _crc(text), 0)
    data[4096 + 40 : 4096 + 64] = np.frombuffer(locator, np.uint8)
    data[4096:4100] = np.frombuffer(struct.pack("<I", _crc(data[4100 : 4096 + 512].tobytes())), np.uint8)
    return BytesReader(data)


# ---- the corpus --------------------------------------------------------------------------------------------


def unpacked(path: Path) -> BytesReader:
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path) as file:
        return BytesReader(np.frombuffer(file.read(), np.uint8), path.name)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("fox-it+dissect.volume/tests/_data/lvm/lvm.bin.gz", ["vg_test/lv_test"]),
        ("fox-it+dissect.volume/tests/_data/lvm/lvm-thin.bin.gz",
         ["lvm-thin/data_tmeta", "lvm-thin/data_tdata", "lvm-thin/lv-1", "lvm-thin/lv-2",
             "lvm-thin/lvol0_pmspare"]),
        ("util-linux+util-linux/tests/ts/blkid/images-fs/lvm2.img.xz", []),
    ],
)  # fmt: skip
def test_corpus(corpus: Path, path: str, names: list[str]) -> None:
    bmap = survey([unpacked(corpus / "images" / path)])
    assert bmap.volumes.column("name").to_pylist() == ["/dev/sda", *(f"/dev/{name}" for name in names)]
    assert_proven(bmap)


def test_corpus_thin_pool_with_an_empty_device(corpus: Path) -> None:
    folder = corpus / "images/fox-it+dissect.volume/tests/_data/dm"
    data = unpacked(folder / "dm-thin-empty-data.bin.gz")
    pool = read_pool(unpacked(folder / "dm-thin-empty-metadata.bin.gz"), data.size)
    assert pool.devices.tolist() == [0, 1]
    assert not np.isin(1, pool.device)
    assert not pool.damage.problems()
    free = tables.integers(pool.data.table(0), "length").sum()
    assert free + int(pool.count.sum()) * pool.block_size == data.size


@pytest.mark.parametrize(
    "text", ["a {", "}", "a = ", "a = [1, 2", 'a = "x', "a b", "= 1", "a { b { } } }", "x {" * 20, "[ ]"]
)
def test_text_that_breaks_the_grammar(text: str) -> None:
    with pytest.raises(Corrupt):
        parse(text)


def test_text() -> None:
    found = parse('# comment\na { b = [ "x\\"y", 3, ]\nc = -7 d="{" } # more\n10 { }\ne = []')
    assert found.section("a").values == {"b": ['x"y', 3], "c": -7, "d": "{"}
    assert list(found.sections) == ["a", "10"]
    assert found.values == {"e": []}
