"""Write what is made from the code: docs/data-model.md, docs/formats.md, docs/problems.md, and the last part
of docs/verification.md. A test fails when they are out of date.

Usage: .venv/bin/python tools/document.py
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from virt_bmap.accesses import trace
from virt_bmap.accesses.profile.saved import RANGES
from virt_bmap.formats import foreign
from virt_bmap.formats import registry as formats
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW, Checks, Docs, FilesystemFormat, VolumeFormat
from virt_bmap.model.listing import LETTERS
from virt_bmap.model.problems import SEVERITY_MEANING, TABLE

DOCS = Path(__file__).resolve().parent.parent / "docs"


def data_model() -> str:
    """The page on the tables."""
    lines = [
        "# The data model",
        "",
        (
            "A block map is seven tables; a trace of a guest is one more. All offsets, lengths and sizes "
            "are bytes; ranges are half open. The page is made from"
        ),
        "`src/virt_bmap/model/tables.py` by `tools/document.py`.",
        "",
        (
            "A **volume** is a number that the map gives to each disk, partition, logical volume, array "
            "or opened container, parents before children. A filesystem is named"
        ),
        (
            "by the volume it lies on, and columns called `volume_offset` count from the start of that "
            "volume, never from the disk. **Mapping rows** place a volume's bytes in its"
        ),
        (
            "parents; they are strided, so a RAID of terabytes is a handful of rows. Disk offsets are "
            "worked out when asked for: `BlockMap.owners` climbs from disk"
        ),
        "to file, `BlockMap.descend` goes down with every copy.",
        "",
        "## In Parquet",
        "",
        (
            "`virt-bmap -o map.parquet` writes one file with one column for each table, a list of the "
            "table's rows (262,144 at most; further rows of a table are in the next"
        ),
        "rows of the file, where shorter tables have empty lists).",
        "",
        "```sql",
        (
            "select unnest(extents, recursive := true) from 'map.parquet';            -- DuckDB: the "
            "table extents"
        ),
        "```",
        "",
        "```python",
        "virt_bmap.load('map.parquet').extents.to_pandas()                         # or .inodes, .names, ...",
        "```",
    ]
    for name in (*BlockMap.TABLES, "accesses"):
        lines += ["", f"## {name}", "", *columns(tables.SCHEMAS[name])]
    lines += ["", "## Names of volumes", "", *NAMES]
    lines += [
        "",
        "## A trace",
        "",
        *TRACE,
        "",
        *columns(trace.SCHEMA),
        "",
        "Each of `objects`:",
        "",
        *columns(trace.OBJECT),
    ]
    lines += ["", "## A profile", "", *PROFILE, "", *columns(RANGES)]
    lines += ["", "## Kinds of extents", "", "| kind | letter in the text map | meaning |", "|---|---|---|"]
    lines += [f"| {kind} | {LETTERS[kind]} | {tables.KIND_MEANING[kind]} |" for kind in tables.KINDS]
    lines += [
        "",
        "Volumes themselves are lines of the text map, too: "
        + ", ".join(f"{letter} {kind}" for kind, letter in LETTERS.items() if kind not in tables.KINDS)
        + ".",
    ]
    lines += ["", "## States of filesystems", "", "| state | meaning |", "|---|---|"]
    lines += [f"| {state} | {tables.STATE_MEANING[state]} |" for state in tables.STATES]
    lines += ["", "## Traits of volumes", "", "| trait | bit | meaning |", "|---|---|---|"]
    lines += [
        f"| {trait} | {1 << bit} | {tables.TRAIT_MEANING[trait]} |" for bit, trait in enumerate(tables.TRAITS)
    ]
    lines += [
        "",
        (
            "Bytes of volumes that are checksummed, verified or journaled, and of all that lies on them, "
            "must stay as they are, whoever calls them free."
        ),
    ]
    lines += ["", "## Inodes of formats without inode numbers", ""]
    for _, format in formats.every():
        if isinstance(format, FilesystemFormat) and format.inode:
            lines.append(f"- **{format.name}**: {format.inode}")
    return "\n".join(lines) + "\n"


NAMES = (
    (
        "Volumes are called as a system calls its devices: `/dev/sda`, `/dev/sda1`, `/dev/md127`, "
        "`/dev/VG/LV`, `/dev/mapper/luks-UUID`, `/dev/mapper/bitlk-GUID`; a btrfs pool as the"
    ),
    (
        "first of its devices. A disk that is a file of another one (`--nested`) is called after the "
        "device and the path: `/dev/sda1:/images/guest.raw`, and with `:file` behind it where"
    ),
    (
        "the volume is the file of an image in another format. What lies on such a disk has its name in "
        "front: partitions as they are (`/dev/sda1:/images/guest.raw1`), all else after a"
    ),
    (
        "colon (`/dev/sda1:/images/guest.raw:/dev/VG/LV`); where several of these files are the disks of "
        "one machine, the name of the first."
    ),
    "",
    (
        "No two volumes have one name (but a btrfs pool that of its device): of several that would, as "
        "those of two volume groups called alike, the later ones have a number behind"
    ),
    "it, `/dev/VG/LV#2`, and a problem of the code `duplicate` says so.",
)
TRACE = (
    (
        "`virt-bmap watch -o` and `virt-bmap trace import` write Parquet with a row for each request, in "
        "order of time: the table `accesses` and what the"
    ),
    (
        "request touched. The file's metadata `virt-bmap-trace` is JSON: `version`, and the sizes of the "
        "`disks` in bytes where they are known."
    ),
    (
        "`virt-bmap-maps`, written when a watch ends, lists the maps that named the objects: the number "
        "of each `map`, and `begun_ns`, when its reading began (0: before)."
    ),
)
PROFILE = (
    (
        "`virt-bmap profile -o` writes Parquet with a row for each range of bytes that some run needed, "
        "in order of first use. The file's metadata"
    ),
    (
        "`virt-bmap-profile` is JSON: `version`, the sizes of the `disks`, and for each of the `runs` "
        "the trace, its seconds, requests and bytes read."
    ),
)


def columns(schema: Iterable[pa.Field]) -> list[str]:
    """The columns of a table as a table."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    for field in schema:
        meaning, _, null = field.metadata[b"meaning"].decode().partition("; null: ")
        kind = str(field.type).split("<")[0].removeprefix("large_")
        kind = {"dictionary": "text (dictionary)", "string": "text", "binary": "bytes"}.get(kind, kind)
        lines.append(f"| {field.name} | {kind} | {null} | {meaning} |")
    return lines


def described(name: str, package: str, docs: Docs, allocator: str | None) -> list[str]:
    """What a format says of itself."""
    lines = ["", f"### {name}", "", f"`{package}`", ""]
    for words, values in zip(("Read", "Refused or only named", "Checked with"), docs, strict=True):
        if values:
            lines += [f"- {words}: {'; '.join(values)}."]
    if allocator:
        lines += [f"- What is free says: {allocator}."]
    return lines


HELD = "## Beside readers of other projects"


def formats_page() -> str:
    """The page on the formats, and what readers of other projects showed of them, which was written by
    hand."""
    lines = [
        "# Formats",
        "",
        (
            "What is read, what is known and refused with a clear word, and what each reader was checked "
            "with. The page is made from the modules by `tools/document.py`."
        ),
        (
            "The sources of each format are named at the top of its module. Where no line says what is "
            "free, nothing does: what merely nothing refers to is `unreferenced`, and is"
        ),
        "never given away.",
    ]
    for title, kind in (("Volumes", VolumeFormat), ("Filesystems", FilesystemFormat)):
        lines += ["", f"## {title}"]
        for module, format in formats.every():
            if isinstance(format, kind):
                lines += described(format.name, module, format.docs, format.allocator)
    opened = {type: listed.load() for listed in formats.IMAGES for type in listed.types if type != RAW}
    lines += [
        "",
        "## Image formats",
        "",
        "Raw files, block devices and NBD exports are read directly, and "
        + ", ".join(type for type in opened if not opened[type].in_qemu)
        + " by its layer alone; through `qemu-nbd`: "
        + ", ".join(type for type in opened if opened[type].in_qemu)
        + ".",
        "",
        "Where something is read here, it is the format's own layer (`--host-offsets`, `info`, `explain`).",
    ]
    for package, image in {listed.package: listed.load() for listed in formats.IMAGES}.items():
        lines += described(image.name, f"virt_bmap.formats.{package}", image.docs, image.allocator)
    lines += [
        "",
        "## Known by magic alone",
        "",
        "Named in `info` and in the map as one piece: "
        + ", ".join(sorted({row[0] for row in foreign.MAGICS}, key=str.lower))
        + ".",
        "",
    ]
    _, held, told = (DOCS / "formats.md").read_text().partition(HELD)
    return "\n".join(lines) + "\n" + held + told


BY_FORMAT = "## Format by format"


def verification() -> str:
    """The page on what is proven: what was written by hand, and a table for each format."""
    head = (DOCS / "verification.md").read_text().partition(BY_FORMAT)[0]
    lines = [
        BY_FORMAT, "",
        ("What `check` asks of each format: a breach of these rules is a problem, and the volume is "
            "not called proven. Made from the modules by `tools/document.py`;"),
        "what is never looked at is as much a part of the verdict.",
    ]  # fmt: skip
    for module, format in formats.every():
        lines += asked_of(format.name, module, format.checks, format.allocator)
    for package, image in {listed.package: listed.load() for listed in formats.IMAGES}.items():
        if image.checks:
            lines += asked_of(image.name, f"virt_bmap.formats.{package}", image.checks, image.allocator)
    return head + "\n".join(lines) + "\n"


def asked_of(name: str, module: str, checks: Checks, allocator: str | None) -> list[str]:
    """What is proven of one format."""
    lines = ["", f"### {name} (`{module.removeprefix('virt_bmap.')}`)", "", "| | |", "|---|---|"]
    lines.append(f"| allocator | {allocator or 'none: what nothing refers to is unreferenced, not free'} |")
    lines.append(f"| checksums verified | {checks.checksums or 'the format has none'} |")
    lines += [
        f"| {what} | {rules.strip()} |" for what, _, rules in (words.partition(":") for words in checks.rules)
    ]
    lines.append(f"| never looked at | {'; '.join(checks.unchecked) or 'nothing is left'} |")
    return lines


def problems() -> str:
    """The page on what can be wrong."""
    lines = [
        "# Problems",
        "",
        (
            "What is wrong on a disk is a row of the table `problems` (see "
            "[the data model](data-model.md)), or of the result of `virt-bmap check`, with one of"
        ),
        (
            "these codes: stable words for programs, with one meaning in every format. The detail "
            "beside it is a sentence for people, and may change. The page is"
        ),
        "made from `src/virt_bmap/model/problems.py` by `tools/document.py`.",
        "",
        *(f"- **{name}**: {words}." for name, words in SEVERITY_MEANING.items()),
        "",
        (
            "A filesystem with an error is `damaged`, whatever its superblock says. A format may have "
            "a reason for another severity than the one given here: a spare that is"
        ),
        "missing from an array that has all its bytes is a note.",
        "",
        "| code | severity | question of `check` | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| {code.name} | {code.severity} | {code.subject} | {code.meaning} |" for code in TABLE]
    return "\n".join(lines) + "\n"


PAGES = {
    "data-model.md": data_model,
    "problems.md": problems,
    "formats.md": formats_page,
    "verification.md": verification,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
