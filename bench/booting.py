"""How much longer a guest takes to boot when it is watched, against `nbdkit file` in the same run; and how
many of the names have a mark.

    python bench/booting.py FOLDER [--rounds N]

The demo's guest boots from a copy of its disk served by `nbdkit file`, and under `virt-bmap watch -o TRACE`,
in turn. FOLDER keeps the demo's disk and map.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import build
import pyarrow.parquet as pq
from replay import guest, nbdkit

BIN = Path(sys.executable).parent
GOAL = 1.05


def plain(disk: Path, folder: Path) -> float:
    """A boot from `nbdkit file`: the seconds."""
    copy = folder / "copy.img"
    subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
    with nbdkit(folder, "plain", "file", str(copy)) as uri:
        return boot(guest(uri, folder))


def watched(disk: Path, saved: Path, folder: Path) -> tuple[float, int, int]:
    """A boot under the watch: the seconds, the watch's own start and end included; how many pieces of
    requests it named, and how many of them with a mark."""
    trace = folder / "trace.parquet"
    options = ["--map", saved, "-o", trace, "--log", folder / "log", "--summary", folder / "summary"]
    seconds = boot([BIN / "virt-bmap", "watch", *options, disk, "--", *guest("$uri", folder)])
    file, pieces, marked = pq.ParquetFile(trace), 0, 0
    for number in range(file.num_row_groups):
        for row in file.read_row_group(number).to_pylist():
            pieces += len(row["objects"])
            marked += sum(piece["older"] for piece in row["objects"])
    return seconds, pieces, marked


def boot(command: Sequence[object]) -> float:
    """Run this, without QEMU's own throw-away layer: the seconds."""
    start = time.monotonic()
    subprocess.run([str(word).replace(",snapshot=on", "") for word in command], check=True)
    return time.monotonic() - start


def main() -> int:
    """Print the medians, their ratio and the marks; exit status 1 where the ratio is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    disk, saved = args.folder / "disk.img", args.folder / "map.parquet"
    if not disk.exists():
        build.main(disk)
    subprocess.run([BIN / "virt-bmap", "-o", saved, disk], check=True, stdout=subprocess.DEVNULL)
    seconds: dict[str, list[float]] = {"nbdkit file": [], "virt-bmap watch -o": []}
    said = []
    for _ in range(args.rounds):
        for server, taken in seconds.items():
            with tempfile.TemporaryDirectory() as name:
                if server == "nbdkit file":
                    taken.append(plain(disk, Path(name)))
                else:
                    said.append(watched(disk, saved, Path(name)))
                    taken.append(said[-1][0])
            print(f"{server:20} {taken[-1]:6.1f} s", flush=True)
    for server, taken in seconds.items():
        print(f"{server:20} median {statistics.median(taken):6.1f} s, best {min(taken):6.1f} s")
    ratio, best = (
        choose(seconds["virt-bmap watch -o"]) / choose(seconds["nbdkit file"])
        for choose in (statistics.median, min)
    )
    print(f"ratio of the medians {ratio:.3f}, of the best {best:.3f} (goal {GOAL})")
    for _, pieces, marked in said:
        print(f"{pieces:,} pieces named, {marked:,} of them marked ({marked / pieces:.1%})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    os.environ.setdefault("ACCEL", "tcg")
    raise SystemExit(main())
