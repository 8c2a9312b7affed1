"""What images say of themselves: that they are damaged, or were not closed. Whoever reads one is told,
whatever it is asked for."""

import json
import subprocess
from pathlib import Path

import pytest
from test_cli import bmap

from support import need, run
from virt_bmap.survey.maps import load

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


# ---- images that were not closed ---------------------------------------------------------------------------


def set_bit(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value | bit]))


def leave_qed(path: Path) -> None:
    """The need-check bit of its features (qed_spec.rst)."""
    set_bit(path, 16, 2)


def leave_qcow2(path: Path) -> None:
    """The dirty bit of its incompatible features (qcow2.rst)."""
    set_bit(path, 72 + 7, 1)
    assert json.loads(run("qemu-img", "info", "--output=json", path))["dirty-flag"] is True


def leave_parallels(path: Path) -> None:
    """in_use (parallels.rst): QEMU writes to no such image."""
    with path.open("r+b") as file:
        file.seek(44)
        file.write((0x746F6E59).to_bytes(4, "little"))
    done = subprocess.run(["qemu-io", "-c", "write 0 512", path], capture_output=True, text=True)
    assert "not closed correctly" in done.stderr + done.stdout


def leave_vmdk(path: Path) -> None:
    """uncleanShutdown (Virtual Disk Format 5.0)."""
    with path.open("r+b") as file:
        file.seek(72)
        file.write(b"\1")


def leave_vhd(path: Path) -> None:
    """Saved State (Virtual Hard Disk Image Format Specification): in both footers, checksums and all."""
    with path.open("r+b") as file:
        for at in (0, path.stat().st_size - 512):
            file.seek(at)
            foot = bytearray(file.read(512))
            assert foot[:8] == b"conectix"
            foot[84] = 1
            foot[64:68] = bytes(4)
            foot[64:68] = (~sum(foot) & 0xFFFFFFFF).to_bytes(4, "big")
            file.seek(at)
            file.write(foot)


LEFT = {
    "qed": ([], leave_qed, "was not closed (QED's need-check bit)"),
    "qcow2": (["-o", "lazy_refcounts=on"], leave_qcow2, ""),
    "parallels": ([], leave_parallels, "was not closed (Parallels' in-use mark)"),
    "vmdk": ([], leave_vmdk, "was not closed (VMDK's uncleanShutdown)"),
    "vpc": (["-o", "subformat=dynamic"], leave_vhd, "its machine was saved, not shut down"),
}


@pytest.mark.parametrize("format", LEFT)
def test_an_image_that_was_not_closed(format: str, image: Path, tmp_path: Path) -> None:
    """Who reads it is told, unless what it holds is certain all the same (qcow2)."""
    options, leave, words = LEFT[format]
    left = tmp_path / f"left.{format}"
    run("qemu-img", "convert", "-O", format, *options, image, left)
    sound = bmap("cat", left, "/dev/sda", "/hello")
    assert (sound.returncode, sound.stdout, sound.stderr) == (0, "hello", "")
    assert "not closed" not in bmap("info", left).stdout
    leave(left)
    done = bmap("cat", left, "/dev/sda", "/hello")
    assert (done.returncode, done.stdout) == (0, "hello")
    assert done.stderr.count(f"{left}: {words}") == 1 if words else done.stderr == ""
    about = bmap("info", left).stdout
    assert about.count(f"{left}: {words or 'was not closed'}") == 1, about
    target = tmp_path / "map.parquet"
    bmap("map", left, "-o", target)
    problems = load(str(target)).problems.to_pylist()
    assert [(row["code"], row["severity"]) for row in problems] == [
        ("unclean", "warning" if words else "note")
    ]
    assert bmap("check", left).returncode == (1 if words else 0)
    if format in ("qed", "qcow2", "parallels"):  # QEMU repairs what has its own mark
        run("qemu-img", "check", "-r", "all", left)
        done = bmap("cat", left, "/dev/sda", "/hello")
        assert (done.stdout, done.stderr) == ("hello", "")
        assert "not closed" not in bmap("info", left).stdout


def test_an_extent_of_a_vmdk_that_was_not_closed(image: Path, tmp_path: Path) -> None:
    """The descriptor beside it does not know."""
    left = tmp_path / "left.vmdk"
    run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", image, left)
    (extent,) = tmp_path.glob("left-s*.vmdk")
    leave_vmdk(extent)
    done = bmap("cat", "--references", left, "/dev/sda", "/hello")
    assert done.stdout == "hello"
    assert done.stderr.count(f"{extent}: was not closed") == 1
    about = bmap("info", "--references", left).stdout
    assert about.count(f"{extent}: was not closed") == 1, about


def test_a_nested_image_that_was_not_closed(image: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    inner = tmp_path / "outer" / "inner.vmdk"
    run("qemu-img", "convert", "-O", "vmdk", image, inner)
    leave_vmdk(inner)
    run("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "outer", tmp_path / "disk", "20m")
    done = bmap("cat", tmp_path / "disk", "--nested", "all", "/dev/sda:/inner.vmdk", "/hello")
    assert done.stdout == "hello"
    assert done.stderr.count("/inner.vmdk: was not closed") == 1
