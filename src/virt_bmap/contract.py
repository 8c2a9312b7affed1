"""What a format module gives back: the two shapes that `filesystems/` and `volumes/` share with `survey`.

A filesystem module has

    NAME                                    in blkid's words, the family: "ext", "xfs"
    probe(reader) -> bool                   by magic only; never raises on content
    read(reader, others=()) -> Filesystem   `others`: readers of volumes that nobody claimed (external journals)

A volume module has

    NAME                                    in blkid's words: "gpt", "LVM2_member"
    SPANS                                   True where one assembly can need several members (LVM, md, btrfs)
    probe(reader) -> bool                   by magic only
    assemble(members) -> Assembly           one member where SPANS is False; else all that were found so far

Both raise Corrupt or Unsupported where nothing can be read; what is wrong but leaves the rest readable is a Problem.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from virt_bmap.keys import NO_KEYS, Keys
from virt_bmap.mapping import Row, Rows
from virt_bmap.reader import Reader
from virt_bmap.tables import ExtentRows


class Problem(NamedTuple):
    """Damage or contradiction that leaves the rest readable. `offset` is in bytes of the volume; -1: not one place."""

    code: str
    detail: str
    offset: int = -1
    severity: str = "error"


@dataclass
class Filesystem:
    """All that a reader found on one volume, as tables of `tables.py` whose `volume` column holds 0 until survey sets it.

    `extents` has a row for every byte of [0, size) that has an owner or that the allocator calls free. The reader does not
    fill what is left: survey adds `unknown` rows and a problem for what no row covers, and a gap from `size` to the volume's end.

    `reader` gives the bytes that the rows speak of: the volume's own, or those with the journal replayed. Whoever reads content from now on reads these.
    """

    type: str
    size: int
    block_size: int
    root: int
    state: str
    inodes: pa.Table
    names: pa.Table
    extents: pa.Table
    reader: Reader
    uuid: str | None = None
    label: str | None = None
    features: str | None = None
    problems: list[Problem] = field(default_factory=list)


class Member(NamedTuple):
    """A volume as an assembling module sees it. `name` is its device name, `number` its id for mapping rows' `parent`, `keys` what the user gave."""

    number: int
    name: str
    reader: Reader
    keys: Keys = NO_KEYS


@dataclass
class Child:
    """A new volume. `rows` place its bytes in its parents; `open`, where given, wraps the reader that follows the rows (decryption).

    `name` is the whole device name. `contents` False: not looked into (an extended partition, a hidden sub-volume). `unread` names the bytes
    that no reader claims: "BIOS boot". `many` gives further rows as columns, for volumes with too many rows for objects (thin).
    """

    kind: str
    name: str
    size: int
    rows: list[Row]
    uuid: str | None = None
    label: str | None = None
    detail: str | None = None
    open: Callable[[Reader], Reader] | None = None
    contents: bool = True
    many: Rows | None = None
    unread: str | None = None


@dataclass
class Assembly:
    """What a volume module makes of its members.

    `extents[number]` holds the rows of the member's own metadata and of what its allocator calls free; with the bytes that
    children's rows take they tile the member, and what is left over survey calls `gap`. `types` renames what a member is (gpt, "LVM2_member", ...).
    `extents` and `problems` may also name children, by `child_reference`.
    """

    children: list[Child] = field(default_factory=list)
    extents: dict[int, ExtentRows] = field(default_factory=dict)
    problems: dict[int, list[Problem]] = field(default_factory=dict)
    types: dict[int, str] = field(default_factory=dict)
    details: dict[int, str] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    uuids: dict[int, str] = field(default_factory=dict)


def child_reference(assembly: Assembly) -> int:
    """The number (below 0) by which rows, extents and problems name the child that is appended next."""
    return -1 - len(assembly.children)


def extent_rows(assembly: Assembly, member: Member) -> ExtentRows:
    """The rows of this member's own metadata, made on first use."""
    return assembly.extents.setdefault(member.number, ExtentRows())
