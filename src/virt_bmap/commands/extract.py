"""virt-bmap extract: copy files and trees out of a disk, with modes, times, links and holes."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from virt_bmap.commands.common import (
    Progress,
    add_disk_options,
    add_nested_option,
    add_partial_option,
    disks_of,
)
from virt_bmap.commands.dump import bar, doubts
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import OutputError, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.survey import maps

if TYPE_CHECKING:
    from virt_bmap.act.extract import Extraction
    from virt_bmap.ask.content import Files

HELP = "copy files and trees to a folder, with modes, times, links and holes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        metavar="[DISK] DEVICE PATH...",
        nargs="+",
        type=INPUT,
        help="a disk (not with -a), a device such as /dev/sda1, and paths on it; / is all of it",
    )
    parser.add_argument(
        "-C",
        "--directory",
        metavar="DIR",
        default=".",
        help="the folder to write to, which must exist (default: .)",
    )
    parser.add_argument(
        "--same-owner", action="store_true", help="keep owners and set-user-ID bits (only root can)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary, no progress")
    add_partial_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.act.extract import extract
    from virt_bmap.ask.content import Files

    needed = 2 if args.add else 3
    if len(args.arguments) < needed:
        raise UsageError(
            f"extract needs {'DEVICE' if args.add else 'a disk, DEVICE'} "
            f"and PATHs; given: {' '.join(args.arguments)}"
        )
    first = 0 if args.add else 1
    device = args.arguments[first]
    paths = [os.fsencode(path) for path in args.arguments[first + 1 :]]
    if args.same_owner and os.geteuid() != 0:
        raise UsageError("--same-owner: only root can give files to other users")
    if not os.path.isdir(args.directory):
        raise OutputError(f"{args.directory}: can't be written: it is not a directory")
    disks = disks_of(args, args.arguments[:first])
    with Progress() as progress, maps.opened(disks, progress.watch) as (bmap, readers):
        volume = bmap.volume_named(device)
        files = Files(bmap, volume, readers[volume])
        wanted = named(files, paths)
        progress.stop()
        warn_of_doubts(bmap, volume, files)
        with bar(f"extracting from {device}", 0, args.quiet) as tell:
            report = extract(files, wanted, args.directory, args.same_owner, tell, args.partial)
    sum_up(report, args.directory, args.quiet, args.partial)
    return 1 if report.lost and not args.partial else 0


def named(files: "Files", paths: list[bytes]) -> list[tuple[bytes, int]]:
    """(name, inode) of each path; of the root directory what lies in it.

    UsageError where two would have the same name.
    """
    result: list[tuple[bytes, int]] = []
    for path in paths:
        inode = files.find(path, follow=False)
        name = path.rstrip(b"/").rpartition(b"/")[2]
        if inode == files.root:
            result += files.children(inode)
        elif name in (b".", b".."):
            raise UsageError(f"{escape(path)}: does not name a file")
        elif any(name == known for known, _ in result):
            raise UsageError(f"{escape(path)}: another of the paths is also called {escape(name)}")
        else:
            result.append((name, inode))
    return result


def warn_of_doubts(bmap: BlockMap, volume: int, files: "Files") -> None:
    """Say on standard error what is wrong with the volume, and what is not in place."""
    for text in doubts(bmap, volume):
        say(f"virt-bmap: {text}", file=sys.stderr)
    if files.state not in tables.CONSISTENT:
        say(
            f"virt-bmap: {files.device}: its {files.type} is not clean ({files.state}): files are read as "
            "recovery would leave them, and what was written last may be missing from them",
            file=sys.stderr,
        )


def sum_up(report: "Extraction", folder: str, quiet: bool, partial: bool) -> None:
    """What was made, and on standard error what was not."""
    if not quiet:
        what = [
            plural(report.files, "file"),
            plural(report.directories, "directory", "directories"),
            plural(report.links, "link"),
        ]
        say(f"{folder}: {', '.join(what)}, {human(report.size)}")
    for path, missing in report.missing:
        words = (
            "zeroes were written for"
            if partial
            else "left out (--partial fills what is missing with zeroes):"
        )
        say(f"virt-bmap: {escape(path)}: {words} {missing}", file=sys.stderr)
    if report.incomplete > len(report.missing):
        say(
            f"virt-bmap: and {plural(report.incomplete - len(report.missing), 'more file')} "
            "that can't be read whole",
            file=sys.stderr,
        )
    for reason, (count, first) in report.left.items():
        say(f"virt-bmap: left out: {reason}: {count:,}, the first: {escape(first)}", file=sys.stderr)
