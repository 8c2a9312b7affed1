"""Checksums and flags of volume managers and image formats: one wrong bit is seen, by `check` and by the
format's own tool."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_proven import complains, flipped

from support import BytesReader, need, run
from virt_bmap.core.checksums import crc32c
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.images import vhdx
from virt_bmap.formats.volumes.lvm.thin import read_pool
from virt_bmap.model.contract import Asks
from virt_bmap.survey.survey import survey

MAPPINGS = "".join(
    f'<single_mapping origin_block="{at * 3}" data_block="{at}" time="0"/>' for at in range(900)
)
XML = (
    '<superblock uuid="" time="1" transaction="1" flags="0" version="2" data_block_size="128" '
    'nr_data_blocks="1000">'
    '<device dev_id="1" mapped_blocks="900" transaction="0" creation_time="0" '
    f'snap_time="0">{MAPPINGS}</device></superblock>'
)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metadata of a thin pool of 1,000 blocks, 900 of them mapped one by one: trees of two levels."""
    need("thin_restore", "thin-provisioning-tools")
    folder = tmp_path_factory.mktemp("thin")
    (folder / "xml").write_text(XML)
    run("truncate", "-s", "2M", folder / "meta")
    run("thin_restore", "-i", folder / "xml", "-o", folder / "meta")
    return folder / "meta"


def codes(image: Path) -> set[str]:
    """What is said of thin metadata."""
    return {
        problem.code
        for problem in read_pool(BytesReader(np.fromfile(image, np.uint8)), 1000 << 16).damage.problems()
    }


def test_every_block_of_thin_metadata_that_has_a_wrong_bit_is_seen(thin: Path) -> None:
    """All blocks in use, each once: as thin_check says."""
    assert codes(thin) == set()
    assert not complains("thin_check", thin)
    blocks = np.fromfile(thin, np.uint8).reshape(-1, 4096)
    used = np.flatnonzero(blocks.any(axis=1)).tolist()
    assert len(used) > 10
    for block in used:
        # bytes that no reader interprets: of the superblock its uuid, else the end of the block
        copy = flipped(thin, block * 4096 + (0x10 if block == 0 else 4090), 5)
        assert complains("thin_check", copy) == bool("checksum" in codes(copy)), block


def test_keys_out_of_order_and_unknown_flags_are_seen(thin: Path) -> None:
    """With checksums made right again."""
    data = np.fromfile(thin, np.uint8)
    blocks = data.reshape(-1, 4096)
    leaf = next(
        at for at in range(len(blocks)) if blocks[at, 4] == 2 and blocks[at, 16:20].view("<u4")[0] > 100
    )
    blocks[leaf, 32:40], blocks[leaf, 40:48] = blocks[leaf, 40:48].copy(), blocks[leaf, 32:40].copy()
    blocks[leaf, :4] = (crc32c(blocks[leaf : leaf + 1, 4:]) ^ np.uint32(121107)).view(np.uint8)
    copy = thin.with_suffix(".order")
    data.tofile(copy)
    assert complains("thin_check", copy)
    assert codes(copy) == {"tree"}
    data = np.fromfile(thin, np.uint8)
    data[6] = 1
    data[:4] = (crc32c(data[None, 4:4096]) ^ np.uint32(160774)).view(np.uint8)
    data.tofile(copy)
    assert codes(copy) == {"superblock"}


def test_unknown_flags_of_a_btrfs_superblock_are_seen(tmp_path: Path) -> None:
    """The checksum made right again: a kernel refuses it."""
    need("mkfs.btrfs", "btrfs-progs")
    image = tmp_path / "x.img"
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", image)
    data = np.fromfile(image, np.uint8)
    assert "superblock" not in survey([BytesReader(data)]).problems.column("code").to_pylist()
    data[0x10038 + 6] |= 0x10
    sealed = data[0x10020:0x11000][None, :]
    data[0x10000:0x10004] = (~crc32c(sealed)).view(np.uint8)
    data.tofile(image)
    problems = [
        row["detail"]
        for row in survey([BytesReader(data)]).problems.to_pylist()
        if row["code"] == "superblock"
    ]
    assert ["0x10000000000000" in detail for detail in problems] == [True], problems
    assert (
        b"0x10000000000000"
        in subprocess.run(["btrfs", "inspect-internal", "dump-super", image], capture_output=True).stdout
    )


def test_headers_and_region_tables_of_vhdx_are_what_was_written(tmp_path: Path) -> None:
    """One copy with a wrong bit is named, two are refused."""
    need("qemu-img", "qemu-utils")
    image = tmp_path / "x.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", image, "8M")
    data = np.fromfile(image, np.uint8)
    assert vhdx.read(BytesReader(data)).damage.problems() == []
    for places in ((65536, 131072), (196608, 262144)):
        for place in places:
            broken = data.copy()
            broken[place + 4090] ^= 1
            found = vhdx.read(BytesReader(broken)).damage.problems()
            assert [problem.code for problem in found] == ["checksum"]
            assert found[0].offset == place
        broken = data.copy()
        broken[[place + 4090 for place in places]] ^= 1
        with pytest.raises(Corrupt):
            vhdx.read(BytesReader(broken))
        broken.tofile(image)
        assert complains("qemu-img", "info", image)


def test_a_fat_that_is_no_copy_of_the_other_is_seen(tmp_path: Path) -> None:
    """One entry of the second FAT changed: fsck.fat says so, too."""
    need("mkfs.fat", "dosfstools")
    image = tmp_path / "x.img"
    run("truncate", "-s", "16M", image)
    run("mkfs.fat", "-F", "16", "-s", "4", image)
    assert not complains("fsck.fat", "-n", image)
    data = np.fromfile(image, np.uint8)
    reserved, sectors = int(data[14]), int(data[22]) | int(data[23]) << 8
    second = (reserved + sectors) * 512
    copy = flipped(image, second + 100, 0)
    assert complains("fsck.fat", "-n", copy)
    found = survey([BytesReader(np.fromfile(copy, np.uint8))], asks=Asks.PROOFS).problems.to_pylist()
    assert [(row["code"], row["volume_offset"]) for row in found] == [("copy-differs", second + 100)]


def test_an_exfat_file_with_more_valid_data_than_data_is_seen(tmp_path: Path) -> None:
    """Its checksum made right again: fsck.exfat says so, too."""
    need("mkfs.exfat", "exfatprogs")
    image = tmp_path / "x.img"
    run("truncate", "-s", "8M", image)
    run("mkfs.exfat", image)
    assert not complains("fsck.exfat", "-n", image)
    data = np.fromfile(image, np.uint8)
    sector = 1 << int(data[108])
    heap = int(data[88:92].view("<u4")[0])
    root = int(data[96:100].view("<u4")[0])
    cluster = sector << int(data[109])
    directory = heap * sector + (root - 2) * cluster
    entry = directory + 32 * next(at for at in range(20) if data[directory + 32 * at] == 0)
    entries = np.zeros((3, 32), np.uint8)
    entries[0, :2], entries[0, 4] = (0x85, 2), 0x20
    entries[1, :4] = 0xC0, 1, 0, 1
    entries[1, 4:6] = np.frombuffer(ord("A").to_bytes(2, "little"), np.uint8)
    entries[1, 8] = 5  # ValidDataLength; DataLength is 0
    entries[2, :3] = 0xC1, 0, ord("A")
    total = 0
    for at, byte in enumerate(entries.reshape(-1).tolist()):
        if at not in (2, 3):
            total = ((total >> 1 | total << 15) + byte) & 0xFFFF
    entries[0, 2:4] = np.frombuffer(total.to_bytes(2, "little"), np.uint8)
    data[entry : entry + 96] = entries.reshape(-1)
    data.tofile(image)
    assert complains("fsck.exfat", "-n", image)
    assert "directory" in survey([BytesReader(data)]).problems.column("code").to_pylist()
