"""The same member twice: a disk by two paths, a clone beside its template. No row is doubled, no name is
wrong, and one line says which two claim to be the same, which is used, and why."""

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tools.fuzz.seeds import PASSPHRASE

import btrfs_images
import recipes
import support
from btrfs_images import loops, mounted_pool
from support import need, run
from virt_bmap.core.keys import Keys
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

# ---- groups, and how their owners write to them ------------------------------------------------------------


def lvm(folder: Path) -> list[Path]:
    return recipes.make("lvm", folder).disks


def md(folder: Path) -> list[Path]:
    return recipes.make("md-raid5", folder).disks


def btrfs(folder: Path) -> list[Path]:
    return btrfs_images.make(folder, "140M", "-d raid1 -m raid1", 2)


def write_lvm(disks: list[Path], folder: Path) -> int:
    """LVM's own state of the group, after it has written to it."""
    with loops(disks) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}', "--driverloaded", "n"]
        run("vgchange", *options, "--addtag", "touched", "my-vg")
        report = json.loads(run("vgs", *options, "--reportformat", "json", "-o", "vg_seqno", "my-vg"))
    return int(report["report"][0]["vg"][0]["vg_seqno"])


def write_md(disks: list[Path], folder: Path) -> int:
    """An event later, as the kernel counts them when it stops an array."""
    for disk in disks:
        with disk.open("r+b") as file:
            file.seek(4096)
            head = bytearray(file.read(256 + 2 * len(disks)))
            (events,) = struct.unpack_from("<Q", head, 0xC8)
            struct.pack_into("<Q", head, 0xC8, events + 1)
            struct.pack_into("<I", head, 0xD8, struct.unpack_from("<I", head, 0xD8)[0] + 1)
            file.seek(4096)
            file.write(head)
    return int(events) + 1


def write_btrfs(disks: list[Path], folder: Path) -> int:
    with mounted_pool(disks, folder / "mnt") as where:
        (where / "new").write_bytes(b"new")
    said = run("btrfs", "inspect-internal", "dump-super", disks[0]).decode()
    found = re.search(r"^generation\s+(\d+)", said, re.MULTILINE)
    assert found
    return int(found[1])


class Group(NamedTuple):
    make: Callable[[Path], list[Path]]
    write: Callable[[list[Path], Path], int]


GROUPS = {"lvm": Group(lvm, write_lvm), "md": Group(md, write_md), "btrfs": Group(btrfs, write_btrfs)}


@pytest.fixture(scope="module", params=GROUPS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def disks(kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return GROUPS[kind].make(tmp_path_factory.mktemp(kind))


def copied(disks: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for disk in disks:
        run("cp", "--sparse=always", disk, folder / disk.name)
    return [folder / disk.name for disk in disks]


def inside(bmap: BlockMap) -> list[tuple[object, ...]]:
    """The volumes that lie in the disks, and where."""
    rows = [row for row in bmap.volumes.to_pylist() if row["kind"] != "disk"]
    return [
        (
            row["name"].replace("/dev/sda", "") if row["kind"] == "pool" else row["name"],
            row["size"],
            row["type"],
            [bmap.volumes.column("name")[at].as_py() for at in bmap.rows_of(row["volume"]).parent.tolist()],
            bmap.rows_of(row["volume"]).parent_offset.tolist(),
        )
        for row in rows
    ]


def said(bmap: BlockMap, code: str) -> list[tuple[str, str]]:
    """(device, words) of the problems of a code."""
    names = bmap.volumes.column("name").to_pylist()
    return [(names[row["volume"]], row["detail"]) for row in bmap.problems.to_pylist() if row["code"] == code]


def test_a_disk_by_two_paths(disks: list[Path], tmp_path: Path) -> None:
    alone = support.mapped(*disks)
    assert not said(alone, "duplicate")
    link = tmp_path / "link"
    link.symlink_to(disks[0])
    bmap = support.mapped(*disks, link)
    assert inside(bmap) == inside(alone)
    last = f"/dev/sd{chr(ord('a') + len(disks))}"
    ((used, words),) = said(bmap, "duplicate")
    assert used == "/dev/sda"
    assert words.startswith(f"/dev/sda of {disks[0]} and {last} of {link} are both ")
    assert "/dev/sda is used, which was given first; give one of them only" in words
    assert said(bmap, "unused-member") == [(last, f"a copy of /dev/sda of {disks[0]}, which is used instead")]


def test_a_copy_that_was_cut_short(disks: list[Path], tmp_path: Path) -> None:
    (cut,) = copied(disks[:1], tmp_path / "cut")
    os.truncate(cut, cut.stat().st_size - (1 << 20))
    bmap = support.mapped(cut, *disks)
    ((used, words),) = said(bmap, "duplicate")
    assert used == "/dev/sdb"
    assert "/dev/sdb is used, which is larger (" in words
    assert not said(bmap, "truncated")


def test_clones_of_which_one_was_written_since(kind: str, disks: list[Path], tmp_path: Path) -> None:
    """All members of the newer one are used, in whatever order they are given; its state is what its owner
    says."""
    clones = copied(disks, tmp_path / "clones")
    before = support.mapped(*disks)
    state = GROUPS[kind].write(clones, tmp_path)
    whole = [row[:3] for row in inside(support.mapped(*clones))]
    assert [row[:3] for row in inside(before)] == whole
    for given in ([*disks, *clones], [*clones, *disks], [clones[0], *disks, *clones[1:]]):
        bmap = support.mapped(*given)
        mine = {f"/dev/sd{chr(ord('a') + at)}" for at, path in enumerate(given) if path in clones}
        assert {parent for row in inside(bmap) for parent in row[3]} == mine
        duplicates = said(bmap, "duplicate")
        assert {device for device, _ in duplicates} == mine
        assert len(duplicates) == len(disks)
        assert all(re.search(rf"was written last \(.* {state}, not \d+\)", words) for _, words in duplicates)


def test_the_kernel_takes_the_newer_btrfs_too(tmp_path: Path) -> None:
    """Of two devices with one id it mounts that of the later generation, whichever it has seen first."""
    disks = btrfs_images.make(tmp_path, "140M", "", 1)
    clones = copied(disks, tmp_path / "clones")
    write_btrfs(clones, tmp_path)
    for given in ([*disks, *clones], [*clones, *disks]):
        with loops(given) as devices:
            for device in devices:
                run("btrfs", "device", "scan", device)
            where = tmp_path / "both"
            where.mkdir(exist_ok=True)
            # by the older device's own name a kernel refuses: the name stands for the newer one
            newer = devices[given.index(clones[0])]
            run("mount", "-o", "ro", newer, where)
            try:
                assert (where / "new").read_bytes() == b"new"
            finally:
                support.unmount(where)
                run("btrfs", "device", "scan", "--forget")
        bmap = support.mapped(*given)
        assert "/new" in support.tree(bmap, bmap.volumes.column("kind").to_pylist().index("pool"))


def test_lvm_sees_two_as_well(tmp_path: Path) -> None:
    """Its own tools warn of the same two devices."""
    need("pvs", "lvm2")
    disks = recipes.make("lvm", tmp_path).disks
    with loops([*disks, disks[0]]) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}', "--driverloaded", "n"]
        done = subprocess.run(["pvs", *options], capture_output=True, text=True)
    assert devices[2] in done.stderr
    assert devices[0] in done.stderr
    bmap = support.mapped(*disks, disks[0])
    ((_, words),) = said(bmap, "duplicate")
    (pv,) = re.findall(r"physical volume (\S+),", words)
    assert pv in done.stderr


def test_groups_of_one_name(tmp_path: Path) -> None:
    """vgimportclone gives a clone other ids; what it is called stays with the user."""
    need("vgimportclone", "lvm2")
    disks = recipes.make("lvm", tmp_path).disks
    clones = copied(disks, tmp_path / "clones")
    with loops(clones) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}', "--driverloaded", "n"]
        run("vgimportclone", *options, "--basevgname", "other-vg", *devices)
        run("vgrename", *options, "other-vg", "my-vg")
    bmap = support.mapped(*disks, *clones)
    names = [name for name in bmap.volumes.column("name").to_pylist() if "my-vg" in name]
    assert names == [f"/dev/my-vg/{name}{end}" for end in ("", "#2") for name in ("lin", "str", "two")]
    assert len(said(bmap, "duplicate")) == 2  # one for each group
    first, second = bmap.volume_named("/dev/my-vg/lin"), bmap.volume_named("/dev/my-vg/lin#2")
    assert support.tree(bmap, first) == support.tree(bmap, second)


@pytest.mark.parametrize("name", ["luks2", "bitlocker"])
def test_a_container_twice(name: str, tmp_path: Path) -> None:
    """Each is opened and shown under a name of its own."""
    (disk,) = recipes.make(name, tmp_path).disks
    clone = Path(shutil.copy(disk, tmp_path / "clone.img"))
    bmap = survey([RawReader(str(path)) for path in (disk, clone)], keys=Keys((("all", PASSPHRASE),)))
    opened = [row["name"] for row in bmap.volumes.to_pylist() if row["kind"] == "crypt"]
    assert opened[1] == f"{opened[0]}#2"
    assert bmap.rows_of(bmap.volume_named(opened[1])).parent.tolist()[0] == 1
    ((device, words),) = said(bmap, "duplicate")
    assert device == opened[1]
    assert words.startswith(f"{opened[0]} is the name of another volume, too")
