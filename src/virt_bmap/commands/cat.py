"""virt-bmap cat: the content of a file on standard output."""

import argparse
import os
import sys

from virt_bmap.commands.common import (
    Progress,
    add_disk_options,
    add_nested_option,
    add_partial_option,
    disks_of,
)
from virt_bmap.commands.extract import warn_of_doubts
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt, ImageError, Unsupported, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.lost import Missing
from virt_bmap.core.printable import say
from virt_bmap.model import tables
from virt_bmap.survey import maps

HELP = "write the content of a file to standard output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        metavar="[DISK] DEVICE PATH",
        nargs="+",
        type=INPUT,
        help="a disk (not with -a), a device such as /dev/sda1, and a path on it",
    )
    parser.add_argument(
        "--stream", metavar="NAME", help="a named stream of the file (NTFS) instead of its content"
    )
    add_partial_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.ask.content import Files, spread

    wanted = 2 if args.add else 3
    if len(args.arguments) != wanted:
        raise UsageError(
            f"cat needs {'DEVICE and PATH' if args.add else 'a disk, DEVICE and PATH'}; "
            f"given: {' '.join(args.arguments)}"
        )
    disks, (device, path) = disks_of(args, args.arguments[:-2]), args.arguments[-2:]
    with Progress() as progress, maps.opened(disks, progress.watch) as (bmap, readers):
        volume = bmap.volume_named(device)
        files = Files(bmap, volume, readers[volume])
        inode = files.find(os.fsencode(path))
        shown = f"{escape(os.fsencode(path))} on {device}"
        if not files.is_kind(inode, tables.T_FILE) and args.stream is None:
            row = int(files.rows_of(ints(inode))[0])
            raise UsageError(
                f"{shown}: is not a file, but of type "
                f"{tables.TYPES[files.kind[row]] if row >= 0 else 'unknown'}"
            )
        if reason := files.refusal(inode, args.stream):
            raise Unsupported(f"{shown}: can't be read: {reason}")
        progress.stop()
        warn_of_doubts(bmap, volume, files)
        missing = Missing() if args.partial else None
        try:
            for data in spread(files.pieces([inode], args.stream), files.length(inode, args.stream), missing):
                sys.stdout.buffer.write(data.data)
        except Corrupt as error:
            raise Corrupt(f"{shown}: {error}", error.offset) from error
        except ImageError as error:
            raise ImageError(f"{shown}: {error}") from error
        sys.stdout.buffer.flush()
        if missing:
            say(f"virt-bmap: {shown}: zeroes were written for {missing}", file=sys.stderr)
    return 0
