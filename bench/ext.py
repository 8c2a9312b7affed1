"""ext4 with many files: the whole process and the reader alone, against `e2fsck -fn`, `fls -r -p` and reading the metadata bare.

    python bench/ext.py CACHE-FOLDER [FILES] [TIMES]

The image (5 KiB a file, sparse) is made once in the cache folder by mke2fs from a tree of files: no root, no mount. A million
files need some 15 GiB and ten minutes the first time.
"""

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

FILES, PER_FOLDER = 200_000, 100
TARGET_RATIO = {200_000: 1.5, 1_000_000: 1.0}
"""Whole process, Parquet output included, over e2fsck -fn."""
MEMORY_TARGET = (200 << 20, 1 << 10)
"""Bytes at most: so many, and so many a file."""


def image(cache: Path, files: int) -> Path:
    """The image, made if it is not there yet."""
    made = cache / f"ext4-{files}.img"
    if not made.exists():
        folder = cache / f"tree-{files}"
        for number in range(files):
            where = folder / f"d{number // PER_FOLDER // 100:03d}" / f"sub{number // PER_FOLDER % 100:03d}"
            if number % PER_FOLDER == 0:
                where.mkdir(parents=True, exist_ok=True)
            (where / f"file-{number:07d}.dat").write_bytes(b"x" * (number % 7 * 1000 + 1))
        part = made.with_suffix(".part")
        with open(part, "wb") as file:
            file.truncate((1 << 30) + files * 8192)
        inodes = str(files + files // 4)
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-N", inodes, "-d", folder, part], check=True, stdout=subprocess.DEVNULL
        )
        shutil.rmtree(folder)
        part.rename(made)
    return made


def best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def command(*words: str | Path) -> Callable[[], object]:
    """Running a program and throwing away what it says."""
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


READ = """
import sys, time, resource
from virt_bmap.filesystems import ext
from virt_bmap.images.raw import RawReader
class Counting(RawReader):
    calls = bytes = 0
    def _fetch(self, offsets, lengths):
        Counting.calls += 1
        Counting.bytes += int(lengths.sum())
        return super()._fetch(offsets, lengths)
reader = Counting(sys.argv[1])
start = time.perf_counter()
found = ext.read(reader)
taken = time.perf_counter() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(taken, Counting.calls, Counting.bytes, found.inodes.num_rows, found.extents.num_rows, memory)
"""
BARE = """
import sys
import numpy as np
from virt_bmap.filesystems import ext
from virt_bmap.images.raw import RawReader
asked = []
class Noting(RawReader):
    def _fetch(self, offsets, lengths):
        asked.append((offsets, lengths))
        return super()._fetch(offsets, lengths)
ext.read(Noting(sys.argv[1]))
import time
reader = RawReader(sys.argv[1])
start = time.perf_counter()
for offsets, lengths in asked:
    reader._fetch(offsets, lengths)
print(time.perf_counter() - start)
"""


def main() -> None:
    cache = Path(sys.argv[1])
    files = int(sys.argv[2]) if len(sys.argv) > 2 else FILES
    times = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    disk, table = image(cache, files), cache / "out.parquet"
    script = Path(sys.executable).with_name("virt-bmap")
    reads = [subprocess.run([sys.executable, "-c", READ, disk], check=True, capture_output=True, text=True).stdout.split()
             for _ in range(times)]  # fmt: skip
    seconds, calls, read_bytes, inodes, extents, _ = min(reads, key=lambda words: float(words[0]))
    bare = min(
        float(subprocess.run([sys.executable, "-c", BARE, disk], check=True, capture_output=True).stdout) for _ in range(times)
    )
    peer = best(command("e2fsck", "-fn", disk), times)
    whole = best(command(script, "-o", table, disk), times)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    print(f"{files} files, {inodes} inodes, {extents} extents; fastest of {times} runs, from the page cache")
    print(f"reader alone              {float(seconds):7.3f} s   {calls} batches of reads, {int(read_bytes) / 2**20:.1f} MiB")
    print(f"the same reads, bare      {bare:7.3f} s")
    print(f"virt-bmap -o x.parquet    {whole:7.3f} s   at most {memory / 2**20:.0f} MiB, "
          f"target {(MEMORY_TARGET[0] + MEMORY_TARGET[1] * files) / 2**20:.0f} MiB")  # fmt: skip
    print(f"e2fsck -fn                {peer:7.3f} s   ratio {whole / peer:.2f}, target {TARGET_RATIO.get(files, 1.5)}")
    if shutil.which("fls"):
        listing = best(command("fls", "-r", "-p", disk), 1)
        print(f"fls -r -p                 {listing:7.3f} s   ratio {whole / listing:.2f}")


if __name__ == "__main__":
    main()
