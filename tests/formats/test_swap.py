"""Swap spaces, against mkswap and blkid."""

import struct
from pathlib import Path

import numpy as np
import pytest

from fat_images import corpus_images
from support import assert_proven, mapped, need, run, survives
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap


def make(tmp_path: Path, page: int, size: int = 1 << 20) -> Path:
    need("mkswap", "util-linux")
    image = tmp_path / f"swap-{page}.img"
    image.write_bytes(bytes(size))
    run("mkswap", "-p", str(page), "-L", "a label", image)
    return image


def blkid(image: Path, tag: str) -> str:
    return run("blkid", "-p", "-o", "value", "-s", tag, image).decode().strip()


def parts(bmap: BlockMap) -> dict[str, int]:
    """Bytes by part."""
    result: dict[str, int] = {}
    for row in bmap.extents.to_pylist():
        result[row["part"]] = result.get(row["part"], 0) + row["length"]
    return result


@pytest.mark.parametrize("page", [4096, 8192, 16384, 32768, 65536])
def test_pages_of_any_size(tmp_path, page):
    image = make(tmp_path, page)
    bmap = mapped(image)
    assert_proven(bmap)
    system = bmap.filesystems.to_pylist()[0]
    assert (system["type"], system["label"], system["uuid"]) == ("swap", "a label", blkid(image, "UUID"))
    assert system["block_size"] == page
    assert parts(bmap) == {"header": page, "swap space": (1 << 20) - page}
    for name in BlockMap.TABLES:
        tables.check(name, getattr(bmap, name))


def test_bad_pages(tmp_path):
    data = np.frombuffer(make(tmp_path, 4096).read_bytes(), np.uint8).copy()
    data[1032:1036] = np.frombuffer(struct.pack("<I", 2), np.uint8)
    data[1536:1544] = np.frombuffer(struct.pack("<II", 7, 9), np.uint8)
    bmap = survives(data)
    assert_proven(bmap)
    assert [row["volume_offset"] for row in bmap.extents.to_pylist() if row["part"] == "bad pages"] == [
        7 * 4096,
        9 * 4096,
    ]


def test_version_0_is_a_bitmap_of_usable_pages(tmp_path):
    data = np.zeros(64 * 4096, np.uint8)
    data[4086:4096] = np.frombuffer(b"SWAP-SPACE", np.uint8)
    data[:8] = np.packbits(np.arange(64) % 64 > 0, bitorder="little")
    data[1] &= 0xFE  # page 8
    bmap = survives(data)
    assert_proven(bmap)
    assert parts(bmap) == {"header": 4096, "bad pages": 4096, "swap space": 62 * 4096}
    image = tmp_path / "v0.img"
    image.write_bytes(data.tobytes())
    assert blkid(image, "TYPE") == "swap"


@pytest.mark.parametrize("magic", [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"])
def test_a_hibernated_system(tmp_path, magic):
    image = make(tmp_path, 4096)
    data = bytearray(image.read_bytes())
    data[4086:4096] = magic
    image.write_bytes(data)
    bmap = mapped(image)
    assert bmap.filesystems.column("type").to_pylist() == [blkid(image, "TYPE")] == ["swsuspend"]
    assert bmap.filesystems.column("state").to_pylist() == ["hibernated"]
    assert_proven(bmap)


def test_what_is_wrong_is_said(tmp_path):
    data = np.frombuffer(make(tmp_path, 4096).read_bytes(), np.uint8).copy()
    assert survives(data[: 1 << 19]).problems.column("code").to_pylist() == ["truncated"]
    data[1024] = 9
    assert survives(data).problems.column("code").to_pylist() == ["unsupported"]


def test_swap_spaces_that_others_made(corpus, tmp_path):
    seen = 0
    for name, image in corpus_images(corpus, tmp_path, "swap"):
        bmap = mapped(image)
        assert_proven(bmap)
        system = bmap.filesystems.to_pylist()[0]
        assert (system["uuid"], system["label"]) == (blkid(image, "UUID"), blkid(image, "LABEL")), name
        seen += 1
    assert seen >= 4
