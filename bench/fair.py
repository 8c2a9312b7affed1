"""What the benches of single formats share: `virt-bmap -o map.parquet IMAGE` against the format's peer on the
same image, whole processes, in turn.

The fastest run of each counts, since all noise comes on top of it; a first round warms the page cache. Our
modules are used as `pip install` leaves them, with their bytecode: where the environment forbids to write it
(PYTHONDONTWRITEBYTECODE), a checkout would be compiled again in every run.
"""

import argparse
import compileall
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import virt_bmap

READ = """
import importlib, sys, time
from virt_bmap.open.raw import RawReader
asked = []
class Noting(RawReader):
    def _fetch(self, offsets, lengths):
        asked.append((offsets, lengths))
        return super()._fetch(offsets, lengths)
module = importlib.import_module("virt_bmap.formats.filesystems." + sys.argv[1])
reader = Noting(sys.argv[2])
start = time.perf_counter()
found = module.read(reader)
alone = time.perf_counter() - start
start = time.perf_counter()
for offsets, lengths in list(asked):
    RawReader._fetch(reader, offsets, lengths)
bare = time.perf_counter() - start
read = sum(int(lengths.sum()) for _, lengths in asked)
print(alone, bare, len(asked), read, found.inodes.num_rows, found.extents.num_rows)
"""
"""The reader alone, and what it read once more without looking at it."""


@dataclass(frozen=True)
class Match:
    """One format's bench."""

    about: str
    """The script's docstring."""
    reader: str
    """The module of virt_bmap.formats.filesystems; '' where its `read` can't be called by itself."""
    build: Callable[[Path, int], Path]
    """(cache folder, files) -> the image, made once."""
    peer: Sequence[str]
    """The command that is given the image as its last argument."""
    needs: dict[str, str]
    """Programs, and the Debian packages that have them."""
    goal: Callable[[int], float]
    """Files -> our time over the peer's, at most."""


def seconds(command: Sequence[str | Path]) -> float:
    """How long a process takes; what it says is thrown away, its exit status is not looked at (checkers have
    many)."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def as_installed() -> None:
    """From here on, we and our children use compiled modules, as after `pip install`."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(virt_bmap.__file__).parent, quiet=2)


def main(match: Match) -> int:
    """Make or find the image in the folder of the command line, compare, and print the figures; 1 where the
    goal is missed, 2 where a program is."""
    parser = argparse.ArgumentParser(description=match.about.split("\n")[0])
    parser.add_argument("cache", type=Path, help="folder that keeps the image for the next run")
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if missing := [
        tool for tool in match.needs if not shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/sbin")
    ]:
        packages = dict.fromkeys(match.needs[tool] for tool in missing)
        print(f"needs {', '.join(missing)}: apt-get install {' '.join(packages)}", file=sys.stderr)
        return 2
    as_installed()
    options.cache.mkdir(parents=True, exist_ok=True)
    image = match.build(options.cache, options.files)
    with tempfile.TemporaryDirectory() as folder:
        ours = [Path(sys.executable).with_name("virt-bmap"), "-q", "-o", Path(folder) / "map.parquet", image]
        subprocess.run(ours, check=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        taken = [(seconds(ours), seconds([*match.peer, image])) for _ in range(options.rounds + 1)][1:]
    our, their = (min(column) for column in zip(*taken, strict=True))
    goal = match.goal(options.files)
    print(f"{options.files:,} files, fastest of {options.rounds} runs in turn, from the page cache:")
    print(
        f"  virt-bmap -o map.parquet  {our:7.3f} s, at most {memory} MiB (goal "
        f"{200 + options.files // 1024} MiB)"
    )
    print(f"  {' '.join(match.peer):<25} {their:7.3f} s: ratio {our / their:.2f}, goal {goal:.2f}")
    if match.reader:
        read_alone(match.reader, image, options.rounds)
    return 0 if our <= goal * their else 1


def read_alone(reader: str, image: Path, rounds: int) -> None:
    """Print what the reader takes without start-up and output, and its reads without the reader."""
    command = [sys.executable, "-c", READ, reader, image]
    found = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        for _ in range(rounds)
    ]
    alone, bare = (min(float(words[column]) for words in found) for column in (0, 1))
    batches, size, inodes, extents = (int(word) for word in found[0][2:])
    print(f"  the reader alone          {alone:7.3f} s: {inodes:,} inodes, {extents:,} extents")
    print(f"  its reads, bare           {bare:7.3f} s: {batches} batches, {size / 2**20:.1f} MiB")
