"""What is known by its magic alone, against blkid and the real images."""

import bz2
import gzip
import lzma
import re
from pathlib import Path

import numpy as np
import pytest

from support import BytesReader, need, run
from virt_bmap.formats import foreign
from virt_bmap.open.raw import RawReader

READ_ELSEWHERE = re.compile(
    r"ext[234]$|btrfs$|xfs|fat|vfat|ntfs|exfat|f2fs|swap|minix|iso9660|squashfs|erofs|mdraid|lvm|mbr-sector|pt:(dos|gpt|PMBR|mmls)|data|companion|"
    r"vmdk-flat|split-raw|hdd-plain|kind"
)
"""Kinds of the inventory that have a reader, or hold raw bytes without any magic."""
PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}
LARGE = 24 << 20
NAMELESS = ("dm-thin-empty-data",)
"""The data device of a thin pool: blocks, and nothing that says so."""


def foreign_images(corpus: Path) -> list[tuple[str, Path]]:
    """(kind, file) of the images of the inventory that only `foreign` can name; archives of several are left
    out, and what takes long to unpack."""

    def is_small(row: list[str]) -> bool:
        size = re.match(r"real=(\d+)", row[6])
        return size is None or int(size[1]) <= LARGE

    rows = [line.split("\t") for line in (corpus / "INVENTORY.tsv").read_text().splitlines()[1:]]
    return [
        (row[5], corpus / row[0])
        for row in rows
        if not READ_ELSEWHERE.match(row[5])
        and ".tar." not in row[0]
        and not row[0].endswith(".zip")
        and is_small(row)
        and not any(name in row[0] for name in NAMELESS)
    ]


def unpacked(path: Path, where: Path) -> Path:
    """The image itself in a temporary file."""
    data = path.read_bytes()
    name = path.name
    while Path(name).suffix in PACKED:
        data = PACKED[Path(name).suffix](data)
        name = Path(name).stem
    where.write_bytes(data)
    return where


def test_corpus(corpus: Path, tmp_path: Path) -> None:
    """Every one has a name, and where blkid knows one, it is blkid's."""
    blkid = need("blkid", "util-linux")
    checked = 0
    for kind, path in foreign_images(corpus):
        image = unpacked(path, tmp_path / "image")
        reader = RawReader(str(image))
        name = foreign.recognise(reader)
        reader.close()
        assert name, (kind, path)
        said = (
            run(blkid, "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", image, ok=(0, 2, 8))
            .decode()
            .split()
        )
        # a fixed VHD, a hybrid disc and a disk with two signatures are more than one thing
        assert not said or name in said or name in ("VHD image", "hfs", "hfsplus", "scoutfs"), (
            path,
            name,
            said,
        )
        checked += 1
    assert checked > 60


def test_luks_and_bitlocker_headers() -> None:
    for magic, at, name in (
        (b"LUKS\xba\xbe\0\2", 0, "crypto_LUKS"),
        (b"-FVE-FS-", 3, "BitLocker"),
        (b"SKUL\xba\xbe", 0x4000, "crypto_LUKS"),
    ):
        assert foreign.recognise(_disk(magic, at)) == name


def test_external_journal_is_not_ext() -> None:
    disk = _disk(b"\x53\xef", 0x438)
    assert foreign.recognise(disk) is None
    disk.data[0x460] = 0x08
    disk.forget_ends()
    assert foreign.recognise(disk) == "jbd"


def test_every_row_is_reachable() -> None:
    """Each row alone on an empty disk gives its own name."""
    for name, *checks in foreign.MAGICS:
        disk = _disk(b"", 0, 4 << 20)
        for check in checks:
            at = check[0] if check[0] >= 0 else disk.size + check[0]
            disk.data[at : at + len(check[1])] = np.frombuffer(check[1], np.uint8)
        assert foreign.recognise(disk) == name


def test_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, calls = _disk(b"hello", 0), []
    original = BytesReader._fetch
    monkeypatch.setattr(
        BytesReader,
        "_fetch",
        lambda self, offsets, lengths: calls.append(1) or original(self, offsets, lengths),
    )
    assert foreign.recognise(disk) is None
    assert len(calls) <= 3


def test_tiny_and_empty() -> None:
    for size in (1, 511, 512, 4096):
        assert foreign.recognise(BytesReader(np.zeros(size, np.uint8))) is None


def test_noise_is_nothing() -> None:
    dice = np.random.default_rng(3)
    for _ in range(100):
        assert foreign.recognise(BytesReader(dice.integers(0, 256, 1 << 17, np.uint8))) is None


def _disk(magic: bytes, at: int, size: int = 1 << 20) -> BytesReader:
    data = np.zeros(size, np.uint8)
    data[at : at + len(magic)] = np.frombuffer(magic, np.uint8)
    return BytesReader(data)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (bytes.fromhex("bebafeca00000000 0100000002000000"), "seSparse VMDK extent"),
        (b"shdw\0\0\0\1\0\0\2\0", "ASIF image"),
    ],
)
def test_images_of_virtual_machines_that_nothing_opens_are_named(head, name):
    """Headers as QEMU's block/vmdk.c (SESPARSE_CONST_HEADER_MAGIC) and macOS 26 (ASIF) have them."""
    assert foreign.recognise(BytesReader(np.frombuffer(head.ljust(1 << 20, b"\0"), np.uint8))) == name
