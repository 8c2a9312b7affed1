"""Rows of a listing as plain Python records, for JSON lines and for people: names escaped, kinds and flags as
words, offsets in decimal."""

from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Int
from virt_bmap.core.escape import escape
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.listing import LISTING, describe, specificity

NAMES = (
    "disk", "start", "end", "kind", "device", "path", "file_offset", "part", "inode", "volume_offset",
    "length", "role", "flags",
)  # fmt: skip
PLAIN = {"path": pa.string(), "flags": pa.list_(pa.string())}
SCHEMA = pa.schema(
    [LISTING.field(name).with_type(PLAIN.get(name, LISTING.field(name).type)) for name in NAMES]
)
"""The columns of a listing as people and programs are given them: paths as escaped text, flags as words."""


def owner_records(bmap: BlockMap, disk: int, starts: Int, ends: Int) -> list[dict[str, Any]]:
    """Every owner of the ranges, range by range, the most specific first, each a dictionary with NAMES."""
    owners = bmap.owners(disk, starts, ends)
    owners = owners.take(specificity(bmap, owners))
    owners = owners.take(np.argsort(owners.query, kind="stable"))
    return [record(row) for row in describe(bmap, disk, owners).to_pylist()]


def record(row: dict[str, Any]) -> dict[str, Any]:
    """One row of a listing with its names escaped and its flags as words."""
    result = {key: row[key] for key in NAMES}
    for key in ("path", "device", "part"):
        if row[key] is not None:
            result[key] = escape(row[key] if isinstance(row[key], bytes) else row[key].encode())
    result["flags"] = [word for word, bit in tables.FLAGS.items() if row["flags"] & bit]
    return result
