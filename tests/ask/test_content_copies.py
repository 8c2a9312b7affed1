"""btrfs content where some copies are wrong, old or missing: what was written comes out, or an error that
names file and byte."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_btrfs import pool

from btrfs_images import fill, make, mounted_pool
from support import mapped, need, run, tree
from virt_bmap import cli
from virt_bmap.core.errors import ImageError
from virt_bmap.core.mapping import COPY, DATA
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

SECTOR = 4096
RANDOM = np.random.default_rng(7)
BIG, MIDDLE = RANDOM.bytes(1_500_000), RANDOM.bytes(70_000)
INLINE = {f"small/n{number}": b"small file %d" % number for number in range(40)}
FILES = {"big": BIG, "middle": MIDDLE, **INLINE}


def plant(where: Path) -> None:
    (where / "small").mkdir()
    for name, data in FILES.items():
        (where / name).write_bytes(data)
    os.symlink("long/" * 300, where / "link")
    subprocess.run(["touch", where / "nosum"], check=True)
    subprocess.run(["chattr", "+C", where / "nosum"], check=True, capture_output=True)
    (where / "nosum").write_bytes(MIDDLE[::-1])


def made(folder: Path, options: str, count: int) -> list[Path]:
    images = make(folder, "300M", options, count)
    with mounted_pool(images, folder / "mnt") as where:
        plant(where)
    return images


def places(bmap: BlockMap, path: str) -> list[tuple[int, int, int, int]]:
    """(logical byte, disk, byte there, role) of every sector of a file's blocks: data and copies."""
    volume = pool(bmap)
    inode = tree(bmap, volume)[path]
    _, table = bmap.slice_of("extents", volume)
    rows = np.flatnonzero(
        (tables.integers(table, "inode") == inode) & (tables.codes(table, "kind") == tables.DATA)
    )
    start = tables.integers(table, "volume_offset")[rows]
    found = bmap.descend(volume, start, start + tables.integers(table, "length")[rows])
    result = []
    for disk, low, high, inside, role in zip(
        found.volume, found.start, found.end, found.inside, found.role, strict=True
    ):
        if role in (DATA, COPY):
            result += [
                (int(inside + at), int(bmap.disks.index(int(disk))), int(low + at), role)
                for at in range(0, int(high - low), SECTOR)
            ]
    return result


def spoil(image: Path, offset: int, size: int = SECTOR) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x5a" * size)


def cat(images: list[Path], path: str, *options: str) -> int:
    added = [word for image in images for word in ("-a", str(image))]
    return cli.run(["cat", *options, *added, "/dev/sda", path])


def read(images: list[Path], path: str, capfdbinary: pytest.CaptureFixture[bytes]) -> bytes:
    assert cat(images, path) == 0
    return capfdbinary.readouterr().out


def extracted(images: list[Path], out: Path) -> dict[str, bytes]:
    out.mkdir()
    added = [word for image in images for word in ("-a", str(image))]
    assert cli.run(["extract", "-q", "-C", str(out), *added, "/dev/sda", "/"]) == 0
    assert os.readlink(out / "link") == "long/" * 300
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


ALL = FILES | {"nosum": MIDDLE[::-1]}


# ---- copies ------------------------------------------------------------------------------------------------

MIRRORS = {
    "crc32c": ("--csum crc32c -d raid1 -m raid1", 2), "xxhash": ("--csum xxhash -d raid1 -m raid1", 2),
    "sha256": ("--csum sha256 -d raid1 -m raid1", 2), "blake2": ("--csum blake2 -d raid1 -m raid1", 2),
    "dup": ("-d dup -m dup", 1), "raid1c3": ("-d raid1c3 -m raid1c3", 3),
    "raid10": ("-d raid10 -m raid10", 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIRRORS)
def test_a_wrong_copy_is_passed_over(kind: str, tmp_path: Path) -> None:
    """Of every sector of a file one copy is spoiled, now this one, now that one; of RAID1C3 two."""
    images = made(tmp_path, *MIRRORS[kind])
    bmap = mapped(*images)
    spoiled: dict[int, int] = {}
    for name in FILES:
        if name.startswith("small"):
            continue
        for nth, (logical, disk, offset, _) in enumerate(
            sorted(places(bmap, f"/{name}"), key=lambda place: (place[0], place[3]))
        ):
            keep = logical // SECTOR % 2 if kind != "raid1c3" else logical // SECTOR % 3
            copies = 3 if kind == "raid1c3" else 2
            if nth % copies != keep:
                spoil(images[disk], offset)
                spoiled[logical] = spoiled.get(logical, 0) + 1
    assert set(spoiled.values()) == {2 if kind == "raid1c3" else 1}
    assert extracted(images, tmp_path / "out") == ALL
    with mounted_pool(images, tmp_path / "mnt", "ro") as where:
        assert (where / "big").read_bytes() == BIG


def test_a_leaf_with_inline_files_that_is_wrong_in_its_first_copy(tmp_path: Path) -> None:
    images = made(tmp_path, "-d single -m dup", 1)
    bmap = mapped(*images)
    hit = {
        (disk, offset // 16384 * 16384)
        for name in INLINE
        for _, disk, offset, role in places(bmap, f"/{name}")
        if role == DATA
    }
    assert hit
    for disk, offset in hit:
        spoil(images[disk], offset, 16384)
    assert extracted(images, tmp_path / "out") == ALL


def test_a_leaf_whose_checksum_alone_is_wrong(tmp_path: Path) -> None:
    """A flipped bit in inline content leaves address and generation right."""
    images = made(tmp_path, "-d single -m dup", 1)
    (first,) = [offset for _, _, offset, role in places(mapped(*images), "/small/n7") if role == DATA]
    data = bytearray(images[0].read_bytes())
    data[first] ^= 1
    images[0].write_bytes(data)
    assert extracted(images, tmp_path / "out") == ALL


def test_what_is_wrong_in_every_copy_is_named(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    images = made(tmp_path, "-d raid1 -m raid1", 2)
    found = sorted(places(mapped(*images), "/big"))
    for logical, disk, offset, _ in found:
        if logical == found[0][0] + 5 * SECTOR:
            spoil(images[disk], offset)
    with pytest.raises(
        ImageError,
        match=r"/big on /dev/sda: can't be read whole: bytes 0x5000-0x6000 \(no copy has the right checksum",
    ):
        cat(images, "/big")
    assert b"\x5a" * 64 not in capfdbinary.readouterr().out
    assert cat(images, "/big", "--partial") == 0
    out, err = capfdbinary.readouterr()
    assert out == BIG[: 5 * SECTOR] + bytes(SECTOR) + BIG[6 * SECTOR :]
    assert b"zeroes were written for bytes 0x5000-0x6000" in err
    with (
        mounted_pool(images, tmp_path / "mnt", "ro") as where,
        pytest.raises(OSError, match="Input/output error"),
    ):
        (where / "big").read_bytes()
    added = [word for image in images for word in ("-a", str(image))]
    (tmp_path / "out").mkdir()
    assert cli.run(["extract", "-q", "-C", str(tmp_path / "out"), *added, "/dev/sda", "/"]) == 1
    assert not (tmp_path / "out/big").exists()
    assert (tmp_path / "out/middle").read_bytes() == MIDDLE
    assert b"big: left out" in capfdbinary.readouterr().err


def test_checksums_that_cant_be_read(tmp_path: Path) -> None:
    """A leaf of the checksum tree is lost in its only copy: nobody can say whether the data is right, as no
    kernel reads it."""
    images = made(tmp_path, "-d single -m single", 1)
    bmap = mapped(*images)
    volume = pool(bmap)
    rows = [row for row in bmap.slice_of("extents", volume)[1].to_pylist() if row["part"] == "checksum tree"]
    start = np.array([row["volume_offset"] for row in rows])
    found = bmap.descend(volume, start, start + np.array([row["length"] for row in rows]))
    for low, high in zip(found.start.tolist(), found.end.tolist(), strict=True):
        spoil(images[0], low, high - low)
    with pytest.raises(ImageError, match="their checksums can't be read"):
        cat(images, "/big")


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "count", "lost"),
    [("raid5", 3, 0), ("raid5", 3, 1), ("raid6", 4, 1), ("raid6", 5, 1), ("raid6", 5, 2)],
)
def test_parity_gives_what_is_missing_or_wrong(profile: str, count: int, lost: int, tmp_path: Path) -> None:
    """Devices are missing; and as many further strips are spoiled in each row as parity can tell."""
    images = made(tmp_path, f"-d {profile} -m raid1c3", count)
    bmap = mapped(*images)
    spare = (1 if profile == "raid5" else 2) - lost
    if spare:
        for logical, disk, offset, _ in places(bmap, "/big"):
            if disk >= lost and logical // (64 << 10) % 5 == 0:  # at most one strip of a row of up to three
                spoil(images[disk], offset)
    for gone in (range(count - lost + 1) if lost else [0]) if not spare else [0]:
        left = [image for nth, image in enumerate(images) if not gone <= nth < gone + lost]
        assert extracted(left, tmp_path / f"out{gone}") == ALL


def test_too_many_devices_are_missing(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    images = made(tmp_path, "-d raid0 -m raid1", 2)
    with pytest.raises(
        ImageError,
        match=r"/big on /dev/sda: can't be read whole: bytes .* \(none of the members present holds them\)",
    ):
        cat(images[:1], "/big")
    capfdbinary.readouterr()
    assert cat(images[:1], "/big", "--partial") == 0
    out = np.frombuffer(capfdbinary.readouterr().out, np.uint8)
    true = np.frombuffer(BIG, np.uint8)
    assert len(out) == len(true)
    same = (out == true).reshape(-1, 500).all(axis=1)
    assert 0.2 < same.mean() < 0.8
    assert (out[out != true] == 0).all()


# ---- a member that was away --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["raid1", "raid5"])
@pytest.mark.parametrize("away", [0, 1])
def test_a_member_that_was_away_comes_last(profile: str, away: int, tmp_path: Path) -> None:
    """While one device was away the others were written, over the same bytes of a file without checksums as
    well: they are what counts."""
    images = made(tmp_path, f"-d {profile} -m raid1", 3 if profile == "raid5" else 2)
    old = tmp_path / "old.img"
    shutil.copyfile(images[away], old)
    need("btrfs", "btrfs-progs")
    there = [image for nth, image in enumerate(images) if nth != away]
    new = {"big": BIG[::-1], "small/n3": b"changed"} | ({"fresh": MIDDLE} if profile == "raid1" else {})
    run("btrfs", "device", "scan", "--forget")
    with mounted_pool(there, tmp_path / "mnt", "noatime,degraded") as where:
        for name, data in new.items():
            (where / name).write_bytes(data)
        if profile == "raid1":  # parts of a row this kernel does not write to a RAID5 that lacks a device
            with (where / "nosum").open("r+b") as file:
                file.write(MIDDLE)
        for _ in range(3):
            fill(where, "date > stamp; sync -f .; rm stamp; sync -f .")
    run("btrfs", "device", "scan", "--forget")
    shutil.copyfile(old, images[away])
    assert extracted(images, tmp_path / "out") == ALL | new | (
        {"nosum": MIDDLE} if profile == "raid1" else {}
    )
    codes = [row["code"] for row in mapped(*images).problems.to_pylist()]
    assert "stale" in codes


# ---- through layers ----------------------------------------------------------------------------------------


def test_an_image_inside(tmp_path: Path) -> None:
    """A disk image on the filesystem: its bytes are checked, too."""
    inner, folder = tmp_path / "inner.img", tmp_path / "tree"
    folder.mkdir()
    (folder / "inside").write_bytes(MIDDLE)
    run("truncate", "-s", "4M", inner)
    run("mke2fs", "-q", "-F", "-t", "ext2", "-d", folder, inner)
    images = make(tmp_path, "300M", "-d raid1 -m raid1", 2)
    with mounted_pool(images, tmp_path / "mnt") as where:
        shutil.copyfile(inner, where / "inner.img")
    for _, disk, offset, role in places(mapped(*images), "/inner.img"):
        if role == DATA:
            spoil(images[disk], offset)
    out = tmp_path / "out"
    out.mkdir()
    added = [word for image in images for word in ("-a", str(image))]
    options = ["--nested", "/inner.img", *added, "/dev/sda:/inner.img", "/inside"]
    assert cli.run(["extract", "-q", "-C", str(out), *options]) == 0
    assert (out / "inside").read_bytes() == MIDDLE


def test_what_fsync_wrote_is_checked_by_the_log(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Copies taken while mounted, after an fsync: the checksums of the new file's data lie in the log
    tree."""
    images = make(tmp_path, "300M", "-d raid1 -m raid1", 2)
    copies = [tmp_path / f"copy{number}.img" for number in range(2)]
    with mounted_pool(images, tmp_path / "mnt", "commit=300") as where:
        # a chunk that were allocated with the file would force a commit
        (where / "before").write_bytes(BIG * 4)
        fill(where, "sync -f .")
        with (where / "logged").open("wb") as file:
            file.write(BIG)
            file.flush()
            os.fsync(file.fileno())
        for image, copy in zip(images, copies, strict=True):
            run("cp", "--sparse=always", image, copy)
    bmap = mapped(*copies)
    assert bmap.filesystems.column("state").to_pylist() == ["recovered"]
    for _, disk, offset, role in places(bmap, "/logged"):
        if role == DATA:
            spoil(copies[disk], offset)
    assert read(copies, "/logged", capfdbinary) == BIG
