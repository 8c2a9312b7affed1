"""virt-bmap sparsify --estimate: what an image would give back to its host if its free space were punched out."""

import argparse
from typing import Any

from virt_bmap import maps
from virt_bmap.commands.common import Progress, add_disk_options, disks_of, human, keys_of, print_json
from virt_bmap.commands.dump import warn
from virt_bmap.errors import UsageError
from virt_bmap.images.raw import RawReader
from virt_bmap.outputs.escape import escape

HELP = "estimate what an image would give back to its host without its free space"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("disk", nargs="*", help="image, block device or NBD URI")
    parser.add_argument("--estimate", action="store_true", help="only say what could be given back; required, and writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_disk_options(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.sparsify import estimate, host_of

    images = disks_of(args, args.disk)
    if not args.estimate:
        raise UsageError(
            "sparsify can only estimate in this version: say --estimate; to copy a disk without its free space, see dump --skip-free"
        )
    rows: list[dict[str, Any]] = []
    with Progress() as progress, maps.open_volumes(images, args.format, args.references, keys_of(args), progress.watch) as opened:
        bmap, readers = opened
        progress.stop()
        names = [escape(name.encode()) for name in bmap.volumes.column("name").to_pylist()]
        for number, (image, disk) in enumerate(zip(images, bmap.disks, strict=True), 1):
            gains, left = estimate(bmap, disk, host_of(image) if isinstance(readers[disk], RawReader) else None)
            rows += [{"disk": number, "device": names[gain.volume], "what": gain.what, "bytes": gain.size, "host_bytes": gain.held}
                     for gain in gains]  # fmt: skip
            for volume, reason in left.items():
                warn(bmap, volume, f"left as it is: {reason}")
    if args.json:
        print_json(rows)
    else:
        _print(rows, names, bmap.disks)
    return 0


def _print(rows: list[dict[str, Any]], names: list[str], disks: list[int]) -> None:
    print(f"{'bytes':>12} {'on the host':>12}  what")
    for number, disk in enumerate(disks, 1):
        mine = [row for row in rows if row["disk"] == number]
        for row in mine:
            print(f"{human(row['bytes']):>12} {_held([row]):>12}  {row['what']} of {row['device']}")
        print(f"{human(sum(row['bytes'] for row in mine)):>12} {_held(mine):>12}  in all of {names[disk]}")


def _held(rows: list[dict[str, Any]]) -> str:
    return "not known" if any(row["host_bytes"] is None for row in rows) else human(sum(row["host_bytes"] for row in rows))
