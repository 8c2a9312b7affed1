"""XFS with 200,000 files: the whole process and the reader alone, against `xfs_repair -n`.

    python bench/xfs.py CACHE-FOLDER [FILES]

The image (1.5 GiB, sparse) is made once in the cache folder by mkfs.xfs, from a prototype: no root, no mount.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

FILES, PER_FOLDER = 200_000, 1000
TARGET_RATIO = 1.0
"""Whole process, Parquet output included, over xfs_repair -n."""


def image(cache: Path, files: int) -> Path:
    """The image, made if it is not there yet."""
    made = cache / f"xfs-{files}.img"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        content = cache / "content"
        content.write_bytes(b"content of every file\n" * 20)
        lines = ["/", "0 0", "d--755 0 0"]
        for number in range(files):
            if number % PER_FOLDER == 0:
                lines += (["$"] if number else []) + [f"folder-{number // PER_FOLDER:04d} d--755 0 0"]
            lines.append(f"a-file-{number:07d}.txt ---644 0 0 {content}")
        proto = cache / "proto"
        proto.write_text("\n".join([*lines, "$", "$", ""]))
        part = made.with_suffix(".part")
        with open(part, "wb") as file:
            file.truncate((600 << 20) + files * 6144)
        subprocess.run(["mkfs.xfs", "-q", "-f", "-p", proto, part], check=True)
        part.rename(made)
    return made


def best(command: list[str], times: int = 5) -> float:
    """Seconds of the fastest run."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
    return min(taken)


READ = """
import sys, time, resource
from virt_bmap.filesystems import xfs
from virt_bmap.images.raw import RawReader
taken = []
for _ in range(int(sys.argv[2])):
    reader = RawReader(sys.argv[1])
    start = time.perf_counter()
    found = xfs.read(reader)
    taken.append(time.perf_counter() - start)
    if not _:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(min(taken), taken[0], found.inodes.num_rows, found.extents.num_rows, peak)
"""


def main() -> None:
    files = int(sys.argv[2]) if len(sys.argv) > 2 else FILES
    path = str(image(Path(sys.argv[1]), files))
    repair = best([shutil.which("xfs_repair") or "/usr/sbin/xfs_repair", "-n", path])
    words = subprocess.run([sys.executable, "-c", READ, path, "5"], check=True, capture_output=True, text=True).stdout.split()
    print(f"xfs_repair -n         {repair:.3f} s")
    print(f"read()                {float(words[0]):.3f} s (first {float(words[1]):.3f} s), {words[2]} inodes, {words[3]} extents, "
          f"peak {int(words[4]) / 1024:.0f} MiB")  # fmt: skip
    tool = shutil.which("virt-bmap", path=str(Path(sys.executable).parent))
    if tool:
        whole = best([tool, "-o", str(Path(sys.argv[1]) / "xfs.parquet"), path])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"virt-bmap -o PARQUET  {whole:.3f} s, {whole / repair:.2f} of xfs_repair -n (target {TARGET_RATIO}), peak of all {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
