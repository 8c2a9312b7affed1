"""virt-bmap lookup: who owns these bytes of a disk?"""

import argparse
import re
import sys
from typing import Any

import numpy as np

from virt_bmap.accesses.ranges import RangeList, parse
from virt_bmap.ask.records import SCHEMA, owner_records
from virt_bmap.commands.common import (
    add_disk_options,
    add_host_option,
    add_nested_option,
    add_result_options,
    emit_records,
    map_or_disks,
    number,
)
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.model.blockmap import BlockMap

HELP = "name every owner of byte ranges of a disk, the most specific first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "map", metavar="MAP-or-DISK", nargs="?", type=INPUT, help="a saved map, or a disk to map now"
    )
    parser.add_argument(
        "range",
        nargs="*",
        metavar="OFFSET[-END|+LENGTH]",
        help="bytes on the disk; DISK:OFFSET for another disk than the first",
    )
    add_result_options(parser, _columns)
    group = parser.add_argument_group("many ranges")
    group.add_argument(
        "--ranges",
        metavar="FILE",
        type=INPUT,
        help="what these ranges hit, by object: a ddrescue map, offset,length "
        "lines, nbdinfo --map, qemu-img map --output=json, a badblocks list, "
        "or a log by blkparse, fio, nbdkit or QEMU; - is standard input",
    )
    group.add_argument(
        "--status",
        metavar="LETTERS",
        help="with a ddrescue map: which blocks (default: --status=-*/, what could not be read)",
    )
    group.add_argument(
        "--block-size", metavar="BYTES", help="with a badblocks list: how many bytes a block has"
    )
    group.add_argument(
        "--op", choices=("read", "write", "trim"), help="with a log: which accesses (default: all)"
    )
    group.add_argument("--device", metavar="DEVICE", help="with a log of several devices: whose accesses")
    group.add_argument(
        "--disk", metavar="N", type=int, help="the disk that the ranges are of, from 1 (default: 1)"
    )
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def _columns() -> list[list[str]]:
    from virt_bmap.ask.hits import OBJECTS

    return [SCHEMA.names, OBJECTS.names]


def run(args: argparse.Namespace) -> int:
    if args.ranges is not None:
        return _many(args)
    if any(option is not None for option in (args.status, args.block_size, args.op, args.device, args.disk)):
        raise UsageError(
            "--status, --block-size, --op, --device and --disk belong to "
            "--ranges; for another disk than the first give DISK:OFFSET"
        )
    given, ranges = (None, [args.map, *args.range]) if args.add else (args.map, args.range)
    if given is None and not args.add:
        raise UsageError("lookup needs a map or disk, and at least one OFFSET[-END|+LENGTH]")
    if not any(ranges):
        raise UsageError("no range to look up: give OFFSET, OFFSET-END or OFFSET+LENGTH")
    asked = [parse_range(text) for text in ranges if text is not None]
    bmap = map_or_disks(args, [given] if given else [])
    emit_records(
        args, [row for disk, start, end in asked for row in owners(bmap, disk, start, end)], SCHEMA, line
    )
    return 0


def parse_range(text: str) -> tuple[int, int, int]:
    """(disk, start, end) of [DISK:]OFFSET[-END|+LENGTH]; a lone OFFSET is one byte."""
    match = re.fullmatch(r"(?:(\d+):)?([^-+]+)(?:([-+])(.+))?", text)
    if not match:
        raise UsageError(f"{text!r} is not OFFSET, OFFSET-END or OFFSET+LENGTH")
    start = number(match[2])
    end = start + 1 if match[3] is None else number(match[4]) + (start if match[3] == "+" else 0)
    if end <= start:
        raise UsageError(f"{text!r}: the range is empty: it starts at byte {start} and ends at {end}")
    return int(match[1] or 1), start, end


def owners(bmap: BlockMap, disk: int, start: int, end: int) -> list[dict[str, Any]]:
    """The records of all owners of a range; UsageError where it is not on the disk."""
    size = bmap.size_of(bmap.disk(disk))
    if start >= size:
        raise UsageError(f"byte {start:#x} lies beyond the end of disk {disk}, which has {size:#x} bytes")
    return owner_records(bmap, disk, np.array([start]), np.array([end]))


def line(row: dict[str, Any]) -> str:
    """One owner for people: `541000-541400 directory /dev/sda1 /lost+found, byte 0x0`."""
    name = row["path"] or (
        f"[{row['part']}]" if row["part"] else f"[inode {row['inode']}]" if row["inode"] is not None else ""
    )
    part = f" [{row['part']}]" if row["part"] and row["path"] else ""
    offset = f" at {row['file_offset']:#x}" if row["file_offset"] is not None else ""
    words = "".join(
        f", {word}" for word in [*row["flags"], *([] if row["role"] == "data" else [row["role"]])]
    )
    return (
        f"{row['disk']} {row['start']:x} {row['end']:x} "
        f"{row['kind']} {row['device']} {name}{part}{offset}".rstrip()
        + words
    )


# ---- many ranges -------------------------------------------------------------------------------------------

SHOWN = 4
"""Ranges inside a file that a person is shown; --json has them all."""


def _many(args: argparse.Namespace) -> int:
    """What the ranges of a file hit, by object."""
    from virt_bmap.ask.hits import OBJECTS, hits

    if args.range or (args.add and args.map):
        raise UsageError(
            "lookup takes ranges from --ranges or as arguments, not both; given: "
            f"{' '.join([args.map, *args.range])}"
        )
    ranges = _read_ranges(args)
    number_of_disk = 1 if args.disk is None else args.disk
    bmap = map_or_disks(args, [args.map] if args.map else [])
    volume = bmap.volumes.slice(bmap.disk(number_of_disk), 1).to_pylist()[0]
    starts, ends = ranges.inside(volume["size"], escape(volume["name"].encode()))
    say(f"{ranges.source}: {ranges.format}, {plural(len(starts), 'range')} to look up", file=sys.stderr)
    found = hits(bmap, number_of_disk, starts, ends)
    if args.json or args.output is not None:
        emit_records(args, found.objects, OBJECTS, hit_line)
        return 0
    for row in found.objects:
        if row["kind"] != "slack":
            say(hit_line(row))
    kinds = sorted(found.kinds.items(), key=lambda item: -item[1])
    say(
        f"{found.size:>15,} bytes in {plural(len(starts), 'range')}"
        + (": " + ", ".join(f"{size:,} {kind}" for kind, size in kinds) if kinds else "")
    )
    return 0


def _read_ranges(args: argparse.Namespace) -> RangeList:
    """The ranges of --ranges; read before any disk is, so that a slip costs no time."""
    data, source = read_list(args.ranges, args.keys_from_stdin)
    block_size = None if args.block_size is None else number(args.block_size)
    return parse(data, source, args.status, block_size, args.op, args.device)


def read_list(path: str, keys_from_stdin: bool) -> tuple[bytes, str]:
    """The content of the file that --ranges names, and its name for messages; `-` is standard input."""
    if path == "-" and keys_from_stdin:
        raise UsageError("standard input can hold ranges or keys, not both")
    try:
        if path == "-":
            return sys.stdin.buffer.read(), "standard input"
        with open(path, "rb") as file:
            return file.read(), path
    except OSError as error:
        raise ImageError(f"{path}: can't be read: {error.strerror}") from error


def hit_line(row: dict[str, Any]) -> str:
    """One object for people: bytes hit, kind, device and name, and where in the file."""
    names = [
        row["path"] or ("" if row["inode"] is None else f"[inode {row['inode']}]"),
        f"[{row['part']}]" if row["part"] else "",
    ]
    name = " ".join(word for word in names if word)
    also = f" (and {plural(len(row['also']), 'more name')})" if row["also"] else ""
    risk = "" if row["names"] is None else f", with {plural(row['names'], 'name')}"
    where = ", ".join(f"{low:#x}-{high:#x}" for low, high in row["ranges"][:SHOWN])
    more = f" and {plural(len(row['ranges']) - SHOWN, 'more range')}" if len(row["ranges"]) > SHOWN else ""
    words = "".join(
        f", {word}" for word in [*row["flags"], *([] if row["role"] == "data" else [row["role"]])]
    )
    return (
        f"{row['bytes']:>15,} {row['kind']:<9} {row['device']} {name}{also}{risk}".rstrip()
        + (f" at {where}{more}" if where else "")
        + words
    )
