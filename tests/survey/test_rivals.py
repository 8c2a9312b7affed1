"""A superblock and a partition table on one disk: which is believed, and that both are said."""

import os
import struct
from functools import partial
from pathlib import Path

import pytest

from recipes.volumes import RECIPES
from support import mapped, need, need_root, run
from virt_bmap import cli

MIB = 1 << 20
SIZE = 64 * MIB
PLACE_90 = SIZE - 65536


def partitioned(path: Path, *partitions: str) -> Path:
    need("sfdisk", "fdisk")
    with open(path, "ab") as file:
        file.truncate(SIZE)
    script = "\n".join(["label: dos", *partitions, ""]).encode()
    run("sfdisk", "-q", "--wipe", "never", path, stdin=script)
    return path


def add_table(path: Path) -> None:
    """A table with one partition, on a disk of whatever size, of which nothing else is changed."""
    script = b"label: dos\nstart=2048,size=65536\n"
    run(need("sfdisk", "fdisk"), "-q", "--no-tell-kernel", "--wipe", "never", path, stdin=script)


def put(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def ext4(path: Path, at: int, size: str) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={at}", path, size)


def mirror_90(size: int) -> bytes:
    """A superblock 0.90 of the first of two members, each used up to `size`: md_p.h."""
    block = bytearray(4096)
    struct.pack_into("<4I", block, 0, 0xA92B4EFC, 0, 90, 0)
    struct.pack_into("<I", block, 0x14, 0x1234)
    struct.pack_into("<i5I", block, 0x1C, 1, size // 1024, 2, 2, 0, 0)
    struct.pack_into("<3I", block, 0x34, 1, 2, 3)
    struct.pack_into("<I", block, 0x84, 1)
    struct.pack_into("<2I", block, 0x9C, 7, 0)
    for disk in range(2):
        struct.pack_into("<5I", block, 0x200 + disk * 128, disk, 8, disk * 16, disk, 6)
    struct.pack_into("<5I", block, 0xF80, 0, 8, 0, 0, 6)
    total = sum(struct.unpack("<1024I", block))
    struct.pack_into("<I", block, 0x98, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    return bytes(block)


def mirror_12(path: Path, data_offset: int, size: int) -> None:
    """A superblock 1.2 of the only member that is left of a mirror: md_p.h."""
    head = bytearray(256 + 4)
    struct.pack_into("<II", head, 0, 0xA92B4EFC, 1)
    head[0x10:0x25] = b"0123456789abcdefhost:"
    struct.pack_into("<iIQII", head, 0x48, 1, 0, size // 512, 0, 2)
    struct.pack_into("<QQQ", head, 0x80, data_offset // 512, size // 512, 8)
    struct.pack_into("<QQ", head, 0xC8, 7, 2**64 - 1)
    struct.pack_into("<I2H", head, 0xDC, 2, 0, 1)
    struct.pack_into("<2H", head, 0x100, 0, 1)
    total = sum(struct.unpack("<65I", head))
    struct.pack_into("<I", head, 0xD8, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    put(path, 4096, bytes(head))


def examined(path: Path) -> None:
    """What mdadm reads of a member: our own superblocks are none unless it takes them."""
    need("mdadm", "mdadm")
    words = run("mdadm", "--examine", path).decode()
    assert "correct" in words.partition("Checksum")[2].splitlines()[0]


def found(path: Path) -> tuple[list[str], list[str | None], list[str]]:
    """Names and types of all volumes, and the codes of what is said of the disk."""
    bmap = mapped(path)
    said = [row["code"] for row in bmap.problems.to_pylist() if row["volume"] == 0]
    names, types = bmap.volumes.column("name").to_pylist(), bmap.volumes.column("type").to_pylist()
    return names, types, said


def test_at_the_end_of_the_disk_and_of_its_last_partition(tmp_path):
    """The place is the same, counted from either; the array is as large as the partition."""
    path = partitioned(tmp_path / "disk", "start=2048,size=32768", "start=34816,type=fd")
    ext4(path, 17 * MIB, f"{(47 * MIB - 65536) // 1024}k")
    put(path, PLACE_90, mirror_90(47 * MIB - 65536))
    examined(path)
    names, types, said = found(path)
    assert names == ["/dev/sda", "/dev/sda1", "/dev/sda2", "/dev/md127"]
    assert types == ["dos", None, "linux_raid_member", "ext4"]
    assert said == ["leftover"]


def test_a_mirror_of_whole_disks_holds_the_table(tmp_path):
    path = partitioned(tmp_path / "disk", "start=2048,size=32768", "start=34816,size=65536")
    ext4(path, 17 * MIB, "32M")
    put(path, PLACE_90, mirror_90(PLACE_90))
    examined(path)
    names, types, said = found(path)
    assert names == ["/dev/sda", "/dev/md127", "/dev/md127p1", "/dev/md127p2"]
    assert types == ["linux_raid_member", "dos", None, "ext4"]
    assert said == []


def test_partitions_that_go_on_behind_a_mirror_are_younger(tmp_path):
    path = partitioned(tmp_path / "disk", "start=2048,size=32768", "start=34816,size=65536")
    ext4(path, 17 * MIB, "32M")
    put(path, PLACE_90, mirror_90(40 * MIB))
    examined(path)
    assert found(path) == (
        ["/dev/sda", "/dev/sda1", "/dev/sda2"],
        ["dos", None, "ext4"],
        ["leftover"],
    )


@pytest.mark.parametrize("is_array", [False, True])
def test_an_array_behind_the_table(is_array, tmp_path):
    """What begins where the array does, or where a partition does, was there last."""
    path = partitioned(tmp_path / "disk", "start=2048,size=16384", "start=32768,size=65536")
    mirror_12(path, 4 * MIB, 32 * MIB)
    ext4(path, 4 * MIB if is_array else 16 * MIB, "32M")
    examined(path)
    names, types, said = found(path)
    assert said == ["leftover"]
    if is_array:
        assert names == ["/dev/sda", "/dev/md127"]
        assert types == ["linux_raid_member", "ext4"]
    else:
        assert names == ["/dev/sda", "/dev/sda1", "/dev/sda2"]
        assert types == ["dos", None, "ext4"]


def swap(path: Path) -> None:
    run(need("mkswap", "util-linux"), "-q", path)


def whole_ext4(path: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", path)


def xfs(path: Path) -> None:
    os.truncate(path, 320 * MIB)
    run(need("mkfs.xfs", "xfsprogs"), "-q", "-f", path)


def f2fs(path: Path) -> None:
    run(need("mkfs.f2fs", "f2fs-tools"), "-q", path)


def ntfs(path: Path) -> None:
    run(need("mkntfs", "ntfs-3g"), "-F", "-q", path)


def fat(path: Path) -> None:
    run(need("mkfs.vfat", "dosfstools"), path)


def luks(version: int, path: Path) -> None:
    words = ["--type", f"luks{version}", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    run(need("cryptsetup", "cryptsetup-bin"), "luksFormat", "-q", *words, path, "-", stdin=b"secret")


def bitlocker(path: Path) -> None:
    (image,) = RECIPES["bitlocker"](path.parent).disks
    put(path, 0, image.read_bytes())


STALE = {
    "ext4": whole_ext4, "xfs": xfs, "swap": swap, "f2fs": f2fs, "ntfs": ntfs, "vfat": fat,
    "crypto_LUKS": partial(luks, 2), "BitLocker": bitlocker,
}  # fmt: skip
ENCRYPTED = ("crypto_LUKS", "BitLocker")
UNSEEN = ("vfat",)
"""Its superblock is the sector that became the table."""


@pytest.mark.parametrize("name", STALE)
def test_a_superblock_that_outlived_a_table(name, tmp_path):
    """Until something lies in a partition nothing tells whether an encrypted volume is older than the table;
    filesystems are: who makes one clears the first sector. Both are there, says wipefs."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    STALE[name](path)
    size = path.stat().st_size
    run(
        "sfdisk",
        "-q",
        "--no-tell-kernel",
        "--wipe",
        "never",
        path,
        stdin=b"label: dos\nstart=2048,size=65536\n",
    )
    there = run("wipefs", "--noheadings", "--output", "TYPE", path).decode().split()
    assert name in there
    assert "dos" in there or name in UNSEEN
    names, types, said = found(path)
    if name in ENCRYPTED:
        assert (types[0], said.count("leftover")) == (name, 1)
    else:
        assert (names, types) == (["/dev/sda", "/dev/sda1"], ["dos", None])
        assert said == ([] if name in UNSEEN else ["leftover"])
    ext4(path, MIB, "32M")
    assert path.stat().st_size == size
    assert found(path)[:2] == (["/dev/sda", "/dev/sda1"], ["dos", "ext4"])
    assert found(path)[2] == ([] if name in UNSEEN else ["leftover"])


def test_what_a_doubted_superblock_calls_free_is_kept(tmp_path, capfd):
    """A pool that may be older than the table beside it: in the partitions may lie what nobody here knows."""
    need("mkfs.btrfs", "btrfs-progs")
    path = tmp_path / "disk"
    path.write_bytes(bytes(2 * SIZE))
    run("mkfs.btrfs", "-q", path)
    add_table(path)
    put(path, 32 * MIB, b"what nobody knows" * 1000)
    before = path.read_bytes()
    assert cli.run(["sparsify", "-q", "--in-place", str(path)]) == 0
    assert path.read_bytes() == before
    assert "has a problem: leftover" in capfd.readouterr().err


def test_a_filesystem_in_a_partition_that_begins_with_the_disk_is_no_leftover(tmp_path):
    """As Sun's first slice does, and mkfs.fat's own table."""
    need("sfdisk", "fdisk"), need("mkfs.vfat", "dosfstools")
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    run("sfdisk", "-q", "--no-tell-kernel", path, stdin=b"label: sun\nstart=0,size=64260,type=83\n")
    label = path.read_bytes()[:512]
    run("mke2fs", "-q", "-F", "-t", "ext4", path, "31M")
    put(path, 0, label)
    assert found(path)[1:] == (["sun", "ext4"], [])
    path.write_bytes(bytes(SIZE))
    run("mkfs.vfat", "--mbr=y", path)
    assert found(path)[1:] == (["vfat"], [])


def test_lvm_takes_no_disk_that_has_partitions(tmp_path):
    need_root()
    need("pvcreate", "lvm2")
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    loop = run("losetup", "--find", "--show", path).decode().strip()
    try:
        run("pvcreate", "-y", "--driverloaded", "n", loop)
    finally:
        run("losetup", "--detach", loop)
    assert found(path) == (["/dev/sda"], ["LVM2_member"], [])
    partitioned(path, "start=2048,size=65536")
    assert found(path) == (["/dev/sda", "/dev/sda1"], ["dos", None], ["leftover"])


def test_btrfs_that_was_forgotten_in_front_of_the_first_partition(tmp_path):
    need("mkfs.btrfs", "btrfs-progs")
    path = tmp_path / "disk"
    path.write_bytes(bytes(2 * SIZE))
    run("mkfs.btrfs", "-q", path)
    partitioned(path, "start=2048,size=65536")
    assert found(path)[1][0] == "btrfs"  # nothing tells that the table is younger
    ext4(path, MIB, "32M")
    assert found(path) == (["/dev/sda", "/dev/sda1"], ["dos", "ext4"], ["leftover"])


def test_clones_that_are_files_of_one_disk_are_machines_of_their_own(tmp_path, capfd):
    """Both say that they are the same member of the same array; what lies in them differs."""
    images = tmp_path / "images"
    images.mkdir()
    for number in (1, 2):
        source, image = tmp_path / f"source{number}", images / f"g{number}.raw"
        source.mkdir()
        (source / "f").write_text(f"guest {number}")
        image.write_bytes(bytes(40 * MIB))
        mirror_12(image, 4 * MIB, 32 * MIB)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", source, "-E", f"offset={4 * MIB}", image, "32M")
        examined(image)
    host = tmp_path / "host"
    with open(host, "wb") as file:
        file.truncate(200 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", images, host)
    for number in (1, 2):
        device = f"/dev/sda:/g{number}.raw:/dev/md127"
        assert cli.run(["cat", "--nested", "/g1.raw", "--nested", "/g2.raw", str(host), device, "/f"]) == 0
        assert capfd.readouterr().out == f"guest {number}"
