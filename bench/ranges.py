"""Which files did 10,000 bad sectors hit? `lookup --ranges` of a ddrescue map against debugfs (icheck,
ncheck) and The Sleuth Kit (ifind).

    python bench/ranges.py CACHE-FOLDER [FILES] [RANGES] [TIMES]

debugfs is given all blocks at once, which is the best it can do; one call a block, as scripts have it, and
ifind are timed on a few and multiplied. The sets of files are compared. The image is that of bench/ext.py.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fair
from ext import build

import virt_bmap
from virt_bmap.ask import hits

FILES, RANGES, SECTOR, BLOCK = 200_000, 10_000, 512, 4096
SAMPLED = 5
"""Calls of what takes seconds each."""
AT_ONCE = 1000
"""Blocks or inodes in one request: a line of debugfs has an end."""


def bad_sectors(disk: Path, count: int) -> list[int]:
    """Sectors in the allocated part of the image, at random."""
    blocks = {name: int(value) for name, _, value in (
        line.partition(":") for line in subprocess.run(["dumpe2fs", "-h", disk], capture_output=True,
            text=True).stdout.splitlines()
    ) if name in ("Block count", "Free blocks")}  # fmt: skip
    used = (blocks["Block count"] - blocks["Free blocks"]) * BLOCK // SECTOR
    return sorted(random.Random(1).sample(range(used), count))


def debugfs(disk: Path, word: str, numbers: list[int]) -> list[list[str]]:
    """The rows of icheck or ncheck."""
    requests = "".join(
        f"{word} {' '.join(map(str, numbers[at : at + AT_ONCE]))}\n" for at in range(0, len(numbers), AT_ONCE)
    )
    done = subprocess.run(
        ["debugfs", "-f", "-", disk], input=requests, capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 2 and row[0].isdigit()]


def by_debugfs(disk: Path, sectors: list[int]) -> set[str]:
    """The paths of what owns the blocks with these sectors."""
    blocks = sorted({sector * SECTOR // BLOCK for sector in sectors})
    inodes = sorted({int(row[1]) for row in debugfs(disk, "icheck", blocks) if row[1].isdigit()})
    return {row[1].replace("//", "/") for row in debugfs(disk, "ncheck", inodes)}


def sampled(run: list[list[str | Path]]) -> float:
    """Seconds of one of these commands, on average."""
    start = time.perf_counter()
    for words in run:
        subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return (time.perf_counter() - start) / len(run)


def main() -> None:
    cache = Path(sys.argv[1])
    files, count, times = (
        int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, FILES), (3, RANGES), (4, 5))
    )
    disk, listed = build(cache, files), cache / "bad.map"
    fair.as_installed()
    sectors = bad_sectors(disk, count)
    listed.write_text(
        "# Mapfile. Created by GNU ddrescue\n0x0 - 1\n"
        + "".join(f"{s * SECTOR:#x} 0x200 -\n" for s in sectors)
    )
    ours = [sys.executable, "-m", "virt_bmap"]
    mapping = min(fair.seconds([*ours, "-o", cache / "out.parquet", disk]) for _ in range(times))
    whole = min(fair.seconds([*ours, "lookup", "--json", disk, "--ranges", listed]) for _ in range(times))
    saved = min(
        fair.seconds([*ours, "lookup", "--json", cache / "out.parquet", "--ranges", listed])
        for _ in range(times)
    )
    print(f"{files} files, {count} bad sectors; fastest of {times} runs, from the page cache")
    print(
        f"virt-bmap lookup --ranges {whole:10.3f} s   mapping included; the map alone {mapping:.3f} "
        f"s, from a saved map {saved:.3f} s"
    )
    bmap = virt_bmap.load(str(cache / "out.parquet"))
    starts = [sector * SECTOR for sector in sectors]
    found = hits.hits(bmap, 1, starts, [start + SECTOR for start in starts]).objects
    named = {row["path"] for row in found if row["kind"] in ("data", "slack", "directory")}
    start = time.perf_counter()
    theirs = by_debugfs(disk, sectors)
    print(
        f"debugfs, all at once      {time.perf_counter() - start:10.3f} s   icheck and ncheck; the "
        f"same files: {named == theirs}"
    )
    some = [sectors[at] * SECTOR // BLOCK for at in range(0, count, count // SAMPLED)][:SAMPLED]
    each = sampled([["debugfs", "-R", f"icheck {block}", disk] for block in some])
    print(
        f"debugfs, one by one       {each * count:10.0f} s   icheck alone, {each:.2f} s each "
        f"({SAMPLED} tried)"
    )
    if shutil.which("ifind"):
        each = sampled([["ifind", "-d", str(block), disk] for block in some])
        print(f"ifind                     {each * count:10.0f} s   {each:.2f} s each ({SAMPLED} tried)")


if __name__ == "__main__":
    main()
