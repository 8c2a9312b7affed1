"""How soon a guest's new files have their names in the log of `virt-bmap watch`: from the return of fsync to
the line. At least 99 % are to be named.

    python bench/naming.py [--files N] [--only ext4|xfs]

The guest is this machine's kernel (tests/kernel_guest.py; needs root, FUSE and loop devices): it writes the
files to the mounted served disk, one after the other, each with fsync; then it moves, grows and deletes some.
The log goes through a pipe, and the time of each line is when it comes out of it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import kernel_guest  # noqa: E402

BIN = Path(sys.executable).parent
MAKE = {"ext4": ["mke2fs", "-q", "-t", "ext4"], "xfs": ["mkfs.xfs", "-q"]}
SIZE = 512 << 20
GOAL = 0.99
SHARES = (50, 90, 99, 100)


def run(kind: str, files: int) -> tuple[int, list[float]]:
    """How many of the steps were named, and the seconds that each of those took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image, log = folder / "disk.img", folder / "log"
        with open(image, "wb") as file:
            file.truncate(SIZE)
        subprocess.run([*MAKE[kind], image], check=True)
        os.mkfifo(log)
        lines: list[tuple[float, str]] = []

        def follow() -> None:
            with open(log, encoding="utf-8") as pipe:
                for line in pipe:
                    lines.append((time.time(), line))

        reader = threading.Thread(target=follow)
        reader.start()
        command = [BIN / "virt-bmap", "watch", "--write", "--log", log, "-o", folder / "trace.parquet", image,
            "--",
                   sys.executable, kernel_guest.__file__, "$unixsocket", folder, str(files)]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(done.stderr, end="")
        reader.join()
        steps = [line.split("\t") for line in (folder / "written").read_text().splitlines()]
    seen: dict[str, float] = {}
    for when, line in lines:
        if line.startswith("write f "):
            seen.setdefault(line.split("\t")[0].split(" ", 3)[3], when)
    created = steps[:files]  # a later step writes to a file that may have been in the log before
    named = [seen[path] - float(written) for written, path in created if path in seen]
    return len(created) - len(named), named


def main() -> int:
    """Print the distribution for each filesystem; exit status 1 where too few files were named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=list(MAKE))
    parser.add_argument("--files", type=int, default=1000)
    args = parser.parse_args()
    failed = 0
    for kind in [args.only] if args.only else MAKE:
        missing, delays = run(kind, args.files)
        share = len(delays) / (len(delays) + missing)
        failed += share < GOAL
        spread = ", ".join(
            f"{percent} % {max(0.0, float(np.percentile(delays, percent))):.2f} s" for percent in SHARES
        )
        print(f"{kind}: {share:.1%} of {args.files:,} files named (goal {GOAL:.0%}); delay at most: {spread}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
