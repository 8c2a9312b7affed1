"""virt-bmap info: the tree of volumes and filesystems."""

import argparse
from typing import Any

import numpy as np
import pyarrow as pa

from virt_bmap.commands.common import (
    add_disk_options,
    add_nested_option,
    add_result_options,
    emit_records,
    map_or_disks,
    opening_of,
)
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.arrays import union
from virt_bmap.core.errors import Corrupt, Unsupported
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW
from virt_bmap.open import magic
from virt_bmap.open.disks import Opening
from virt_bmap.survey import maps

HELP = "show the tree of disks, volumes and filesystems with sizes, types, labels, UUIDs and states"

FACTS = ("type", "label", "uuid", "state", "features")
COUNTS = ("block_size", "size", "free", "directories", "files", "deleted")
IMAGE_SIZES = ("virtual_size", "cluster_size", "allocated", "stored", "file_size")
SCHEMA = pa.schema([
    ("volume", pa.int32()), ("parents", pa.list_(pa.int32())), ("disk", pa.int32()), ("kind", pa.string()),
    ("device", pa.string()), ("size", pa.int64()), ("type", pa.string()), ("label", pa.string()),
    ("uuid", pa.string()), ("detail", pa.string()),
    ("image", pa.struct([("file", pa.string()), ("format", pa.string()),
                *((name, pa.int64()) for name in IMAGE_SIZES)])),
    ("filesystem", pa.struct([*((name, pa.string()) for name in FACTS), ("consistent", pa.bool_()),
                *((name, pa.int64()) for name in COUNTS)])),
    ("problems", pa.list_(pa.struct([("severity", pa.string()), ("code", pa.string()), ("offset", pa.int64()),
                    ("detail", pa.string())]))),
])  # fmt: skip
"""The columns of `volumes`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "disk",
        nargs="*",
        type=INPUT,
        metavar="MAP-or-DISK",
        help="a saved map, or images, block devices, NBD URIs",
    )
    add_result_options(parser, lambda: [SCHEMA.names], "one JSON object a line, one for each volume")
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    bmap = map_or_disks(args, args.disk)
    found = volumes(bmap)
    if not (len(args.disk) == 1 and not args.add and maps.is_saved(args.disk[0])):
        for image, disk in zip([*args.add, *args.disk], bmap.disks, strict=True):
            found[disk]["image"] = image_facts(image, opening_of(args))
    if args.json or args.output is not None:
        emit_records(args, found, SCHEMA, str)
    else:
        _print_tree(found)
    return 0


def volumes(bmap: BlockMap) -> list[dict[str, Any]]:
    """Each volume as a dictionary, with its filesystem's facts
    and the problems found on it; parents before children."""
    child, parent = tables.integers(bmap.mappings, "volume"), tables.integers(bmap.mappings, "parent")
    systems = {row["volume"]: row for row in bmap.filesystems.to_pylist()}
    problems: dict[int, list[dict[str, Any]]] = {}
    for row in bmap.problems.to_pylist():
        problems.setdefault(row["volume"], []).append(row)
    result = []
    for row in bmap.volumes.to_pylist():
        number = row["volume"]
        system = systems.get(number)
        result.append({
            "volume": number, "parents": sorted(set(parent[child == number].tolist())), "disk": row["disk"],
            "kind": row["kind"], "device": _safe(row["name"]), "size": row["size"],
            "type": _safe(row["type"]), "label": _safe(row["label"]), "uuid": _safe(row["uuid"]),
            "detail": _safe(row["detail"]), "image": None,
            "filesystem": _filesystem(bmap, number, system) if system else None,
            "problems": [{"severity": p["severity"], "code": p["code"], "offset": p["volume_offset"],
                    "detail": _safe(p["detail"])}
                         for p in problems.get(number, ())],
        })  # fmt: skip
    return result


def image_facts(image: str, opening: Opening) -> dict[str, Any] | None:
    """What the image format itself says of a disk, names escaped; None for a raw disk, over NBD, and for
    formats whose layer is not read."""
    if magic.is_uri(image):
        return None
    from virt_bmap.open.host import describe, open_host

    try:
        with open_host([image], opening) as host:
            facts: dict[str, Any] | None = None if host.disks[0].format == RAW else _escaped(describe(host))
            return facts
    except Unsupported:
        return None
    except Corrupt as error:
        return {
            "file": _safe(image),
            "format": None,
            "problems": [
                {"severity": "error", "code": error.code, "offset": error.offset, "detail": _safe(str(error))}
            ],
        }


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return _safe(value) if isinstance(value, str) else value


def _safe(text: str | None) -> str | None:
    return None if text is None else escape(text.encode(errors="surrogateescape"))


def _filesystem(bmap: BlockMap, number: int, system: dict[str, Any]) -> dict[str, Any]:
    _, inodes = bmap.slice_of("inodes", number)
    _, extents = bmap.slice_of("extents", number)
    free = tables.codes(extents, "kind") == tables.FREE
    start = tables.integers(extents, "volume_offset")[free]
    low, high = union(start, start + tables.integers(extents, "length")[free])
    deleted = tables.integers(inodes, "flags") & tables.I_DELETED != 0
    types = tables.codes(inodes, "type")[~deleted]
    return {
        **{key: _safe(system[key]) for key in FACTS},
        "consistent": system["state"] in tables.CONSISTENT,
        "block_size": system["block_size"], "size": system["size"], "free": int((high - low).sum()),
        "directories": int(np.count_nonzero(types == tables.T_DIRECTORY)),
        "files": int(np.count_nonzero(types == tables.T_FILE)), "deleted": int(np.count_nonzero(deleted)),
    }  # fmt: skip


def _print_tree(found: list[dict[str, Any]]) -> None:
    """Volumes below the first of their parents, as lsblk draws them."""
    children: dict[int, list[dict[str, Any]]] = {}
    for row in found:
        children.setdefault(row["parents"][0] if row["parents"] else -1, []).append(row)

    def show(number: int, indent: str) -> None:
        rows = children.get(number, [])
        for at, row in enumerate(rows):
            last = at == len(rows) - 1
            branch, below = ("", "") if number < 0 else ("└─", "  ") if last else ("├─", "│ ")
            stem = "│ " if children.get(row["volume"]) else "  "
            first, *more = _lines(row, found)
            say(indent + branch + first)
            for text in more:
                say(indent + below + stem + text)
            show(row["volume"], indent + below)

    show(-1, "")


def _lines(row: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """What is said of one volume: a line of facts, a line for its filesystem, a line for each problem."""
    facts = [row["device"], human(row["size"]), row["kind"], row["type"] or "nothing known"]
    system = row["filesystem"] or {}
    facts += [f"label {label!r}" for label in dict.fromkeys((row["label"], system.get("label"))) if label]
    facts += [f"uuid {uuid}" for uuid in [system.get("uuid") or row["uuid"]] if uuid]
    facts += [row["detail"]] if row["detail"] else []
    others = row["parents"][1:]
    facts += [f"also on {', '.join(found[number]['device'] for number in others)}"] if others else []
    lines = [", ".join(facts)]
    lines += _image_lines(row["image"]) if row["image"] else []
    if system:
        counted = (
            f"{plural(system['directories'], 'directory', 'directories')}, {plural(system['files'], 'file')}"
        )
        counted += f" ({system['deleted']:,} deleted)" if system["deleted"] else ""
        state = "frozen (consistent)" if system["state"] == "frozen" else system["state"]
        lines.append(
            f"  {state}; {human(system['free'])} free of {human(system['size'])}; blocks of "
            f"{human(system['block_size'])}; {counted}"
        )
    said = [f"{problem['severity']}: {problem['detail']}" for problem in row["problems"]]
    return lines + [text for text in said if text not in lines]  # the image may have said it


WRITTEN = 200
"""Characters of what somebody wrote about a case that a person is shown; --json has them all."""
NAMED = 10
"""Snapshots and bitmaps that a person is shown; --json has them all."""


def _image_lines(image: dict[str, Any]) -> list[str]:
    """What is said of the image itself: a line of facts, one each for the chain, snapshots and bitmaps, and
    its problems."""
    lines = []
    if image["format"]:
        facts = [
            " ".join(
                [
                    image["format"],
                    *([f"version {image['version']}"] if image.get("version") else []),
                    image.get("subformat") or "",
                ]
            ).rstrip()
        ]
        facts += [f"clusters of {human(image['cluster_size'])}"] if image["cluster_size"] > 1 else []
        facts += [f"{human(image['allocated'])} allocated", f"file of {human(image['file_size'])}"]
        facts += [f"encrypted ({image['encryption']})"] if image.get("encryption") else []
        facts += [word for word in ("dirty", "corrupt") if image.get(word)]
        lines.append("  image: " + ", ".join(facts))
        lines += [
            f"  {word} {file['file']} ({file['format']})"
            for word, file in zip(["backing file", *["on"] * 64], image["backing"], strict=False)
        ]
        lines += [f"  data in {file}" for file in image["data_files"]]
        lines += _kept_lines(image)
        for word in ("snapshot", "bitmap"):
            names = [found["name"] for found in image.get(f"{word}s", [])]
            more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            lines += [f"  {plural(len(names), word)}: {', '.join(names[:NAMED])}{more}"] if names else []
    return lines + [f"{problem['severity']}: {problem['detail']}" for problem in image["problems"]]


def _short(text: str) -> str:
    return text if len(text) <= WRITTEN else text[:WRITTEN] + "..."


def _kept_lines(image: dict[str, Any]) -> list[str]:
    """What an image remembers of its making: what it is of, whose case that is, hashes of the disk."""
    making = [
        *([f"{image['media']} medium"] if image.get("media") else []),
        *([f"sectors of {human(image['sector_size'])}"] if image.get("sector_size") else []),
        *([f"write blocker {image['write_blocker']}"] if image.get("write_blocker") else []),
        *([f"set {image['set_identifier']}"] if image.get("set_identifier") else []),
        *([plural(len(image["sessions"]), "session")] if image.get("sessions") else []),
    ]
    case = [f"{word.replace('_', ' ')} '{_short(value)}'" for word, value in image.get("case", {}).items()]
    hashes = [f"{name.upper()} {value}" for name, value in image.get("hashes", {}).items()]
    return [f"  {words}: {', '.join(found)}" for words, found in
            (("made of", making), ("case", case), ("kept of the disk", hashes)) if found]  # fmt: skip
