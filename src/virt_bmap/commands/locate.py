"""virt-bmap locate: where do the bytes of a file lie?"""

import argparse
import os
from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.commands.common import (
    add_disk_options,
    add_host_option,
    add_nested_option,
    add_result_options,
    emit_records,
    map_or_disks,
)
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.arrays import complement
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.listing import LISTING
from virt_bmap.saved.results import field

HELP = "list where the bytes of a file lie, in file order, with holes and unwritten parts"
SCHEMA = pa.schema([
    *(LISTING.field(name).with_nullable(True) for name in ("disk", "start", "end", "kind", "device")),
    ("path", pa.string()), LISTING.field("file_offset"),
    field("file_length", pa.int64(), "bytes of the file", null="not file content"), LISTING.field("part"),
    LISTING.field("volume_offset").with_nullable(True), LISTING.field("role"),
    ("flags", pa.list_(pa.string())),
])  # fmt: skip
"""The columns of `pieces`; a hole lies on no disk."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        metavar="[MAP-or-DISK] DEVICE PATH",
        nargs="+",
        type=INPUT,
        help="a saved map or a disk (not with -a), a device such as /dev/sda1, and a path on it",
    )
    add_result_options(parser, lambda: [SCHEMA.names])
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    wanted = 2 if args.add else 3
    if len(args.arguments) != wanted:
        raise UsageError(
            f"locate needs {'DEVICE and PATH' if args.add else 'a map or disk, DEVICE and PATH'}; "
            f"given: {' '.join(args.arguments)}"
        )
    device, path = args.arguments[-2:]
    bmap = map_or_disks(args, args.arguments[:-2])
    volume = bmap.volume_named(device)
    rows = pieces(bmap, volume, bmap.inode_of(volume, os.fsencode(path)))
    for row in rows:
        row.update(device=device, path=escape(os.fsencode(path)))
    emit_records(args, rows, SCHEMA, line)
    return 0


def pieces(bmap: BlockMap, volume: int, inode: int) -> list[dict[str, Any]]:
    """Every piece of an inode: its content in file order with holes up to its size, then its streams and
    metadata; copies follow what they copy."""
    _, table = bmap.slice_of("extents", volume)
    mine = np.flatnonzero(tables.integers(table, "inode") == inode)
    rows = table.take(mine).to_pylist()
    start = tables.integers(table, "volume_offset")[mine]
    found = bmap.descend(volume, start, start + tables.integers(table, "length")[mine])
    result: list[dict[str, Any]] = []
    for at, row in enumerate(rows):
        for piece in np.flatnonzero(found.query == at).tolist():
            skip = int(found.inside[piece]) - row["volume_offset"]
            length = int(found.length[piece])
            whole = row["flags"] & tables.COMPRESSED
            result.append(
                {
                    "kind": row["kind"],
                    "part": None if row["part"] is None else escape(row["part"].encode()),
                    "disk": bmap.disks.index(int(found.volume[piece])) + 1,
                    "start": int(found.start[piece]),
                    "end": int(found.end[piece]),
                    "volume_offset": int(found.inside[piece]),
                    "file_offset": None
                    if row["file_offset"] is None
                    else row["file_offset"] + (0 if whole else skip),
                    "file_length": None
                    if row["file_offset"] is None
                    else row["file_length"]
                    if whole
                    else length,
                    "role": bmap.role_name(int(found.role[piece])),
                    "flags": [word for word, bit in tables.FLAGS.items() if row["flags"] & bit],
                }
            )
    _, inodes = bmap.slice_of("inodes", volume)
    size = tables.integers(inodes, "size")[tables.integers(inodes, "inode") == inode]
    result += _holes(result, int(size[0]) if len(size) else 0)
    content = [row for row in result if row["file_offset"] is not None and row["part"] is None]
    rest = [row for row in result if row["file_offset"] is None or row["part"] is not None]
    return sorted(content, key=lambda row: (row["file_offset"], row["role"])) + rest


def _holes(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    known = [row for row in rows if row["file_offset"] is not None and row["part"] is None]
    if not known and any(row["part"] for row in rows):
        return []
    start = np.array([row["file_offset"] for row in known], np.int64)
    end = start + np.array([row["file_length"] for row in known], np.int64)
    return [
        {"kind": "hole", "part": None, "disk": None, "start": None, "end": None, "volume_offset": None,
            "file_offset": low,
         "file_length": high - low, "role": "data", "flags": []}
        for low, high in zip(*(side.tolist() for side in complement(start, end, 0, size)), strict=True)
    ]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One piece for people: where in the file, what it is, where on the disk and in the device."""
    inside = (
        "-"
        if row["file_offset"] is None
        else f"{row['file_offset']:x}-{row['file_offset'] + row['file_length']:x}"
    )
    words = "".join(
        f", {word}" for word in [*row["flags"], *([] if row["role"] == "data" else [row["role"]])]
    )
    part = f" [{row['part']}]" if row["part"] else ""
    if row["disk"] is None:
        return f"{inside} {row['kind']}"
    return (
        f"{inside} {row['kind']}{part} disk {row['disk']} at {row['start']:x}-{row['end']:x}, "
        f"{row['device']} at {row['volume_offset']:x}{words}"
    )
