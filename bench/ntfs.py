"""How long an NTFS volume with 200,000 files takes to map, against `fls -r -p` of The Sleuth Kit on the same image.

    python bench/ntfs.py [--files N] [--rounds N] CACHE

CACHE keeps the image for the next run. It is made by mkntfs and filled through ntfs-3g (root, FUSE): three files in four are resident. Both are
whole processes with everything in the page cache, in turns; medians are compared. The map is made with all extents and joined paths, where fls
prints names only. Also told: peak memory, and what a slow link would charge, in rounds of reading and bytes.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL = 1 / 3
"""The whole process takes a third of the time of fls, start-up included."""
CODE = """
import sys, time, resource
from virt_bmap.images.raw import RawReader
from virt_bmap.survey import survey
reader = RawReader(sys.argv[1])
start = time.perf_counter()
bmap = survey([reader])
read = time.perf_counter() - start
paths = len(bmap.paths(0)[0])
print(read, paths, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, reader.rounds, reader.requested, bmap.problems.num_rows)
"""


def build(cache: Path, files: int) -> Path:
    """The image, made once."""
    image = cache / f"ntfs-{files}.img"
    if image.exists():
        return image
    part = image.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(part, "wb") as file:
        file.truncate((files * 5120 + (64 << 20)) & ~0xFFFF)
    subprocess.run(["mkntfs", "-F", "-Q", "-q", str(part)], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        daemon = subprocess.Popen(["ntfs-3g", "-o", "no_detach,noatime", str(part), folder], stderr=subprocess.DEVNULL)
        while not Path(folder).is_mount() and daemon.poll() is None:
            time.sleep(0.05)
        try:
            for number in range(files):
                path = Path(folder, f"folder {number // 1000}", f"file number {number:06}.txt")
                if number % 1000 == 0:
                    path.parent.mkdir()
                path.write_bytes(b"x" * (100 if number % 4 else 5000))
        finally:
            subprocess.run(["umount", folder], check=True)
            daemon.wait()
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
    if missing := [tool for tool in ("mkntfs", "ntfs-3g", "fls") if not shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/sbin")]:
        print(f"needs {', '.join(missing)} (Debian packages ntfs-3g and sleuthkit)", file=sys.stderr)
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    image = build(options.cache, options.files)
    ours, peer, reads, facts = [], [], [], []
    for _ in range(options.rounds + 1):  # the first round warms the page cache
        seconds, output = timed([sys.executable, "-c", CODE, str(image)])
        facts = output.split()
        ours.append(seconds)
        reads.append(float(facts[0]))
        peer.append(timed(["fls", "-r", "-p", str(image)])[0])
    process, read, fls = (statistics.median(values[1:]) for values in (ours, reads, peer))
    print(
        f"{options.files} files: process {process:.2f} s (read {read:.2f} s), fls {fls:.2f} s: ratio {process / fls:.2f}, goal {GOAL:.2f}"
    )
    print(
        f"paths {facts[1]}, peak {int(facts[2]) >> 10} MiB, {facts[3]} rounds of reading, {int(facts[4]) >> 20} MiB read, problems {facts[5]}"
    )
    return 0 if process <= GOAL * fls else 1


if __name__ == "__main__":
    raise SystemExit(main())
