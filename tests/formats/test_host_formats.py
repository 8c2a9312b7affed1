"""vmdk, vhd, vhdx, vdi and raw as layers: places against qemu-img map where QEMU tells them, content against
QEMU's own reading."""

import contextlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from host_images import (
    content,
    numbered,
    ours,
    parts,
    proven,
    qemus,
    random_writes,
    raw_content,
)
from support import need, run
from virt_bmap import cli
from virt_bmap.core.errors import BmapError, ImageError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.core.mapping import DATA
from virt_bmap.formats.images.layer import split
from virt_bmap.open import open_image
from virt_bmap.open.disks import Opening
from virt_bmap.open.host import open_host

SIZE = 7 << 20
FORMATS = {
    "vmdk": ("vmdk", (), 65536),
    "vmdk with grains of zeroes": ("vmdk", ("zeroed_grain=on",), 65536),
    "vmdk flat": ("vmdk", ("subformat=monolithicFlat",), 65536),
    "vmdk in parts": ("vmdk", ("subformat=twoGbMaxExtentSparse",), 65536),
    "vmdk flat in parts": ("vmdk", ("subformat=twoGbMaxExtentFlat",), 65536),
    "vhd": ("vpc", ("force_size=on",), 2 << 20),
    "vhd by geometry": ("vpc", (), 2 << 20),
    "vhd fixed": ("vpc", ("subformat=fixed", "force_size=on"), 2 << 20),
    "vhdx": ("vhdx", ("block_size=1M",), 1 << 20),
    "vhdx without zero states": ("vhdx", ("block_size=1M", "block_state_zero=off"), 1 << 20),
    "vhdx fixed": ("vhdx", ("subformat=fixed", "block_size=2M"), 2 << 20),
    "vdi": ("vdi", (), 1 << 20),
    "vdi static": ("vdi", ("static=on",), 1 << 20),
    "raw": ("raw", (), 4096),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """Random blocks, and 3 MiB of nothing in between."""
    path = tmp_path_factory.mktemp("formats") / "disk.raw"
    numbered(path, SIZE)
    with path.open("r+b") as file:
        file.seek(4 << 20)
        file.write(bytes(3 << 20))
    return path


def convert(disk: Path, format: str, options: tuple[str, ...], target: Path) -> Path:
    need("qemu-img", "qemu-utils")
    run("qemu-img", "convert", "-O", format, *(["-o", ",".join(options)] if options else []), disk, target)
    return target


AS_FILE = ("vmdk flat", "vmdk flat in parts", "vhd fixed", "vdi static", "raw")
"""Where QEMU looks for holes of the file and calls them zero."""


def lies_in(found: list, wider: list) -> bool:
    """Is each piece part of one of the others, at the same place?"""
    return all(
        any(low <= start and end <= high and at == place + start - low for low, high, _, _, place in wider)
        for start, end, _, _, at in found
        if at >= 0
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_map_is_qemus_and_the_content_too(disk, tmp_path, name):
    format, options, cluster = FORMATS[name]
    image = convert(disk, format, options, tmp_path / f"a.{format}")
    for step in range(2):
        with open_host([str(image)], Opening(format=format, references=True)) as host:
            if name in AS_FILE:
                assert lies_in(qemus(image, format), ours(host))
            elif format != "vhdx":  # QEMU does not tell where a VHDX has its blocks
                assert ours(host) == qemus(image, format)
            assert content(host) == raw_content(image, format, tmp_path / "raw")
            assert host.disks[0].size >= SIZE
        proven(image, format=format)
        if step == 0:
            random_writes(image, SIZE, cluster, seed=len(name), count=12, packed=False, format=format)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "raw"])
def test_data_that_goes_on_beyond_the_end_is_told(disk, tmp_path, name):
    """A copy that was broken off inside the last piece of data; of a fixed VHD with its footer behind it."""
    format, options, _ = FORMATS[name]
    image = convert(disk, format, options, tmp_path / f"a.{format}")
    with open_host([str(image)], Opening(format=format, references=True)) as host:
        rows, files = host.disks[0].rows, host.paths
        assert not [problem for link in host.disks[0].chain for problem in link.layer.damage.problems()]
        last = int(np.argmax(np.where(rows.role == DATA, rows.parent_offset + rows.run, 0)))
        file, end = files[rows.parent[last]], int(rows.parent_offset[last] + rows.run[last])
    with open(file, "r+b") as out:
        out.seek(-512, os.SEEK_END)
        footer = out.read()
        out.truncate(end - 8192)
        if format == "vpc":
            out.seek(0, os.SEEK_END)
            out.write(footer)
    with open_host([str(image)], Opening(format=format, references=True)) as host:
        said = [problem.code for link in host.disks[0].chain for problem in link.layer.damage.problems()]
    assert "truncated" in said


def test_a_stream_of_compressed_grains(disk, tmp_path):
    image = convert(disk, "vmdk", ("subformat=streamOptimized",), tmp_path / "a.vmdk")
    with open_host([str(image)]) as host:
        assert [piece[:3] for piece in ours(host)] == [piece[:3] for piece in qemus(image, "vmdk")]
        assert content(host) == disk.read_bytes()
    found = parts(proven(image))
    assert {"header", "descriptor", "grain table", "grain directory", "redundant grain table"} <= set(found)


def test_markers_and_footer_of_a_stream_are_named(corpus, tmp_path):
    """QEMU writes neither; this image is VMware's."""
    image = unpacked(
        corpus, "strozfriedberg+vmdk-rs/data/streamOptimizedWithMarkers.vmdk", tmp_path / "a.vmdk"
    )
    found = parts(proven(image))
    assert {"footer", "marker", "grain directory"} <= set(found)


def test_a_vmdk_delta_link_is_a_chain(disk, tmp_path):
    base = convert(disk, "vmdk", (), tmp_path / "base.vmdk")
    top = tmp_path / "top.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", top)
    random_writes(top, SIZE, 65536, seed=4, count=10, packed=False, format="vmdk")
    with open_host([str(top)], Opening(references=True)) as host:
        assert ours(host) == qemus(top, "vmdk")
        assert content(host) == raw_content(top, "vmdk", tmp_path / "raw")
    assert "hidden by an overlay" in parts(proven(top), 1)
    with pytest.raises(ImageError, match="--references"), open_host([str(top)]):
        pass


# ---- differencing VHD and VHDX: QEMU makes and reads none --------------------------------------------------


def as_child(image: bytes, parent: str, block: int, present: np.ndarray) -> bytes:
    """A dynamic VHD of QEMU made a differencing one: type, parent locator behind its data, and for each
    sector whether it has it."""
    data = bytearray(image[:-512])
    name = parent.encode("utf-16-le")
    locator = len(data)
    data += name.ljust(512, b"\0")
    struct.pack_into(">4sIII", data, 512 + 576, b"W2ru", 512, len(name), 0)
    struct.pack_into(">Q", data, 512 + 576 + 16, locator)
    struct.pack_into(">I", data, 60, 4)
    table, entries = struct.unpack_from(">QxxxxI", data, 512 + 16)
    bitmap = block // 512 // 8
    for number in range(entries):
        at = struct.unpack_from(">I", data, table + 4 * number)[0]
        if at != 0xFFFFFFFF:
            data[at * 512 : at * 512 + bitmap] = np.packbits(
                present[number * block // 512 :][: block // 512]
            ).tobytes()
    for start, length, at in ((0, 512, 64), (512, 1024, 36)):
        struct.pack_into(">I", data, start + at, 0)
        struct.pack_into(">I", data, start + at, ~sum(data[start : start + length]) & 0xFFFFFFFF)
    return bytes(data) + bytes(data[:512])


def test_a_differencing_vhd_shows_its_parents_sectors(disk, tmp_path):
    convert(disk, "vpc", ("force_size=on",), tmp_path / "parent.vhd")
    other = tmp_path / "other.raw"
    fresh = numbered(other, SIZE, seed=8)
    whole = convert(other, "vpc", ("force_size=on",), tmp_path / "whole.vhd").read_bytes()
    present = np.random.default_rng(4).integers(0, 2, (8 << 20) // 512).astype(bool)
    present[4096:5000] = False
    child = tmp_path / "child.vhd"
    child.write_bytes(as_child(whole, "parent.vhd", 2 << 20, present))
    mask = np.repeat(present[: SIZE // 512], 512)
    expected = np.where(mask, np.frombuffer(fresh, np.uint8), np.fromfile(disk, np.uint8)).tobytes()
    with open_host([str(child)], Opening(references=True)) as host:
        assert content(host)[:SIZE] == expected
    found = parts(proven(child))
    assert {
        "parent locator",
        "sectors not in use",
        "block bitmap",
        "footer copy",
        "dynamic disk header",
    } <= set(found)
    reader = open_image(str(child), Opening(references=True))
    assert reader.read(0, SIZE) == expected, "all commands read it, though QEMU does not"
    reader.close()
    with pytest.raises(ImageError, match=r"parent.vhd.*--references"):
        open_image(str(child))


def test_a_differencing_vhdx_shows_its_parents_sectors(disk, tmp_path):
    """The child is QEMU's own file with the flag, the locator, one sector bitmap block and states changed by
    hand."""
    convert(disk, "vhdx", ("block_size=1M",), tmp_path / "parent.vhdx")
    other = tmp_path / "other.raw"
    fresh = numbered(other, SIZE, seed=9)
    data = bytearray(convert(other, "vhdx", ("block_size=1M",), tmp_path / "whole.vhdx").read_bytes())
    regions = [struct.unpack_from("<16sQI", data, (192 << 10) + 16 + 32 * nth) for nth in range(2)]
    bat, meta = (
        next(offset for guid, offset, _ in regions if guid[:4] == start)
        for start in (b"\x66\x77\xc2\x2d", b"\x06\xa2\x7c\x8b")
    )
    entries = [
        struct.unpack_from("<16sIII", data, meta + 32 + 32 * nth)
        for nth in range(struct.unpack_from("<H", data, meta + 10)[0])
    ]
    parameters = next(offset for guid, offset, _, _ in entries if guid[:4] == b"\x37\x67\xa1\xca")
    struct.pack_into("<I", data, meta + parameters + 4, 2)
    key, value = "relative_path".encode("utf-16-le"), ".\\parent.vhdx".encode("utf-16-le")
    locator = bytes(18) + struct.pack("<HIIHH", 1, 32, 32 + len(key), len(key), len(value)) + key + value
    data[meta + (128 << 10) : meta + (128 << 10) + len(locator)] = locator
    struct.pack_into(
        "<16sIII",
        data,
        meta + 32 + 32 * len(entries),
        bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c"),
        128 << 10,
        len(locator),
        0,
    )
    struct.pack_into("<H", data, meta + 10, len(entries) + 1)
    present = np.random.default_rng(5).integers(0, 2, SIZE // 512).astype(bool)
    place = -(-len(data) >> 20 << 20) if len(data) % (1 << 20) else len(data)
    data = data.ljust(place, b"\0") + np.packbits(present, bitorder="little").tobytes().ljust(1 << 20, b"\0")
    struct.pack_into("<Q", data, bat + 8 * 4096, place | 6)  # 4096 blocks of 1 MiB are one chunk
    for number in range(7):
        state = struct.unpack_from("<Q", data, bat + 8 * number)[0]
        struct.pack_into("<Q", data, bat + 8 * number, (state & ~7) | 7 if state & 7 == 6 else 0)
    child = tmp_path / "child.avhdx"
    child.write_bytes(data)
    mask = np.repeat(present, 512)
    expected = np.where(mask, np.frombuffer(fresh, np.uint8), np.fromfile(disk, np.uint8)).tobytes()
    with open_host([str(child)], Opening(references=True)) as host:
        assert content(host) == expected
    assert {"sector bitmap", "sectors not in use", "block allocation table", "metadata region", "log"} <= set(
        parts(proven(child))
    )


def test_ranges_are_cut_at_multiples():
    start, end = split(np.array([0, 5, 30]), np.array([4, 25, 40]), 10)
    assert list(zip(start.tolist(), end.tolist(), strict=True)) == [
        (0, 4),
        (5, 10),
        (10, 20),
        (20, 25),
        (30, 40),
    ]


# ---- images of other projects ------------------------------------------------------------------------------


def unpacked(corpus: Path, name: str, target: Path) -> Path:
    tool = {".gz": "zcat", ".xz": "xzcat", ".bz2": "bzcat"}.get(Path(name).suffix, "cat")
    target.write_bytes(run(tool, corpus / "images" / name))
    return target


CORPUS = (
    "fox-it+dissect.hypervisor/tests/_data/disk/vhdx/dynamic.vhdx.gz",
    "fox-it+dissect.hypervisor/tests/_data/disk/vhd/fixed.vhd.gz",
    "LTRData+ExFat/ExFat.DiscUtils.Tests/exFAT.vhdx.gz",
    "log2timeline+dfvfs/test_data/image.vhd.678307d1.xz",
    "log2timeline+dfvfs/test_data/image.qcow2.xz",
    "log2timeline+dfvfs/test_data/lvm.qcow2.xz",
    "masahiro331+go-vmdk-parser/pkg/virtualization/vmdk/testdata/vmdk-streamoptimized.img.xz",
    "strozfriedberg+vmdk-rs/data/streamOptimized.vmdk.xz",
    "strozfriedberg+vmdk-rs/data/streamOptimizedWithMarkers.vmdk",
    "log2timeline+dfvfs/test_data/ext2.vmdk.xz",
    "qemu+qemu/tests/qemu-iotests/sample_images/hyperv2012r2-dynamic.vhd.bz2",
    "qemu+qemu/tests/qemu-iotests/sample_images/virtualpc-dynamic.vhd.bz2",
    "diskfs+go-diskfs/disk/formats/qcow2/testdata/file.qcow2.xz",
)


@pytest.mark.parametrize("name", CORPUS)
def test_images_of_other_programs(corpus, tmp_path, name):
    """The first 64 KiB of each place and random ranges read as QEMU reads them; every byte of the file has an
    owner."""
    image = unpacked(corpus, name, tmp_path / "image")
    with open_host([str(image)]) as host, contextlib.closing(open_image(str(image))) as reader:
        rows, size = host.disks[0].rows, host.disks[0].size
        assert size == reader.size
        if size < 64 << 20:
            assert content(host) == reader.read(0, size)
        else:
            random = np.random.default_rng(1).integers(0, size - 65536, 50)
            start = np.concatenate([rows.volume_offset[:500], random // 512 * 512])
            length = np.concatenate([np.minimum(rows.run[:500], 65536), np.full(50, 65536)])
            mine = MappedReader(size, "disk", dict(enumerate(host.files)), rows)
            assert (mine.read_ranges(start, length) == reader.read_ranges(start, length)).all()
    proven(image)


def test_a_wrong_checksum_is_said(corpus, tmp_path):
    """QEMU refuses this image: "Incorrect header checksum"."""
    image = unpacked(corpus, "log2timeline+dfvfs/test_data/image.vhd.xz", tmp_path / "image.vhd")
    with open_host([str(image)]) as host:
        assert [problem.code for problem in host.disks[0].chain[0].layer.damage.problems()] == ["checksum"]


# ---- damage ------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, name: str, data: bytes, words: str, format: str | None = None) -> None:
    (tmp_path / name).write_bytes(data)
    with (
        pytest.raises(BmapError, match=words) as found,
        open_host([str(tmp_path / name)], Opening(format=format, references=True)),
    ):
        pass
    assert "\n" not in str(found.value)


def test_what_is_not_read_is_named(disk, tmp_path):
    refused(tmp_path, "a.vmdk", b"COWD".ljust(4096, b"\0"), "COWD")
    text = '# Disk DescriptorFile\nparentCID=ffffffff\nRW 100 {} "x.bin" 0\n'
    (tmp_path / "x.bin").write_bytes(b"COWD".ljust(51200, b"\0"))
    refused(tmp_path, "b.vmdk", text.format("SESPARSE").encode(), "SESPARSE")
    refused(tmp_path, "c.vmdk", text.format("SPARSE").encode(), "x.bin: is a COWD")
    vdi = bytearray(convert(disk, "vdi", (), tmp_path / "a.vdi").read_bytes())
    vdi[0x4C] = 4
    refused(tmp_path, "b.vdi", vdi, "differencing")
    refused(
        tmp_path,
        "c.qed",
        convert(disk, "qed", (), tmp_path / "a.qed").read_bytes(),
        "qed image lie in its file is not known here",
    )
    qcow2 = bytearray(convert(disk, "qcow2", (), tmp_path / "a.qcow2").read_bytes())
    qcow2[72] = 0x80
    refused(tmp_path, "b.qcow2", qcow2, "incompatible qcow2 features")
    refused(tmp_path, "c.qcow2", qcow2[:72] + bytes(32) + qcow2[104:], "refcount order 0 and a length of 0")
    refused(
        tmp_path,
        "d.qcow2",
        convert(disk, "qcow2", (), tmp_path / "e.qcow2").read_bytes()[:100_000],
        "L1 table lies at bytes .*beyond the end",
    )


def test_a_file_used_in_two_formats_is_refused(disk, tmp_path):
    base = convert(disk, "qcow2", (), tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "top.qcow2")
    with (
        pytest.raises(ImageError, match="used as qcow2 by one image and as raw by another"),
        open_host([str(base), str(tmp_path / "top.qcow2")], Opening(references=True)),
    ):
        pass


def test_a_loop_of_backing_files_ends(tmp_path):
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    run(
        "qemu-img",
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "a.qcow2",
        "-F",
        "qcow2",
        tmp_path / "b.qcow2",
        "1M",
    )
    run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", tmp_path / "a.qcow2")
    with (
        pytest.raises(ImageError, match="or loops"),
        open_host([str(tmp_path / "a.qcow2")], Opening(references=True)),
    ):
        pass


def test_what_an_image_names_is_not_opened_unasked(disk, tmp_path):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", tmp_path / "top.qcow2")
    with pytest.raises(ImageError, match="--references"), open_host([str(tmp_path / "top.qcow2")]):
        pass
    raw = tmp_path / "guest.raw"  # what a guest writes into its own raw disk
    raw.write_bytes((tmp_path / "top.qcow2").read_bytes())
    with open_host([str(raw)], Opening(format="raw")) as host:
        assert host.paths == [str(raw)]


@pytest.mark.parametrize(
    ("format", "option"), [("vdi", "static=on"), ("qcow2", "preallocation=metadata,cluster_size=1M")]
)
def test_a_large_disk_of_which_all_is_allocated(format, option, tmp_path):
    """Its tables have an entry for each block of 2 TB, its file is holes but for these: not too much for what
    is stored, since the entries are runs."""
    need("qemu-img", "qemu-utils")
    size, path = 2000 << 30, tmp_path / "large"
    run("qemu-img", "create", "-q", "-f", format, "-o", option, path, str(size))
    with open_host([str(path)], Opening(format=format)) as host:
        rows = host.disks[0].rows
        assert len(rows.parent) < 20
        assert int(rows.parent_run.sum()) == size


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vdi"])
def test_an_image_whose_disk_is_blank_is_mapped(format: str, tmp_path: Path) -> None:
    """Nothing is known on the disk, but all of the image's own metadata is, and it can be checked."""
    image, saved = tmp_path / "image", tmp_path / "map.parquet"
    run(need("qemu-img", "qemu-utils"), "create", "-q", "-f", format, image, "16M")
    assert cli.run(["-q", "--host-offsets", "-o", str(saved), str(image)]) == 0
    assert cli.run(["check", "--host-offsets", str(image)]) == 0
