"""One byte of a disk, all the way down: every layer it
passes, who owns it there, and what is known of the owner.

The result is plain dictionaries, ready for JSON: names are escaped, offsets and sizes are bytes. What the map
does not say is left out rather than guessed: which of several names of a large directory lie in this block.
Whose a free block was, the metadata may still say (`history_at`).
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.ask import history
from virt_bmap.ask.records import record
from virt_bmap.ask.structures import fields, structure
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.layers import raw
from virt_bmap.core.mapping import PACKED, ROLES, Rows
from virt_bmap.core.reader import Reader
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners
from virt_bmap.model.listing import describe, specificity

MAX_LAYERS = 256
"""Layers in one answer: a parity byte belongs to every data disk's byte of its stripe, a thin block to every
snapshot; a hostile stack multiplies both."""
MAX_NAMES = 1000
"""Names listed of one directory, paths of one inode, records of one block; all are counted."""
SECTOR = 512
MAX_FORMER = 16
"""Former owners of one byte that are told, the last first."""

Found = dict[str, Any]


def explain(bmap: BlockMap, disk: int, offset: int) -> Found:
    """Byte `offset` of disk number `disk` (from 1); UsageError where there is no such byte."""
    top = bmap.disk(disk)
    size = bmap.size_of(top)
    if not 0 <= offset < size:
        raise UsageError(f"byte {offset:#x} lies beyond the end of disk {disk}, which has {size:#x} bytes")
    owners = bmap.owners(disk, ints(offset), ints(offset + 1))
    owners = owners.take(owners.extent >= 0)
    walk = _Walk(bmap, owners, disk)
    layer = walk.layer(top, offset)
    return {
        "disk": disk,
        "offset": offset,
        "sector": offset // SECTOR,
        "complete": walk.left >= 0,
        "layer": layer,
    }


class _Walk:
    """Climbs from the disk; `left` is how many more layers may be shown."""

    def __init__(self, bmap: BlockMap, owners: Owners, disk: int = 1) -> None:
        self.bmap, self.owners, self.disk, self.left = bmap, owners, disk, MAX_LAYERS - 1

    def layer(self, volume: int, offset: int) -> Found:
        """What a volume has to say of its byte `offset`, and the volumes that hold this byte in turn."""
        row = self.bmap.volumes.slice(volume, 1).to_pylist()[0]
        extents = np.unique(
            self.owners.extent[(self.owners.volume == volume) & (self.owners.inside == offset)]
        )
        system = _filesystem(self.bmap, volume, offset)
        result = {
            "volume": volume, "device": _safe(row["name"]), "kind": row["kind"], "size": row["size"],
            "offset": offset, **{key: _safe(row[key]) for key in ("type", "label", "uuid", "detail")},
            "filesystem": system,
            "owners": [_owner(self.bmap, volume, offset, extent) for extent in extents.tolist()],
        }  # fmt: skip
        kinds = {owner["kind"] for owner in result["owners"]}
        if tables.KINDS[tables.GAP] in kinds:
            result["between"] = _neighbours(self.bmap, volume, offset)
        block = system["block_size"] if system else SECTOR
        result["problems"] = _problems(self.bmap, volume, offset, block, bool(kinds & {"content", "unknown"}))
        result["layers"] = self._inner(volume, offset)
        return result

    def _inner(self, volume: int, offset: int) -> list[Found]:
        rows = self.bmap.rows_into(volume)
        pieces = rows.up(ints(offset), ints(offset + 1))
        result = []
        for row, target, length in zip(
            pieces.row.tolist(), pieces.target.tolist(), pieces.target_length.tolist(), strict=True
        ):
            self.left -= 1
            if self.left < 0:
                break
            if rows.role[row] == PACKED:
                inner = self._packed(int(rows.volume[row]), target, target + length)
            else:
                inner = self.layer(int(rows.volume[row]), target)
            result.append({"from": _run(rows, row, offset), **inner})
        return result

    def _packed(self, volume: int, start: int, end: int) -> Found:
        """A compressed run: any byte of it belongs to all owners of the bytes that it holds, so that no
        single one is followed."""
        row = self.bmap.volumes.slice(volume, 1).to_pylist()[0]
        packed = self.owners.take(self.owners.role == PACKED)
        packed = packed.take(specificity(self.bmap, packed))
        return {
            "volume": volume, "device": _safe(row["name"]), "kind": row["kind"], "size": row["size"],
            "offset": start, "end": end,
            **{key: _safe(row[key]) for key in ("type", "label", "uuid", "detail")}, "filesystem": None,
            "owners": [], "problems": [], "layers": [],
            "packed": [record(found) for found in describe(self.bmap, self.disk, packed).to_pylist()],
        }  # fmt: skip


def _run(rows: Rows, row: int, offset: int) -> Found:
    """The run of bytes (an LV's segment, a chunk of an array's member) in which the parent's byte `offset`
    lies; offsets of the parent."""
    first = int(rows.parent_offset[row])
    step = int(rows.parent_step[row])
    run = int(rows.parent_run[row])
    nth = (offset - first) // step if step else 0
    start = first + nth * step
    return {"role": ROLES[rows.role[row]], "start": start, "end": start + run, "inside": offset - start,
        "number": nth,
            "count": int(rows.count[row])}  # fmt: skip


def _neighbours(bmap: BlockMap, volume: int, offset: int) -> list[str | None]:
    """The devices that end before and begin after a byte which belongs to none."""
    rows = bmap.rows_into(volume)
    start = rows.parent_offset
    end = rows.parent_end
    before, behind = np.flatnonzero(end <= offset), np.flatnonzero(start > offset)
    nearest = [
        before[np.argmax(end[before])] if len(before) else -1,
        behind[np.argmin(start[behind])] if len(behind) else -1,
    ]
    names = bmap.volumes.column("name")
    return [_safe(names[int(rows.volume[at])].as_py()) if at >= 0 else None for at in nearest]


def _problems(bmap: BlockMap, volume: int, offset: int, block: int, whole: bool) -> list[str]:
    """What the readers complained of in this block, and of the whole volume where it could not be read."""
    where, at = tables.integers(bmap.problems, "volume"), tables.integers(bmap.problems, "volume_offset")
    here = (at >= 0) & (at // block == offset // block)
    mine = np.flatnonzero((where == volume) & (here | whole))
    return [
        f"{row['severity']}: {escape(row['detail'].encode())}" for row in bmap.problems.take(mine).to_pylist()
    ]


def fields_at(bmap: BlockMap, layer: Found, readers: Sequence[Reader], length: int) -> Found | None:
    """The fields of metadata in `length` bytes from the byte on: of the innermost layer that knows any, its
    device, what lies there, and a list."""
    for inner in layer["layers"]:
        if found := fields_at(bmap, inner, readers, length):
            return found
    low, volume = layer["offset"], layer["volume"]
    features = (bmap.slice_of("filesystems", volume)[1].column("features").to_pylist() or [None])[0] or ""
    for part, start, end in _places(layer):
        if known := structure(layer["type"], part, features):
            rows = fields(known, start, end, low, min(low + length, end), readers[volume].read_clipped)
            return {"device": layer["device"], "part": part, "fields": rows} if rows else None
    return None


def meant_at(layer: Found, readers: Sequence[Reader], length: int) -> Found | None:
    """The bytes that the innermost filesystem means where others lie on the disk, since its journal is not
    replayed yet: its device, and the bytes as hexadecimal digits."""
    for inner in layer["layers"]:
        if found := meant_at(inner, readers, length):
            return found
    reader, offset = readers[layer["volume"]], layer["offset"]
    if raw(reader) is reader or layer.get("end") is not None:
        return None
    meant, there = (one.read(offset, min(length, one.size - offset)) for one in (reader, raw(reader)))
    return {"device": layer["device"], "offset": offset, "bytes": meant.hex()} if meant != there else None


def _places(layer: Found) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, byte after the last) of what may have a structure: the inode's record, then each
    owner's extent."""
    if layer["filesystem"] and (record := layer["filesystem"]["record"]):
        yield "record", record["offset"], record["offset"] + record["size"]
    for owner in layer["owners"]:
        if owner["file_start"] in (None, 0) or owner["kind"] == "directory":
            yield owner["part"] or owner["kind"], owner["start"], owner["end"]


def history_at(bmap: BlockMap, layer: Found, readers: Sequence[Reader]) -> Found | None:
    """What the metadata still says of the past of the byte, in the innermost
    layer that knows: of a byte in a journal what it is a copy of, of a
    free one whose it was (`former`, None where the format keeps nothing)."""
    for inner in layer["layers"]:
        if found := history_at(bmap, inner, readers):
            return found
    volume, owners = layer["volume"], {owner["part"] or owner["kind"] for owner in layer["owners"]}
    if layer["filesystem"] and "journal" in owners:
        return _copy(bmap, layer, raw(readers[volume]))
    if layer["filesystem"] and "free" in owners:
        former = history.former_owners(
            bmap, volume, readers[volume], ints(layer["offset"]), ints(layer["offset"] + 1)
        )
        told = None if former is None else _former(bmap, volume, former, layer["offset"])
        return {"device": layer["device"], "copy_of": None, "transaction": None, "owners": [], "former": told}
    return None


def _copy(bmap: BlockMap, layer: Found, reader: Reader) -> Found | None:
    """What a byte of a journal is a copy of, and whose that is."""
    volume = layer["volume"]
    past = history.history_of(bmap, volume)
    copy = past.copy_of(reader, layer["offset"]) if past and past.copy_of else None
    if copy is None:
        return None
    _, extents = bmap.slice_of("extents", volume)
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    rows = extents.take(np.flatnonzero((start <= copy[0]) & (copy[0] < start + length))).to_pylist()
    here = [{"kind": row["kind"], "part": _safe(row["part"]),
            "path": None if row["inode"] is None else _first_path(bmap, volume, row["inode"])}
            for row in rows]  # fmt: skip
    return {
        "device": layer["device"],
        "copy_of": copy[0],
        "transaction": copy[1],
        "owners": here,
        "former": None,
    }


def _former(bmap: BlockMap, volume: int, former: pa.Table, offset: int) -> list[Found]:
    """The former owners of one byte, each as its last word has it."""
    _, first = np.unique(tables.integers(former, "inode"), return_index=True)
    rows = former.take(np.sort(first)[:MAX_FORMER]).to_pylist()
    _, inodes = bmap.slice_of("inodes", volume)
    number = tables.integers(inodes, "inode")[tables.integers(inodes, "flags") & tables.I_DELETED == 0]
    living = set(number[np.isin(number, [row["inode"] for row in rows])].tolist())
    return [
        {
            "inode": row["inode"],
            "names": [escape(name) for name in row["names"]],
            "part": _safe(row["part"]),
            "file_offset": None
            if row["file_offset"] is None
            else row["file_offset"] + offset - row["volume_offset"],
            "size": row["size"],
            "mtime": _time(row["mtime_ns"]),
            "said_by": row["said_by"],
            "sequence": row["sequence"],
            "doubt": row["doubt"],
            "now": _first_path(bmap, volume, row["inode"]) if row["inode"] in living else None,
        }
        for row in rows
    ]


# ---- the filesystem ----------------------------------------------------------------------------------------


def _filesystem(bmap: BlockMap, volume: int, offset: int) -> Found | None:
    """The filesystem's facts, the block (counted from the start of the volume), and the inodes whose records
    lie in it."""
    rows = bmap.slice_of("filesystems", volume)[1].to_pylist()
    if not rows or offset >= rows[0]["size"]:
        return None
    size = max(1, rows[0]["block_size"])
    record, others = _records(bmap, volume, offset, size)
    return {
        **{key: _safe(rows[0][key]) for key in ("type", "label", "uuid", "state")}, "block_size": size,
        "block": offset // size, "block_offset": offset % size, "record": record, "records_in_block": others,
    }  # fmt: skip


def record_size(bmap: BlockMap, volume: int) -> int:
    """The size of the inodes' own records on a volume; 0 where it differs from one to the next, or where they
    lie compressed."""
    format = formats.filesystem(bmap.filesystem_type(volume))
    if format is None or not format.fixed_records:
        return 0
    _, inodes = bmap.slice_of("inodes", volume)
    place = tables.integers(inodes, "record_offset")
    return int(np.gcd.reduce(np.diff(np.unique(place[place >= 0]))))


def _records(bmap: BlockMap, volume: int, offset: int, block: int) -> tuple[Found | None, Found]:
    """The inode whose record holds the byte; and all whose records begin in this block."""
    size = record_size(bmap, volume)
    if not size:
        return None, {"count": 0, "records": []}
    _, inodes = bmap.slice_of("inodes", volume)
    place, number = tables.integers(inodes, "record_offset"), tables.integers(inodes, "inode")

    def record(at: int) -> Found:
        inode = int(number[at])
        return {"inode": inode, "path": _first_path(bmap, volume, inode), "offset": int(place[at])}

    beside = np.flatnonzero((place >= 0) & (place // block == offset // block))
    beside = beside[np.argsort(place[beside], kind="stable")]
    here = np.flatnonzero((place >= 0) & (place <= offset) & (offset < place + size))
    mine = (
        {**record(int(here[0])), "size": size, "inside": offset - int(place[here[0]])} if len(here) else None
    )
    return mine, {"count": len(beside), "records": [record(at) for at in beside[:MAX_NAMES].tolist()]}


# ---- the owner ---------------------------------------------------------------------------------------------


def _owner(bmap: BlockMap, volume: int, offset: int, extent: int) -> Found:
    """One extent that holds the byte: what it is, where the byte lies in the file, and the inode."""
    row = bmap.extents.slice(extent, 1).to_pylist()[0]
    start, in_file = row["volume_offset"], row["file_offset"]
    compressed = bool(row["flags"] & tables.COMPRESSED)
    inode = None if row["inode"] is None else _inode(bmap, volume, row["inode"])
    return {
        "kind": row["kind"], "meaning": tables.KIND_MEANING[row["kind"]], "part": _safe(row["part"]),
        "start": start, "end": start + row["length"],
        "file_offset": None if in_file is None or compressed else in_file + offset - start,
        "file_start": in_file, "file_end": None if in_file is None else in_file + row["file_length"],
        "flags": _words(tables.FLAGS, row["flags"]), "inode": inode,
        "names": _names(bmap, volume, row["inode"]) if row["kind"] == "directory" and inode else None,
    }  # fmt: skip


def _inode(bmap: BlockMap, volume: int, number: int) -> Found:
    """What stat would say, and all names; where the map holds no inodes (a text map), the names alone."""
    _, inodes = bmap.slice_of("inodes", volume)
    rows = inodes.take(np.flatnonzero(tables.integers(inodes, "inode") == number)[:1]).to_pylist()
    count, paths = _paths(bmap, volume, number)
    result: Found = {"inode": number, "path": paths[0] if paths else None, "paths": paths, "names": count}
    for row in rows:
        result |= {
            "type": row["type"], "size": row["size"],
            "mode": None if row["mode"] is None else f"{row['mode']:o}", "uid": row["uid"], "gid": row["gid"],
            "nlink": row["nlink"], "mtime": _time(row["mtime_ns"]),
            "flags": _words(tables.INODE_FLAGS, row["flags"]),
        }  # fmt: skip
    return result


def _names(bmap: BlockMap, volume: int, directory: int) -> Found | None:
    """The names in a directory, all of its blocks together."""
    _, names = bmap.slice_of("names", volume)
    if not len(names):
        return None
    mine = np.flatnonzero(tables.integers(names, "parent") == directory)
    return {
        "count": len(mine),
        "names": [escape(name) for name in names.column("name").take(pa.array(mine[:MAX_NAMES])).to_pylist()],
    }


def _paths(bmap: BlockMap, volume: int, inode: int) -> tuple[int, list[str]]:
    known, path = bmap.paths(volume)
    low, high = (int(np.searchsorted(known, inode, side)) for side in ("left", "right"))
    return high - low, [escape(name) for name in path.slice(low, min(high - low, MAX_NAMES)).to_pylist()]


def _first_path(bmap: BlockMap, volume: int, inode: int) -> str | None:
    known, path = bmap.paths(volume)
    at = int(np.searchsorted(known, inode))
    return escape(path[at].as_py()) if at < len(known) and known[at] == inode else None


def _words(words: dict[str, int], flags: int) -> list[str]:
    return [word for word, bit in words.items() if flags & bit]


def _safe(text: str | None) -> str | None:
    return None if text is None else escape(text.encode(errors="surrogateescape"))


def _time(nanoseconds: int | None) -> str | None:
    """ISO 8601 in UTC with all nanoseconds; the plain number where no calendar reaches."""
    if nanoseconds is None:
        return None
    seconds, rest = divmod(nanoseconds, 10**9)
    try:
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    except OverflowError:
        return f"{nanoseconds} ns"
    return f"{when:%Y-%m-%dT%H:%M:%S}" + (f".{rest:09}" if rest else "") + "Z"


def kinds_of(layer: Found) -> set[str]:
    """The kinds of a layer and of all inside it: does a byte pass an encrypted volume?"""
    return {layer["kind"]}.union(*(kinds_of(inner) for inner in layer["layers"]))
