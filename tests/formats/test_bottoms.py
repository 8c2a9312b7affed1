"""What lies at the bottom of a volume, and how much is stored of it: the disks that one made it of, each
once, and what the host's filesystem says is no hole in their files."""

import os
from pathlib import Path

import pytest

from btrfs_images import loops
from recipes.made import blank
from support import need, need_root, run
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layers import bottom
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import CLAIM_FREE, CLAIM_STORED, afford, stored_bytes
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened

MIB = 1 << 20
PROFILES = {"single": 1, "dup": 1, "raid0": 2, "raid1": 2, "raid1c3": 3, "raid10": 4, "raid5": 3, "raid6": 4}
"""How a pool keeps its data and metadata, and on how many disks."""


def data_of(path: Path) -> int:
    """Bytes of a file that are no hole, as lseek(2) tells."""
    found, at, size = 0, 0, path.stat().st_size
    with open(path, "rb") as file:
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found += at - begin
    return found


def made(folder: Path, profile: str) -> list[Path]:
    need_root(), need("mkfs.btrfs", "btrfs-progs")
    images = [blank(folder / f"{number}.img", 256 * MIB) for number in range(PROFILES[profile])]
    with loops(images) as devices:
        run("mkfs.btrfs", "-q", "-f", "-d", profile, "-m", profile, *devices)
    return images


def pool_of(bmap: BlockMap, readers: list[Reader]) -> Reader:
    (number,) = (at for at, kind in enumerate(bmap.volumes.column("kind").to_pylist()) if kind == "pool")
    return readers[number]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_pool_lies_on_its_disks(profile: str, tmp_path: Path) -> None:
    images = made(tmp_path, profile)
    with opened(Disks([str(image) for image in images])) as (bmap, readers):
        pool, disks = pool_of(bmap, readers), [readers[number] for number in bmap.disks]
        assert {reader.name for reader in bottom(pool)} == {str(image) for image in images}
        assert bottom(pool) == set().union(*(bottom(disk) for disk in disks))
        stored = sum(map(data_of, images))
        assert 0 < stored < 64 * MIB
        assert stored_bytes(pool) == min(pool.size, stored)


def test_of_a_pool_with_a_disk_lost_the_others_are_the_bottom(tmp_path: Path) -> None:
    images = made(tmp_path, "raid1c3")[1:]
    with opened(Disks([str(image) for image in images])) as (bmap, readers):
        pool = pool_of(bmap, readers)
        assert {reader.name for reader in bottom(pool)} == {str(image) for image in images}
        assert stored_bytes(pool) == min(pool.size, sum(map(data_of, images)))


def test_what_a_pool_can_afford_follows_the_files(tmp_path: Path) -> None:
    """The pool says that it has gigabytes; its files hold some MiB."""
    images = [blank(tmp_path / f"{number}.img", 8 << 30) for number in range(2)]
    need_root(), need("mkfs.btrfs", "btrfs-progs")
    with loops(images) as devices:
        run("mkfs.btrfs", "-q", "-f", "-d", "raid0", "-m", "raid1", *devices)
    most = CLAIM_FREE + CLAIM_STORED * sum(map(data_of, images))
    with opened(Disks([str(image) for image in images])) as (bmap, readers):
        pool = pool_of(bmap, readers)
        afford(pool, most, "tables")
        with pytest.raises(Corrupt, match="they lie in holes"):
            afford(pool, most + 1, "tables")
