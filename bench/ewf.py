"""How long an E01 of an ext4 with 200,000 files takes to map: against the same disk raw, and against `fls -r`
of The Sleuth Kit on the same E01.

    python bench/ewf.py [--files N] [--rounds N] CACHE

CACHE keeps the images for the next run; bench/ext.py makes the raw one, ewfacquire the other (chunks of
32 KiB, "fast"). The fastest run of each counts. At most twice the raw one's time is allowed, and beside it
what the chunks that the map asks for take to inflate, which is measured alone; 1 where it was more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ext
import fair

INFLATE = """
import sys, time
from virt_bmap.formats.images.ewf import extents
from virt_bmap.open import open_image
from virt_bmap.survey.survey import survey
reader = open_image(sys.argv[1])
asked, kept = [], reader._inflated
def noting(rows):
    asked.append([row for row in rows.tolist() if row not in reader._clusters])
    return kept(rows)
reader._inflated = noting
survey([reader])
rows = reader._rows
which = [row for part in asked for row in part]
chunks = [reader._files[0].read(int(rows.parent_offset[row]), int(rows.parent_run[row])) for row in which]
start = time.process_time()
for chunk in chunks:
    extents.inflate(chunk, reader.disk.chain[0].layer.cluster)
print(time.process_time() - start, len(chunks), len(set(which)), len(rows))
"""
"""The chunks that a map inflates, inflated once more alone: seconds, how many, how many different ones, of
how many."""


def build(cache: Path, files: int) -> tuple[Path, Path]:
    """The disk raw, and as E01."""
    raw = ext.build(cache, files)
    image = cache / f"ext4-{files}.E01"
    if not image.exists():
        words = ["ewfacquire", "-u", "-q", "-f", "encase6", "-c", "fast", "-S", str(1 << 40)]
        subprocess.run([*words, "-t", image.with_suffix(""), raw], check=True, stdout=subprocess.DEVNULL)
    return raw, image


def taken(command: Sequence[str | Path]) -> tuple[float, float]:
    """(seconds, seconds of processor time) of a process; what it says is thrown away."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("cache", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    raw, image = build(args.cache, args.files)
    fair.as_installed()
    found: dict[str, list[tuple[float, float]]] = {"raw": [], "E01": [], "fls": []}
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "virt_bmap", "-q", "--force", "-o", f"{folder}/map.parquet"]
        commands = {"raw": [*ours, raw], "E01": [*ours, image], "fls": ["fls", "-r", "-i", "ewf", image]}
        for nth in range(args.rounds + 1):
            for name, command in commands.items():
                once = taken(command)
                if nth:  # the first round warms the page cache
                    found[name].append(once)
    alone = subprocess.run([sys.executable, "-c", INFLATE, image], check=True, capture_output=True, text=True)
    inflating, chunks, different, of = (float(word) for word in alone.stdout.split())
    best = {name: min(times) for name, times in found.items()}
    least = {name: min(used for _, used in times) for name, times in found.items()}
    print(f"{image.stat().st_size >> 20:,} MiB of {raw.stat().st_size >> 20:,} MiB, {args.files:,} files")
    for name in found:
        print(f"{name:4} {best[name][0]:7.2f} s, processor {least[name]:7.2f} s")
    print(
        f"inflated: {chunks:,.0f} chunks ({different:,.0f} different) of {of:,.0f}, {inflating:.2f} s alone"
    )
    allowed = 2 * least["raw"] + inflating
    print(
        f"E01: {least['E01'] / allowed:.2f} of what is allowed; "
        f"{least['E01'] / least['fls']:.2f} of what fls takes"
    )
    return int(least["E01"] > allowed)


if __name__ == "__main__":
    raise SystemExit(main())
