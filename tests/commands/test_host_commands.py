"""--host-offsets on the command line; what info and explain say of the image itself; bad input."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import need, run
from virt_bmap.cli import run as virt_bmap
from virt_bmap.core.errors import BmapError, MapError, UsageError
from virt_bmap.serve.source import saved, source

MARK = b"found in the file of the host".ljust(1024, b".")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A filesystem with one file in base.raw; packed.qcow2 has it compressed, top.qcow2 lies over it with a
    new cluster and a snapshot."""
    need("mke2fs", "e2fsprogs")
    need("qemu-img", "qemu-utils")
    folder = tmp_path_factory.mktemp("host")
    (folder / "tree").mkdir()
    (folder / "tree" / "file").write_bytes(MARK * 4)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder / "tree", folder / "base.raw", "8M")
    run("qemu-img", "convert", "-c", "-O", "qcow2", folder / "base.raw", folder / "packed.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "top.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x2e 7M 64k", folder / "top.qcow2")
    run("qemu-img", "snapshot", "-c", "one", folder / "top.qcow2")
    run("qemu-img", "bitmap", "--add", folder / "top.qcow2", "dirty")
    return folder


def said(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        virt_bmap([str(argument) for argument in arguments])
    return out.getvalue()


def test_what_is_at_a_byte_of_the_image_file(images):
    """The file's bytes in base.raw, which is file 2 of the chain, and the metadata of the overlay, which is
    file 1."""
    place = (images / "base.raw").read_bytes().index(MARK)
    rows = [
        json.loads(line)
        for line in said(
            "lookup", "--host-offsets", "--references", "--json", images / "top.qcow2", f"2:{place}"
        ).splitlines()
    ]
    assert (rows[0]["path"], rows[0]["file_offset"], rows[0]["role"]) == ("/file", 0, "data")
    assert rows[-1]["device"] == str(images / "base.raw")
    table = int.from_bytes((images / "top.qcow2").read_bytes()[40:48], "big")
    assert "[L1 table]" in said("lookup", "--host-offsets", "--references", images / "top.qcow2", table)


def test_a_byte_of_a_compressed_cluster_is_all_its_owners(images):
    place = (images / "base.raw").read_bytes().index(MARK)
    found = json.loads(said("explain", "--json", images / "packed.qcow2", place))["host"]
    assert (found["role"], found["cluster"], found["level"]) == ("compressed", place // 65536, 0)
    rows = [
        json.loads(line)
        for line in said(
            "lookup", "--host-offsets", "--json", images / "packed.qcow2", found["offset"] + 5
        ).splitlines()
    ]
    assert "/file" in {row["path"] for row in rows}
    assert {row["role"] for row in rows if row["path"] == "/file"} == {"compressed"}
    text = said("explain", "--host-offsets", images / "packed.qcow2", found["offset"] + 5)
    assert "compressed: " in text
    assert "/file" in text
    assert f"bytes {found['offset']:#x}-{found['end']:#x} of {images / 'packed.qcow2'}" in said(
        "explain", images / "packed.qcow2", place
    )


def test_a_byte_of_the_disk_is_followed_into_the_chain(images):
    place = (images / "base.raw").read_bytes().index(MARK)
    line = said("explain", "--references", images / "top.qcow2", place).splitlines()[1]
    assert (
        line == f"qcow2 cluster {place // 65536:,} of 65,536 bytes, byte {place % 65536:#x} in it: byte "
        f"{place:#x} of {images / 'base.raw'}, 1 backing file down"
    )


def test_maps_on_files_are_saved_and_read_back(images, tmp_path):
    for name in ("a.parquet", "a.bmap"):
        said("map", "-q", "--host-offsets", "--references", images / "top.qcow2", "-o", tmp_path / name)
        place = (images / "base.raw").read_bytes().index(MARK)
        assert " data /dev/sda /file" in said("lookup", tmp_path / name, f"2:{place}")
    assert "proven: 3 volumes" in said("check", "--host-offsets", tmp_path / "a.parquet")
    with pytest.raises(MapError, match="bytes of image files"):
        saved(str(tmp_path / "a.parquet"), [source(str(images / "base.raw"))])
    said("map", "-q", images / "base.raw", "-o", tmp_path / "guest.parquet")
    with pytest.raises(UsageError, match="counts in bytes of the guest's disks"):
        said("lookup", "--host-offsets", tmp_path / "guest.parquet", "0")


def test_info_says_what_qemu_says(images):
    found = json.loads(said("info", "--json", "--references", images / "top.qcow2").splitlines()[0])["image"]
    about = json.loads(run("qemu-img", "info", "--output=json", images / "top.qcow2"))
    assert (found["format"], found["virtual_size"], found["cluster_size"]) == (
        about["format"],
        about["virtual-size"],
        about["cluster-size"],
    )
    assert [(s["id"], s["name"], s["vm_state"]) for s in found["snapshots"]] == [
        (s["id"], s["name"], s["vm-state-size"]) for s in about["snapshots"]
    ]
    assert [(b["name"], b["granularity"]) for b in found["bitmaps"]] == [
        (b["name"], b["granularity"]) for b in about["format-specific"]["data"]["bitmaps"]
    ]
    assert found["backing"] == [{"file": str(images / "base.raw"), "format": "raw"}]
    text = said("info", "--references", images / "top.qcow2")
    assert "image: qcow2 version 3, clusters of 64.0 KiB" in text
    assert "1 snapshot: one" in text
    assert json.loads(said("info", "--json", images / "base.raw").splitlines()[0])["image"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("map", "--host-offsets", "none.qcow2"), "none.qcow2: can't be opened: No such file"),
        (("explain", "--host-offsets", "top.qcow2", "0"), "--references"),
        (("explain", "--host-offsets", "packed.qcow2", "3:0"), "there is no disk 3"),
        (("lookup", "--host-offsets", "packed.qcow2", "1T"), "lies beyond the end of disk 1"),
        (
            ("map", "--host-offsets", "--method", "observe", "packed.qcow2"),
            "counts in bytes of the guest's disks",
        ),
        (("check", "--host-offsets", "--format", "vdi", "packed.qcow2"), "is VDI of version"),
    ],
)
def test_bad_input_is_one_line(images, arguments, words):
    command, *rest = arguments
    full = [str(images / word) if word.endswith(".qcow2") else word for word in rest]
    with pytest.raises(BmapError, match=words) as found:
        said(command, *full)
    assert "\n" not in str(found.value)


def test_tools_are_not_needed_to_look_at_a_plain_qcow2(images, tmp_path):
    """Only compressed content is left to QEMU: an image without any is read by its rows alone."""
    run("qemu-img", "convert", "-O", "qcow2", images / "base.raw", tmp_path / "plain.qcow2")
    done = subprocess.run(["/usr/bin/env", "-i", "PATH=/nowhere", sys.executable, "-m", "virt_bmap", "check",
            "--host-offsets", tmp_path / "plain.qcow2"],
                          capture_output=True, text=True)  # fmt: skip
    assert "proven" in done.stdout, done.stderr
