"""`virt-bmap report`: a map and traces as one HTML page."""

import argparse
import os
import sys

from virt_bmap.commands.common import (
    add_disk_options,
    add_force_option,
    add_host_option,
    add_nested_option,
    map_or_disks,
)
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import say
from virt_bmap.host.ours import is_page
from virt_bmap.model.contract import Asks

HELP = "draw a map, and traces of its disks, as one HTML page that needs no network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "map", metavar="MAP-or-DISK", nargs="?", type=INPUT, help="a saved map, or a disk to map now"
    )
    parser.add_argument("trace", metavar="TRACE", nargs="*", type=INPUT, help="traces of the map's disks")
    parser.add_argument(
        "-o", "--output", metavar="PAGE", type=Output(is_page), help="the HTML file to write; required"
    )
    parser.add_argument(
        "--title", metavar="TEXT", help="the page's heading (default: the name of the map or disk)"
    )
    add_force_option(parser)
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.host.files import replacing

    if not args.output:
        raise UsageError("report needs -o PAGE, the file to write")
    if args.map is None and not args.add:
        raise UsageError("report needs a saved map or a disk")
    given, names = ([], [args.map, *args.trace]) if args.add else ([args.map], args.trace)
    names = [name for name in names if name is not None]
    title = args.title or os.path.basename(args.add[0] if args.add else args.map)
    from virt_bmap.accesses.traces import load, read
    from virt_bmap.show.report.page import page

    for name in names:
        read(name)  # before a disk is mapped: a slip should cost no time
    bmap = map_or_disks(args, given, Asks.SLEEP)
    with replacing(args.output) as file:
        size = file.write(page(bmap, load(names, bmap) if names else None, title))
    say(f"{args.output}: {human(size)} written, {plural(len(names), 'trace')} in it", file=sys.stderr)
    return 0
