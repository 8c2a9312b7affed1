"""How much of `nbdkit file`'s throughput is left when the same disk is watched, with the same client, in one
run.

    python bench/watch.py [--files N] [--rounds N] [--writing] [--bmaplogger]

The client is `qemu-img bench` (C, pipelined): 256 KiB sequential reads with 16 in flight, and 4 KiB reads
scattered over the disk with 64 in flight. Rounds alternate between the servers, so that the machine's moods
hit all of them alike; the medians are compared (on a busy machine the best rounds, printed as well, say
more). Everything that watching costs runs meanwhile: nbdkit's log filter and throw-away layer, the process
that reads the map again, and the one that names the objects, prints the live log (to /dev/null) or draws the
screen (on a pseudo terminal), and writes the trace. With --writing, a second client of each server writes the
filesystem's superblock twice a second, as it is: so the map is read again and again.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import random
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

DISK = 512 << 20
"""Bytes: fits into the page cache of any machine, so that the servers are measured and not a disk."""
SEQUENTIAL = ("256 KiB sequential", 262144, ["-c", "20000", "-d", "16", "-s", "262144"])
RANDOM = ("4 KiB random", 4096, ["-c", "200000", "-d", "64", "-s", "4096", "-S", str(4096 * 2477 * 7)])
BIN = Path(sys.executable).parent
GOAL = {SEQUENTIAL[0]: 0.9, RANDOM[0]: 0.5}
READING = "; ".join(f"qemu-img bench -f raw {' '.join(options)} $1" for _, _, options in (SEQUENTIAL, RANDOM))
WRITING = """
(while sleep 0.5 && echo "write -q -s $2 0 4096"; do :
done) 2>/dev/null | qemu-io -f raw $1 >/dev/null & writer=$!
trap 'kill $writer' EXIT
"""
"""Until the reading is done; what it writes is the disk's first block, from the file $2."""
WATCHED = ("watch", "watch -o TRACE", "watch --tui -o TRACE")
SCREEN = 40, 120
"""Lines and columns of the terminal."""


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
    server = subprocess.Popen(
        ["nbdkit", "-f", "--exit-with-parent", "-U", socket, "-P", pid, "file", str(image)]
    )
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


class Bench:
    """One disk, its map, and the servers."""

    def __init__(self, folder: Path, files: int, writing: bool) -> None:
        self.folder, self.image, self.map = folder, build(folder, files), folder / "map.parquet"
        subprocess.run([BIN / "virt-bmap", self.image, "-o", self.map], check=True, capture_output=True)
        self.output, self.head = folder / "client.txt", folder / "head"
        self.head.write_bytes(self.image.open("rb").read(4096))
        self.client = f"{WRITING if writing else ''}({READING}) > {self.output}"
        self.servers = {
            "nbdkit file": self.plain,
            **{f"virt-bmap {name}": lambda name=name: self.watch(name) for name in WATCHED},
            "bmaplogger": self.bmaplogger,
        }

    def plain(self) -> None:
        """The client against nbdkit's file plugin."""
        with plain(self.image, self.folder) as uri:
            subprocess.run(
                ["sh", "-c", self.client, "client", uri, self.head], check=True, stdout=subprocess.DEVNULL
            )

    def watch(self, name: str) -> None:
        """The client under `virt-bmap watch`, with the options of the row."""
        options = ["-o", self.folder / "trace.parquet"] if "-o" in name else []
        options += ["--tui"] if "--tui" in name else ["--log", "/dev/null"]
        command = [BIN / "virt-bmap", "watch", "--map", self.map, "--summary", "/dev/null", *options,
            self.image, "--",
                   "sh", "-c", self.client, "client", "$uri", self.head]  # fmt: skip
        if "--tui" in name:
            on_terminal(command)
            return
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if done.stderr.strip():
            print(done.stderr.strip())

    def bmaplogger(self) -> None:
        """The client under bmaplogger, for comparison: no goal is set for it."""
        command = [BIN / "bmaplogger", *([] if "qemu-io" in self.client else ["-r"]), f"file={self.image}",
            f"bmap={self.map}",
                   "logfile=/dev/null", "--run", f"set -- $uri {self.head}; {self.client}"]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if done.stderr.strip():
            print(done.stderr.strip())

    def run(self, server: str) -> list[float]:
        """Bytes per second of both kinds of reading."""
        self.servers[server]()
        return measured(self.output.read_text())


def on_terminal(command: list[str | Path]) -> None:
    """Run a screen on a pseudo terminal that takes all that is drawn, and leave it when it says that the
    command has ended."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(command[0], [str(word) for word in command], {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", *SCREEN, 0, 0))
    seen, left = b"", False
    with contextlib.suppress(OSError):  # the terminal's end
        while select.select([terminal], [], [], 60)[0] and (data := os.read(terminal, 1 << 16)):
            seen = seen[-100:] + data
            if b"ended, status" in seen and not left:
                left = bool(os.write(terminal, b"q"))
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert status == 0, seen.decode(errors="replace")


def main() -> int:
    """Print the medians and what is left of the plain server's; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--writing", action="store_true", help="let a second client write the superblock all the time"
    )
    parser.add_argument("--bmaplogger", action="store_true", help="measure that, too; no goal is set for it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.files, args.writing)
        found: dict[str, list[list[float]]] = {
            server: [] for server in bench.servers if args.bmaplogger or server != "bmaplogger"
        }
        for _ in range(args.rounds):
            for server, runs in found.items():
                runs.append(bench.run(server))
    missed = 0
    for column, (what, _, _) in enumerate((SEQUENTIAL, RANDOM)):
        base = [speeds[column] for speeds in found["nbdkit file"]]
        for server, rounds in found.items():
            speeds = [both[column] for both in rounds]
            median, best = statistics.median(speeds), max(speeds)
            share, goal = median / statistics.median(base), GOAL[what] if "watch" in server else 0.0
            missed += share < goal
            print(
                f"{what:20} {server:30} median {median / 1e6:7.1f} MB/s {share:6.1%}   best "
                f"{best / 1e6:7.1f} MB/s "
                f"{best / max(base):6.1%}" + (f"   goal {goal:.0%}" if goal else "")
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
