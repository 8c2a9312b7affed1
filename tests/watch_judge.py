"""Is every name right that a watch gives without a mark? A guest whose blocks say whose they are, a disk that
reads them, and what the trace calls them.

    watch_judge.py [--kind ext4|xfs|btrfs]... [--seed N]... [--seconds S] [--scenario NAME]... [--files N]
                   [--machine] [--keep FOLDER]

Needs root, FUSE and loop devices. What counts: every marked block of every request. It is right where the
trace names a file that was called so at some time (or one that shares its blocks), wrong where it names
another one, or none for what was written. What is read where no content lies is left out: there lies what was
there before (of a directory, say, that is in the journal so far).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import marked_disk
import watch_guest
import watch_machine

BMAP = str(Path(sys.executable).parent / "virt-bmap")
NEAR = {"read": 50_000_000, "write": 2_000_000_000}
"""ns from the watch's line, which comes first, to the disk's, at most: of reads the disk has more lines,
those of whoever reads the map again."""
FILE = ("data", "unwritten")


@dataclass
class Judged:
    """Blocks by what was said of them (operation, right or wrong, marked or not), those that are wrong, and
    how long names took."""

    blocks: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    delays_ms: list[float] = field(default_factory=list)
    requests: int = 0
    marked_requests: int = 0
    maps: int = 0
    refused: list[str] = field(default_factory=list)
    """What the guest could not do here."""

    def __str__(self) -> str:
        named = sum(self.blocks.values())
        marked = sum(count for (_, _, is_marked), count in self.blocks.items() if is_marked)
        delays = np.percentile(self.delays_ms or [0], [50, 90, 99]).astype(int).tolist()
        parts = ", ".join(
            f"{op} {how}{' (marked)' if is_marked else ''} {count}"
            for (op, how, is_marked), count in sorted(self.blocks.items())
        )
        return (
            f"{len(self.wrong)} wrong without a mark of {named} blocks; {marked / max(named, 1):.1%} "
            f"of them marked; {self.maps} maps; "
            f"names after {delays[0]}, {delays[1]}, {delays[2]} ms (50, 90, 99 %); "
            f"{parts}{''.join(f'; not done: {what}' for what in self.refused)}"
        )


def watched(
    folder: Path,
    kind: str,
    seed: int,
    seconds: float,
    scenarios: list[str],
    files: int = 0,
    guest: str = watch_guest.__file__,
) -> Path:
    """Run the guest under a watch, on a disk that reads its marks and has so many other files: the trace."""
    image, trace = folder / "disk.img", folder / "trace.parquet"
    with open(image, "wb") as file:
        file.truncate(watch_guest.GROWN + files * watch_guest.ROOM)
    watch_guest.make(kind, image, watch_guest.SIZE + files * watch_guest.ROOM, files)
    watch_guest.fill(folder, image, files)
    with beneath(image, folder) as uri:
        command = [
            BMAP,
            "watch",
            uri,
            "--write",
            "-o",
            trace,
            "--log",
            folder / "log",
            "--summary",
            folder / "summary",
            "--",
            sys.executable,
            guest,
            "$unixsocket",
            folder,
            kind,
            str(seed),
            str(seconds),
            *scenarios,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 900)
        assert done.returncode == 0, done.stderr
        print(done.stderr, end="", file=sys.stderr)
    return trace


@contextlib.contextmanager
def beneath(image: Path, folder: Path) -> Iterator[str]:
    """The disk that reads marks, as an NBD URI."""
    socket, pid = folder / "marked", folder / "marked.pid"
    server = subprocess.Popen(
        [
            "nbdkit",
            "-f",
            "-U",
            socket,
            "-P",
            pid,
            "python",
            marked_disk.__file__,
            f"file={image}",
            f"log={folder / 'marks'}",
        ]
    )
    while not (pid.exists() and pid.read_text()):
        assert server.poll() is None
        time.sleep(0.02)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()


class Names:
    """What each file was ever called, and which others may hold its blocks."""

    def __init__(self, path: Path) -> None:
        self.of: defaultdict[int, set[bytes]] = defaultdict(set)
        self.clones: defaultdict[int, set[int]] = defaultdict(set)
        self.inode: dict[int, int] = {}
        self.snapshots: list[bytes] = []
        self.mkfs: list[int] = []
        self.refused: list[str] = []
        for line in path.read_text().splitlines():
            said = json.loads(line)
            if "file" in said:
                self.of[said["file"]].add(said["path"].encode())
            if "inode" in said:
                self.inode[said["file"]] = said["inode"]
            if "clone_of" in said:
                for known in [
                    said["clone_of"],
                    *(of for of, those in self.clones.items() if said["clone_of"] in those),
                ]:
                    self.clones[known].add(said["file"])
            if "refused" in said:
                self.refused.append(said["refused"])
            if "snapshot" in said:
                self.snapshots.append(said["snapshot"].encode())
            if said.get("scenario") == "mkfs":
                self.mkfs.append(said["time_ns"])

    def fits(self, file: int, path: bytes | None, inode: int) -> bool:
        """Was this the file's name, or that of one which shares its blocks? A file that is deleted has none,
        but is its inode still."""
        if path is None:
            return inode in (self.inode[number] for number in (file, *self.clones[file]))
        for snapshot in self.snapshots:
            if path.startswith(snapshot + b"/"):
                path = path[len(snapshot) :]
        return any(path in self.of[number] for number in (file, *self.clones[file]))


def judge(folder: Path, trace: Path) -> Judged:
    """Compare the trace with what the disk saw."""
    names, result = Names(folder / "names"), Judged()
    result.refused = names.refused
    rows: defaultdict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    begun = {
        said["map"]: said["begun_ns"]
        for said in json.loads(pq.read_metadata(trace).metadata[b"virt-bmap-maps"])
    }
    result.maps = len(begun)
    file = pq.ParquetFile(trace)
    for number in range(file.num_row_groups):
        for row in file.read_row_group(number).to_pylist():
            rows[row["op"], row["offset"], row["length"]].append(row)
            result.requests += 1
            result.marked_requests += any(piece["older"] for piece in row["objects"])
            _judge_mkfs(row, names, result)
    for line in (folder / "marks").read_text().splitlines():
        when, op, offset, length, *blocks = line.split()
        if not blocks:
            continue
        known = rows[op, int(offset), int(length)]
        near = [
            row
            for row in known
            if 0 <= int(when) - row["time_ns"] < NEAR[op] and (op == "read" or "used" not in row)
        ]
        if not near:
            if op == "write":
                result.wrong.append(f"{line}: not in the trace")
            continue  # the reads of whoever reads the map again are not
        row = (min if op == "write" else max)(near, key=lambda row: row["time_ns"])
        row["used"] = True
        for block in blocks:
            at, number, index = map(int, block.split(":"))
            _judge_block(result, names, row, op, at, number, index, begun)
    return result


def _judge_block(
    result: Judged,
    names: Names,
    row: dict[str, Any],
    op: str,
    at: int,
    number: int,
    index: int,
    begun: dict[int, int],
) -> None:
    pieces = [
        piece
        for piece in row["objects"]
        if piece["offset"] <= at < piece["offset"] + piece["length"] and not piece["inline"]
    ]
    files = [piece for piece in pieces if piece["kind"] in FILE]
    marked = bool(pieces) and all(piece["older"] for piece in files or pieces)
    if op == "read" and (
        not any(piece["kind"] == "data" for piece in pieces)
        or any(piece["part"] == "bookend" for piece in pieces)
    ):
        result.blocks[op, "stale", marked] += 1
        return
    right = [piece for piece in files if names.fits(number, piece["path"], piece["inode"])]
    result.blocks[op, "right" if right else "wrong" if files else "nobody's", marked] += 1
    if right:
        piece = right[0]
        marked = piece["older"]
        if (
            piece["file_offset"] is not None
            and piece["file_offset"] + at - piece["offset"] != index * marked_disk.BLOCK
            and not marked
        ):
            result.wrong.append(
                f"{op} at {at}: {piece['path']!r} at {piece['file_offset']}, not block {index}"
            )
        result.delays_ms.append(max(0, begun[piece["map"]] - row["time_ns"]) / 1e6)
    elif not marked:
        said = [
            (
                piece["kind"],
                piece["path"],
                piece["part"],
                piece["map"],
                (begun[piece["map"]] - row["time_ns"]) // 10**6,
            )
            for piece in files or pieces
        ]
        result.wrong.append(
            f"{row['time_ns']} {op} at {at}: {number} ({sorted(names.of[number])[:3]}) is called {said}"
        )


def _judge_mkfs(row: dict[str, Any], names: Names, result: Judged) -> None:
    """What mkfs writes belongs to no file."""
    if (
        len(names.mkfs) != 2
        or not names.mkfs[0] < row["time_ns"] < names.mkfs[1]
        or row["op"] not in ("write", "zero")
    ):
        return
    if bad := [piece["path"] for piece in row["objects"] if piece["kind"] in FILE and not piece["older"]]:
        result.wrong.append(f"mkfs writes at {row['offset']}: is called {bad[0]!r}")


def main() -> int:
    """Print what was found, a line for each run; exit status 1 where a name was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=tuple(watch_guest.MAKE))
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--scenario", action="append", choices=watch_guest.SCENARIOS)
    parser.add_argument("--files", type=int, default=0, help="so many files lie there before")
    parser.add_argument("--machine", action="store_true", help="the guest has a kernel of its own, emulated")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave disks, logs and traces here")
    args = parser.parse_args()
    wrong = 0
    for kind in args.kind or watch_guest.MAKE:
        for seed in args.seed or [1]:
            memory = os.path.isdir("/dev/shm") and not args.machine  # which has a /dev of its own
            with tempfile.TemporaryDirectory(dir="/dev/shm" if memory else None) as name:
                folder = Path(name)
                if args.keep:
                    folder = args.keep / f"{kind}-{seed}"
                    folder.mkdir(parents=True)
                found = judge(
                    folder,
                    watched(
                        folder,
                        kind,
                        seed,
                        args.seconds,
                        args.scenario or list(watch_guest.SCENARIOS),
                        args.files,
                        watch_machine.__file__ if args.machine else watch_guest.__file__,
                    ),
                )
            print(f"{kind} seed {seed}: {found}", flush=True)
            for line in found.wrong[:10]:
                print("   ", line)
            wrong += len(found.wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
