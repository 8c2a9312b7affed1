"""virt-bmap explain: one byte of a disk, all the way down."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from virt_bmap.ask.explain import explain, fields_at, history_at, kinds_of, meant_at
from virt_bmap.commands.common import (
    Progress,
    add_disk_options,
    add_host_option,
    add_nested_option,
    disks_of,
    load,
)
from virt_bmap.commands.lookup import line, parse_range
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import Corrupt, ImageError, Unsupported, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.layers import raw
from virt_bmap.core.printable import say, to_json
from virt_bmap.core.reader import Reader
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic
from virt_bmap.open.disks import Disks, Opening
from virt_bmap.survey import maps

HELP = "say all that is known of one byte of a disk: every layer, the owner, and the bytes there"

DUMP = 64
"""Bytes shown."""
SHOWN = 10
"""Names, other inodes, owners and problems that a person is shown; --json has them all."""

TOLD = ("unwritten", "xattr", "tree", "boot", "gap", "free", "content", "unknown", "unreferenced")
"""Kinds whose meaning is said: the name after the others tells it."""

Found = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        type=INPUT,
        metavar="[MAP-or-DISK] OFFSET",
        help="a saved map or a disk (not with -a), and a byte "
        "of it; DISK:OFFSET for another disk than the first",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_host_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    wanted = 1 if args.add else 2
    if len(args.arguments) != wanted:
        raise UsageError(
            f"explain needs {'one OFFSET' if args.add else 'a map or disk, and one OFFSET'}; "
            f"given: {' '.join(args.arguments)}"
        )
    disk, start, end = parse_range(args.arguments[-1])
    if end != start + 1:
        raise UsageError(f"{args.arguments[-1]!r}: explain takes one byte; lookup takes ranges")
    given = args.arguments[:-1]
    if given and maps.is_saved(given[0]):
        answer = explain(load(args, given[0]), disk, start) | {
            "image": None,
            "host": None,
            "bytes": None,
            "meant": None,
            "fields": None,
            "history": None,
            "unread": "the map was saved without the disk's bytes",
        }
    else:
        answer = _read(disks_of(args, given), disk, start)
    if args.json:
        say(to_json(answer))
    else:
        say("\n".join(_lines(answer)))
    return 0


def _read(disks: Disks, disk: int, offset: int) -> Found:
    """The answer with the bytes themselves, read while the disks are open; a bad sector is a reason to ask,
    so that is not an error."""
    with Progress() as progress, maps.opened(disks, progress.watch) as (bmap, readers):
        progress.stop()
        answer = explain(bmap, disk, offset)
        if bmap.on_files:
            image, host = bmap.volumes.column("name")[bmap.disk(disk)].as_py(), None
        else:
            image = disks.images[disk - 1]
            host = _host(image, disks, offset)
        return answer | {"image": _shown(image), "host": host} | _bytes(bmap, answer, readers)


def _host(image: str, opening: Opening, offset: int) -> Found | None:
    """Where a byte of the disk lies in the image's files; None where the file is the disk, over NBD, and
    where the format's layer is not read."""
    if magic.is_uri(image):
        return None
    from virt_bmap.open.host import open_host

    try:
        with open_host([image], opening) as host:
            return None if host.disks[0].format == RAW else host.place(0, offset) | {"unread": None}
    except Unsupported:
        return None
    except Corrupt as error:
        return {"unread": str(error)}


def _shown(path: str) -> str:
    return escape(path.encode(errors="surrogateescape"))


def _bytes(bmap: BlockMap, answer: Found, readers: Sequence[Reader]) -> Found:
    """The bytes there, the fields of what lies there, and
    what was there before; or why they can't be read."""
    reader, offset = raw(readers[bmap.disk(answer["disk"])]), answer["offset"]
    found: Found = {"bytes": None, "meant": None, "fields": None, "history": None, "unread": None}
    try:
        found["bytes"] = reader.read(offset, min(DUMP, reader.size - offset)).hex()
        found["meant"] = meant_at(answer["layer"], readers, DUMP)
        found["fields"] = fields_at(bmap, answer["layer"], readers, DUMP)
        found["history"] = history_at(bmap, answer["layer"], readers)
    except ImageError as error:
        found["unread"] = str(error)
    return found


# ---- for people --------------------------------------------------------------------------------------------


def _lines(answer: Found) -> Iterator[str]:
    image = f" of {answer['image']}" if answer["image"] else ""
    yield (
        f"byte {answer['offset']:#x} ({answer['offset']:,}){image}, "
        f"in sector {answer['sector']:,} of 512 bytes"
    )
    if answer["host"]:
        yield _host_line(answer["host"])
    yield from _layer(answer["layer"], "")
    if not answer["complete"]:
        yield "(further layers are left out)"
    if answer["history"]:
        yield from _history(answer["history"])
    yield ""
    if answer["bytes"] is None:
        yield f"the bytes there are not shown: {answer['unread']}"
        return
    place = "in the file" if answer["layer"]["kind"] == "file" else "on the disk"
    where = (
        f"as they are {place}, below the encryption"
        if "crypt" in kinds_of(answer["layer"])
        else f"as they are {place}"
    )
    yield f"the bytes there, {where}:"
    yield from _dump(answer["offset"], bytes.fromhex(answer["bytes"]))
    if meant := answer["meant"]:
        yield f"the bytes that {meant['device']} has there once its journal is replayed:"
        yield from _dump(meant["offset"], bytes.fromhex(meant["bytes"]))
    if answer["fields"]:
        yield from _fields(answer["fields"])


def _host_line(host: Found) -> str:
    """The image format's cluster, and where it lies in which file."""
    if host["unread"]:
        return f"where it lies in the image file is not known: {host['unread']}"
    cluster = (
        f"{host['format']} cluster {host['cluster']:,} of {host['cluster_size']:,} bytes, byte "
        f"{host['cluster_offset']:#x} in it: "
    )
    if host["file"] is None:
        return cluster + "in no file of the image, so it reads as zeroes"
    file = escape(host["file"].encode(errors="surrogateescape"))
    below = f", {plural(host['level'], 'backing file')} down" if host["level"] else ""
    if host["role"] == "compressed":
        return f"{cluster}compressed, in bytes {host['offset']:#x}-{host['end']:#x} of {file}{below}"
    return f"{cluster}byte {host['offset']:#x} of {file}{below}" + (
        ", which is kept for it, but reads as zeroes" if host["role"] == "zero" else ""
    )


def _layer(layer: Found, indent: str) -> Iterator[str]:
    if (run := layer.get("from")) and layer["kind"] != "partition":
        yield from (indent + text for text in _run(run))
    facts = [layer["kind"], human(layer["size"]), layer["type"] or "nothing known in it"]
    facts += [f"{word} {layer[word]}" for word in ("label", "uuid") if layer[word]] + (
        [layer["detail"]] if layer["detail"] else []
    )
    where = (
        f"byte {layer['offset']:#x}"
        if layer.get("end") is None
        else f"bytes {layer['offset']:#x}-{layer['end']:#x}"
    )
    yield f"{indent}{layer['device']} ({', '.join(facts)}): {where}"
    inner = indent + "  "
    if system := layer["filesystem"]:
        label = f" {system['label']!r}" if system["label"] else ""
        yield (
            f"{inner}{system['type']}{label}, {system['state']}: block {system['block']:,} of "
            f"{system['block_size']:,} bytes, byte {system['block_offset']:#x} in it"
        )
    for owner in layer["owners"][:SHOWN]:
        yield from (inner + text for text in _owner(owner, layer))
    if more := len(layer["owners"]) - SHOWN:
        yield from [f"{inner}and {plural(more, 'more owner')} of the same bytes"] if more > 0 else []
    if packed := layer.get("packed"):
        yield from (f"{inner}{line(row)}" for row in packed[:SHOWN])
        yield from (
            [f"{inner}and {plural(len(packed) - SHOWN, 'more owner')} of these bytes"]
            if len(packed) > SHOWN
            else []
        )
    elif not layer["owners"] and not layer["layers"]:
        yield f"{inner}the map names no owner"
    if system:
        yield from (inner + text for text in _records(system))
    yield from (inner + text for text in layer["problems"][:SHOWN])
    for found in layer["layers"]:
        yield from _layer(found, inner)


def _run(run: Found) -> Iterator[str]:
    """Which run of bytes of the parent holds it: a segment of an LV, a chunk of an array's member."""
    chunk = f"chunk {run['number']:,} of {run['count']:,}, " if run["count"] > 1 else ""
    yield (
        f"{run['role']}: {chunk}{human(run['end'] - run['start'])} "
        f"from byte {run['start']:#x}, byte {run['inside']:#x} in it"
    )


def _owner(owner: Found, layer: Found) -> Iterator[str]:
    part = f" [{owner['part']}]" if owner["part"] else ""
    flags = f" ({', '.join(owner['flags'])})" if owner["flags"] else ""
    inode = owner["inode"]
    name = f" of {inode['path'] or 'inode ' + str(inode['inode'])}" if inode else ""
    meaning = f": {owner['meaning']}" if owner["kind"] in TOLD else ""
    yield f"{owner['kind']}{part}{name}{flags}{meaning}"
    if owner["kind"] == "gap" and owner["part"] is None:
        before, behind = layer["between"]
        yield f"  between {before or 'the start'} and {behind or 'the end'}"
    yield f"  bytes {owner['start']:#x}-{owner['end']:#x} of {layer['device']}" + _in_file(owner)
    if inode:
        yield from ("  " + text for text in _inode(inode))
    if names := owner["names"]:
        yield (
            f"  {plural(names['count'], 'name')} in this directory: {_some(names['names'], names['count'])}"
            if names["count"]
            else "  no names in it"
        )


def _in_file(owner: Found) -> str:
    if owner["file_start"] is None:
        return ""
    text = f", which hold bytes {owner['file_start']:#x}-{owner['file_end']:#x} of it"
    if owner["file_offset"] is None:
        return text + ", compressed"
    size = owner["inode"].get("size") if owner["inode"] else None
    behind = (
        size is not None
        and owner["part"] is None
        and owner["kind"] in ("data", "unwritten")
        and owner["file_offset"] >= size
    )
    return (
        text
        + f"; this one is byte {owner['file_offset']:#x}"
        + (" (beyond its end: slack)" if behind else "")
    )


def _inode(inode: Found) -> Iterator[str]:
    if inode.get("type", "unknown") != "unknown":
        facts = [inode["type"], f"{inode['size']:,} bytes"] + (
            [f"mode {inode['mode']}"] if inode["mode"] else []
        )
        facts += [f"{word} {inode[word]}" for word in ("uid", "gid") if inode[word] is not None] + [
            plural(inode["nlink"], "link")
        ]
        facts += ([f"modified {inode['mtime']}"] if inode["mtime"] else []) + inode["flags"]
        yield f"inode {inode['inode']}: {', '.join(facts)}"
    if inode["names"] > 1:
        yield f"{plural(inode['names'], 'name')}: {_some(inode['paths'], inode['names'])}"
    elif not inode["names"]:
        yield "no name leads to it"


def _records(system: Found) -> Iterator[str]:
    """The inodes whose own records lie here: what a bad block puts at risk."""
    if record := system["record"]:
        yield f"byte {record['inside']:#x} of the {record['size']}-byte record of inode {record['inode']}" + (
            f", {record['path']}" if record["path"] else ""
        )
    block = system["records_in_block"]
    if block["count"]:
        names = [row["path"] or f"inode {row['inode']}" for row in block["records"]]
        yield f"{plural(block['count'], 'inode')} with records in this block: {_some(names, block['count'])}"


def _some(names: list[str], count: int) -> str:
    more = count - len(names[:SHOWN])
    return ", ".join(names[:SHOWN]) + (f", and {more:,} more" if more else "")


def _history(history: Found) -> Iterator[str]:
    """What the metadata still says of the past."""
    if history["copy_of"] is not None:
        names = [owner["path"] or f"[{owner['part'] or owner['kind']}]" for owner in history["owners"]]
        yield (
            f"a journal's copy, of transaction {history['transaction']}: belongs at byte "
            f"{history['copy_of']:#x} of {history['device']}" + (f", {', '.join(names)}" if names else "")
        )
    former = history["former"]
    if former is None and history["copy_of"] is None:
        yield "who owned it is not known: nothing that this filesystem keeps about freed space is read here"
    if former == []:
        yield "the metadata remembers no owner"
    if former and len(former) > 1:
        yield f"{len(former)} former owners are remembered, the last one first as far as can be told:"
    for one in former or []:
        yield from _former(one)


def _former(one: Found) -> Iterator[str]:
    """One former owner: what was there, who says so, and how sure that is."""
    name = ", ".join(one["names"]) or "a name that is gone"
    part = f" [{one['part']}]" if one["part"] else ""
    size = "" if one["size"] is None else f", {one['size']:,} bytes"
    modified = f", modified {one['mtime']}" if one["mtime"] else ""
    place = "in"
    if one["file_offset"] is not None:
        behind = one["size"] is not None and one["part"] is None and one["file_offset"] >= one["size"]
        place = f"byte {one['file_offset']:#x}{' (beyond its end: slack)' if behind else ''} of"
    yield f"was once {place} inode {one['inode']} ({name}){part}{size}{modified}"
    number = "" if one["sequence"] is None else f", sequence number {one['sequence']}"
    now = f"; that inode is {one['now']} now" if one["now"] else ""
    yield f"  says the {one['said_by']}{number}{now}"
    if one["doubt"]:
        yield f"  {one['doubt']}"


def _fields(found: Found) -> Iterator[str]:
    """What the bytes mean, by the format's own names."""
    yield ""
    yield (
        f"fields of the {found['part']}, at bytes of {found['device']}:"
        if found["part"] != "record"
        else f"fields of the inode's record, at bytes of {found['device']}:"
    )
    for row in found["fields"]:
        number = "" if row["record"] is None else f"[{row['record']}] "
        value = row["value"]
        words = f"{value:,} ({value:#x})" if isinstance(value, int) and abs(value) > 9 else str(value)
        yield f"{row['start']:010x}  {number}{row['name']} = {words}"


def _dump(offset: int, data: bytes) -> Iterator[str]:
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{offset + at:010x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|"
