"""A disk behind a slow link: how many round trips' worth of waiting does a map cost, and how many bytes,
against the metadata's own?

    python bench/link.py IMAGE [DELAY-MS]

nbdkit's delay filter holds every request for DELAY-MS (20). Waiting is the time with the delay less the time
without, in round trips. The metadata's bytes are those of the map's own extents: what is metadata,
directories and trees, free space and the journal's content left aside.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from virt_bmap.core.arrays import total
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open import open_image
from virt_bmap.survey.survey import survey

THREADS = 256
"""Requests that nbdkit holds at a time; a real link holds any number."""
ROUNDS = 5
TARGET_TRIPS, TARGET_BYTES = 40, 1.2
UNREAD = ("inode table (unused)", "reserved group descriptors", "journal", "boot code")
"""Metadata that needs no reading."""


def timed(image: str, delay: int) -> tuple[float, BlockMap, int, int]:
    """(seconds, map, batches waited for, bytes asked for) of mapping through nbdkit."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        server = subprocess.Popen(
            [
                "nbdkit",
                "-f",
                "-r",
                "-U",
                socket,
                "-t",
                str(THREADS),
                "--filter=delay",
                "file",
                image,
                f"delay-read={delay}ms",
            ]
        )
        try:
            while not socket.exists():
                time.sleep(0.05)
            time.sleep(0.3)
            reader = open_image(f"nbd+unix:///?socket={socket}")
            start = time.perf_counter()
            bmap = survey([reader])
            took = time.perf_counter() - start
            reader.close()  # nbdkit ends only when its clients have gone
            return took, bmap, reader.rounds, reader.requested
        finally:
            server.terminate()
            server.wait()


def fastest(image: str, delay: int) -> tuple[float, BlockMap, int, int]:
    """Of ROUNDS runs: all noise comes on top, and here it would be taken for waiting."""
    return min((timed(image, delay) for _ in range(ROUNDS)), key=lambda found: found[0])


def metadata_bytes(bmap: BlockMap) -> int:
    """What has to be read to know the map."""
    kind = tables.codes(bmap.extents, "kind")
    part = np.array(bmap.extents.column("part").to_pylist(), object)
    flags = tables.integers(bmap.extents, "flags")
    wanted = (
        np.isin(kind, (tables.METADATA, tables.DIRECTORY, tables.TREE))
        & ~np.isin(part, UNREAD)
        & ((flags & tables.INLINE) == 0)
    )
    start = tables.integers(bmap.extents, "volume_offset")[wanted]
    return total(start, start + tables.integers(bmap.extents, "length")[wanted])


def main() -> None:
    image, delay = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
    plain, bmap, _, _ = fastest(image, 0)
    slow, _, rounds, asked = fastest(image, delay)
    trips, ratio = (slow - plain) / (delay / 1000), asked / metadata_bytes(bmap)
    print(
        f"{bmap.inodes.num_rows:,} inodes: {plain:.2f} s without delay, {slow:.2f} s with {delay} ms "
        "a request"
    )
    print(f"waiting: {trips:.1f} round trips (target {TARGET_TRIPS}), in {rounds} batches")
    print(f"asked for {asked / 1e6:.1f} MB: {ratio:.2f} times the metadata's bytes (target {TARGET_BYTES})")


if __name__ == "__main__":
    main()
