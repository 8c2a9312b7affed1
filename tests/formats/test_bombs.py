"""Small files that claim to be giants, by holes and by tables that lie over each other: memory and time
follow what is stored."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import recipes
from support import need, run
from virt_bmap.core.arrays import PAIRS, Intervals
from virt_bmap.core.checksums import crc32c
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.mapped import MappedReader, Patch, PatchedReader
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.core.reader import BytesReader
from virt_bmap.core.stored import CLAIM_FREE, afford, stored_bytes
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.maps import load

MEMORY, SECONDS = 1 << 30, 10


LIMITED = (
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    "sys.argv[0] = 'virt-bmap'; "
    "runpy.run_module('virt_bmap', run_name='__main__')"
)
MEASURE = (
    "import os, sys; pid = os.posix_spawn(sys.executable, [sys.executable, '-c', *sys.argv[1:]], "
    "os.environ); "
    "used = os.wait4(pid, 0)[2]; print(used.ru_maxrss, used.ru_utime + used.ru_stime)"
)
"""A process in between: the kernel counts what a program's parent had in memory when it started it, and that
is all that the tests before took."""


def cost(*words: object) -> tuple[int, float, str]:
    """(peak memory in bytes, seconds of processor time, standard error) of a command; it ends well or in one
    line."""
    command = [sys.executable, "-I", "-c", MEASURE, LIMITED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "not enough memory" not in done.stderr
    memory, seconds = done.stdout.split()[-2:]
    return int(memory) << 10, float(seconds), done.stderr


def grown(path: Path, size: int) -> Path:
    with open(path, "r+b") as file:
        try:
            file.truncate(size)
        except OSError:
            pytest.skip(f"this folder's filesystem has no files of {size} bytes")
    return path


def ext4(folder: Path, blocks: int, per_group: int, inodes: int, size: int) -> Path:
    """A small ext4 whose superblock, its checksum right, claims a giant."""
    need("mke2fs", "e2fsprogs")
    path = folder / "ext4.img"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-N", "256", "-O", "^has_journal", path, "4M")
    with open(path, "r+b") as file:
        file.seek(1024)
        found = bytearray(file.read(1024))
        struct.pack_into("<I", found, 4, blocks & 0xFFFFFFFF)
        struct.pack_into("<I", found, 0x150, blocks >> 32)
        struct.pack_into("<III", found, 0x20, per_group, per_group, inodes)
        struct.pack_into(
            "<I",
            found,
            0x3FC,
            int(crc32c(np.frombuffer(bytes(found[:0x3FC]), np.uint8)[None, :], 0xFFFFFFFF)[0]),
        )
        file.seek(1024)
        file.write(found)
    return grown(path, size)


def xfs(folder: Path) -> Path:
    need("mkfs.xfs", "xfsprogs")
    path = folder / "xfs.img"
    path.touch()
    grown(path, 300 << 20)
    run("mkfs.xfs", "-q", "-f", path)
    with open(path, "r+b") as file:
        found = bytearray(file.read(512))
        blocks = struct.unpack_from(">I", found, 84)[0]
        struct.pack_into(">Q", found, 8, blocks << 20)
        struct.pack_into(">I", found, 88, 1 << 20)
        file.seek(0)
        file.write(found)
    return grown(path, 1 << 42)


def iso(folder: Path) -> Path:
    need("genisoimage", "genisoimage")
    (folder / "tree").mkdir()
    (folder / "tree/file").write_bytes(b"x")
    path = folder / "iso.img"
    run("genisoimage", "-quiet", "-o", path, folder / "tree")
    with open(path, "r+b") as file:
        for at, number in ((80, 0xFFFFFFF0), (156 + 10, 0xFFFFF800)):
            file.seek(0x8000 + at)
            file.write(struct.pack("<I", number) + struct.pack(">I", number))
    return grown(path, 1 << 43)


def raid0(folder: Path) -> list[Path]:
    """Three members of an array of 1.5 EiB, each a superblock in a hole."""
    need("mke2fs", "e2fsprogs")
    disks = recipes.make("md-raid5", folder).disks
    for path in disks:
        with open(path, "r+b") as file:
            file.seek(4096)
            head = bytearray(file.read(256 + 2 * len(disks)))
            assert head[:4] == b"\xfc\x4e\x2b\xa9"
            struct.pack_into("<i", head, 0x48, 0)
            struct.pack_into("<QI", head, 0x50, 1 << 43, 1)
            struct.pack_into("<Q", head, 0x88, 1 << 43)
            head[0xD8:0xDC] = bytes(4)
            words = np.frombuffer(bytes(head).ljust(-(-len(head) // 4) * 4, b"\0"), "<u4")
            total = int(words.astype(np.uint64).sum())
            struct.pack_into("<I", head, 0xD8, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
            file.seek(4096)
            file.write(head)
        grown(path, 1 << 43)
    return disks


BOMBS: dict[str, Callable[[Path], Path]] = {
    "ext4: 2^30 groups": lambda folder: ext4(folder, 1 << 33, 8, 8, 1 << 43),
    "ext4: 2^24 groups": lambda folder: ext4(folder, 1 << 32, 256, 8, 1 << 42),
    "ext4: 4 TiB of groups that are zero": lambda folder: ext4(folder, (1 << 32) - 1, 8192, 8192, 1 << 42),
    "xfs: 2^20 groups": xfs,
    "iso: a directory of 4 GiB": iso,
}


@pytest.mark.parametrize("name", BOMBS)
def test_holes_cost_nothing(name: str, tmp_path: Path) -> None:
    path = BOMBS[name](tmp_path)
    memory, seconds, said = cost("map", "-q", "--format", "raw", "-o", "/dev/null", path)
    assert memory < MEMORY, said
    assert seconds < SECONDS, said


def test_an_array_of_holes_costs_nothing(tmp_path: Path) -> None:
    """What no kernel is asked for: members as large as a file may be, of an array that is larger still."""
    out = tmp_path / "map.parquet"
    memory, seconds, said = cost("map", "-o", out, *raid0(tmp_path))
    (array,) = [row for row in load(str(out)).volumes.to_pylist() if row["name"] == "/dev/md127"]
    assert array["size"] == 3 << 52
    assert "checksum" not in said
    assert memory < MEMORY, said
    assert seconds < SECONDS, said


def test_an_image_of_holes_costs_nothing(tmp_path: Path) -> None:
    """The same behind QEMU, of whose image only the file is known."""
    need("qemu-img", "qemu-utils")
    need("qemu-nbd", "qemu-utils")
    path = ext4(tmp_path, 1 << 32, 256, 8, 1 << 42)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, tmp_path / "d.qcow2")
    memory, seconds, said = cost("map", "-q", "-o", "/dev/null", tmp_path / "d.qcow2")
    assert memory < MEMORY, said
    assert seconds < SECONDS, said


def test_an_honest_giant_is_mapped(tmp_path: Path) -> None:
    """16 TiB of ext4, 40 MiB of it stored: nothing of it is refused."""
    need("mke2fs", "e2fsprogs")
    path = tmp_path / "giant.img"
    path.touch()
    grown(path, (16 << 40) - (1 << 30))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", path)
    memory, _, said = cost("check", path)
    assert "holes" not in said
    assert memory < MEMORY


def test_the_past_of_an_honest_giant(tmp_path: Path) -> None:
    """Whose was this free byte? Two thousand million inodes are unused, and of nearly all the table is a
    hole."""
    need("mke2fs", "e2fsprogs")
    path = tmp_path / "giant.img"
    path.touch()
    grown(path, 8 << 40)
    run(
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^extent,^64bit",
        "-i",
        "4096",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        path,
    )
    memory, seconds, said = cost("explain", path, (7 << 40) + (1 << 30))
    assert memory < MEMORY, said
    assert seconds < SECONDS, said


def test_what_is_stored_is_known_through_layers(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"x" * 65536)
    disk = RawReader(str(path))
    # the same bytes, again and again
    thousand = Rows.of([Row(at << 30, 0, 1 << 30, 65536) for at in range(1000)], 1)
    volume = MappedReader(1 << 40, "volume", {0: disk}, thousand)
    assert stored_bytes(disk) == stored_bytes(volume) == 65536
    afford(volume, CLAIM_FREE, "little")
    with pytest.raises(
        Corrupt,
        match=r"tables would take .* bytes, but only 65,536 are stored: they lie in holes, or over",
    ):
        afford(volume, CLAIM_FREE + 5 * 65536, "tables")
    with pytest.raises(Corrupt, match="what is read together would take"):
        volume.read(0, 2 * CLAIM_FREE)
    disk.close()
    memory = BytesReader(np.zeros(4096, np.uint8), "memory")
    assert stored_bytes(memory) == 4096
    patched = PatchedReader(volume, Patch(np.array([0]), np.zeros((1, 512), np.uint8)))
    assert stored_bytes(patched) == 65536


def test_a_square_of_pairs_is_refused() -> None:
    n = 1 << 14
    everything = Intervals(np.zeros(n, np.int64), np.full(n, 100))
    with pytest.raises(Corrupt, match="unless metadata overlaps"):
        everything.overlaps(np.zeros(n, np.int64), np.full(n, 100))
    assert len(everything.overlaps(np.zeros(8), np.full(8, 100))[0]) == 8 * n < PAIRS


def test_stripes_are_not_unrolled_for_ever() -> None:
    rows = Rows.of([Row(0, 0, 0, 1, 1 << 40, 2, 2)], 1)
    with pytest.raises(Corrupt, match="stripes"):
        rows.down(np.array([0]), np.array([1 << 41]))
