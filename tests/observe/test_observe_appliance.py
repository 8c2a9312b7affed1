"""Observed maps and verdicts by a real kernel, in libguestfs's appliance: a filesystem without reader, and
two with one."""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from support import need, run
from virt_bmap import cli
from virt_bmap.ask.content import Files, spread
from virt_bmap.core.errors import MissingTool
from virt_bmap.model import tables
from virt_bmap.observe import appliance
from virt_bmap.open.raw import RawReader
from virt_bmap.survey import maps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of all sizes, with holes and zeroes, by path."""
    need("nbdkit", "nbdkit")
    need("guestfish", "libguestfs-tools linux-image-amd64")
    try:
        appliance.interpreter()
    except MissingTool as error:
        pytest.skip(str(error))
    chooser = random.Random(11)
    sizes = [
        0,
        1,
        511,
        512,
        4096,
        4097,
        100_000,
        1_500_000,
        *(chooser.randrange(1, 30_000) for _ in range(40)),
    ]
    files = {f"/d{number % 5}/file{number}": chooser.randbytes(size) for number, size in enumerate(sizes)}
    files["/d0/hole"] = chooser.randbytes(5000) + bytes(50_000) + chooser.randbytes(5000)
    files["/d0/zeroes"] = bytes(20_000)
    return files


def unpacked(tree: dict[str, bytes], folder: Path) -> Path:
    for path, data in tree.items():
        target = folder / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def filled(image: Path, tree: dict[str, bytes], folder: Path) -> None:
    """Copy the files in with the appliance's kernel."""
    run("tar", "-C", unpacked(tree, folder / "tree"), "-cf", folder / "tree.tar", ".")
    script = f"add {image} format:raw\nrun\nmount /dev/sda /\ntar-in {folder / 'tree.tar'} /\numount-all\n"
    env = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    run("guestfish", stdin=script.encode(), env=env)


def test_a_filesystem_without_reader_is_mapped_and_its_files_read_by_the_map(tree, tmp_path, monkeypatch):
    mkfs = need("mkfs.minix", "util-linux")
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 << 20))
    subprocess.run([mkfs, "-3", image], check=True, capture_output=True)
    filled(image, tree, tmp_path)
    assert cli.run(["map", "--method", "observe", "-q", "-o", "map.parquet", str(image)]) == 0
    bmap = maps.load("map.parquet")
    assert bmap.filesystems.column("type").to_pylist() == ["minix"]
    assert bmap.filesystems.column("state").to_pylist() == [tables.OBSERVED]
    files = Files(bmap, 0, RawReader(str(image)))
    for path, data in tree.items():
        inode = files.find(path.encode())
        assert files.refusal(inode) is None
        content = b"".join(piece.tobytes() for piece in spread(files.pieces([inode]), files.length(inode)))
        assert hashlib.sha256(content).digest() == hashlib.sha256(data).digest(), path
    directories = tables.integers(bmap.inodes, "inode")[
        tables.codes(bmap.inodes, "type") == tables.T_DIRECTORY
    ]
    kind, owner = tables.codes(bmap.extents, "kind"), tables.integers(bmap.extents, "inode")
    assert np.isin(directories, owner[kind == tables.DIRECTORY]).all()


@pytest.mark.parametrize("type", ["ext4", "ntfs"])
def test_the_readers_stand_before_the_judge(type, tree, tmp_path, capsys):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 << 20))
    if type == "ext4":
        need("mke2fs", "e2fsprogs")
        run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", unpacked(tree, tmp_path / "tree"), image)
    else:
        run(need("mkntfs", "ntfs-3g"), "-q", "-F", image)
        filled(image, tree, tmp_path)
    status = cli.run(["verify", "--json", str(image)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 0, printed
    assert printed[0]["files"] == printed[0]["of"] == len(tree)
    assert sum(printed[0]["bytes"].values()) == sum(map(len, tree.values()))
    assert printed[0]["bytes"]["agreed"] > 1_500_000
    shutil.rmtree(tmp_path / "tree", ignore_errors=True)
