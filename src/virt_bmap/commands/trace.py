"""`virt-bmap trace`: accesses that other tools logged, or that a killed watch left, as a trace."""

import argparse
import sys

from virt_bmap.accesses.logs import NAMES
from virt_bmap.commands.common import add_force_option
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.printable import say
from virt_bmap.host.ours import is_tables
from virt_bmap.survey import maps

HELP = "make a trace of a log by nbdkit, QEMU, blkparse, fio or biosnoop, or of what a killed watch left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["import", "recover"],
        help="read another tool's log, or the .part of a killed watch",
    )
    parser.add_argument(
        "file", metavar="FILE", type=INPUT, help="the log (- is standard input), or the .part"
    )
    parser.add_argument(
        "-o", "--output", metavar="TRACE", type=Output(is_tables), help="the Parquet file to write; required"
    )
    parser.add_argument(
        "--map", metavar="MAP", type=INPUT, help="name what the accesses touched by this saved map"
    )
    add_force_option(parser)
    parser.add_argument(
        "--disk", metavar="N", type=int, default=1, help="the disk that the log is of, from 1 (default: 1)"
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        choices=tuple(NAMES),
        help=f"the log's format, instead of what its content says: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="the device or file whose accesses are meant, where a log has several",
    )


def run(args: argparse.Namespace) -> int:
    from virt_bmap.accesses.logs import parse
    from virt_bmap.accesses.traces import save_log
    from virt_bmap.host.files import replacing

    if not args.output:
        raise UsageError(f"trace {args.action} needs -o TRACE, the file to write")
    if args.action == "recover":
        return _recover(args.file, args.output)
    if not 1 <= args.disk < 1 << 31:
        raise UsageError(f"--disk counts from 1; given: {args.disk}")
    source = "standard input" if args.file == "-" else args.file
    log = parse(_content(args.file), source, args.format, args.device)
    bmap = maps.load(args.map) if args.map else None
    with replacing(args.output) as file:
        save_log(log, file, bmap, args.disk)
    for note in log.notes:
        say(f"virt-bmap: {source}: {note}", file=sys.stderr)
    if len(log.unread):
        more = f" and {plural(len(log.unread) - 1, 'more line')}" if len(log.unread) > 1 else ""
        say(
            f"virt-bmap: {source}: line {log.unread[0]}{more} left "
            f"out, not in the format of {log.format}: {log.example}",
            file=sys.stderr,
        )
    seconds = (log.accesses.time_ns[-1] - log.accesses.time_ns[0]) / 1e9
    say(
        f"{source}: {log.format}, {plural(len(log.accesses), 'access', 'accesses')} "
        f"in {seconds:.1f} s; {args.output}: written",
        file=sys.stderr,
    )
    return 0


def _recover(path: str, output: str) -> int:
    from virt_bmap.accesses.traces import recover
    from virt_bmap.host.files import replacing

    with replacing(output) as file:
        count = recover(path, file)
    say(f"{path}: {plural(count, 'access', 'accesses')}; {output}: written", file=sys.stderr)
    return 0


def _content(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror}") from error
