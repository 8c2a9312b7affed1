"""virt-bmap diff: which files changed between two times of a disk, and by how many bytes?"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from virt_bmap.commands.common import (
    Progress,
    add_mapping_options,
    add_result_options,
    disks_of,
    elapsed,
    emit,
)
from virt_bmap.commands.dump import bar
from virt_bmap.commands.lookup import read_list
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import say
from virt_bmap.open.magic import FORMATS
from virt_bmap.saved.results import check_name

if TYPE_CHECKING:
    import pyarrow as pa

    from virt_bmap.diff import Answer, Question

HELP = (
    "which files changed between two images, in an overlay, since a dirty bitmap began, or between two maps?"
)
BY = ("file", "directory", "change", "kind", "filesystem")
LIMIT = 40
"""Rows that a person is shown: more than that nobody reads, and the largest come first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "old",
        metavar="OLD",
        nargs="?",
        type=INPUT,
        help="the older image, NBD URI or saved map; left out, the backing file of NEW",
    )
    parser.add_argument(
        "new",
        metavar="NEW",
        type=INPUT,
        help="the newer one: an image, NBD URI or saved map of the same disk",
    )
    source = parser.add_argument_group(
        "what changed",
        "Without these: where the images differ, what an overlay itself holds, or what two maps say.",
    )
    source.add_argument(
        "--bitmap",
        metavar="NAME",
        help="what this dirty bitmap of NEW (a qcow2 image or an NBD export) calls changed",
    )
    source.add_argument(
        "--ranges",
        metavar="FILE",
        type=INPUT,
        help="these ranges: offset,length lines or whatever lookup --ranges reads; - is standard input",
    )
    source.add_argument(
        "--disk",
        metavar="N",
        type=int,
        default=1,
        help="the disk of saved maps that is meant, from 1 (default: 1)",
    )
    source.add_argument(
        "--verify",
        action="store_true",
        help="read what is called changed, and leave out clusters that are equal",
    )
    shown = parser.add_argument_group("output")
    shown.add_argument(
        "--by",
        choices=BY,
        default="file",
        help="add the rows up (default: file, one row for each file and change)",
    )
    shown.add_argument(
        "--depth",
        metavar="N",
        type=int,
        help="with --by directory: how many levels of directories are told apart",
    )
    shown.add_argument(
        "--limit",
        metavar="N",
        type=int,
        default=LIMIT,
        help=f"rows of the table for people, 0 for all (default: {LIMIT})",
    )
    add_result_options(
        parser, _columns, more=", and compare disks that differ in size or do not look like one disk"
    )
    images = parser.add_argument_group("disks")
    for option, which in (("--format", "NEW"), ("--old-format", "OLD")):
        images.add_argument(
            option,
            choices=FORMATS,
            metavar="FORMAT",
            help=f"image format of {which}, instead of what its magic says",
        )
    images.add_argument(
        "-a",
        "--add",
        metavar="IMAGE",
        type=INPUT,
        action="append",
        default=[],
        help="another disk of NEW's machine, where LVM, md or btrfs spans several; repeat it",
    )
    images.add_argument(
        "--old-add",
        metavar="IMAGE",
        type=INPUT,
        action="append",
        default=[],
        help="the same for OLD's machine (default: those of --add, taken as unchanged)",
    )
    add_mapping_options(images)


def _columns() -> list[list[str]]:
    from virt_bmap.diff import report

    return [
        report.SCHEMA.names,
        *(report.rolled_up(report.SCHEMA.empty_table(), by).column_names for by in BY if by != "file"),
    ]


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    question = _question(args)
    answer = _answer(question)
    rows = _rows(answer, args.by, args.depth)
    if args.output is None and not args.json:
        _print(args, answer, rows)
        return 0
    emit(args, rows)
    say(_total(answer), file=sys.stderr)
    if args.output is not None:
        say(f"{args.output}: {plural(rows.num_rows, 'row')}, written in {elapsed(start)}")
    return 0


def _question(args: argparse.Namespace) -> "Question":
    """What is asked for; what makes no sense is refused before any disk is read."""
    from virt_bmap.accesses.ranges import parse
    from virt_bmap.diff import Question

    if args.output is not None:
        check_name(args.output)
    if args.bitmap is not None and args.ranges is not None:
        raise UsageError("--bitmap and --ranges both say what changed: give one of them")
    if args.depth is not None and (args.by != "directory" or args.depth < 0):
        raise UsageError("--depth is a number of levels, from 0, and belongs to --by directory")
    if args.limit < 0:
        raise UsageError("--limit is a number of rows; 0 shows all")
    if args.old is None and args.old_format is not None:
        raise UsageError("--old-format is the format of OLD, which is not given")
    ranges = parse(*read_list(args.ranges, args.keys_from_stdin)) if args.ranges is not None else None
    return Question(
        args.old, disks_of(args, first=[args.new]), args.bitmap, ranges, args.disk, args.verify, args.force,
        args.old_format, tuple(args.old_add),
    )  # fmt: skip


def _answer(question: "Question") -> "Answer":
    """Ask, with progress on a terminal: first of the maps, then of the bytes compared."""
    from virt_bmap.diff import Telling, diff

    with Progress() as progress, contextlib.ExitStack() as stack:
        bars: list[Callable[[int], None]] = []

        def comparing(done: int, size: int) -> None:
            if not bars:
                progress.stop()
                bars.append(stack.enter_context(bar("comparing", size, quiet=False)))
            bars[0](done)

        return diff(question, Telling(progress.watch, comparing))


def _rows(answer: "Answer", by: str, depth: int | None) -> "pa.Table":
    from virt_bmap.diff import report

    return answer.rows if by == "file" else report.rolled_up(answer.rows, by, depth)


def _print(args: argparse.Namespace, answer: "Answer", rows: "pa.Table") -> None:
    """For people: the rows, all bytes by what happened, and what that means."""
    from virt_bmap.diff import report
    from virt_bmap.saved.results import show

    limit = args.limit or None
    left = show(report.shown(rows) if args.by == "file" else rows, sys.stdout, limit=limit)
    if left:
        say(f"... and {plural(left, 'more row')}; --limit 0 shows all")
    if args.by != "change":
        say()
        show(report.rolled_up(answer.rows, "change"), sys.stdout)
    say()
    say(_total(answer))
    for line in _remarks(answer):
        say(line)


def _total(answer: "Answer") -> str:
    return f"{answer.size:,} bytes ({human(answer.size)}) changed: {answer.how}"


def _remarks(answer: "Answer") -> Sequence[str]:
    from virt_bmap.diff import report

    idle = {word: size for word, size in report.idle_share(answer.rows).items() if size}
    lines = []
    if idle and answer.size:
        words = {
            "free": "free space",
            "moved": "moved data",
            "unchanged": "unchanged bytes of changed clusters",
        }
        named = ", ".join(f"{human(size)} {words[word]}" for word, size in idle.items())
        lines.append(f"{100 * sum(idle.values()) / answer.size:.1f} % of it is not new: {named}")
    if answer.pieces:
        (files, before), (files_now, after) = answer.pieces
        lines.append(
            f"fragmentation: {before / max(1, files):.2f} pieces a file before ({plural(files, 'file')} with "
            f"content), {after / max(1, files_now):.2f} now ({plural(files_now, 'file')})"
        )
    return lines
