"""Operations that were begun in the log of XFS and not ended: the kernel, which ends them, is the judge."""

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xfs_images
from busy_copies import FLAVOURS, MIB, by_kernel, by_map, differences
from support import assert_proven, mapped, mounted, need, need_root, run
from virt_bmap.core.errors import Corrupt
from virt_bmap.formats.filesystems.xfs import intents
from virt_bmap.formats.filesystems.xfs.extents import Extents
from virt_bmap.formats.filesystems.xfs.journal import find_log
from virt_bmap.formats.filesystems.xfs.replay import replay
from virt_bmap.formats.filesystems.xfs.superblock import read_geometry
from virt_bmap.model.damage import Damage
from virt_bmap.open.raw import RawReader


@contextmanager
def churned(where: Path) -> Iterator[None]:
    """Fragmented files are cloned, written, cut and removed, while others are synced all the time: so the log
    is written between the steps of one operation."""
    stop = threading.Event()

    def churn(name: str) -> None:
        first, second = where / name, where / f"{name}-clone"
        while not stop.is_set():
            with open(first, "wb") as file:
                for i in range(60):
                    os.pwrite(file.fileno(), b"x" * 4096, i * 8192)
                os.fsync(file.fileno())
            run("cp", "--reflink=always", first, second)
            with open(second, "r+b") as file:
                for i in range(0, 60, 3):
                    os.pwrite(file.fileno(), b"y" * 4096, i * 8192)
            os.truncate(first, 20000)
            first.unlink()
            second.unlink()

    def sync(name: str) -> None:
        with open(where / name, "wb") as file:
            while not stop.is_set():
                os.pwrite(file.fileno(), b"z", 0)
                os.fsync(file.fileno())

    tasks = [
        threading.Thread(target=task, args=(f"{task.__name__}{i}",))
        for task in (churn, sync)
        for i in range(3)
    ]
    for thread in tasks:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in tasks:
            thread.join()


def begun(image: Path) -> int:
    """How many extents are still to be freed or mapped when the log of an image is replayed."""
    reader = RawReader(str(image))
    try:
        geometry = read_geometry(reader)
        log = find_log(reader, geometry, (), Damage())
        if log is None or log.clean:
            return 0
        found = replay(reader, geometry, log).intents
        return len(found.freed[0]) + len(found.landed[0]) + len(found.mapped)
    finally:
        reader.close()


def test_what_was_begun_is_finished(tmp_path: Path) -> None:
    """Copies of one moment each. A third of them has such operations."""
    need_root()
    need("mkfs.xfs", "xfsprogs")
    disk = xfs_images.make(tmp_path / "host.img", size=8 << 30)
    with mounted(disk) as host:
        image = xfs_images.make(
            host / "busy.img", "--unsupported", "-m", "reflink=1,rmapbt=1", size=192 * MIB
        )
        taken = [host / f"taken{number}.img" for number in range(40)]
        with mounted(image, "noatime") as where, churned(where):
            for copy in taken:
                time.sleep(0.03)
                run("cp", "--reflink=always", image, copy)
        some = [copy for copy in taken if begun(copy)][:3]
        assert some, "no copy was taken between two steps"
        for copy in some:
            bmap, mine = by_map(copy)
            assert bmap.problems.column("code").to_pylist() == ["journal-replayed"]
            assert_proven(mapped(copy))
            assert differences(by_kernel(copy, FLAVOURS["xfs"]), mine) == []


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=6),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=5),
)
def test_extents_come_and_go_block_by_block(
    old: list[tuple[int, int]], steps: list[tuple[int, int, bool]]
) -> None:
    """Against a file that is a table of blocks."""
    blocks: dict[int, int] = {}
    rows = []
    for number, (place, count) in enumerate(old):
        if not any(block in blocks for block in range(place, place + count)):
            rows.append((1, 0, place, 1000 * (number + 1), count, 0))
            blocks |= {place + i: 1000 * (number + 1) + i for i in range(count)}
    mapped = np.zeros(len(steps), intents.MAPPED)
    for number, (place, count, comes) in enumerate(steps):
        start = 100_000 + 1000 * number
        mapped[number] = (77, start, place, count, intents.MAP if comes else intents.UNMAP)
        for i in range(count):
            blocks.pop(place + i, None)
            if comes:
                blocks[place + i] = start + i
    rows.append((0, 0, 0, 5, 40, 0))  # of another inode
    extents = Extents(*np.array(rows, np.int64).T)
    found = intents.finished(extents, np.array([66, 77]), intents.Intents(mapped=mapped))
    ours = {
        int(place + i): int(block + i)
        for owner, place, block, count in zip(
            found.owner, found.file_block, found.block, found.count, strict=True
        )
        if owner == 1
        for i in range(count)
    }
    assert ours == blocks
    assert int(found.count[found.owner == 1].sum()) == len(blocks)


def test_an_intent_that_does_not_hold_its_extents_is_refused(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfsprogs")
    reader = RawReader(str(xfs_images.make(tmp_path / "disk.img")))
    geometry = read_geometry(reader)
    reader.close()
    data = intents.HEAD.pack(intents.EFI, 1, 3, 1) + struct.pack("<QII", 1, 1, 0)
    with pytest.raises(Corrupt, match="does not hold its extents"):
        intents.intents_of(geometry, [(intents.EFI, data)])
