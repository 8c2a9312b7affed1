"""virt-bmap verify: read files through a real kernel, and compare where it reads them from with the map."""

import argparse
from typing import TYPE_CHECKING, Any

from virt_bmap.commands.common import add_disk_options, disks_of, print_json, stages
from virt_bmap.commands.observing import refuse_machines, say_left
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say

if TYPE_CHECKING:
    from virt_bmap.observe.judge import Agreement, Difference

NAME = "verify"
HELP = "read files through a real kernel, and compare where it reads them from with the map"
REASONS = {
    "agreed": "read from where the map says",
    "zeroes": "zeroes, read from where the map says or holes: which is which can't be told",
    "hole": "holes: neither has a place for them",
    "unwritten": "allocated but never written: read as zeroes without a disk",
    "inline": "inside an inode or a tree node, read as metadata",
    "compressed": "stored compressed: compared as a whole",
    "encrypted": "stored encrypted: compared as a whole",
}
"""Why bytes of files are not a disagreement, in the order in which they are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line, as docs/man/virt-bmap-verify.1 describes it."""
    parser.add_argument("disk", nargs="*", type=INPUT, help="image, block device or NBD URI")
    parser.add_argument(
        "--sample", metavar="N", type=int, help="read N files of each filesystem instead of all"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="choose other files: the same number, the same files (default: 0)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line: each filesystem's figures, then disagreements",
    )
    add_disk_options(parser)


def run(args: argparse.Namespace) -> int:
    """Launch, mount, read, compare. 1 where the two disagree."""
    from virt_bmap.observe.verify import verify
    from virt_bmap.serve.source import source

    if args.sample is not None and args.sample < 1:
        raise UsageError(f"--sample {args.sample}: must be 1 or more")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must not be negative")
    disks = disks_of(args, args.disk)
    refuse_machines(disks)
    sources = [source(image, disks) for image in disks.images]
    with stages() as tell:
        found, left = verify(sources, disks, args.sample, args.seed, tell)
    say_left(left)
    if args.json:
        print_json([_figures(device, verdict) for device, verdict in found])
        print_json([_row(device, row) for device, verdict in found for row in verdict.disagreements])
    else:
        for device, verdict in found:
            _say(device, verdict)
    wrong = sum(len(verdict.disagreements) for _, verdict in found)
    if not args.json:
        say(f"{plural(wrong, 'disagreement')}" if wrong else "the map and the kernel agree")
    return 1 if wrong else 0


def _figures(device: str, verdict: "Agreement") -> dict[str, Any]:
    return {
        "device": escape(device.encode()),
        "type": verdict.type,
        "kernel": verdict.kernel,
        "files": verdict.files,
        "of": verdict.of,
        "bytes": verdict.bytes,
        "other": verdict.other,
        "disagreements": len(verdict.disagreements),
    }


def _row(device: str, row: "Difference") -> dict[str, Any]:
    return {
        "device": escape(device.encode()),
        "code": row.code,
        "path": escape(row.path.encode()),
        "start": row.start,
        "end": row.end,
        "mapped": None if row.mapped < 0 else row.mapped,
        "observed": None if row.observed < 0 else row.observed,
        "detail": escape(row.detail.encode()),
    }


def _say(device: str, verdict: "Agreement") -> None:
    """One filesystem: what was compared, how it came out, and what else was read."""
    which = (
        f"{verdict.files:,} of {plural(verdict.of, 'file')}"
        if verdict.files < verdict.of
        else plural(verdict.files, "file")
    )
    say(f"{escape(device.encode())}: {verdict.type}, {which} read by {verdict.kernel}")
    for reason, words in REASONS.items():
        if size := verdict.bytes.get(reason):
            say(f"  {human(size):>12}  {words}")
    for kind, size in sorted(verdict.other.items(), key=lambda item: -item[1]):
        say(f"  {human(size):>12}  read on the way: {kind}")
    for row in verdict.disagreements:
        where = f" bytes {row.start:#x}-{row.end:#x}" if row.start >= 0 else ""
        mapped = "nowhere" if row.mapped < 0 else f"at {row.mapped:#x}"
        observed = "not read" if row.observed < 0 else f"read at {row.observed:#x}"
        words = escape(row.detail.encode()) or f"in the map {mapped}, by the kernel {observed}"
        say(f"  {row.code}: {escape(row.path.encode())}{where}: {words}")
