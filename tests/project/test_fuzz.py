"""The fuzzer itself: damage that is undone and repeated, checksums that the formats' own tools accept, faults
that are seen."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tools.fuzz import beside, growth
from tools.fuzz.disk import Disk, scratch
from tools.fuzz.images import Image
from tools.fuzz.seeds import Seed

import recipes
from recipes.linux import SMALL_XFS
from support import need, run

ROOT = Path(__file__).resolve().parents[2]


def seed(name: str, folder: Path) -> Seed:
    try:
        paths = tuple(recipes.make(name, folder).disks)
    except recipes.Left as reason:
        pytest.skip(str(reason))
    return Seed(name, paths, paths[0].suffix != ".img")


@pytest.fixture
def work() -> Iterator[Path]:
    """In memory: files of any size, which filesystems on disks do not have."""
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        yield Path(folder)


# ---- damage ------------------------------------------------------------------------------------------------


def test_a_patch_is_what_differs_and_makes_the_damage_again(tmp_path: Path) -> None:
    source, chooser = tmp_path / "source", random.Random(1)
    source.write_bytes(whole := chooser.randbytes(100_000))
    disk = Disk(source, tmp_path / "disk")
    for size in (100_000, 60_000, 1 << 30):
        disk.resize(size)
        for _ in range(20):
            disk.write(chooser.randrange(110_000), chooser.randbytes(chooser.randrange(1, 300)))
        damaged, patch = (tmp_path / "disk").read_bytes()[:110_000], disk.patch()
        assert len(patch) == len({at for at, _ in patch})
        disk.restore()
        assert (tmp_path / "disk").read_bytes() == whole
        disk.apply(patch, size)
        assert (tmp_path / "disk").read_bytes()[:110_000] == damaged
        assert os.path.getsize(tmp_path / "disk") == size
        disk.restore()
    assert (tmp_path / "disk").read_bytes() == whole


@pytest.mark.parametrize("name", ["ext4", "lvm", "qcow2"])
def test_a_mutation_is_a_function_of_seed_and_number(name: str, tmp_path: Path, work: Path) -> None:
    image = Image(seed(name, tmp_path / "seeds"), work)
    whole = [path.read_bytes() for path in image.whole]
    seen = []
    for number in (*range(40), *range(40)):
        done = image.mutate(number)
        seen.append((done, image.patches()))
        image.restore()
        assert [Path(path).read_bytes() for path in image.paths] == whole
    assert seen[:40] == seen[40:]
    assert len({json.dumps(patches) for _, patches in seen}) > 36
    assert any("grown" in done[0] for done, _ in seen if done)


def test_a_grown_disk_is_read_as_a_large_one(tmp_path: Path, work: Path) -> None:
    """The fields found are those that count: the map of the grown filesystem has its new size."""
    image = Image(seed("ext4", tmp_path / "seeds"), work)
    for number in range(20):
        growth.grow(random.Random(number), image.disks, image.fields)
        image.sealer.seal()
        size = image.disks[0].size
        if size <= 1 << 40:
            with image.opened() as (bmap, _):
                if bmap.filesystems.num_rows and bmap.filesystems.column("size")[0].as_py() == size:
                    return
        image.restore()
    pytest.fail("no grown image was mapped at its size")


# ---- checksums ---------------------------------------------------------------------------------------------


def is_clean(command: list[str], image: Path) -> bool:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return (
        subprocess.run(
            [*command, image], capture_output=True, env={**os.environ, **SMALL_XFS, "PATH": path}
        ).returncode
        == 0
    )


CHECKERS = {
    "ext4": (["e2fsck", "-fn"], "e2fsprogs", 16),
    "ext4-meta-bg": (["e2fsck", "-fn"], "e2fsprogs", 16),
    "xfs": (["xfs_repair", "-n", "-f", "-o", "force_geometry"], "xfsprogs", 36),
    "btrfs": (["btrfs", "check", "--force"], "btrfs-progs", 0),
    "exfat": (["fsck.exfat", "-n"], "exfatprogs", 0),
}
"""A format's own checker, its package, and where in an inode a time lies, which nobody can call wrong (0: not
tried)."""


@pytest.mark.parametrize("name", CHECKERS)
def test_what_is_sealed_is_right_for_the_formats_own_checker(name: str, tmp_path: Path, work: Path) -> None:
    """Times of many inodes changed: the checker complains of their checksums; sealed, it does not."""
    command, package, time = CHECKERS[name]
    need(command[0], package)
    image = Image(seed(name, tmp_path / "seeds"), work)
    path = image.disks[0].path
    assert is_clean(command, path)
    starts = [unit.start for unit in image.sealer.units if unit.end - unit.start in (128, 256, 512)]
    # XFS' magic; the mode of a plain file
    inodes = [at for at in starts if image.disks[0].read(at, 2) in (b"IN", b"\xa4\x81")]
    places = [at + time for at in inodes] if time else []
    for at in places:
        image.disks[0].write(at, bytes([image.disks[0].read(at, 1)[0] ^ 1]))
    damaged = bool(places) and not is_clean(command, path)
    image.sealer.seal()
    assert is_clean(command, path)
    assert damaged or not time


@pytest.mark.parametrize(
    ("name", "least"),
    [("xfs", 200), ("btrfs", 100), ("ntfs", 200), ("exfat", 80), ("iso-udf", 400), ("udf-512", 15),
        ("erofs", 1), ("f2fs", 150), ("gpt", 8), ("lvm", 10),
     ("lvm-thin", 8), ("md-raid1", 2), ("md-raid5", 3), ("luks2", 2), ("bitlocker", 3), ("sgi", 1),
     ("sun", 1), ("vhd", 3), ("vhdx", 5), ("ext4-dirty", 280)],
)  # fmt: skip
def test_sealed_structures_are_found(name: str, least: int, tmp_path: Path, work: Path) -> None:
    """As many as the tools made: each computes, on what they wrote, what they wrote.

    And each notices a change.
    """
    image = Image(seed(name, tmp_path / "seeds"), work)
    assert len(image.sealer.units) >= least
    noticed = 0
    for unit in image.sealer.units:
        disk = image.disks[unit.disk]
        for at in (unit.start, unit.start + 512, (unit.start + unit.end) // 2, unit.end - 1):
            disk.write(at, bytes([disk.read(at, 1)[0] ^ 255]) if at < unit.end else b"")
        before = len(disk.touched)
        unit.seal(disk)
        noticed += len(disk.touched) > before
        image.restore()
    assert noticed > 0.9 * len(image.sealer.units)


# ---- campaigns ---------------------------------------------------------------------------------------------

PATCHED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from tools.fuzz import __main__, campaign, consumers, seeds, worker
def broken(use):
    byte = use.image.disks[0].read(1024 + 0x78, 1)
{fault}
consumers.CONSUMERS = ((1, broken),)
worker.CPU_LIMIT, worker.MEMORY_LIMIT, campaign.PATIENCE = 1.0, 200 << 20, 8.0
found = {{"swap": seeds.Seed("swap", (Path({image!r}),), False)}}
summary = campaign.run(found, Path({found!r}), 2, 2, {mutations}, [], lambda text: None)
"""
FAULTS = {
    "exception": ("    import numpy; numpy.zeros(1)[5]", "IndexError at the fuzzer"),
    "hang": ("    while True: pass", "hang at the fuzzer"),
    "memory": ("    kept = b'1' * (300 << 20)", "memory: more than 200 MiB in broken of swap"),
    "death": ("    import os; os._exit(3)", "died (status 768) in swap"),
    "hang outside": ("    import ctypes; ctypes.CDLL(None).pause()",
        "hang outside Python (status 9) in swap"),
}  # fmt: skip


def campaign(fault: str, folder: Path, mutations: int) -> dict:
    image = folder / "swap.img"
    if not image.exists():
        (made,) = recipes.make("swap", folder).disks
        assert made == image
    script = PATCHED.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        fault=fault,
        image=str(image),
        found=str(folder / "found"),
        mutations=mutations,
    )
    run(sys.executable, "-c", script)
    return json.loads((folder / "found" / "summary.json").read_text())


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str, tmp_path: Path) -> None:
    fault, signature = FAULTS[name]
    summary = campaign(fault, tmp_path, 1)
    assert signature in summary["faults"]
    assert summary["formats"]["swap"]["fault"] >= 1
    (folder,) = [path for path in (tmp_path / "found").iterdir() if path.is_dir()]
    assert json.loads((folder / "fault.json").read_text())["fault"] == signature


def test_a_campaign_goes_on_where_it_ended(tmp_path: Path) -> None:
    first = campaign("    pass", tmp_path, 60)
    assert first["faults"] == {}
    assert first["mutations"] >= 60
    then = campaign("    pass", tmp_path, first["mutations"] + 50)
    assert then["mutations"] >= first["mutations"] + 50
    assert then["next"]["swap"] >= then["mutations"]
    assert sum(counts["mutations"] for counts in then["formats"].values()) == then["mutations"]


def test_a_fault_is_made_smaller_and_comes_again(tmp_path: Path) -> None:
    """A fault of a few bytes: what is left of the damage is in them."""
    fault = "    if use.image.disks[0].read(1024, 12) != {!r}: raise ValueError('x')"
    (image,) = recipes.make("swap", tmp_path).disks
    with open(image, "rb") as file:
        file.seek(1024)
        head = file.read(12)
    summary = campaign(fault.format(head), tmp_path, 300)
    assert "ValueError at the fuzzer" in summary["faults"]
    (folder,) = [path for path in (tmp_path / "found").iterdir() if path.is_dir()]
    script = PATCHED.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        fault=fault.format(head),
        image=str(image),
        found=str(tmp_path / "found"),
        mutations=0,
    )
    script = (
        script[: script.index("summary = ")]
        + f"from tools.fuzz import again\nprint(again.smaller(found, Path({str(folder)!r})))"
    )
    run(sys.executable, "-c", script)
    ((_, patch),) = json.loads((folder / "small.json").read_text())["patches"]
    assert patch
    assert sum(len(bytes.fromhex(data)) for _, data in patch) <= 12
    assert all(1024 <= at < 1036 for at, _ in patch)


def test_files_beside_images_are_damaged_and_read(tmp_path: Path) -> None:
    """Tables with other values are still Parquet; lines are still lines; each number is one damage, and the
    file is whole again."""
    kept = os.getcwd()
    made = {name: seed(name, tmp_path / "seeds") for name in ("ext4", "lvm", "gpt", "qcow2")}
    makers = beside.make(tmp_path / "beside", made)
    assert {name.split("-")[1] for name in makers} == {"map", "textmap", "trace", "profile", "log", "ranges"}
    readable = 0
    for name in (
        "beside-map-lvm.parquet",
        "beside-trace-trace.parquet",
        "beside-log-fio-3",
        "beside-ranges-ddrescue",
    ):
        file = makers[name]()
        whole = file.patches()
        damages = []
        for number in (*range(12), *range(12)):
            file.mutate(number)
            damages.append(file.patches())
            with contextlib.suppress(pa.ArrowException, OSError):
                readable += (
                    name.endswith("parquet")
                    and pq.read_table(io.BytesIO(bytes.fromhex(damages[-1][0][1][0][1]))) is not None
                )
            file.restore()
            assert file.patches() == whole
        assert damages[:12] == damages[12:]
        assert sum(damage != whole for damage in damages) >= 18
        file.apply(damages[3])
        assert file.copy(tmp_path / "out") == [tmp_path / "out"]
        assert (tmp_path / "out").read_bytes().hex() == damages[3][0][1][0][1]
        file.close()
    assert readable >= 20
    assert os.getcwd() == kept


def test_a_kept_fault_gives_its_image(tmp_path: Path, work: Path) -> None:
    image = Image(seed("lvm", tmp_path / "seeds"), work)
    number = next(number for number in range(100) if image.mutate(number) and image.disks[0].size < 1 << 30)
    image.restore()
    image.mutate(number)
    damaged = [disk.path.read_bytes() for disk in image.disks]
    patches = image.patches()
    image.restore()
    image.apply(patches)
    copies = image.copy(tmp_path / "out")
    assert [path.name for path in copies] == ["out.1", "out.2"]
    assert [path.read_bytes() for path in copies] == damaged
