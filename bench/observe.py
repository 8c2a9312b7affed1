#!/usr/bin/env python3
"""Both ways to a map, side by side: the metadata read directly, and every file read by a kernel in
libguestfs's appliance.

bench/observe.py [FILES]        an ext4 with 2,000 files by default
times in seconds, the appliance's launch apart
"""

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from virt_bmap.observe.journal import Journal
from virt_bmap.observe.session import observed_map, session
from virt_bmap.serve.source import source
from virt_bmap.survey import maps


def main() -> None:
    """Make the image, map it both ways, compare."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = made(folder, count)
        direct = min(seconds(lambda: maps.map_disks([str(image)])) for _ in range(5))
        sources = [source(str(image))]
        start = time.monotonic()
        with (
            contextlib.closing(Journal(str(folder / "journal"), sources, False)) as journal,
            session(sources) as running,
        ):
            launched = time.monotonic()
            observed_map(running, journal)
            observed = time.monotonic() - launched
        size = sum(file.stat().st_size for file in (folder / "tree").rglob("*"))
    print(f"ext4, {count:,} files, {size / 1e6:.0f} MB")
    print(f"direct    {direct:8.3f} s")
    print(
        f"observed  {observed:8.1f} s, after {launched - start:.1f} s until the appliance was up; "
        f"{observed / count * 1000:.0f} ms a file"
    )
    print(f"ratio     {observed / direct:8.0f}")


def made(folder: Path, count: int) -> Path:
    """An ext4 with this many files, most of them small."""
    chooser = random.Random(1)
    for number in range(count):
        target = folder / "tree" / f"d{number % 40}" / f"file{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(chooser.randbytes(int(min(1 << 20, chooser.lognormvariate(9, 1.5)))))
    image = folder / "disk.img"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", folder / "tree", image, "512M"], check=True
    )
    return image


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
