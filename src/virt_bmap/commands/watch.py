"""`virt-bmap watch`: run a command with a disk served to
it, and say which files it reads and writes as it does."""

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from virt_bmap.commands.common import (
    add_disk_options,
    add_force_option,
    disks_of,
    mapped,
    refuse_shared,
)
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import counted, human, plural
from virt_bmap.core.errors import OutputError
from virt_bmap.core.printable import one_line, say
from virt_bmap.host import ours
from virt_bmap.host.files import growing
from virt_bmap.model import tables
from virt_bmap.serve.address import Address, port

if TYPE_CHECKING:
    from virt_bmap.accesses.resolve import Resolver
    from virt_bmap.watch.session import Outcome, Runner
    from virt_bmap.watch.sinks import Sink
    from virt_bmap.watch.summary import Summary

LAST_WORDS = 10
"""Lines of a failed command's output that are left on the terminal when the screen is gone."""
NAME = "watch"
HELP = "run a command, such as a guest, on a disk and log which files it reads and writes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line, as docs/man/virt-bmap-watch.1.md describes it."""
    parser.add_argument(
        "disk", metavar="DISK", type=INPUT, help="the disk to serve: image, block device or NBD URI"
    )
    parser.add_argument(
        "command",
        metavar="COMMAND",
        nargs=argparse.PARSER,
        help="what to run, after --; $uri and $nbd in it name the served disk",
    )
    parser.add_argument(
        "--map", metavar="MAP", type=INPUT, help="use this saved map instead of mapping the disks first"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="let writes reach the disk; otherwise they are thrown away at the end",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket",
        metavar="PATH",
        type=_at(lambda text: Address(os.path.abspath(text))),
        help="serve the disk at this Unix socket instead of one in a private folder",
    )
    where.add_argument(
        "--port",
        metavar="[HOST:]PORT",
        type=_at(port),
        help="serve the disk at this TCP port, of 127.0.0.1 where no host is given",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="TRACE",
        type=Output(ours.is_tables),
        help="write every access with the objects it touched to this Parquet file",
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        default="-",
        type=Output(ours.is_log),
        help="write the live log to FILE instead of standard output",
    )
    parser.add_argument(
        "--summary",
        metavar="FILE",
        default="-",
        type=Output(ours.is_summary),
        help="write the closing summary to FILE instead of standard output",
    )
    parser.add_argument(
        "--top",
        metavar="N",
        type=int,
        default=20,
        help="files in each list of the summary (default: %(default)s)",
    )
    parser.add_argument(
        "--inline",
        action="store_true",
        help="log also objects that lie inside a block of inodes that is touched",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no live log")
    parser.add_argument(
        "--tui",
        action="store_true",
        help="show what goes on as a picture of the disk with lists, instead of the live log",
    )
    parser.add_argument(
        "--no-refresh",
        action="store_true",
        help="name everything by the map from the start, even where metadata is written",
    )
    add_force_option(parser)
    add_disk_options(parser)


def _at(parse: "Callable[[str], Address]") -> "Callable[[str], Address]":
    """The type of an argument that says where the disk is to be served."""

    def parsed(text: str) -> Address:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def run(args: argparse.Namespace) -> int:
    """Map, serve, run, follow, sum up. Returns the exit status of the command."""
    from virt_bmap.accesses.resolve import Resolver
    from virt_bmap.serve.source import saved, source
    from virt_bmap.watch.lines import LineLog
    from virt_bmap.watch.refresh import Refresher
    from virt_bmap.watch.session import Printer, watch
    from virt_bmap.watch.sinks import EachDisk
    from virt_bmap.watch.summary import Summary

    disks = disks_of(args, first=[args.disk])
    if args.write:
        refuse_shared(disks, "--write")
    sources = [source(image, disks) for image in disks.images]
    tui = args.tui and _can_show()
    with contextlib.ExitStack() as stack:
        refresher = None if args.no_refresh else stack.enter_context(contextlib.closing(Refresher(disks)))
        resolver = Resolver(saved(args.map, sources) if args.map else mapped(disks))
        summaries = {disk: Summary(resolver, disk) for disk in range(1, len(sources) + 1)}
        printer = Printer(stack.enter_context(growing(args.log)))
        lines = {disk: LineLog(resolver, printer.write, args.inline) for disk in summaries}
        sinks: dict[str, Sink] = {"the summary": EachDisk(summaries)}
        if not args.quiet and not (tui and args.log == "-"):
            sinks["the live log"] = EachDisk(lines)
        saving = stack.enter_context(_Saving(args.output, resolver)) if args.output else None
        if saving:
            sinks["the trace"] = saving.trace

        def flush() -> None:
            for line in lines.values():
                line.flush()

        def go(run: "Runner | None" = None) -> "Outcome":
            # nargs=PARSER leaves a further -- to the command, but Python before 3.13 the first one, too
            command = args.command[1:] if args.command[0] == "--" else args.command
            return watch(resolver, sources, command, sinks, write=args.write, idle=flush,
                         refresher=refresher, run=run, address=args.socket or args.port)  # fmt: skip

        try:
            outcome, last_words = _show(resolver, sinks, go) if tui else (go(), [])
        finally:
            with contextlib.suppress(Exception):
                flush()
            printer.close()
        words = [*_warnings(outcome, printer.dropped), *(saving.finish(outcome) if saving else [])]
    if outcome.status:  # the terminal may be gone: not before the trace has its name
        for line in last_words[-LAST_WORDS:]:
            _say(line)
    _sum_up("\n".join(_report(summary, args.top) for summary in summaries.values()), args.summary)
    for word in words:
        _say(f"virt-bmap: {word}")
    return outcome.status


class _Saving:
    """The trace of a watch: a stream while it grows, which becomes
    Parquet when it ends, and stays where that can't be."""

    def __init__(self, path: str, resolver: "Resolver") -> None:
        """Raises OutputError where it can't be begun."""
        from virt_bmap.accesses.trace import SCHEMA, Part, Trace, about

        self._path, self._about = path, about(resolver)
        self._part = Part(path, SCHEMA, self._about)
        self._keep = False
        self.trace = Trace(resolver, self._part, often=True)
        if self._part.moved:
            _say(
                f"virt-bmap: {self._part.path}: was left by a watch "
                f"that was killed; it is kept as {self._part.moved}"
            )

    def __enter__(self) -> "_Saving":
        return self

    def finish(self, outcome: "Outcome") -> Iterator[str]:
        """Make the trace of the stream.

        What goes wrong is said, and is not a reason to fail: the command has run.
        """
        from virt_bmap.accesses.trace import save
        from virt_bmap.host.files import replacing

        broken = outcome.broken.pop("the trace", "")
        self._keep = True
        try:
            if not broken:
                self.trace.close()
        except Exception as error:
            broken = getattr(error, "strerror", None) or one_line(error)
        if broken:
            yield f"{self._path}: the trace is not complete: {broken}"
        try:
            with replacing(self._path) as file:
                save(self._part.rows(), self._about, file)
            self._keep = False
        except Exception as error:
            kept = f"; what was traced is kept in {self._part.path}" if self._part.path else ""
            yield f"{one_line(error)}{kept}"

    def __exit__(self, *_: object) -> None:
        self._part.close(self._keep)


def _say(words: str) -> None:
    """On standard error, where anybody listens."""
    with contextlib.suppress(OSError, ValueError):
        say(words, file=sys.stderr, flush=True)


def _sum_up(text: str, path: str) -> None:
    """Write the summary where it is wanted; else, where nobody reads on there, to standard error."""
    try:
        with growing(path) as out:
            out.write(text)
            out.flush()
    except (OSError, ValueError, OutputError) as error:
        if path != "-":
            _say(f"virt-bmap: {one_line(error)}")
        _say(text.rstrip("\n"))
        if path == "-":  # nor must Python complain of it in the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _can_show() -> bool:
    """Is there a terminal for --tui, and the package that draws on it? Says so where there is not."""
    missing = None if sys.stdin.isatty() and sys.stdout.isatty() else "needs a terminal"
    if not missing and not importlib.util.find_spec("textual"):
        missing = "needs the Python package textual (pip install 'virt-bmap[tui]')"
    if missing:
        say(f"virt-bmap: --tui {missing}: plain lines instead", file=sys.stderr)
    return not missing


def _show(
    resolver: "Resolver", sinks: "dict[str, Sink]", go: "Callable[[Runner], Outcome]"
) -> "tuple[Outcome, list[str]]":
    """The watch under the screen: how it ended, and the last lines that the command printed."""
    from virt_bmap.watch.activity import Activity
    from virt_bmap.watch.screen import show

    activity = Activity(resolver)
    sinks["the screen"] = activity
    return show(activity, go)


def _warnings(outcome: "Outcome", dropped: int) -> Iterator[str]:
    """What is not as it should be, one line each."""
    if outcome.server:
        yield f"the disk's server ended before the command did: {outcome.server}"
    for name, why in outcome.broken.items():
        yield f"{name} ended early: {why}"
    if outcome.naming:
        yield (
            f"naming failed: {outcome.naming}; "
            + counted(outcome.unnamed, "[access is|accesses are] without a name and in no list")
        )
    if outcome.stale:
        yield (
            "the map could not always be read again (names that the "
            f"log marks 'older map' may be wrong): {outcome.stale}"
        )
    if outcome.failed:
        yield f"{plural(outcome.failed, 'request')} failed: the disk could not be read or written there"
    if outcome.lost or outcome.unread:
        yield (
            f"{counted(outcome.lost, '[access is|accesses are] missing from the log')}, "
            f"{plural(outcome.unread, 'line')} of it could not be read"
        )
    if dropped:
        yield (
            f"{counted(dropped, '[line was|lines were] not shown')}: the output was slower than the guest "
            "(the summary and the trace have everything)"
        )


def _report(summary: "Summary", top: int) -> str:
    """The closing summary of one disk as text: totals, share
    of the disk, files by bytes and by first access."""
    objects = summary.objects().to_pylist()
    files = [row for row in objects if row["kind"] in ("data", "unwritten")]
    ways = summary.ways
    lines = [*_totals(summary, objects)]
    by_bytes = sorted(files, key=lambda row: (-sum(row[way] for way in ways), row["first_ns"]))
    lines += _listed("Files by bytes", by_bytes, top, [
        *((way, lambda row, way=way: human(row[way]) if row[way] else "-") for way in ways),
        ("size", lambda row: human(row["size"]) if row["size"] is not None else "-"),
    ])  # fmt: skip
    lines += _listed("Files by first access", files, top, [
        ("after", lambda row: f"{(row['first_ns'] - summary.begin_ns) / 1e9:.3f} s"),
        ("accesses", lambda row: str(row["accesses"])),
    ])  # fmt: skip
    return "\n".join(lines) + "\n"


def _totals(summary: "Summary", objects: list[dict[str, Any]]) -> list[str]:
    seconds = (summary.end_ns - summary.begin_ns) / 1e9
    share, ways = summary.share(), summary.ways
    requests = [
        plural(count, op, "flushes" if op == "flush" else None) + (f" ({human(size)})" if size else "")
        for op, count, size in zip(tables.OPS, summary.requests.tolist(), summary.bytes.tolist(), strict=True)
        if count
    ]
    of_disk = ", ".join(f"{human(share[way])} {way} ({share[way] / share['size']:.1%})" for way in ways)
    kinds: dict[str, list[int]] = {}
    for row in objects:
        seen = kinds.setdefault(row["kind"], [0] * (1 + len(ways)))
        for at, count in enumerate([1, *(row[way] for way in ways)]):
            seen[at] += count
    device = summary.resolver.bmap.volumes.column("name")[summary.resolver.bmap.disk(summary.disk)].as_py()
    lines = [
        f"{device}: {', '.join(requests) or 'no requests'} in {seconds:.1f} s",
        f"Of the disk's {human(share['size'])}, each byte counted once: {of_disk}",
    ]
    if kinds:
        lines += ["", f"{'objects':>10} {' '.join(f'{way:>12}' for way in ways)}  kind"]
    for kind, (count, *sizes) in sorted(kinds.items(), key=lambda item: -sum(item[1][1:])):
        lines.append(f"{count:>10,} {' '.join(f'{human(size):>12}' for size in sizes)}  {kind}")
    return lines


def _listed(
    title: str,
    rows: list[dict[str, Any]],
    top: int,
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]],
) -> list[str]:
    if not rows or top <= 0:
        return []
    shown = f"{title} (first {top} of {len(rows):,})" if len(rows) > top else title
    lines = ["", f"{shown}:", " ".join(f"{name:>12}" for name, _ in columns) + "  file"]
    for row in rows[:top]:
        lines.append(" ".join(f"{get(row):>12}" for _, get in columns) + f"  {row['device']} {row['name']}")
    return lines
