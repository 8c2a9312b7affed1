"""`virt-bmap profile`: what a guest needed, from traces; lists of it for other tools; what changed, and what
nobody needed."""

import argparse
import sys
from typing import TYPE_CHECKING

from virt_bmap.commands.common import add_force_option, print_json
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.host import ours
from virt_bmap.survey import maps

if TYPE_CHECKING:
    import pyarrow as pa

    from virt_bmap.accesses.profile.saved import Profile
    from virt_bmap.model.blockmap import BlockMap

HELP = "what a guest needs: files and byte ranges in order of first use, from one or more traces"
EXPORTS = ("files", "files0", "prefetch", "ranges", "extentlist")


def _is_ours(path: str) -> bool:
    from virt_bmap.accesses.profile.compare import COMPARED
    from virt_bmap.accesses.profile.unused import UNUSED

    return ours.is_profile_output(path) or ours.is_result(lambda: [COMPARED.names, UNUSED.names])(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="+",
        type=INPUT,
        metavar="TRACE-or-PROFILE",
        help="traces of one machine, or a profile; two profiles are compared",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Output(_is_ours),
        help="write the profile, or what the options below ask for, to FILE",
    )
    parser.add_argument(
        "--map",
        metavar="MAP",
        type=INPUT,
        help="a saved map of the disks: sizes of files, and names for traces that have none",
    )
    add_force_option(parser)
    parser.add_argument("--json", action="store_true", help="print all rows, one JSON object a line")
    parser.add_argument(
        "--top", metavar="N", type=int, default=20, help="rows that are shown (default: %(default)s; 0: all)"
    )
    group = parser.add_argument_group("instead of the files in order of first use")
    group.add_argument(
        "--export",
        choices=EXPORTS,
        metavar="LIST",
        help=f"write a list for another tool: {', '.join(EXPORTS)}",
    )
    group.add_argument(
        "--compare", action="store_true", help="two traces or profiles: new, gone, more, less, earlier, later"
    )
    group.add_argument(
        "--never-read", action="store_true", help="by directory, what no run read; needs --map"
    )
    group = parser.add_argument_group("which part")
    group.add_argument("--common", action="store_true", help="with --export: only what every run needed")
    group.add_argument(
        "--disk",
        metavar="N",
        type=int,
        default=1,
        help="with --export: the disk that ranges are of, from 1 (default: 1)",
    )
    group.add_argument("--device", metavar="DEVICE", help="with --export: only files of this volume")
    group.add_argument(
        "--depth",
        metavar="N",
        type=int,
        help="with --never-read: names deep (default: 1, below /usr, /var and /opt 2)",
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    bmap = maps.load(args.map) if args.map else None
    from virt_bmap.accesses.profile import saved

    if args.compare or (len(args.trace) == 2 and all(map(saved.is_profile, args.trace))):
        return _compare(args, bmap)
    profile = _profile(args.trace, bmap)
    if args.export:
        return _export(args, profile)
    if args.never_read:
        assert bmap
        from virt_bmap.accesses.profile.unused import unused

        return _result(args, unused(bmap, profile, args.depth), "directory", "directories")
    if args.output:
        from virt_bmap.host.files import replacing

        with replacing(args.output) as file:
            saved.save(profile, file)
    _show(args, profile)
    return 0


def _check(args: argparse.Namespace) -> None:
    """UsageError where options don't belong together: before anything is read."""
    if sum((args.compare, args.never_read, args.export is not None)) > 1:
        raise UsageError("--export, --compare and --never-read each ask for another result: give one of them")
    if args.never_read and not args.map:
        raise UsageError("--never-read needs --map MAP: a profile knows only what was read")
    if args.compare and len(args.trace) != 2:
        raise UsageError(f"--compare compares two traces or profiles; given: {len(args.trace)}")
    if args.depth is not None and not (args.never_read and 1 <= args.depth <= 100):
        raise UsageError("--depth N belongs to --never-read and is at least 1")
    if (args.compare or args.never_read) and args.output:
        from virt_bmap.saved.results import check_name

        check_name(args.output)


def _profile(given: list[str], bmap: "BlockMap | None") -> "Profile":
    """A saved profile, or the one of these traces."""
    from virt_bmap.accesses import traces
    from virt_bmap.accesses.profile import build, saved

    if any(map(saved.is_profile, given)):
        if len(given) > 1:
            raise UsageError(
                "a profile is shown alone, two are compared; to combine several boots, give their traces"
            )
        return saved.load(given[0])
    return build.build(traces.load(given, bmap))


def _compare(args: argparse.Namespace, bmap: "BlockMap | None") -> int:
    from virt_bmap.accesses.profile.compare import compare

    before, after = (_profile([name], bmap) for name in args.trace)
    return _result(args, compare(before, after), "change", None)


def _export(args: argparse.Namespace, profile: "Profile") -> int:
    from virt_bmap.accesses.profile.exports import write
    from virt_bmap.host.files import replacing

    with replacing(args.output or "-") as file:
        left = write(profile, args.export, file, args.disk, args.device, args.common)
    if left:
        say(
            f"virt-bmap: {plural(left, 'file')} left out: a "
            "line can't hold a name with a newline (files0 can)",
            file=sys.stderr,
        )
    return 0


def _result(args: argparse.Namespace, table: "pa.Table", word: str, words: str | None) -> int:
    """A table to where the options say."""
    from virt_bmap.saved.results import json_lines, save, show

    if args.output:
        save(table, args.output)
    elif args.json:
        sys.stdout.writelines(f"{line}\n" for line in json_lines(table))
    elif not len(table):
        say(f"no {words or word + 's'}")
    else:
        left = show(table, sys.stdout, limit=args.top or None)
        if left:
            say(f"({plural(left, f'more {word}', f'more {words or word + chr(115)}')}: --top 0 shows all)")
    return 0


def _show(args: argparse.Namespace, profile: "Profile") -> None:
    """The profile for people: what all runs took together, and the files."""
    from virt_bmap.accesses.profile.summary import files, totals

    found = files(profile)
    if args.json:
        print_json(found.to_pylist())
        return
    for run in profile.runs:
        name = escape(run.trace.encode(errors="surrogateescape"))
        say(f"{name}: {plural(run.requests, 'request')} in {run.seconds:.1f} s, {human(run.read)} read")
    for disk in totals(profile):
        share = f" ({disk['needed'] / disk['size']:.1%} of it)" if disk["size"] else ""
        common = f", {human(disk['common'])} by every run" if len(profile.runs) > 1 else ""
        say(f"disk {disk['disk']}: {human(disk['needed'])} needed{share}{common}, each byte counted once")
    if args.output:
        say(f"{args.output}: written", file=sys.stderr)
    say()
    hidden = {"runs", "in_all_runs"} if len(profile.runs) == 1 else set()
    hidden |= {"size", "share"} if found.column("size").null_count == len(found) else set()
    args.output = None
    _result(args, found.select([name for name in found.column_names if name not in hidden]), "object", None)
