"""How long a btrfs with 200,000 files takes to map, against `btrfs check --readonly` of the same image.

    python bench/btrfs.py [--files N] [--rounds N] CACHE

CACHE keeps the image for the next run. It is made by `mkfs.btrfs --rootdir` from files of mixed sizes: half of them lie inline in the trees.
Both are whole processes with everything in the page cache, in turns; medians are compared. The map is made with paths and checked by its own
allocator (columns "read" and "process"); its peak memory is told, and what a slow link would charge: rounds of reading and bytes.
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL = 1.0
"""The whole process takes no longer than btrfs check."""
CODE = """
import sys, time, resource
from virt_bmap.images.raw import RawReader
from virt_bmap.survey import survey
reader = RawReader(sys.argv[1])
start = time.perf_counter()
bmap = survey([reader])
read = time.perf_counter() - start
paths = len(bmap.paths(1)[0])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read, paths, peak, reader.rounds, reader.requested, bmap.problems.filter(bmap.problems.column("severity").to_numpy() != "note").num_rows)
"""


def build(cache: Path, files: int) -> Path:
    """The image, made once."""
    image = cache / f"btrfs-{files}.img"
    if image.exists():
        return image
    tree, part = cache / "btrfs-tree", image.with_suffix(".part")
    chooser = random.Random(1)
    filler = os.urandom(65536)
    for number in range(files):
        path = tree / f"d{number % 500}" / f"some file {number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filler[: chooser.choice([100, 900, 5000, 9000])])
    part.unlink(missing_ok=True)
    with open(part, "wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mkfs.btrfs", "-q", "--rootdir", str(tree), str(part)], check=True, capture_output=True)
    shutil.rmtree(tree)
    part.rename(image)
    return image


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds and standard output of a process."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not shutil.which("btrfs"):
        print("needs btrfs (Debian package btrfs-progs)", file=sys.stderr)
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    image = build(options.cache, options.files)
    ours, peer, reads, facts = [], [], [], []
    for _ in range(options.rounds + 1):  # the first round warms the page cache
        seconds, output = timed([sys.executable, "-c", CODE, str(image)])
        facts = output.split()
        ours.append(seconds)
        reads.append(float(facts[0]))
        peer.append(timed(["btrfs", "check", "--readonly", str(image)])[0])
    process, read, check = (statistics.median(values[1:]) for values in (ours, reads, peer))
    print(
        f"{options.files} files: process {process:.2f} s (read {read:.2f} s), btrfs check {check:.2f} s: ratio {process / check:.2f}, goal {GOAL}"
    )
    print(
        f"paths {facts[1]}, peak {int(facts[2]) >> 10} MiB, {facts[3]} rounds of reading, {int(facts[4]) >> 20} MiB read, problems {facts[5]}"
    )
    print(f"(this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB)", file=sys.stderr)
    return 0 if process <= GOAL * check else 1


if __name__ == "__main__":
    raise SystemExit(main())
