"""What tables of images make us hold is bounded by what is stored: each bound with one that is over it, and
one that may be as large."""

import struct
from pathlib import Path

import numpy as np
import pytest

from support import need, run
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import BytesReader
from virt_bmap.formats.images.layer import Draft, place_sectors, used_entries
from virt_bmap.open.host import open_host

KIB, MIB, CLUSTER = 1 << 10, 1 << 20, 64 << 10


def image_of(data: np.ndarray) -> BytesReader:
    return BytesReader(data.view(np.uint8), "image")


def refused(found: pytest.ExceptionInfo[Corrupt]) -> None:
    assert found.value.code == "holes"


def test_rows_of_a_table_whose_entries_lead_to_one_place() -> None:
    """2 Mi of them have 8 MiB, and would take 128."""
    with pytest.raises(Corrupt, match="runs of table entries") as found:
        used_entries(image_of(np.full(2 << 20, 7, "<u4")), 0, 8 * MIB, "<u4", 0)
    refused(found)
    number, value = used_entries(image_of(np.arange(2 << 20).astype("<u4")), 0, 8 * MIB, "<u4", 0)
    assert len(number) == len(value) == (2 << 20) - 1, "one that goes up by steps is one row"


def test_runs_of_sectors() -> None:
    """Many blocks may have one bitmap, each of its bits a run: 4,096 sectors in a block of 2 MiB."""
    image = image_of(np.full(64 * KIB, 0x55, np.uint8))

    def place(blocks: int) -> Draft:
        draft = Draft([image], blocks * 2 * MIB)
        guest = np.arange(blocks) * 2 * MIB
        place_sectors(draft, guest, np.full(blocks, 512), np.zeros(blocks, np.int64), 4096, 512, "big")
        return draft

    with pytest.raises(Corrupt, match="runs of sectors") as found:
        place(400)
    refused(found)
    in_file = (64 - 1) * KIB // (2 * 512)
    assert len(place(2).finish("image", 1, {}).rows) == 2 * in_file


def qcow2(path: Path, size: str) -> bytearray:
    """The metadata of a new image."""
    need("qemu-img", "qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    return bytearray(path.read_bytes().ljust(4 * CLUSTER, b"\0"))


@pytest.mark.parametrize(("tables", "over"), [(320, True), (20, False)])
def test_runs_of_clusters(tables: int, over: bool, tmp_path: Path) -> None:
    """Entries of L2 tables that all lead to one cluster: each is a row, eight times as large."""
    path = tmp_path / "image.qcow2"
    data = qcow2(path, "160G")
    (l1,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(f">{tables}Q", data, l1, *(1 << 63 | (4 + nth) * CLUSTER for nth in range(tables)))
    path.write_bytes(data + struct.pack(">Q", 1 << 63 | 2 * CLUSTER) * (tables * CLUSTER // 8))
    opened(path, "runs of clusters" if over else None)


@pytest.mark.parametrize(("blocks", "over"), [(8, True), (1, False)])
def test_runs_of_refcounts(blocks: int, over: bool, tmp_path: Path) -> None:
    """Refcounts of one bit, every other one 1: each is a row of 64 bytes."""
    path = tmp_path / "image.qcow2"
    data = qcow2(path, "1M")
    struct.pack_into(">I", data, 96, 0)
    (table,) = struct.unpack_from(">Q", data, 48)
    struct.pack_into(f">{blocks}Q", data, table, *((4 + nth) * CLUSTER for nth in range(blocks)))
    path.write_bytes(data + b"\x55" * (blocks * CLUSTER))
    with path.open("r+b") as file:
        file.truncate(blocks * 8 * CLUSTER * CLUSTER)
    opened(path, "runs of refcounts" if over else None)


def opened(path: Path, words: str | None) -> None:
    """What the bound forbids ends with one line; what is below it only has problems."""
    if words is None:
        with open_host([str(path)]) as host:
            assert host.disks[0].chain[0].layer.damage.problems()
        return
    with pytest.raises(Corrupt, match=words) as found, open_host([str(path)]):
        pass
    refused(found)
    assert "\n" not in str(found.value)
