"""virt-bmap lookup: who owns these bytes of a disk?"""

import argparse
import re
from typing import Any

import numpy as np

from virt_bmap.blockmap import BlockMap
from virt_bmap.commands.common import add_disk_options, map_or_disks, number, print_json
from virt_bmap.errors import UsageError
from virt_bmap.outputs.records import owner_records

HELP = "name every owner of byte ranges of a disk, the most specific first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("map", metavar="MAP-or-DISK", nargs="?", help="a saved map, or a disk to map now")
    parser.add_argument(
        "range", nargs="*", metavar="OFFSET[-END|+LENGTH]", help="bytes on the disk; DISK:OFFSET for another disk than the first"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_disk_options(parser)


def run(args: argparse.Namespace) -> int:
    given, ranges = (None, [args.map, *args.range]) if args.add else (args.map, args.range)
    if given is None and not args.add:
        raise UsageError("lookup needs a map or disk, and at least one OFFSET[-END|+LENGTH]")
    if not any(ranges):
        raise UsageError("no range to look up: give OFFSET, OFFSET-END or OFFSET+LENGTH")
    asked = [parse_range(text) for text in ranges if text is not None]
    bmap = map_or_disks(args, [given] if given else [])
    for disk, start, end in asked:
        _show(bmap, disk, start, end, args.json)
    return 0


def parse_range(text: str) -> tuple[int, int, int]:
    """(disk, start, end) of [DISK:]OFFSET[-END|+LENGTH]; a lone OFFSET is one byte."""
    match = re.fullmatch(r"(?:(\d+):)?([^-+]+)(?:([-+])(.+))?", text)
    if not match:
        raise UsageError(f"{text!r} is not OFFSET, OFFSET-END or OFFSET+LENGTH")
    start = number(match[2])
    end = start + 1 if match[3] is None else number(match[4]) + (start if match[3] == "+" else 0)
    if end <= start:
        raise UsageError(f"{text!r}: the range is empty: it ends at byte {end}, and starts at {start}")
    return int(match[1] or 1), start, end


def _show(bmap: BlockMap, disk: int, start: int, end: int, as_json: bool) -> None:
    if not 1 <= disk <= len(bmap.disks):
        raise UsageError(f"there is no disk {disk} in this map, which has {len(bmap.disks)}")
    size = bmap.volumes.column("size")[bmap.disks[disk - 1]].as_py()
    if start >= size:
        raise UsageError(f"byte {start:#x} lies behind the end of disk {disk}, which has {size:#x} bytes")
    found = owner_records(bmap, disk, np.array([start]), np.array([end]))
    if as_json:
        print_json(found)
        return
    for row in found:
        print(line(row))


def line(row: dict[str, Any]) -> str:
    """One owner for people: `541000-541400 directory /dev/sda1 /lost+found, byte 0x0`."""
    name = row["path"] or (f"[{row['part']}]" if row["part"] else f"[inode {row['inode']}]" if row["inode"] is not None else "")
    part = f" [{row['part']}]" if row["part"] and row["path"] else ""
    offset = f" at {row['file_offset']:#x}" if row["file_offset"] is not None else ""
    words = "".join(f", {word}" for word in [*row["flags"], *([] if row["role"] == "data" else [row["role"]])])
    return f"{row['disk']} {row['start']:x} {row['end']:x} {row['kind']} {row['device']} {name}{part}{offset}{words}".rstrip()
