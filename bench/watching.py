"""Memory of a watch that goes on: a client writes for minutes to files and to free space of a large
filesystem, and to its superblock again and again, so that the map is read all the time.

    python bench/watching.py [--files N] [--seconds S] [--free SHARE] [--rate N] CACHE

CACHE keeps the image for the next run (see bench/ext.py). What is written goes to the throw-away layer, some
hundred MiB in TMPDIR. Printed are, for each tenth of the time, the writes so far and the most that the watch,
the process that reads the map, and the folder in memory between them took; exit status 1 where the watch's
own memory in the last third is more than a tenth above that of the second one.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ext
import numpy as np

from virt_bmap.model import tables
from virt_bmap.open.nbd import REQUEST_HEADER, REQUEST_MAGIC
from virt_bmap.open.nbd_writer import CMD_WRITE, REPLY, NbdWriter
from virt_bmap.survey.maps import load

BIN = Path(sys.executable).parent
BLOCK = 4096
PLACES = 100_000
"""Blocks that are written, again and again."""
TOGETHER = 256
SUPERBLOCK = 0.5
"""Seconds between two writes of the filesystem's first block."""
MORE = 1.1
MIB = 1 << 20


def client(uri: str, places: str, head: str, seconds: float, rate: float) -> None:
    """Write, `rate` blocks a second at most, and say how much that was."""
    offsets, first = np.load(places), Path(head).read_bytes()
    chooser = np.random.default_rng(1)
    link = NbdWriter(uri)
    wire = np.zeros(TOGETHER, np.dtype([("request", REQUEST_HEADER), ("data", f"V{BLOCK}")]))
    request = wire["request"]
    request["magic"], request["type"], request["length"], request["cookie"] = (
        REQUEST_MAGIC,
        CMD_WRITE,
        BLOCK,
        np.arange(TOGETHER),
    )
    begin = last = said = time.monotonic()
    count = 0
    while time.monotonic() - begin < seconds:
        request["offset"] = offsets[chooser.integers(len(offsets), size=TOGETHER)]
        wire["data"] = bytes(BLOCK)
        if time.monotonic() - last > SUPERBLOCK:
            last = time.monotonic()
            request["offset"][0], wire["data"][0] = 0, first
        link._send(memoryview(wire).cast("B"))
        replies = np.frombuffer(link._receive(TOGETHER * REPLY.itemsize), REPLY)
        assert not replies["error"].any()
        count += TOGETHER
        time.sleep(max(0.0, count / rate - (time.monotonic() - begin)))
        if time.monotonic() - said > 1:
            said = time.monotonic()
            print(count, flush=True)
    link.close()


def memory(pid: int) -> int:
    """Bytes of a process that are its own or in memory only for it."""
    try:
        words = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(words.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def children(pid: int) -> Iterator[int]:
    """The processes that read the map for this one."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid
                and b"refresh" in (folder / "cmdline").read_bytes()
            ):
                yield int(folder.name)
        except (OSError, ValueError):
            continue


def places(image: Path, folder: Path, free: float) -> None:
    """Blocks of files and of free space that the client may write to."""
    saved = folder / "map.parquet"
    subprocess.run([BIN / "virt-bmap", "-o", saved, image], check=True, capture_output=True)
    extents = load(str(saved)).extents
    kind, offset, length = (
        tables.codes(extents, "kind"),
        tables.integers(extents, "volume_offset"),
        tables.integers(extents, "length"),
    )
    chooser = np.random.default_rng(2)
    data = offset[(kind == tables.DATA) & (length >= BLOCK)]
    empty = (kind == tables.FREE) & (length >= 2 * BLOCK)
    row = chooser.choice(np.flatnonzero(empty), int(PLACES * free), p=length[empty] / length[empty].sum())
    inside = offset[row] + (chooser.random(len(row)) * (length[row] // BLOCK)).astype(np.int64) * BLOCK
    np.save(
        folder / "places.npy",
        np.concatenate([chooser.choice(data, int(PLACES * (1 - free))) // BLOCK * BLOCK, inside]),
    )
    with open(image, "rb") as file:
        (folder / "head").write_bytes(file.read(BLOCK))


def main() -> int:
    """Watch the client, and the watch."""
    if sys.argv[1:2] == ["--client"]:
        client(*sys.argv[2:5], *map(float, sys.argv[5:7]))  # type: ignore[arg-type]
        return 0
    if sys.argv[1:2] == ["--places"]:
        places(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--free", type=float, default=0.3, help="share of the writes that goes to free space")
    parser.add_argument(
        "--rate",
        type=float,
        default=6000,
        help="writes a second; more than can be named are dropped from the log, and said",
    )
    parser.add_argument("cache", type=Path)
    args = parser.parse_args()
    image = ext.build(args.cache, args.files)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own, whose memory goes with it
        subprocess.run([sys.executable, __file__, "--places", image, folder, str(args.free)], check=True)
        command = [
            BIN / "virt-bmap",
            "watch",
            "-o",
            folder / "trace.parquet",
            "--log",
            "/dev/null",
            "--summary",
            folder / "summary",
            image,
            "--",
            sys.executable,
            __file__,
            "--client",
            "$uri",
            folder / "places.npy",
            folder / "head",
            str(args.seconds),
            str(args.rate),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        counts = [0]
        assert process.stdout
        reader = threading.Thread(
            target=lambda: counts.extend(int(line) for line in process.stdout), daemon=True
        )  # type: ignore[union-attr]
        reader.start()
        samples: list[tuple[float, int, int, int]] = []
        begin = time.monotonic()
        while process.poll() is None:
            shared = sum(
                int(line.split()[0]) << 10
                for line in subprocess.run(
                    "du -sk /dev/shm/virt-bmap-$(id -u)*", shell=True, capture_output=True, text=True
                ).stdout.splitlines()
            )
            samples.append(
                (
                    time.monotonic() - begin,
                    memory(process.pid),
                    sum(map(memory, children(process.pid))),
                    shared,
                )
            )
            if len(counts) > 1 and len(samples) % 20 == 0:
                print(f"{samples[-1][0]:6.0f} s {counts[-1]:>11,} writes   watch "
                    f"{samples[-1][1] / MIB:6.0f} MiB   reader {samples[-1][2] / MIB:6.0f} MiB   "
                      f"between them {samples[-1][3] / MIB:5.0f} MiB", flush=True)  # fmt: skip
            time.sleep(0.5)
        reader.join()
        trace = (folder / "trace.parquet").stat().st_size
    busy = [sample for sample in samples if sample[0] < args.seconds]
    third = len(busy) // 3
    middle, last = (
        statistics.median(sample[1] for sample in part)
        for part in (busy[third : 2 * third], busy[2 * third :])
    )
    most = [max(sample[column] for sample in samples) / MIB for column in (1, 2, 3)]
    print(
        f"{args.files:,} files, {counts[-1]:,} writes in {args.seconds:.0f} s: the watch's own memory "
        f"{middle / MIB:.0f} MiB in the second third, {last / MIB:.0f} MiB in the "
        f"last; most: watch {most[0]:.0f} MiB, reader of the map {most[1]:.0f} MiB, between them "
        f"{most[2]:.0f} MiB; trace {trace / MIB:.0f} MiB"
    )
    return process.returncode or int(last > middle * MORE)


if __name__ == "__main__":
    raise SystemExit(main())
