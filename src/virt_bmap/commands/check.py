"""virt-bmap check: what is proven of a map, what contradicts it, and what nobody looked at."""

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from virt_bmap.commands.common import (
    add_disk_options,
    add_host_option,
    add_nested_option,
    add_result_options,
    disks_of,
    map_or_disks,
    print_json,
)
from virt_bmap.commands.map import refuse_unknown
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.model.contract import CONTRADICTED, NOT_LOOKED_AT, PROVEN, Asks
from virt_bmap.survey import maps

if TYPE_CHECKING:
    import pyarrow as pa

    from virt_bmap.ask.check import Checked, Verdict

COLUMNS = ("device", "subject", "result", "code", "start", "end", "detail")
HELP = "prove that every byte has an owner, and that owners, allocators and checksums agree"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "disk",
        nargs="*",
        type=INPUT,
        metavar="MAP-or-DISK",
        help="a saved map (Parquet), or images, block devices, NBD URIs",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit status 1 also where something was not looked at, what files hold excepted",
    )
    parser.add_argument(
        "--content",
        action="store_true",
        help="read all of the disks, and compare them with the checksums and hashes that their images keep",
    )
    add_result_options(
        parser, lambda: [COLUMNS], "one JSON object a line: totals of each volume, then the verdicts"
    )
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.ask.check import check

    if args.content and len(args.disk) == 1 and not args.add and maps.is_saved(args.disk[0]):
        raise UsageError(f"{args.disk[0]}: is a map; --content reads the disk itself")
    bmap = map_or_disks(args, args.disk, asks=Asks.PROOFS)
    if not args.content:  # whatever the disk holds can be compared
        refuse_unknown(bmap, [*args.add, *args.disk])
    report = check(bmap)
    if args.content:
        from virt_bmap.ask.vouched import add_content

        add_content(report, bmap, disks_of(args, args.disk))
    names = [escape(name.encode()) for name in bmap.volumes.column("name").to_pylist()]
    if args.output is not None:
        from virt_bmap.saved import results

        results.save(_table(report, names), args.output)
    elif args.json:
        print_json(
            [
                {"device": names[t.volume], "size": t.size, "children": t.children, "kinds": t.by_kind}
                for t in report.totals
            ]
        )
        print_json(_table(report, names).to_pylist())
    else:
        _tell(report, names)
    unseen = any(row.result == NOT_LOOKED_AT and row.subject != "files" for row in report.verdicts)
    return 1 if report.disagreements or (args.strict and unseen) else 0


def _table(report: "Checked", names: list[str]) -> "pa.Table":
    """The verdicts as a result."""
    import pyarrow as pa

    from virt_bmap.saved.results import field

    schema = pa.schema([
        field("device", pa.string(), "the volume, as libguestfs names it"),
        field("subject", pa.string(), "owners, allocator, structure, checksums (of metadata), journal, "
            "content (encrypted, foreign), files (what they hold)"),
        field("result", pa.string(), "proven, contradicted, not looked at"),
        field("code", pa.string(), "stable word for what contradicts", null="nothing does"),
        field("start", pa.int64(), "first byte at fault, in the volume", "bytes", "not one place"),
        field("end", pa.int64(), "the byte after the last", "bytes", "not a range"),
        field("detail", pa.string(), "what was looked at, what is wrong, or why nothing was looked at"),
    ])  # fmt: skip
    rows = [
        {"device": names[v.volume], "subject": v.subject, "result": v.result, "code": v.code,
            "start": None if v.start < 0 else v.start,
         "end": None if v.end < 0 else v.end, "detail": escape(v.detail.encode())}
        for v in report.verdicts
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def _tell(report: "Checked", names: list[str]) -> None:
    """For people: each volume by kinds and verdicts, then in one line what is proven, and in the last one
    what is not."""
    for total in report.totals:
        say(f"{names[total.volume]}: {total.size:,} bytes")
        if total.children:
            say(f"  {total.children:>20,} in its volumes")
        for kind, size in total.by_kind.items():
            say(f"  {size:>20,} {kind}")
        for row in report.verdicts:
            if row.volume == total.volume and row.result != CONTRADICTED:
                say(f"  {row.result}: {row.subject}: {escape(row.detail.encode())}")
    for found in report.disagreements:
        where = (
            ""
            if found.start < 0
            else f": byte {found.start:#x}"
            if found.end < 0
            else f": bytes {found.start:#x}-{found.end:#x}"
        )
        say(f"{names[found.volume]}{where}: {found.code}: {escape(found.detail.encode())}")
    proven = Counter(row.subject for row in report.verdicts if row.result == PROVEN)
    volumes = len({row.volume for row in report.verdicts if row.result == PROVEN})
    what = ", ".join(f"{subject} ({count})" for subject, count in proven.items())
    if report.disagreements:
        say(f"not proven: {plural(len(report.disagreements), 'disagreement')}")
        return
    say(f"proven: {plural(volumes, 'volume')}: {what}" if what else "proven: nothing")
    if unseen := _unseen(report.verdicts, names):
        say(f"not looked at: {unseen}")


def _unseen(verdicts: "list[Verdict]", names: list[str]) -> str:
    """What was not looked at, volume by volume."""
    subjects: dict[str, list[str]] = {}
    for row in verdicts:
        if row.result == NOT_LOOKED_AT and row.subject not in subjects.setdefault(names[row.volume], []):
            subjects[names[row.volume]].append(row.subject)
    devices: dict[str, list[str]] = {}
    for name, words in subjects.items():
        devices.setdefault(" and ".join(filter(None, (", ".join(words[:-1]), words[-1]))), []).append(name)
    return "; ".join(f"{words} of {', '.join(names)}" for words, names in devices.items())
