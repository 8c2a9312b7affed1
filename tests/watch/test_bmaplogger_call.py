"""The command line of 2014, as it was given then, with a real QEMU; and its map, which floods no log."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_watch_doors import SECTOR, image, place  # noqa: F401

from support import mapped, need, need_root, run
from virt_bmap.model import tables
from virt_bmap.saved import bmap, bmap_reader

BIN = Path(sys.executable).parent
THE_CALL = "nbdkit -r bmaplogger file=disk.img bmap=disk.bmap --run ' qemu-kvm -m 2048 -hda $nbd '"


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A copy of nbdkit's plugin folder, with the link that the manual names."""
    need("nbdkit", "nbdkit")
    if subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
        pytest.skip("nbdkit's Python plugin is not installed (apt-get install nbdkit-plugin-python)")
    copy = tmp_path / "plugins"
    shutil.copytree(folder(), copy, symlinks=True)
    (copy / "nbdkit-bmaplogger-plugin").unlink(missing_ok=True)
    (copy / "nbdkit-bmaplogger-plugin").symlink_to(BIN / "bmaplogger")
    return copy


def folder() -> str:
    """Where nbdkit looks for plugins."""
    lines = run("nbdkit", "--dump-config").decode().splitlines()
    return next(line for line in lines if line.startswith("plugindir=")).partition("=")[2]


def test_the_call_of_2014(image: Path, plugins: Path, tmp_path: Path) -> None:
    need_root()  # for a mount of its own over nbdkit's plugin folder
    need("unshare", "util-linux")
    programs = tmp_path / "bin"
    programs.mkdir()
    if not shutil.which("qemu-kvm"):  # its modern name
        (programs / "qemu-kvm").symlink_to(need("qemu-system-x86_64", "qemu-system-x86"))
    run(BIN / "virt-bmap", "-o", tmp_path / "disk.bmap", image)
    before = hashlib.sha256(image.read_bytes()).digest()
    script = f"mount --bind {plugins} {folder()} && cd {tmp_path} && exec timeout 100 {THE_CALL}"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"read f /dev/sda /boot/kernel", "write f /dev/sda /boot/state"} <= {
        line.split("\t")[0] for line in lines
    }
    assert "what is written is thrown away" in done.stderr
    assert hashlib.sha256(image.read_bytes()).digest() == before


def test_what_is_written_with_r_is_read_again_and_thrown_away(image: Path, tmp_path: Path) -> None:
    need("qemu-io", "qemu-utils")
    need("nbdkit", "nbdkit")
    data, chooser = bytearray(image.read_bytes()), np.random.default_rng(5)
    before, words = bytes(data), []
    for number in range(40):
        at, length = int(chooser.integers(0, 100_000)) * SECTOR, int(chooser.integers(1, 60)) * SECTOR
        at %= len(data) - length
        words += ["-c", f"write -P {number + 1} {at} {length}"]
        data[at : at + length] = bytes([number + 1]) * length
    clients = " ".join(f"'{word}'" for word in words)
    copy = tmp_path / "copy"
    command = f"qemu-io -f raw {clients} $uri >/dev/null && qemu-img convert -f raw -O raw $uri {copy}"
    logger = [BIN / "bmaplogger", "-r", f"file={image}", f"logfile={tmp_path / 'log'}"]
    done = subprocess.run([*logger, "--run", command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == data
    assert image.read_bytes() == before


def test_a_text_map_knows_what_lies_inside_inodes(tmp_path: Path) -> None:
    need("mke2fs", "e2fsprogs")
    (tmp_path / "tree").mkdir()
    for number in range(50):
        (tmp_path / "tree" / f"link{number}").symlink_to("somewhere")
        (tmp_path / "tree" / f"file{number}").write_bytes(b"x" * (40 if number % 2 else 9000))
    disk = tmp_path / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-O", "inline_data", "-I", "256", "-d", tmp_path / "tree", disk)
    found = mapped(disk)
    text = tmp_path / "disk.bmap"
    with open(text, "wb") as file:
        bmap.save(found, file)
    again = bmap_reader.load(text.read_bytes(), "disk.bmap")

    def inside(extents: object) -> set[int]:
        flags, offset = tables.integers(extents, "flags"), tables.integers(extents, "volume_offset")  # type: ignore[arg-type]
        return set(offset[flags & tables.INLINE != 0].tolist())

    assert len(inside(found.extents)) >= 50
    assert inside(found.extents) == inside(again.extents)
