"""virt-bmap map: write the block map of one or more disks."""

import argparse
import sys
import time
from collections.abc import Sequence

from virt_bmap.commands.common import (
    add_disk_options,
    add_force_option,
    add_host_option,
    add_nested_option,
    disks_of,
    elapsed,
    mapped,
)
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.host.files import replacing
from virt_bmap.host.ours import is_map
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

HELP = "write the block map of disks: which file owns every byte?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("disk", nargs="*", type=INPUT, help="image, block device or NBD URI")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="bmap",
        type=Output(is_map),
        help="where to write the map: text, or the tables if it "
        "ends in .parquet; - is standard output (default: bmap)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    parser.add_argument(
        "--method",
        choices=("auto", "direct", "observe"),
        default="auto",
        help="direct: read the filesystems' metadata; observe: read every file through a kernel and watch "
        "which blocks it reads; auto: direct, and say what would have to be observed (default: auto)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an observation that was interrupted"
    )
    add_force_option(parser)
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    disks = disks_of(args, args.disk)
    if args.method == "observe" and disks.host_offsets:
        raise UsageError(
            "--host-offsets reads the image formats' own metadata; "
            "an observation counts in bytes of the guest's disks"
        )
    if args.method == "observe":
        from virt_bmap.commands.observing import observe

        with observe(args, disks) as bmap:
            write(bmap, args.output, disks.images)
    elif args.resume:
        raise UsageError("--resume goes on with an observation: it needs --method observe")
    else:
        bmap = mapped(disks)
        refuse_unknown(bmap, disks.images)
        write(bmap, args.output, disks.images)
    if not args.quiet:
        summary(bmap, args.output, elapsed(start))
    if args.method == "auto":
        from virt_bmap.observe.advice import advice

        for line in advice(bmap):
            say(f"virt-bmap: {line}", file=sys.stderr)
    return 0


def write(bmap: BlockMap, output: str, images: Sequence[str]) -> None:
    """The map as text, or as tables where the name says so."""
    with replacing(output) as file:
        if output.endswith(".parquet"):
            from virt_bmap.saved import parquet

            parquet.save(bmap, file, images)
        else:
            from virt_bmap.saved import bmap as text

            text.save(bmap, file)


def refuse_unknown(bmap: BlockMap, images: Sequence[str]) -> None:
    """ImageError where nothing on a disk is known: no partition table, volume or filesystem. A map of image
    files has their own metadata in any case."""
    if bmap.on_files:
        return
    disks = [number for number, kind in enumerate(bmap.volumes.column("kind").to_pylist()) if kind == "disk"]
    for image, disk in zip(images, disks, strict=False):
        if bmap.volumes.column("type")[disk].as_py() is None:
            raise ImageError(
                f"{image}: nothing known is on this disk: no partition table, volume manager or filesystem "
                "is where one would be; if the image is in a format other than raw, name it with --format"
            )


def summary(bmap: BlockMap, output: str, took: str) -> None:
    """What was found, as the original said it, and what was wrong; on standard error when the map goes to
    standard output."""
    out = sys.stderr if output == "-" else sys.stdout
    kinds = bmap.volumes.column("kind").to_pylist()
    alive = tables.integers(bmap.inodes, "flags") & tables.I_DELETED == 0
    types = tables.codes(bmap.inodes, "type")[alive].tolist()
    counted = [
        plural(kinds.count("disk"), "disk"), plural(kinds.count("partition"), "partition"),
        plural(kinds.count("lv"), "logical volume"), plural(bmap.filesystems.num_rows, "filesystem"),
        plural(types.count(tables.T_DIRECTORY), "directory", "directories"),
        plural(types.count(tables.T_FILE), "file"),
    ]  # fmt: skip
    say(", ".join(counted), file=out)
    for problem in bmap.problems.to_pylist():
        if problem["severity"] != "note":
            name = bmap.volumes.column("name")[problem["volume"]].as_py()
            say(
                f"{problem['severity']}: {escape(name.encode())}: {escape(problem['detail'].encode())}",
                file=sys.stderr,
            )
    if output != "-":
        say(f"{output}: written in {took}", file=out)
