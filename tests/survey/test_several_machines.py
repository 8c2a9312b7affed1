"""Disks of several machines in one command: each machine's volumes are found as if it were alone, and all of
them have names of their own."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_ext_aged import crash, essence
from tools.fuzz.seeds import PASSPHRASE

import btrfs_images
from recipes.made import Made, digest
from recipes.volumes import RECIPES
from support import content, mounted, need, need_root, run, tree
from virt_bmap import cli
from virt_bmap.core.errors import UsageError
from virt_bmap.core.keys import parse
from virt_bmap.core.reader import Reader
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks, nested
from virt_bmap.survey.maps import map_disks, opened

MIB = 1 << 20
TEXT, CHANGED = b"hello world", b"HELLO WORLD"
"""What the recipes' file `text` is made of, and what it is in the clone."""
COMMIT = b"\xc0\x3b\x39\x98\0\0\0\2"
"""How a commit block of a journal begins."""


def text(word: bytes) -> str:
    return digest((word + b", again and again\n") * 2000)


def machine(made: Made, folder: Path, word: bytes = TEXT) -> list[Path]:
    """Copies of the disks, in which the text was changed to begin with this word."""
    folder.mkdir()
    copies = [folder / disk.name for disk in made.disks]
    for disk, copy in zip(made.disks, copies, strict=True):
        copy.write_bytes(disk.read_bytes().replace(TEXT, word))
    return copies


def paths(*machines: Sequence[Path]) -> list[str]:
    return [str(disk) for machine in machines for disk in machine]


def names(bmap: BlockMap) -> list[str]:
    found: list[str] = bmap.volumes.column("name").to_pylist()
    assert len(set(found)) == len(found)
    return found


def hash_of(bmap: BlockMap, readers: list[Reader], device: str, path: str = "/text") -> str:
    volume, disks = bmap.volume_named(device), [readers[disk] for disk in bmap.disks]
    return digest(content(bmap, disks, volume, tree(bmap, volume)[path]))


@pytest.mark.parametrize("name", ["lvm", "lvm-thin", "md-raid1", "md-raid5"])
@pytest.mark.parametrize("order", ["in order", "in turns", "backwards"])
def test_clones_are_apart(tmp_path: Path, name: str, order: str) -> None:
    """All ids and states are the same: what their files are called tells which disks belong together."""
    (tmp_path / "made").mkdir()
    made = RECIPES[name](tmp_path / "made")
    both = machine(made, tmp_path / "one"), machine(made, tmp_path / "two", CHANGED)
    disks = paths(*zip(*both, strict=True)) if order == "in turns" else paths(*both)
    disks = disks[::-1] if order == "backwards" else disks
    with opened(Disks(disks, machines=True)) as (bmap, readers):
        assert "duplicate" not in bmap.problems.column("code").to_pylist()
        for one, word in zip(both, (TEXT, CHANGED), strict=True):
            top = f"/dev/sd{'abcdef'[min(disks.index(str(disk)) for disk in one)]}"
            alone = names(map_disks(paths(one)))
            spanning = {f"{top}:{device}" for device in alone if not device.startswith("/dev/sd")}
            assert spanning == {device for device in names(bmap) if device.startswith(f"{top}:")}
            for device in made.trees:
                assert hash_of(bmap, readers, f"{top}:{device}") == text(word)


def test_strangers_whose_groups_have_one_name(tmp_path: Path) -> None:
    """As installers name them. The short name of a volume will do where there is only one."""
    found = []
    for name, word in (("one", TEXT), ("two", CHANGED)):
        (tmp_path / f"made-{name}").mkdir()
        found.append(machine(RECIPES["lvm"](tmp_path / f"made-{name}"), tmp_path / name, word))
    with opened(Disks(paths(*found), machines=True)) as (bmap, readers):
        assert hash_of(bmap, readers, "/dev/sda:/dev/my-vg/lin") == text(TEXT)
        assert hash_of(bmap, readers, "/dev/sdc:/dev/my-vg/lin") == text(CHANGED)
        with pytest.raises(UsageError, match="no device /dev/my-vg/lin in this map"):
            bmap.volume_named("/dev/my-vg/lin")
    with opened(Disks(paths(found[0]), machines=True)) as (bmap, readers):
        assert hash_of(bmap, readers, "/dev/my-vg/lin") == text(TEXT)


def test_a_group_that_is_called_as_a_disk(tmp_path: Path) -> None:
    """Nobody takes its volumes for something on that disk."""
    (tmp_path / "made").mkdir()
    made = RECIPES["lvm"](tmp_path / "made")
    need("vgrename", "lvm2")
    with btrfs_images.loops(made.disks) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}', "--driverloaded", "n"]
        run("vgrename", *options, "my-vg", "sda")
    found = names(map_disks(paths(made.disks), machines=True))
    assert "/dev/sda:/dev/sda/lin" in found


def test_clones_of_a_pool(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs-progs")
    disks = [tmp_path / "one", tmp_path / "two"]
    disks[0].write_bytes(bytes(128 * MIB))
    run("mkfs.btrfs", "-q", disks[0])
    shutil.copy(disks[0], disks[1])
    for disk in disks:
        with mounted(disk) as where:
            (where / "file").write_bytes(disk.name.encode())
    with opened(Disks(paths(disks), machines=True)) as (bmap, readers):
        for device, disk in zip(("/dev/sda", "/dev/sdb"), disks, strict=True):
            assert hash_of(bmap, readers, device, "/file") == digest(disk.name.encode())


def test_clones_of_an_encrypted_volume(tmp_path: Path) -> None:
    """One key opens both, and each has the name of its machine."""
    (tmp_path / "made").mkdir()
    made = RECIPES["luks2"](tmp_path / "made")
    both = machine(made, tmp_path / "one"), machine(made, tmp_path / "two")
    (device,) = made.trees
    keys = parse([f"all:key:{PASSPHRASE.decode()}"])
    with opened(Disks(paths(*both), machines=True, keys=keys)) as (bmap, readers):
        for top in ("/dev/sda", "/dev/sdb"):
            opened_volume = readers[bmap.volume_named(f"{top}:{device}")]
            assert TEXT in opened_volume.read(0, opened_volume.size)


def test_each_clone_has_its_own_journal(tmp_path: Path) -> None:
    """On a disk of its own, both of one identity: that of the other one stands before the end of its log."""
    log = tmp_path / "log.img"
    with open(log, "wb") as file:
        file.truncate(8 * MIB)
    run("mke2fs", "-q", "-F", "-b", "1024", "-O", "journal_dev", log)
    need_root()
    loop = run("losetup", "-f", "--show", log).decode().strip()
    try:
        crashed = crash(tmp_path, f"-t ext4 -b 1024 -J device={loop}", "", (log,))
    finally:
        run("losetup", "-d", loop)
    made = Made(crashed)
    one, two = machine(made, tmp_path / "one"), machine(made, tmp_path / "two")
    journal = bytearray(two[1].read_bytes())
    commits = [at for at in range(2048, len(journal), 1024) if journal[at : at + 8] == COMMIT]
    journal[commits[len(commits) // 2] :] = bytes(len(journal) - commits[len(commits) // 2])
    two[1].write_bytes(journal)
    alone = [essence(map_disks(paths(disks))) for disks in (one, two)]
    assert alone[0] != alone[1]
    for order in ((one[0], two[0], two[1], one[1]), (two[0], one[0], one[1], two[1])):
        bmap = map_disks(paths(order), machines=True)
        assert "duplicate" not in bmap.problems.column("code").to_pylist()
        for volume, disk in enumerate(order[:2]):
            assert essence(bmap, volume) == alone[disk.parent.name == "two"]


def test_in_bytes_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    made = RECIPES["md-raid1"](tmp_path / "made")
    both = [machine(made, tmp_path / "one"), machine(made, tmp_path / "two", CHANGED)]
    images = [Path(f"{disk}.qcow2") for disks in both for disk in disks]
    for image in images:
        run(
            need("qemu-img", "qemu-utils"),
            "convert",
            "-O",
            "qcow2",
            "-f",
            "raw",
            image.with_suffix(""),
            image,
        )
    with opened(Disks(paths(images), machines=True, host_offsets=True)) as (bmap, readers):
        for top, word in (("/dev/sda", TEXT), ("/dev/sdc", CHANGED)):
            assert hash_of(bmap, readers, f"{top}:/dev/md127") == text(word)


def test_images_inside_of_one_of_them(tmp_path: Path) -> None:
    """A machine whose disk is a file of another one's is a third machine."""
    (tmp_path / "made").mkdir()
    made = RECIPES["md-raid1"](tmp_path / "made")
    guest, other = machine(made, tmp_path / "one"), machine(made, tmp_path / "two", CHANGED)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", guest[0].parent, tmp_path / "host", "64M")
    disks = Disks(paths([tmp_path / "host"], other), machines=True, nested=nested(["all"]))
    with opened(disks) as (bmap, readers):
        assert hash_of(bmap, readers, "/dev/sda:/disk0.img:/dev/md127") == text(TEXT)
        assert hash_of(bmap, readers, "/dev/sdb:/dev/md127") == text(CHANGED)


def test_commands_take_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    made = RECIPES["md-raid1"](tmp_path / "made")
    disks = paths(machine(made, tmp_path / "one"), machine(made, tmp_path / "two", CHANGED))
    adds = [word for disk in disks for word in ("-a", disk)]
    for top, word in (("/dev/sda", TEXT), ("/dev/sdc", CHANGED)):
        assert cli.run(["cat", "--machines", *adds, f"{top}:/dev/md127", "/text"]) == 0
        assert digest(os.fsencode(capfd.readouterr().out)) == text(word)
    assert cli.run(["report", "--machines", *adds, "-o", str(tmp_path / "page.html")]) == 0
    for words in (["verify"], ["map", "--method", "observe", "-o", str(tmp_path / "map")]):
        with pytest.raises(UsageError, match="an appliance is one machine"):
            cli.run([*words, "--machines", *adds])
