"""The report of a disk with a million extents, and of a trace of a million requests: seconds, peak memory and
the size of the page.

    python bench/report.py [--extents N] [--requests N]

The map is made, not read: a filesystem of 1 TiB whose files lie in random order, each in four pieces, a tenth
of it free. Prints also how long Chromium takes to draw the page, where it and selenium are installed. Goal:
at most 10 MiB of page.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved import parquet

GOAL = 10 << 20
PIECES = 4
SIZE = 1 << 40


def block_map(extents: int) -> BlockMap:
    """One disk, one filesystem on the whole of it."""
    chooser = np.random.default_rng(1)
    files = extents // PIECES
    cuts = np.append(0, np.sort(chooser.choice(SIZE >> 12, extents, replace=False)) << 12)
    length = np.diff(np.append(cuts, SIZE))
    owner = np.append(-1, chooser.permutation(np.repeat(np.arange(files), PIECES)[:extents]) + 100)
    free = chooser.random(len(owner)) < 0.1
    inode = np.where(free, -1, owner)
    directories = np.arange(1000) + 10
    numbers = np.concatenate([[2], directories, np.arange(files) + 100 + 1000])
    inode = np.where(inode >= 0, inode + 1000, -1)
    kinds = np.full(len(numbers), tables.T_FILE, np.int8)
    kinds[: 1 + len(directories)] = tables.T_DIRECTORY
    names = [*(b"directory-%d" % n for n in range(1000)), *(b"some-file-%d.bin" % n for n in range(files))]
    parents = np.append(np.full(1000, 2), directories[chooser.integers(0, 1000, files)])
    rows = tables.ExtentRows()
    rows.add(
        np.where(inode < 0, tables.FREE, tables.DATA),
        cuts,
        length,
        inode=inode,
        file_offset=np.where(inode < 0, -1, cuts),
    )
    return BlockMap(
        tables.make("volumes", volume=0, disk=1, kind="disk", name="/dev/sda", size=SIZE, type="ext4"),
        tables.empty("mappings"),
        tables.make("filesystems", volume=0, type="ext4", block_size=4096, size=SIZE, root=2, state="clean"),
        tables.make("inodes", volume=0, inode=numbers, type=kinds, size=0, nlink=1,
            mtime_ns=np.iinfo(np.int64).min, flags=0),
        tables.make("names", volume=0, parent=parents, inode=numbers[1:], name=names), rows.table(0),
        tables.empty("problems"),
    )  # fmt: skip


def log(requests: int) -> bytes:
    """Requests all over the disk, as a table."""
    chooser = np.random.default_rng(2)
    offset = chooser.integers(0, (SIZE >> 12) - 64, requests) << 12
    size = chooser.integers(1, 64, requests) << 12
    rows = zip(range(requests), offset.tolist(), size.tolist(), strict=True)
    return b"time_us,op,offset,length\n" + b"".join(b"%d,read,%d,%d\n" % row for row in rows)


def drawn(page: Path) -> str:
    """How long a browser takes."""
    try:
        from selenium.webdriver import Chrome
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return "not measured: selenium is not installed"
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        browser = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        start = time.monotonic()
        browser.get(f"file://{page}")
        while not browser.execute_script("return document.body.dataset.ready"):
            time.sleep(0.05)
        took = time.monotonic() - start
        browser.quit()
    return f"{took:.1f} s"


def main() -> int:
    """Print the figures; 1 where the page is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extents", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "map.parquet", "wb") as file:
            parquet.save(block_map(args.extents), file)
        (folder / "log.csv").write_bytes(log(args.requests))
        program = [sys.executable, "-m", "virt_bmap"]
        for what, command in (
            (
                "trace import",
                [
                    "trace",
                    "import",
                    folder / "log.csv",
                    "--map",
                    folder / "map.parquet",
                    "-o",
                    folder / "trace.parquet",
                ],
            ),
            ("report of the map", ["report", folder / "map.parquet", "-o", folder / "map.html"]),
            (
                "report with the trace",
                ["report", folder / "map.parquet", folder / "trace.parquet", "-o", folder / "page.html"],
            ),
        ):
            start = time.monotonic()
            subprocess.run([*program, *map(str, command)], check=True, stderr=subprocess.DEVNULL)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
            print(f"{what:22} {time.monotonic() - start:6.1f} s, peak memory so far {peak} MiB")
        size = (folder / "page.html").stat().st_size
        print(
            f"page: {size / (1 << 20):.1f} MiB (goal {GOAL >> 20}); drawn by Chromium in "
            f"{drawn(folder / 'page.html')}"
        )
    return int(size > GOAL)


if __name__ == "__main__":
    sys.exit(main())
