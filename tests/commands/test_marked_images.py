"""A qcow2 that QEMU has marked as corrupt: whoever reads it is told, whatever it is asked for."""

import json
from pathlib import Path

import pytest
from test_cli import bmap

from support import need, run

WORDS = "QEMU has marked it as damaged"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One with a file in it."""
    need("qemu-img", "qemu-utils")
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello").write_bytes(b"hello")
    raw.write_bytes(bytes(8 << 20))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "tree", raw)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def mark(image: Path) -> None:
    """As QEMU does: a bit of the incompatible features."""
    with image.open("r+b") as file:
        file.seek(72 + 7)
        file.write(b"\2")
    about = json.loads(run("qemu-img", "info", "--output=json", image))
    assert about["format-specific"]["data"]["corrupt"] is True


def commands(image: Path, folder: Path) -> list[list[object]]:
    (folder / "out").mkdir(parents=True)
    return [
        ["cat", image, "/dev/sda", "/hello"],
        ["extract", "-C", folder / "out", image, "/dev/sda", "/"],
        ["dump", image, "/dev/sda", folder / "out.raw"],
    ]


@pytest.mark.parametrize("which", range(3), ids=["cat", "extract", "dump"])
def test_who_reads_a_corrupt_image_is_told(image: Path, tmp_path: Path, which: int) -> None:
    sound = bmap(*commands(image, tmp_path / "sound")[which])
    assert (sound.returncode, sound.stderr) == (0, "")
    mark(image)
    done = bmap(*commands(image, tmp_path)[which])
    assert (done.returncode, done.stderr.count(WORDS)) == (0, 1), done.stderr
    assert str(image) in done.stderr
    assert done.stdout.replace(str(tmp_path), "") == sound.stdout.replace(str(tmp_path / "sound"), "")


def test_an_overlay_of_a_corrupt_image_is_no_better(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    mark(image)
    done = bmap("cat", top, "/dev/sda", "/hello", "--references")
    assert done.stdout == "hello"
    assert f"{image}: {WORDS}" in done.stderr


@pytest.mark.parametrize("options", [[], ["--host-offsets"]], ids=["disk", "host"])
def test_a_map_says_so(image: Path, tmp_path: Path, options: list[str]) -> None:
    mark(image)
    target = tmp_path / "out.parquet"
    bmap("map", image, "-o", target, *options)
    done = bmap("info", target)
    assert WORDS in done.stdout
