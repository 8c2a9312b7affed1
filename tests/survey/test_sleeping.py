"""A machine that sleeps in a file: its filesystems look clean, but nothing of its disks may be given back.

Swap files made by mkswap on real filesystems.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_lvm import loops

import ntfs_images
from ntfs_images import fuse
from support import mapped, mounted, need, run
from virt_bmap.ask.space import free_space, traits_of
from virt_bmap.cli import run as bmap
from virt_bmap.model import tables
from virt_bmap.survey import sleeping

MIB = 1 << 20
MARK = b"S1SUSPEND\0"


def swap_file(path: Path, mark: bytes | None = MARK, page: int = 4096, size: int = 2 * MIB) -> Path:
    """What mkswap makes of a file without holes, and what the kernel's mark_swapfiles writes over its
    signature."""
    need("mkswap", "util-linux")
    path.write_bytes(np.random.default_rng(page).bytes(size))
    path.chmod(0o600)
    run("mkswap", "-p", str(page), path)
    assert path.read_bytes()[page - 10 : page] == b"SWAPSPACE2"
    with path.open("r+b") as file:
        file.seek(1536)
        # where no bad page is listed: mke2fs makes holes of blocks of zeroes
        file.write(bytes([7]) * (page - 10 - 1536))
        file.write(mark or b"")
    return path


def ext4(image: Path, folder: Path) -> None:
    run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", folder, image, "16M")


def xfs(image: Path, folder: Path) -> None:
    need("mkfs.xfs", "xfsprogs")
    run("truncate", "-s", "300M", image)
    run("mkfs.xfs", "-q", image)
    with mounted(image) as root:
        copied(folder, root)


def btrfs(image: Path, folder: Path) -> None:
    need("mkfs.btrfs", "btrfs-progs")
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", "--rootdir", folder, image)


def f2fs(image: Path, folder: Path) -> None:
    need("sload.f2fs", "f2fs-tools")
    run("truncate", "-s", "128M", image)
    run("mkfs.f2fs", "-q", image)
    run("sload.f2fs", "-f", folder, image, ok=(0, 1))


def vfat(image: Path, folder: Path) -> None:
    need("mcopy", "mtools")
    run("mkfs.vfat", "-C", image, str(32 << 10))
    run("mcopy", "-s", "-i", image, *sorted(folder.iterdir()), "::/")


def exfat(image: Path, folder: Path) -> None:
    need("mkfs.exfat", "exfatprogs"), need("mount.exfat-fuse", "exfat-fuse")
    run("truncate", "-s", "32M", image)
    run("mkfs.exfat", image)
    with mounted(image, kind="exfat-fuse") as root:
        copied(folder, root)


def ntfs(image: Path, folder: Path) -> None:
    need("mkntfs", "ntfs-3g")
    run("truncate", "-s", "32M", image)
    run("mkntfs", "-F", "-Q", image)
    with fuse(image, "rw") as root:
        copied(folder, root)


def copied(folder: Path, root: Path) -> None:
    for path in folder.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    run("sync", "-f", root)


@pytest.mark.parametrize("make", [ext4, xfs, btrfs, f2fs, vfat, exfat, ntfs])
def test_a_swap_file(
    make: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, mark in (("awake", None), ("asleep", MARK)):
        folder, image = tmp_path / f"files-{name}", tmp_path / f"{name}.img"
        folder.mkdir()
        swap_file(folder / "swapfile", mark)
        (folder / "large").write_bytes(np.random.default_rng(2).bytes(3 * MIB))
        make(image, folder)
        found = mapped(image)
        number = found.filesystems.column("volume")[0].as_py()
        assert bool(traits_of(found)[number] & tables.SLEEPING) == bool(mark)
        assert bool(len(free_space(found, 0).all()[0])) == (not mark)
        before = image.read_bytes()
        assert bmap(["sparsify", "-q", "--in-place", str(image)]) == 0
        said = capsys.readouterr().err
        assert ("the machine sleeps" in said) == bool(mark)
        if mark:
            assert "/swapfile holds the memory of a machine that sleeps" in said
            assert image.read_bytes() == before
            assert bmap(["dump", "-q", "--skip-free", str(image), "/dev/sda", str(tmp_path / "out")]) == 0
            assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize("page", [4096, 8192, 16384, 65536])
@pytest.mark.parametrize("mark", [b"S1SUSPEND\0", b"LINHIB0001"])
def test_pages_and_marks(page: int, mark: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    swap_file(folder / "any name", mark, page)
    ext4(tmp_path / "image", folder)
    assert traits_of(mapped(tmp_path / "image")).tolist() == [tables.SLEEPING]


def test_on_every_layer(tmp_path: Path) -> None:
    """In a logical volume: the other filesystems of the machine stay as they are, too."""
    need("vgcreate", "lvm2")
    folder, image = tmp_path / "files", tmp_path / "pv.img"
    folder.mkdir()
    swap_file(folder / "swap.img")
    run("truncate", "-s", "64M", image)
    with loops(image) as (devices, options):
        run("pvcreate", *options[:2], devices[0])
        run("vgcreate", *options, "-s", "1M", "vg", devices[0])
        for name in ("root", "home"):
            run("lvcreate", *options, "-an", "-Zn", "-Wn", "vg", "-n", name, "-L", "20M")
    (folder / "empty").mkdir()
    ext4(tmp_path / "root", folder)
    ext4(tmp_path / "home", folder / "empty")
    with image.open("r+b") as file:
        for at, name in enumerate(("root", "home")):
            file.seek(MIB + at * 20 * MIB)
            file.write((tmp_path / name).read_bytes())
    found = mapped(image)
    space = free_space(found, 0)
    names = found.volumes.column("name").to_pylist()
    assert {names[number] for number in space.left} == {"/dev/sda", "/dev/vg/root", "/dev/vg/home"}
    assert all("/dev/vg/root is hibernated" in reason for reason in space.left.values())


def test_in_a_disk_inside_a_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, outer = tmp_path / "files", tmp_path / "outer"
    folder.mkdir(), outer.mkdir()
    swap_file(folder / "swapfile")
    ext4(outer / "vm.img", folder)
    run("mke2fs", "-q", "-t", "ext4", "-d", outer, tmp_path / "image", "48M")
    assert (
        bmap(
            [
                "dump",
                "-q",
                "--skip-free",
                "--nested",
                "all",
                str(tmp_path / "image"),
                "/dev/sda:/vm.img",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "the machine sleeps" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == (outer / "vm.img").read_bytes()


def test_what_is_no_swap_file(tmp_path: Path) -> None:
    """A file with holes, a small one: nobody sleeps in these."""
    folder = tmp_path / "files"
    folder.mkdir()
    swap_file(folder / "small", size=512 << 10)
    with (folder / "holes").open("wb") as file:
        file.write(bytes(4086) + MARK)
        file.truncate(4 * MIB)
    ext4(tmp_path / "image", folder)
    assert traits_of(mapped(tmp_path / "image")).tolist() == [0]


def test_more_large_files_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of whole pages come first, as swap files are made."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        (folder / f"photo{number}").write_bytes(bytes([1]) * (2 * MIB + 1001 * number + 1))
    swap_file(folder / "swapfile", size=MIB)
    ext4(tmp_path / "image", folder)
    monkeypatch.setattr(sleeping, "MOST", 1)
    assert traits_of(mapped(tmp_path / "image")).tolist() == [tables.SLEEPING]


# ---- swap partitions and Windows ---------------------------------------------------------------------------


def test_a_swap_space_whose_header_is_not_mkswaps(tmp_path: Path) -> None:
    image = swap_file(tmp_path / "swap")
    with image.open("r+b") as file:
        file.seek(1024)
        file.write(struct.pack("<I", 9))
    found = mapped(image)
    assert traits_of(found).tolist() == [tables.SLEEPING]
    assert found.filesystems.column("state").to_pylist() == ["hibernated"]


def test_a_partition_that_begins_with_a_mark(tmp_path: Path) -> None:
    """As TuxOnIce leaves it: known by its magic alone."""
    image = tmp_path / "image"
    image.write_bytes(b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c".ljust(MIB, b"\1"))
    assert traits_of(mapped(image)).tolist() == [tables.SLEEPING]


@pytest.mark.parametrize(
    ("name", "content", "asleep"),
    [
        ("hiberfil.sys", b"hibr", True),
        ("HIBERFIL.SYS", b"HIBR", True),
        ("hiberfil.sys", b"wake", False),
        ("backup.sys", b"hibr", False),
    ],
)
def test_windows_on_fat(name: str, content: bytes, asleep: bool, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(content.ljust(2 * MIB, b"\1"))
    vfat(tmp_path / "image", folder)
    assert bool(traits_of(mapped(tmp_path / "image"))[0] & tables.SLEEPING) == asleep


def test_windows_on_a_damaged_volume(tmp_path: Path) -> None:
    """What sleeps there has other volumes open, whatever is wrong with this one."""
    need("mkntfs", "ntfs-3g")
    made = ntfs_images.make(tmp_path / "image", 4, 4096, 512)
    with fuse(made.image, "rw") as root:
        (root / "hiberfil.sys").write_bytes(b"hibr".ljust(5000, b"\0"))
        (root / "other").write_bytes(b"words")
    found = mapped(made.image)
    inode = dict(
        zip(found.names.column("name").to_pylist(), found.names.column("inode").to_pylist(), strict=True)
    )[b"other"]
    row = found.inodes.column("inode").to_pylist().index(inode)
    with open(made.image, "r+b") as file:
        file.seek(found.inodes.column("record_offset")[row].as_py() + 510)
        file.write(b"\xff\xfe")
    found = mapped(made.image)
    assert found.filesystems.column("state").to_pylist() == ["damaged"]
    assert traits_of(found).tolist() == [tables.SLEEPING]
