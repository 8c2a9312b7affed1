"""`virt-bmap watch`: run a command with a disk served to it, and say which files it reads and writes as it does."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from virt_bmap.watch.session import Outcome

NAME = "watch"
HELP = "run a command, such as a guest, on a disk and log which files it reads and writes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line, as docs/man/virt-bmap-watch.1.md describes it."""
    from virt_bmap.images import FORMATS

    parser.add_argument("disk", metavar="DISK", help="disk image, block device or NBD URI")
    parser.add_argument(
        "command", metavar="COMMAND", nargs="+", help="what to run, behind --; $uri and $nbd in it name the served disk"
    )
    parser.add_argument(
        "-a", "--add", metavar="DISK", action="append", default=[], help="a further disk of the same machine: $uri2, $nbd2, ..."
    )
    parser.add_argument("--map", metavar="MAP", help="use this saved map instead of mapping the disks first")
    parser.add_argument("--format", choices=FORMATS, help="format of the images (default: found by their magic)")
    parser.add_argument("--references", action="store_true", help="open backing and data files that the image's header names")
    parser.add_argument(
        "--write", action="store_true", help="let writes reach the disk; otherwise they are thrown away at the end"
    )
    parser.add_argument(
        "-o", "--output", metavar="TRACE", help="write every access with the objects it touched to this Parquet file"
    )
    parser.add_argument("--log", metavar="FILE", default="-", help="write the live log to FILE instead of standard output")
    parser.add_argument(
        "--summary", metavar="FILE", default="-", help="write the closing summary to FILE instead of standard output"
    )
    parser.add_argument(
        "--top", metavar="N", type=int, default=20, help="files in each list of the summary (default: %(default)s)"
    )
    parser.add_argument(
        "--inline", action="store_true", help="log also objects that lie inside a block of inodes that is touched"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no live log")


def run(args: argparse.Namespace) -> int:
    """Map, serve, run, follow, sum up. Returns the exit status of the command."""
    from virt_bmap.outputs.files import replacing
    from virt_bmap.watch.lines import LineLog
    from virt_bmap.watch.resolve import Resolver
    from virt_bmap.watch.session import Printer, watch
    from virt_bmap.watch.source import mapped, saved, source
    from virt_bmap.watch.summary import Summary, report
    from virt_bmap.watch.trace import Trace

    sources = [source(image, args.format, args.references) for image in [args.disk, *args.add]]
    resolver = Resolver(saved(args.map, sources) if args.map else mapped(sources))
    disks = range(1, len(sources) + 1)
    summaries = {disk: Summary(resolver, disk) for disk in disks}
    with contextlib.ExitStack() as stack:
        trace = None
        if args.output:
            trace = Trace(resolver, stack.enter_context(replacing(args.output)))
            stack.callback(trace.close)
        log = sys.stdout if args.log == "-" else stack.enter_context(_text(args.log))
        printer = Printer(log)
        lines = {disk: LineLog(resolver, printer.write, args.inline) for disk in disks}
        sinks = [lambda disk, accesses, touched: summaries[disk].add(accesses, touched)]
        if trace:
            sinks.append(trace.add)
        if not args.quiet:
            sinks.append(lambda disk, accesses, touched: lines[disk].add(accesses, touched))

        def flush() -> None:
            for line in lines.values():
                line.flush()

        try:
            outcome = watch(resolver, sources, args.command, sinks, write=args.write, idle=flush)
        finally:
            flush()
            printer.close()
    with contextlib.ExitStack() as stack:
        out = sys.stdout if args.summary == "-" else stack.enter_context(_text(args.summary))
        for summary in summaries.values():
            out.write(report(summary, args.top))
    for warning in _warnings(outcome, printer.dropped):
        print(f"virt-bmap: {warning}", file=sys.stderr)
    return outcome.status


@contextlib.contextmanager
def _text(path: str) -> Iterator[TextIO]:
    """A text file that grows while the guest runs: a live log can't wait for its end to get its name."""
    from virt_bmap.errors import OutputError

    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error
    with file:
        yield file


def _warnings(outcome: "Outcome", dropped: int) -> Iterator[str]:
    """What is not as it should be, one line each."""
    if outcome.server:
        yield f"the disk's server ended before the command did: {outcome.server}"
    if outcome.failed:
        yield f"{outcome.failed} requests failed: the disk could not be read or written there"
    if outcome.lost or outcome.unread:
        yield f"{outcome.lost} accesses are missing from the log, {outcome.unread} lines of it could not be read"
    if dropped:
        yield f"{dropped} lines were not shown: the output was slower than the guest (the summary and the trace have them)"
