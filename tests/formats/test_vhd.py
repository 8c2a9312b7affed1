"""VHD: how large the disk is, by the program that made the image; blocks that make no disk."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest

from support import need, run
from virt_bmap.core.errors import BmapError
from virt_bmap.core.mapped import MappedReader
from virt_bmap.formats.images.vhd.header import checksum
from virt_bmap.open import open_image
from virt_bmap.open.host import open_host

MIB = 1 << 20
BYTES = 8 * MIB + 3 * 512
"""What the footer says; its geometry has some sectors more."""
BY_GEOMETRY = (b"vpc ", b"qemu")
BY_BYTES = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vbox", b"    ")


def made_by(creator: bytes, subformat: str, path: Path) -> Path:
    """An image of QEMU as if this program had made it."""
    need("qemu-img", "qemu-utils")
    raw = path.with_suffix(".raw")
    raw.write_bytes(np.random.default_rng(5).bytes(3 * MIB) + bytes(BYTES - 3 * MIB - 1) + b"e")
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat}", raw, path)
    data = bytearray(path.read_bytes())
    for at in (0, len(data) - 512):
        if data[at : at + 8] == b"conectix":
            data[at + 28 : at + 32] = creator
            struct.pack_into(">Q", data, at + 48, BYTES)
            struct.pack_into(">I", data, at + 64, checksum(bytes(data[at : at + 512]), 64))
    path.write_bytes(data)
    return path


def asked_of_qemu(image: Path, size: str, target: Path) -> bytes:
    """The disk as QEMU reads it, its size taken in this way."""
    options = f"driver=vpc,force_size_calc={size},file.filename={image}"
    run("qemu-img", "convert", "--image-opts", "-O", "raw", options, target)
    return target.read_bytes()


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("creator", [*BY_GEOMETRY, *BY_BYTES], ids=lambda name: name.decode().strip("\0 "))
def test_the_size_is_what_the_creator_means(creator: bytes, subformat: str, tmp_path: Path) -> None:
    """Both ways to the disk's bytes agree with QEMU's own, whichever creators it knows by itself."""
    image = made_by(creator, subformat, tmp_path / "image.vhd")
    wanted = asked_of_qemu(image, "chs" if creator in BY_GEOMETRY else "current_size", tmp_path / "wanted")
    assert (len(wanted) == BYTES) == (creator in BY_BYTES)
    with open_host([str(image)]) as host, contextlib.closing(open_image(str(image))) as served:
        disk = host.disks[0]
        assert disk.size == served.size == len(wanted)
        mine = MappedReader(disk.size, "disk", dict(enumerate(host.files)), disk.rows)
        assert mine.read(0, disk.size) == served.read(0, disk.size) == wanted


@pytest.mark.parametrize("block", [3 * MIB, 0, 256])
def test_blocks_are_powers_of_two(block: int, tmp_path: Path) -> None:
    """And of whole sectors: no program makes others, QEMU reads none."""
    refused(tmp_path, 32, block, f"blocks of {block:,} bytes")


def test_blocks_make_up_the_disk(tmp_path: Path) -> None:
    refused(tmp_path, 28, 2, "make no disk of 8,390,144")


def refused(tmp_path: Path, field: int, value: int, words: str) -> None:
    """An image with this number in its dynamic disk header, which QEMU does not open either."""
    image = made_by(b"win ", "dynamic", tmp_path / "image.vhd")
    data = bytearray(image.read_bytes())
    struct.pack_into(">I", data, 512 + field, value)
    struct.pack_into(">I", data, 512 + 36, checksum(bytes(data[512 : 512 + 1024]), 36))
    image.write_bytes(data)
    with pytest.raises(BmapError, match=words), open_host([str(image)]):
        pass
    with pytest.raises(AssertionError):
        run("qemu-img", "info", "-f", "vpc", image)
