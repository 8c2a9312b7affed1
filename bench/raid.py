"""A 10 TiB RAID5 of four sparse disks against the same filesystem on one plain disk: time in turn, and
memory, which must not grow with the size.

    python bench/raid.py CACHE-FOLDER [--files 10000] [--rounds 5]

The array, its ext4 and its files are made once by mdadm and the kernel in libguestfs's appliance (a minute or
two); the plain disk is a copy of the array's bytes, read through the map.
"""

import argparse
import base64
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fair import seconds

from virt_bmap.core.arrays import Int, ints, union
from virt_bmap.core.mapping import DATA
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import opened

TIB, MIB = 1 << 40, 1 << 20
DISKS = 4
GOAL = 10.0
"""The array's time over the plain disk's."""
GROWTH = 1.5
"""Peak memory for 10 TiB over that for 1 TiB on the array, against the same growth on the plain disk."""
MAKE = """
modprobe raid456
yes | mdadm --create /dev/md127 --run --assume-clean --level=5 --bitmap=none --raid-devices={disks} {members}
mkfs.ext4 -q -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 /dev/md127
mount -o noinit_itable /dev/md127 /sysroot
number=0
while [ $number -lt {files} ]; do
    [ $((number % 500)) = 0 ] && folder=/sysroot/folder-$number && mkdir $folder
    number=$((number + 1)); echo "the content of file $number" > $folder/file-$number
done
umount /sysroot; mdadm --stop /dev/md127; sync
"""


def members(cache: Path, size: int, files: int) -> list[Path]:
    """The array's disks, made if they are not there yet."""
    folder = cache / f"raid5-{size // TIB}T-{files}"
    names = ["diska", "diskb", "diskc", "diskd"][:DISKS]
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=cache))
        for name in names:
            with (part / name).open("wb") as file:
                file.truncate(size // (DISKS - 1) // MIB * MIB + 256 * MIB)
        devices = " ".join(f"/dev/disk/guestfs/{name}" for name in names)
        script = base64.b64encode(MAKE.format(disks=DISKS, members=devices, files=files).encode()).decode()
        lines = [f"add {name} format:raw label:{name}" for name in names]
        lines += ["run", f'debug sh "echo {script} | base64 -d > /tmp/make; sh -e /tmp/make 2>&1"']
        environment = {
            **os.environ,
            "LIBGUESTFS_BACKEND": "direct",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
        }
        subprocess.run(
            ["guestfish"], input="\n".join(lines), cwd=part, env=environment, text=True, check=True
        )
        part.rename(folder)
    return [folder / name for name in names]


def plain(disks: list[Path]) -> Path:
    """One sparse disk with the array's bytes: whatever any disk has data for, moved to its offset in the
    array."""
    made = disks[0].parent / "plain"
    if not made.exists():
        with (
            opened(Disks([str(disk) for disk in disks], format="raw")) as (bmap, readers),
            made.with_suffix(".part").open("wb") as file,
        ):
            volume = bmap.volume_named("/dev/md127")
            file.truncate(readers[volume].size)
            rows = bmap.rows_of(volume)
            for number, disk in zip(bmap.disks, disks, strict=True):
                pieces = rows.take((rows.parent == number) & (rows.role == DATA)).up(*data_ranges(disk))
                for low, high in zip(
                    *(side.tolist() for side in union(pieces.target, pieces.target + pieces.length)),
                    strict=True,
                ):
                    os.pwrite(file.fileno(), readers[volume].read(low, high - low), low)
        made.with_suffix(".part").rename(made)
    return made


def data_ranges(path: Path) -> tuple[Int, Int]:
    """(starts, ends) in bytes of what is no hole in a sparse file."""
    starts, ends, size = [], [], path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            starts.append(at)
            at = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            ends.append(at)
    return ints(starts), ints(ends)


def peak(command: list[str | Path]) -> int:
    """MiB that one process takes at most."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not shutil.which("guestfish"):
        print("needs guestfish (apt-get install libguestfs-tools linux-image-amd64)", file=sys.stderr)
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    program, memory, passed = Path(sys.executable).parent / "virt-bmap", [], True
    for size in (TIB, 10 * TIB):
        disks = members(options.cache, size, options.files)
        one = plain(disks)
        with tempfile.TemporaryDirectory() as folder:
            start: list[str | Path] = [program, "-q", "--format", "raw", "-o", Path(folder) / "map.parquet"]
            memory.append((peak([*start, *disks]), peak([*start, one])))
            taken = [(seconds([*start, *disks]), seconds([*start, one])) for _ in range(options.rounds)]
        array, single = (min(column) for column in zip(*taken, strict=True))
        print(
            f"{size // TIB} TiB, {options.files:,} files: RAID5 of {DISKS} disks {array:.2f} s, one "
            f"plain disk {single:.2f} s: ratio "
            f"{array / single:.2f}, goal {GOAL}; peak memory {memory[-1][0]} MiB and {memory[-1][1]} MiB"
        )
        passed &= array <= GOAL * single
    grown = [large / small for small, large in zip(*memory, strict=True)]
    print(f"memory from 1 to 10 TiB: RAID5 {grown[0]:.2f} times, plain disk {grown[1]:.2f} times")
    return 0 if passed and grown[0] <= GROWTH * grown[1] else 1


if __name__ == "__main__":
    sys.exit(main())
