"""btrfs filesystems that have grown from a read-only seed onto another device: joined again as a kernel joins
them, from disks and from images inside of disks."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import support
from btrfs_images import fill, loops, make, mounted_pool
from support import run
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import nested
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey

Files = dict[str, bytes]


class Grown(NamedTuple):
    """A seed, what has grown from it, and the files of each as the kernel has shown them."""

    seed: Path
    sprouts: list[Path]
    seen: list[Files]


def files_of(where: Path) -> Files:
    return {f"/{path.relative_to(where)}": path.read_bytes() for path in where.iterdir() if path.is_file()}


def sprout(seed: Path, image: Path, where: Path, number: int) -> Files:
    """The kernel's own way: the seed is mounted, a device added, and the mount made writable."""
    run("truncate", "-s", "200M", image)
    with loops([seed, image]) as (below, above):
        run("btrfs", "device", "scan", "--forget")
        where.mkdir(exist_ok=True)
        run("mount", "-t", "btrfs", below, where)
        try:
            run("btrfs", "device", "add", "-f", above, where)
            run("mount", "-o", "remount,rw", where)
            fill(
                where,
                f"head -c {300_000 + number} /dev/urandom > new{number}; "
                "dd if=/dev/urandom of=old bs=4k count=3 seek=7 conv=notrunc status=none; rm gone; sync -f .",
            )
        finally:
            support.unmount(where)
        run("btrfs", "device", "scan", "--forget")
        run("btrfs", "device", "scan", below, above)
        run("mount", "-t", "btrfs", "-o", "ro", above, where)
        try:
            return files_of(where)
        finally:
            support.unmount(where)
            run("btrfs", "device", "scan", "--forget")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("seeds")
    (seed,) = make(folder, "200M", "", name="seed")
    with mounted_pool([seed], folder / "mnt") as where:
        fill(where, "head -c 500000 /dev/urandom > old; head -c 90000 /dev/urandom > gone; echo x > kept")
    run("btrfstune", "-S", "1", seed)
    sprouts = [folder / f"sprout{number}.img" for number in (1, 2)]
    seen = [sprout(seed, image, folder / "mnt", number) for number, image in enumerate(sprouts, 1)]
    assert seen[0].keys() == {"/old", "/kept", "/new1"}
    return Grown(seed, sprouts, seen)


def pools(bmap: BlockMap) -> list[int]:
    kinds = bmap.volumes.column("kind").to_pylist()
    return [number for number, kind in enumerate(kinds) if kind == "pool"]


def shown(bmap: BlockMap, disks: list[RawReader], volume: int) -> Files:
    inodes = support.tree(bmap, volume)
    return {
        path: support.content(bmap, disks, volume, inode) for path, inode in inodes.items() if path != "/"
    }


@contextlib.contextmanager
def opened(*images: Path) -> Iterator[list[RawReader]]:
    disks = [RawReader(os.fspath(image)) for image in images]
    try:
        yield disks
    finally:
        for disk in disks:
            disk.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_seed_and_what_grew_from_it(grown: Grown, order: tuple[int, int]) -> None:
    images = [[grown.seed, grown.sprouts[0]][at] for at in order]
    bmap = support.mapped(*images)
    (volume,) = pools(bmap)
    with opened(*images) as disks:
        assert shown(bmap, disks, volume) == grown.seen[0]
    support.assert_proven(bmap)
    names = bmap.volumes.column("name").to_pylist()
    assert names[volume] == names[order.index(1)]
    assert "mounted" not in str(bmap.problems.to_pylist())


def test_two_grew_from_one_seed(grown: Grown) -> None:
    """Each is shown, and the seed's own bytes are named once."""
    images = [grown.seed, *grown.sprouts]
    bmap = support.mapped(*images)
    assert len(pools(bmap)) == 2
    with opened(*images) as disks:
        assert [shown(bmap, disks, volume) for volume in pools(bmap)] == grown.seen
    support.assert_proven(bmap)
    parts = [row["part"] for row in bmap.slice_of("extents", 0)[1].to_pylist()]
    assert parts.count("superblock") == 2


def test_a_seed_alone(grown: Grown) -> None:
    bmap = support.mapped(grown.seed)
    (volume,) = pools(bmap)
    assert set(support.tree(bmap, volume)) == {"/", "/old", "/gone", "/kept"}
    support.assert_proven(bmap)


def test_without_its_seed(grown: Grown) -> None:
    bmap = support.mapped(grown.sprouts[0])
    assert "missing-member" in bmap.problems.column("code").to_pylist()


def test_a_stranger_with_the_device_id_of_a_seed(grown: Grown, tmp_path: Path) -> None:
    """btrfstune -u gives a filesystem another id, and lets its device have its own: it is no seed of this."""
    stranger = Path(shutil.copy(grown.seed, tmp_path / "stranger.img"))
    run("btrfstune", "-S", "0", "-f", stranger)
    run("btrfstune", "-f", "-u", stranger)
    images = [stranger, grown.sprouts[0], grown.seed]
    bmap = support.mapped(*images)
    assert len(pools(bmap)) == 2
    with opened(*images) as disks:
        assert shown(bmap, disks, pools(bmap)[1]) == grown.seen[0]
    support.assert_proven(bmap)


# ---- images inside of a disk -------------------------------------------------------------------------------


def mapped_inside(folder: Path, images: dict[str, Path]) -> tuple[BlockMap, Path]:
    """The map of a disk with these files, which are disks; and it."""
    for name, image in images.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        run("cp", "--sparse=always", image, folder / "tree" / name)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder / "tree", folder / "disk", "1G")
    shutil.rmtree(folder / "tree")
    with opened(folder / "disk") as disks:
        return survey(disks, nested=nested([f"/{name}" for name in images])), folder / "disk"


def contents(bmap: BlockMap, disk: Path, volume: int) -> Files:
    with opened(disk) as disks:
        return shown(bmap, disks, volume)


def test_images_of_one_machine(grown: Grown, tmp_path: Path) -> None:
    bmap, disk = mapped_inside(tmp_path, {"a-seed.img": grown.seed, "b-sprout.img": grown.sprouts[0]})
    (volume,) = pools(bmap)
    assert contents(bmap, disk, volume) == grown.seen[0]
    assert bmap.volumes.column("name")[volume].as_py() == "/dev/sda:/b-sprout.img"
    support.assert_proven(bmap)


def test_images_of_clones(grown: Grown, tmp_path: Path) -> None:
    """Two machines with a seed each, of one template: the names of their folders tell them apart."""
    images = {}
    for number, image in enumerate([grown.sprouts[0], grown.sprouts[0]], 1):
        images |= {f"vm{number}/seed.img": grown.seed, f"vm{number}/sprout.img": image}
    bmap, disk = mapped_inside(tmp_path, images)
    assert len(pools(bmap)) == 2
    for number, volume in enumerate(pools(bmap), 1):
        parents = set(bmap.rows_of(volume).parent.tolist())
        names = {bmap.volumes.column("name")[at].as_py() for at in parents}
        assert names == {f"/dev/sda:/vm{number}/{name}.img" for name in ("seed", "sprout")}
        assert contents(bmap, disk, volume) == grown.seen[0]
    support.assert_proven(bmap)


def test_images_that_share_a_seed(grown: Grown, tmp_path: Path) -> None:
    images = {"golden.img": grown.seed}
    images |= {f"vm{number}/disk.img": image for number, image in enumerate(grown.sprouts, 1)}
    bmap, disk = mapped_inside(tmp_path, images)
    assert len(pools(bmap)) == 2
    assert [contents(bmap, disk, volume) for volume in pools(bmap)] == grown.seen
    support.assert_proven(bmap)
