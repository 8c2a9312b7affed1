"""What the benches of single formats share: `virt-bmap -o map.parquet IMAGE` against a peer on the same image, whole processes, in turn.

The fastest run of each counts, since all noise comes on top of it; a first round warms the page cache.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def seconds(command: Sequence[str | Path]) -> float:
    """How long a process takes; what it says is thrown away, its exit status is not looked at (checkers have many)."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main(about: str, build: Callable[[Path, int], Path], peer: Sequence[str], needs: dict[str, str], goal: float) -> int:
    """Make or find the image in the folder of the command line, compare, and print the figures; 1 where the goal is missed.

    `peer` is given the image as its last argument; `needs` maps programs to the Debian packages that have them.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if missing := [tool for tool in needs if not shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/sbin")]:
        print(
            f"needs {', '.join(missing)} (Debian packages {', '.join(dict.fromkeys(needs[tool] for tool in missing))})",
            file=sys.stderr,
        )
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    image = build(options.cache, options.files)
    with tempfile.TemporaryDirectory() as folder:
        ours = [Path(sys.executable).parent / "virt-bmap", "-q", "-o", Path(folder) / "map.parquet", image]
        subprocess.run(ours, check=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        taken = [(seconds(ours), seconds([*peer, image])) for _ in range(options.rounds + 1)][1:]
    our, their = (min(column) for column in zip(*taken, strict=True))
    print(
        f"{options.files:,} files: virt-bmap {our:.2f} s, {' '.join(peer)} {their:.2f} s: ratio {our / their:.2f}, goal {goal:.2f}; peak memory {memory} MiB"
    )
    return 0 if our <= goal * their else 1
