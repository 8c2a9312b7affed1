"""virt-bmap check: prove that a map is complete and agrees with the filesystems' own allocators."""

import argparse

from virt_bmap.blockmap import FILE
from virt_bmap.commands.common import add_disk_options, add_host_option, add_nested_option, map_or_disks, plural, print_json
from virt_bmap.commands.map import refuse_unknown
from virt_bmap.commands.paths import INPUT
from virt_bmap.outputs.escape import escape

HELP = "prove that every byte has an owner, and that owners and allocators agree"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "disk", nargs="*", type=INPUT, metavar="MAP-or-DISK", help="a saved map (Parquet), or images, block devices, NBD URIs"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line: totals of each volume, then disagreements")
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.check import check

    bmap = map_or_disks(args, args.disk)
    refuse_unknown(bmap, [*args.add, *args.disk])
    report = check(bmap)
    names = [escape(name.encode()) for name in bmap.volumes.column("name").to_pylist()]
    if args.json:
        print_json(
            [{"device": names[t.volume], "size": t.size, "children": t.children, "kinds": t.by_kind} for t in report.totals]
        )
        print_json([{"device": names[d.volume], "code": d.code, "start": None if d.start < 0 else d.start, "end": None if d.end < 0 else d.end,
                     "detail": escape(d.detail.encode())} for d in report.disagreements])  # fmt: skip
        return 1 if report.disagreements else 0
    for total in report.totals:
        print(f"{names[total.volume]}: {total.size:,} bytes")
        if total.children:
            print(f"  {total.children:>20,} in its volumes")
        for kind, size in total.by_kind.items():
            print(f"  {size:>20,} {kind}")
    for found in report.disagreements:
        where = (
            "" if found.start < 0 else f" byte {found.start:#x}" if found.end < 0 else f" bytes {found.start:#x}-{found.end:#x}"
        )
        print(f"{names[found.volume]}:{where}: {found.code}: {escape(found.detail.encode())}")
    if report.disagreements:
        print(f"not proven: {plural(len(report.disagreements), 'disagreement')}")
        return 1
    kinds = bmap.volumes.column("kind").to_pylist()
    opaque = [names[total.volume] for total in report.totals if "content" in total.by_kind and kinds[total.volume] != FILE]
    print(f"proven: {plural(len(report.totals), 'volume')}, every byte owned, owners and allocators agree")
    if opaque:
        print(f"taken as one piece, not looked into: {', '.join(opaque)}")
    return 0
