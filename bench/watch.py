"""How much of `nbdkit file`'s throughput is left when the same disk is watched, with the same client, in one run.

    python bench/watch.py [--files N] [--rounds N]

The client is `qemu-img bench` (C, pipelined): 256 KiB sequential reads with 16 in flight, and 4 KiB reads scattered over the disk with 64 in flight.
Rounds alternate between the servers, so that the machine's moods hit all of them alike; the medians are compared
(on a busy machine the best rounds, printed as well, say more). Everything that watching costs
runs meanwhile: nbdkit's log filter and throw-away layer, and the process that names the objects and prints the live log (to /dev/null).
"""

import argparse
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DISK = 512 << 20
"""Bytes: fits into the page cache of any machine, so that the servers are measured and not a disk."""
SEQUENTIAL = ("256 KiB sequential", 262144, ["-c", "20000", "-d", "16", "-s", "262144"])
RANDOM = ("4 KiB random", 4096, ["-c", "200000", "-d", "64", "-s", "4096", "-S", str(4096 * 2477 * 7)])
BIN = Path(sys.executable).parent
GOAL = {SEQUENTIAL[0]: 0.9, RANDOM[0]: 0.5}
CLIENT = "; ".join(f"qemu-img bench -f raw {' '.join(options)} $1" for _, _, options in (SEQUENTIAL, RANDOM))


def build(folder: Path, files: int) -> Path:
    """An ext4 disk with files of mixed sizes that fill most of it."""
    tree, image = folder / "tree", folder / "disk.img"
    chooser = random.Random(1)
    left = int(DISK * 0.8)
    for number in range(files):
        path = tree / f"d{number % 50}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = min(left, chooser.choice([1000, 5000, 40000, 200000, 2 * left // (files - number)]))
        path.write_bytes(os.urandom(size))
        left -= size
    with open(image, "wb") as file:
        file.truncate(DISK)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image)], check=True)
    subprocess.run(["rm", "-rf", str(tree)], check=True)
    image.read_bytes()  # into the page cache
    return image


@contextlib.contextmanager
def plain(image: Path, folder: Path) -> Iterator[str]:
    """`nbdkit file`, nothing else."""
    socket, pid = folder / "plain", folder / "plain.pid"
    server = subprocess.Popen(["nbdkit", "-f", "--exit-with-parent", "-U", socket, "-P", pid, "file", str(image)])
    while not (pid.exists() and pid.read_text()):
        assert server.poll() is None, "nbdkit did not start"
        time.sleep(0.01)
    yield f"nbd+unix:///?socket={socket}"
    server.terminate()
    server.wait()
    pid.unlink()
    socket.unlink(missing_ok=True)


def measured(output: str) -> list[float]:
    """Bytes per second of each run of the client."""
    seconds = [float(value) for value in re.findall(r"Run completed in ([0-9.]+) seconds", output)]
    counts = [int(options[options.index("-c") + 1]) * size for _, size, options in (SEQUENTIAL, RANDOM)]
    return [count / second for count, second in zip(counts, seconds, strict=True)]


def run_plain(image: Path, folder: Path, _map: Path) -> list[float]:
    """The client against nbdkit's file plugin."""
    with plain(image, folder) as uri:
        return measured(subprocess.run(["sh", "-c", CLIENT, "client", uri], check=True, capture_output=True, text=True).stdout)


def run_watch(image: Path, folder: Path, saved: Path) -> list[float]:
    """The client under `virt-bmap watch`."""
    output = folder / "client.txt"
    command = [BIN / "virt-bmap", "watch", "--map", str(saved), "--log", "/dev/null", str(image), "--",
               "sh", "-c", f"({CLIENT}) > {output}", "client", "$uri"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if done.stderr.strip():
        print(done.stderr.strip())
    return measured(output.read_text())


def run_bmaplogger(image: Path, folder: Path, saved: Path) -> list[float]:
    """The client under bmaplogger, for comparison: no goal is set for it."""
    output = folder / "client.txt"
    command = [BIN / "bmaplogger", "-r", f"file={image}", f"bmap={saved}", "logfile=/dev/null",
               "--run", f"set -- $uri; ({CLIENT}) > {output}"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if done.stderr.strip():
        print(done.stderr.strip())
    return measured(output.read_text())


def main() -> int:
    """Print the medians and what is left of the plain server's; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    servers = {"nbdkit file": run_plain, "virt-bmap watch": run_watch, "bmaplogger": run_bmaplogger}
    found: dict[str, list[list[float]]] = {name: [] for name in servers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = build(folder, args.files)
        saved = folder / "map.parquet"
        subprocess.run([BIN / "virt-bmap", str(image), "-o", str(saved)], check=True, capture_output=True)
        for _ in range(args.rounds):
            for server, run in servers.items():
                found[server].append(run(image, folder, saved))
    missed = 0
    for column, (what, _, _) in enumerate((SEQUENTIAL, RANDOM)):
        runs = {server: [rounds[column] for rounds in found[server]] for server in servers}
        base = statistics.median(runs["nbdkit file"]), max(runs["nbdkit file"])
        for server, speeds in runs.items():
            median, best = statistics.median(speeds), max(speeds)
            goal = GOAL[what] if server == "virt-bmap watch" else 0.0
            missed += median / base[0] < goal
            print(
                f"{what:20} {server:16} median {median / 1e6:7.1f} MB/s {median / base[0]:6.1%}   best {best / 1e6:7.1f} MB/s "
                f"{best / base[1]:6.1%}" + (f"   goal {goal:.0%}" if goal else "")
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
