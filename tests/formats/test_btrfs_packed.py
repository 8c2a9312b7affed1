"""Compressed files of btrfs, against what the kernel wrote and reads."""

import hashlib
import os
import random
import struct
from pathlib import Path

import lzallright
import numpy as np
import pytest

import btrfs_images
from support import hashes, mapped, mounted, need_root, run
from virt_bmap.cli import run as bmap
from virt_bmap.core.errors import ImageError
from virt_bmap.formats.filesystems.btrfs import packed as of_btrfs
from virt_bmap.model import tables

ALGORITHMS = ("zlib", "lzo", "zstd")
SIZES = (1, 50, 1900, 2047, 4095, 4096, 4097, 20_000, 131_071, 131_072, 131_073, 300_000, 2_000_000)


def some(size: int, seed: int) -> bytes:
    """Bytes of which some repeat themselves, and some don't."""
    chooser = random.Random(seed)
    found = bytearray()
    while len(found) < size:
        line = chooser.randbytes(chooser.randrange(1, 300))
        found += line * chooser.choice([1, 1, 2, 9, 500])
    return bytes(found[:size])


def fill(top: Path) -> None:
    """Files of all sizes; parts of them written again, cloned, punched, cut off."""
    for size in SIZES:
        (top / f"{size}").write_bytes(some(size, size))
    for number in range(150):
        (top / f"many {number}").write_bytes(some(random.Random(number).randrange(1, 200_000), number + 9))
    run("sync", "-f", top)
    for name in ("clone", "cut", "holes", "grown", "rewritten"):
        run("cp", "--reflink=always", top / "2000000", top / name)
    os.truncate(top / "cut", 700_001)
    run("fallocate", "-p", "-o", "200000", "-l", "300000", top / "holes")
    with open(top / "rewritten", "r+b") as file:
        for at in (5, 150_000, 1_234_567):
            file.seek(at)
            file.write(some(9_000, at))
    with open(top / "grown", "ab") as file:
        file.write(some(100_000, 3))
    run("sync", "-f", top)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_content_is_what_the_kernel_reads(algorithm: str, tmp_path: Path) -> None:
    need_root()
    image = btrfs_images.make(tmp_path, "300M", "-m single")[0]
    with mounted(image, f"compress-force={algorithm}") as top:
        fill(top)
        theirs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in top.iterdir()}
    flags = np.array(mapped(image).extents.column("flags"))
    assert (flags & tables.COMPRESSED != 0).sum() > 150, "hardly anything is compressed"
    assert hashes(image) == theirs


def test_what_can_not_be_unpacked_is_an_error_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's own damage: a checksum of the disk would have told before."""
    need_root()
    image = btrfs_images.make(tmp_path, "128M", "-m single")[0]
    with mounted(image, "compress-force=zlib") as top:
        (top / "file").write_bytes(some(300_000, 1))
        (top / "other").write_bytes(some(1_000, 2))

    def damaged(data: bytes, size: int) -> bytes:
        raise ValueError("not a stream")

    monkeypatch.setattr(of_btrfs, "zlibbed", damaged)
    with pytest.raises(
        ImageError, match=r"^/file on /dev/sda: .* 0x0-.* \(what they are compressed to is damaged\)"
    ):
        bmap(["cat", str(image), "/dev/sda", "/file"])


@pytest.mark.parametrize("sector", [4096, 16384])
def test_lzo_as_the_kernel_frames_it(sector: int) -> None:
    """Every place in a sector at which a block can end: no length crosses a sector's end."""
    lzo, chooser, ends = lzallright.LZOCompressor(), random.Random(4), set()
    for seed in range(400):
        content = some(chooser.randrange(1, 3 * sector), seed)
        stream = bytearray(4)
        for at in range(0, len(content), sector):
            block = lzo.compress(content[at : at + sector])
            stream += struct.pack("<I", len(block)) + block
            if (left := -len(stream) % sector) < 4:
                stream += bytes(left)
            ends.add(left)
        stream[:4] = struct.pack("<I", len(stream))
        padded = bytes(stream).ljust(-(-len(stream) // sector) * sector, b"\0")
        assert of_btrfs.lzo(sector, padded, len(content)) == content
    assert len(ends) > 300


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"", "length is 0"),
        (b"\x03\0\0\0" + bytes(90), "length is 3"),
        (b"\xff\xff\xff\xff" + bytes(90), "length is 4294967295"),
        (b"\x10\0\0\0\xff\0\0\0" + bytes(90), "block of 255 bytes"),
        (b"\x10\0\0\0" + bytes(90), "block of 0 bytes"),
        (b"\x10\0\0\0\x08\0\0\0" + b"\xff" * 90, "LZO|Lzo|lzo|input|output|Input|Output"),
    ],
)
def test_lzo_that_is_damaged_is_said(stream: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        of_btrfs.lzo(4096, stream, 4096)
