"""Every format grown by holes: numbers that say how large a disk is raised, alone and together, checksums
right again. Memory and time follow what is stored.

Honest giants, as the formats' own tools make them, are mapped and proven all the same.
"""

import ctypes
import gc
import os
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from tools.fuzz import growth
from tools.fuzz.disk import scratch
from tools.fuzz.images import Image
from tools.fuzz.seeds import Seed

import recipes
from recipes.made import blank
from recipes.volumes import LINEAR, write_lvm_text
from support import need, run
from virt_bmap.ask.check import PROVEN, check
from virt_bmap.core.errors import BmapError
from virt_bmap.model import tables
from virt_bmap.open.disks import Disks
from virt_bmap.open.host import open_host
from virt_bmap.survey import maps
from virt_bmap.survey.survey import survey_host

MEMORY, SECONDS = 1 << 30, 10
ADDRESS_SPACE = 6 << 30
POWERS = (12, 20, 34)
"""By which whole disks grow: into sizes where all tables are still built, where some are, and beyond all that
can be."""
ALONE, FEW = (20, 62), 12
"""By which numbers alone grow, and of how many."""


class Cost(NamedTuple):
    memory: int
    """Bytes beyond what the process had at its start, which is what earlier tests left in it."""
    seconds: float
    said: str


def cost(of: Callable[[], str]) -> Cost:
    """What a call takes in a process of its own; what it returns, or the line it ends with.

    Any other end fails.
    """
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the child could use again would not be counted
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        said = "died"
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CPU, (6 * SECONDS, 6 * SECONDS))
            try:
                said = of()
            except BmapError as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"fault: {error!r}"
            os.write(write, f"{before}\n{said[:4000]}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    _, status, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    if status:
        return Cost(used.ru_maxrss << 10, seconds, f"fault: status {status}")
    before, said = data.decode().split("\n", 1)
    return Cost((used.ru_maxrss << 10) - int(before), seconds, said)


def assert_small(found: Cost, what: object) -> None:
    assert not found.said.startswith("fault"), (what, found)
    assert "\n" not in found.said, (what, found)
    assert found.memory < MEMORY, (what, found)
    assert found.seconds < SECONDS, (what, found)


# ---- grown by holes ----------------------------------------------------------------------------------------


@pytest.fixture
def work() -> Iterator[Path]:
    """In memory: files of any size, which filesystems on disks do not have."""
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        yield Path(folder)


FAMILIES = {name.split("-")[0]: name for name in reversed(recipes.RECIPES)}
"""The first recipe of each format."""


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_costs_nothing(family: str, tmp_path: Path, work: Path) -> None:
    try:
        paths = tuple(recipes.make(FAMILIES[family], tmp_path).disks)
    except recipes.Left as reason:
        pytest.skip(str(reason))
    image = Image(Seed(family, paths, paths[0].suffix != ".img"), work)

    def mapped() -> str:
        with image.opened() as (bmap, _):
            check(bmap)
            return f"{bmap.extents.num_rows} extents"

    try:
        assert not cost(mapped).said.startswith(("refused", "fault"))
        for power in POWERS:
            growth.grow_by(image.disks, power, image.fields)
            image.sealer.seal()
            assert_small(cost(mapped), power)
            image.restore()
        for field in image.fields[:FEW]:
            for power in ALONE:
                growth.grow_by(image.disks, POWERS[-1], [field], power)
                image.sealer.seal()
                assert_small(cost(mapped), (field, power))
                image.restore()
    finally:
        image.close()


# ---- tables in holes ---------------------------------------------------------------------------------------


def patched(path: Path, size: int, *fields: tuple[int, str, int]) -> Path:
    """A disk grown by a hole to `size`, with these numbers, (offset, format, value), written."""
    with open(path, "r+b") as file:
        file.truncate(size)
        for at, format, value in fields:
            file.seek(at)
            file.write(struct.pack(format, value))
    return path


def fat32(folder: Path) -> Path:
    """2^28 clusters, their FAT of 1 GiB in a hole."""
    (path,) = recipes.make("fat32", folder).disks
    return patched(path, 1 << 42, (0x0D, "B", 16), (0x20, "<I", 0xFFFFFFFF), (0x24, "<I", 1 << 21))


def exfat(folder: Path) -> Path:
    """2^32 clusters, their FAT of 16 GiB in a hole."""
    (path,) = recipes.make("exfat", folder).disks
    return patched(
        path,
        1 << 45,
        (72, "<Q", 1 << 36),
        (84, "<I", 1 << 25),
        (88, "<I", (1 << 25) + 4096),
        (92, "<I", 0xFFFFFFF5),
    )


def vdi(folder: Path) -> Path:
    """12 M blocks, whose pointers are zeroes: all of them the first."""
    (path,) = recipes.make("vdi", folder).disks
    return patched(path, 1 << 32, (0x170, "<Q", 12 << 40), (0x180, "<I", 12 << 20))


def vhd(folder: Path) -> Path:
    (path,) = recipes.make("vhd", folder).disks
    return patched(path, 1 << 32, (512 + 28, ">I", 15 << 20))


TABLES = {"fat32": fat32, "exfat": exfat, "vdi": vdi, "vhd": vhd}


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_holes_cost_nothing(name: str, work: Path) -> None:
    try:
        path = str(TABLES[name](work))
    except recipes.Left as reason:
        pytest.skip(str(reason))

    def mapped() -> str:
        if not path.endswith(".img"):
            with open_host([path]) as host:
                return f"{survey_host(host)[0].extents.num_rows} extents"
        with maps.opened(Disks([path], format="raw")) as (bmap, _):
            check(bmap)
            return f"{bmap.extents.num_rows} extents"

    found = cost(mapped)
    assert_small(found, name)
    assert found.memory < MEMORY // 2  # what lies in a hole makes no rows


def test_one_extent_is_no_thousand_filesystems(tmp_path: Path) -> None:
    """Volumes of one text that all lie on the same extents are not read again and again."""
    try:
        (disk,) = recipes.make("lvm-thin", tmp_path).disks
    except recipes.Left as reason:
        pytest.skip(str(reason))
    text = disk.read_bytes()[4096 + 512 :].split(b"\0")[0].decode()
    volumes = [
        LINEAR.format(name=f"lv{n}", id=f"{n:032d}", visible=', "VISIBLE"', count=4, at=0) for n in range(300)
    ]
    head, _, _ = text.partition("logical_volumes")
    write_lvm_text(disk, (head + "logical_volumes {\n" + "\n".join(volumes) + "\n} }").encode())
    with maps.opened(Disks([str(disk)], format="raw")) as (bmap, _):
        assert bmap.volumes.column("name").to_pylist() == ["/dev/sda", "/dev/my-vg/lv0"]
        (words,) = [row["detail"] for row in bmap.problems.to_pylist() if row["code"] == "two-owners"]
        assert words.startswith("299 logical volumes of my-vg can't be read: ")


# ---- honest giants -----------------------------------------------------------------------------------------

GIANTS: dict[str, tuple[int, Sequence[str], str]] = {
    "ext4": (15 << 40, ("mke2fs", "-q", "-F", "-t", "ext4", "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard"), "e2fsprogs"),
    "xfs": (16 << 40, ("mkfs.xfs", "-q", "-K"), "xfsprogs"),
    "btrfs": (2 << 40, ("mkfs.btrfs", "-q", "-K"), "btrfs-progs"),
    "vfat": (2 << 40, ("mkfs.fat", "-F", "32", "-s", "128"), "dosfstools"),
    "exfat": (2 << 40, ("mkfs.exfat",), "exfatprogs"),
    "ntfs": (2 << 40, ("mkntfs", "-q", "-Q", "-F"), "ntfs-3g"),
}  # fmt: skip
"""Their size, what makes them, and its package."""


@pytest.mark.parametrize("name", GIANTS)
def test_an_honest_giant_in_holes_is_proven(name: str, work: Path) -> None:
    """Most of its tables are zeroes, and the copy has holes there."""
    size, maker, package = GIANTS[name]
    need(maker[0], package)
    fresh, path = blank(work / "fresh", size), work / "disk.img"
    run(*maker, fresh)
    run("cp", "--sparse=always", fresh, path)
    fresh.unlink()

    def proven() -> str:
        with maps.opened(Disks([str(path)], format="raw")) as (bmap, _):
            assert bmap.filesystems.column("type").to_pylist() == [name]
            free = tables.codes(bmap.extents, "kind") == tables.FREE
            assert tables.integers(bmap.extents, "length")[free].sum() > (size // 2 if name != "btrfs" else 0)
            assert "error" not in bmap.problems.column("severity").to_pylist()
            report = check(bmap)
            assert not report.disagreements
            return (
                "proven"
                if PROVEN in {one.result for one in report.verdicts if one.subject == "allocator"}
                else "not proven"
            )

    found = cost(proven)
    assert found.said == "proven"
    assert_small(found, name)
