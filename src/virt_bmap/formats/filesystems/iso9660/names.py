"""Directory trees read level by level: every record of every directory as columns.

Sources: ECMA-119 9.1 (directory records) and 6.8.1.1 (no record crosses a sector); RRIP 1.12 4.1.5 (relocated
directories).
"""

from dataclasses import dataclass, field

import numpy as np

from virt_bmap.core.arrays import EMPTY, Bytes, Int, expand, gather, ints
from virt_bmap.core.layout import records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import allowance
from virt_bmap.formats.filesystems.iso9660 import susp
from virt_bmap.formats.filesystems.iso9660.superblock import (
    SECTOR,
    DirectoryTree,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.paths import positions
from virt_bmap.model.problems import WARNING

MAX_LEVELS = 256
"""ISO 9660 allows 8, Rock Ridge as many as one likes; a path of 4096 bytes has 2048."""
BATCH = 8 << 20
"""Bytes of directories parsed at a time."""

RECORD = struct(33, [
    (0, "length", "u1"),
    (1, "extended_attribute_length", "u1"),
    (2, "location_of_extent", "<u4"),
    (10, "data_length", "<u4"),
    (18, "recording_date", "u1", (7,)),
    (25, "file_flags", "u1"),
    (26, "file_unit_size", "u1"),
    (27, "interleave_gap_size", "u1"),
    (28, "volume_sequence_number", "<u2"),
    (32, "file_identifier_length", "u1"),
])  # fmt: skip
HIDDEN, DIRECTORY, ASSOCIATED, MULTI_EXTENT = 1, 2, 4, 0x80
INT_COLUMNS = (
    "parent", "offset", "extent", "xar", "size", "flags", "unit", "gap", "mtime_ns", "mode", "nlink", "uid",
    "gid", "real_size", "link_size", "name_length",
)  # fmt: skip


@dataclass
class Walk:
    """One tree: its records as columns (`column["parent"]`...), one row for each record but '.' and '..', in
    disk order in each directory.

    Offsets and sizes in bytes. `parent` is the offset of the directory's content, which is also its inode;
    `name` holds all names joined. `directories` are (offset, length) as read; `areas` continuation areas;
    `links` (record offset, volume offset, length) of link targets.
    """

    column: dict[str, Int] = field(default_factory=dict)
    name: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    moved: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    directories: tuple[Int, Int] = (EMPTY, EMPTY)
    areas: tuple[Int, Int] = (EMPTY, EMPTY)
    links: tuple[Int, Int, Int] = (EMPTY, EMPTY, EMPTY)
    root: dict[str, int] = field(default_factory=dict)


def walk(reader: Reader, block_size: int, tree: DirectoryTree, damage: Damage) -> Walk:
    """Read a whole tree, breadth first.

    Directories that lie outside the volume or are reached twice are damage, not entered.
    """
    state = _State(reader, block_size, tree, damage)
    skip = state.system_use_skip()
    level, level_size = ints(tree.root), ints(tree.root_size)
    for _ in range(MAX_LEVELS):
        level, level_size = state.enter(level, level_size)
        if not len(level):
            level, level_size = state.enter(*state.orphans())
            if not len(level):
                return state.result()
        level, level_size = state.read_level(level, level_size, skip)
    damage.say("too-deep", f"more than {MAX_LEVELS} levels of directories", tree.root)
    return state.result()


class _State:
    """What a walk has met so far."""

    def __init__(self, reader: Reader, block_size: int, tree: DirectoryTree, damage: Damage) -> None:
        self.reader, self.block_size, self.tree, self.damage = reader, block_size, tree, damage
        self.seen, self.seen_size = EMPTY, EMPTY
        self.columns: dict[str, list[Int]] = {name: [] for name in INT_COLUMNS}
        self.names: list[Bytes] = []
        self.moved: list[np.ndarray] = []
        self.areas: list[tuple[Int, Int]] = []
        self.links: list[tuple[Int, Int, Int]] = []
        self.waiting: list[tuple[Int, Int]] = []
        self.root: dict[str, int] = {}

    def system_use_skip(self) -> int | None:
        """SP in the root's '.' record: how many bytes stand before the entries of other records; None without
        Rock Ridge."""
        if self.tree.name == "Joliet" or self.tree.root > self.reader.size - SECTOR:
            return None
        first = self.reader.read(self.tree.root, 255)
        for at in (34, 34 + 14):  # 14: the system use field of CD-ROM XA comes first
            if first[at : at + 2] == b"SP" and first[at + 4 : at + 6] == b"\xbe\xef" and first[at + 2] >= 7:
                return first[at + 6]
        return None

    def enter(self, level: Int, size: Int) -> tuple[Int, Int]:
        """Those directories of a level that lie inside the volume and were not read before, sorted."""
        inside = (level >= 0) & (size > 0) & (level <= self.reader.size - np.maximum(size, 1))
        lost = level[~inside & (size > 0)]
        self.damage.add("outside", "[directory lies|directories lie] outside the volume", lost)
        level, first = np.unique(level[inside], return_index=True)
        size = size[inside][first]
        again = positions(self.seen, level) >= 0 if len(self.seen) else np.zeros(len(level), bool)
        level, size = level[~again], size[~again]
        used = int(self.seen_size.sum())
        affordable = np.cumsum(size) + used <= allowance(self.reader)
        what = (
            "[directory is|directories are] not read: together, "
            "directories claim more bytes than the volume has"
        )
        self.damage.check(affordable, "twice", what, level)
        level, size = level[affordable], size[affordable]
        self.seen, self.seen_size = np.append(self.seen, level), np.append(self.seen_size, size)
        return level, size

    def orphans(self) -> tuple[Int, Int]:
        """Relocated directories that no CL entry led to."""
        waiting, self.waiting = self.waiting, []
        return np.concatenate([EMPTY, *(pair[0] for pair in waiting)]), np.concatenate(
            [EMPTY, *(pair[1] for pair in waiting)]
        )

    def read_level(self, level: Int, size: Int, skip: int | None) -> tuple[Int, Int]:
        """Parse the directories of one level; returns offset and size of their subdirectories."""
        batch = np.cumsum(size) // BATCH
        below: list[tuple[Int, Int]] = []
        for number in np.unique(batch):
            mine = batch == number
            below.append(self._read_batch(level[mine], size[mine], skip))
        return np.concatenate([pair[0] for pair in below]), np.concatenate([pair[1] for pair in below])

    def _read_batch(self, level: Int, size: Int, skip: int | None) -> tuple[Int, Int]:
        data = self.reader.read_ranges(level, size)
        base = np.cumsum(size) - size
        at, directory, bad = _records_of(data, base, size)
        raw = (
            records(data[at[:, None] + np.arange(RECORD.itemsize)], RECORD)
            if len(at)
            else np.zeros(0, RECORD)
        )
        identifier = raw["file_identifier_length"].astype(np.int64)
        length = raw["length"].astype(np.int64)
        fits = 33 + identifier <= length
        count = bad + int((~fits).sum())
        self.damage.add("directory", "directory [record does|records do] not fit", int(level[0]), count)
        at = at[fits]
        directory = directory[fits]
        raw = raw[fits]
        identifier = identifier[fits]
        length = length[fits]
        offset = level[directory] + at - base[directory]
        dot = (identifier == 1) & (data[at + 33] <= 1) if len(at) else np.zeros(0, bool)
        if skip is not None:
            first = at + 33 + identifier + 1 - identifier % 2
            first = first + np.where(offset == self.tree.root, 0, skip)
            found = susp.collect(
                self.reader,
                self.block_size,
                data,
                offset - at + first,
                np.minimum(first, at + length),
                at + length,
            )
            what = "system use [entry is cut off or lies|entries are cut off or lie] elsewhere"
            self.damage.add("directory", what, int(level[0]), found.damaged, severity=WARNING)
            self.areas.append(found.areas)
            rock = susp.rock_ridge(found.entries, len(at))
            linked, where, bytes_ = susp.links(found.entries)
            self.links.append((offset[linked], where, bytes_))
        else:
            rock = None
        return self._keep(data, level[directory], at, offset, raw, identifier, dot, rock)

    def _keep(
        self,
        data: Bytes,
        parent: Int,
        at: Int,
        offset: Int,
        raw: np.ndarray,
        identifier: Int,
        dot: np.ndarray,
        rock: susp.RockRidge | None,
    ) -> tuple[Int, Int]:
        """Store the columns of a batch; returns its subdirectories."""
        none = np.full(len(at), -1, np.int64)
        extent = (
            widen(raw["location_of_extent"], "extent") + raw["extended_attribute_length"]
        ) * self.block_size
        column = {
            "parent": parent, "offset": offset, "extent": extent,
            "xar": raw["extended_attribute_length"].astype(np.int64) * self.block_size,
            "size": widen(raw["data_length"], "data_length"), "flags": widen(raw["file_flags"], "flags"),
            "unit": raw["file_unit_size"].astype(np.int64) * self.block_size,
            "gap": raw["interleave_gap_size"].astype(np.int64) * self.block_size,
            "mtime_ns": susp.short_stamps(raw["recording_date"]), "mode": none, "nlink": none, "uid": none,
            "gid": none, "real_size": none, "link_size": none, "name_length": identifier,
        }  # fmt: skip
        name_data, name_at = data, at + 33
        moved = np.zeros(len(at), bool)
        if rock:
            for name in ("mode", "nlink", "uid", "gid", "real_size", "link_size"):
                column[name] = getattr(rock, name)
            column["mtime_ns"] = np.where(
                rock.mtime_ns == np.iinfo(np.int64).min, column["mtime_ns"], rock.mtime_ns
            )
            plain = rock.name_length == 0
            column["name_length"] = np.where(plain, identifier, rock.name_length)
            name_data = np.concatenate([data, rock.name])
            name_at = np.where(plain, name_at, len(data) + np.cumsum(rock.name_length) - rock.name_length)
            moved = rock.moved
            self._relocate(column, rock)
        if not self.root and len(offset):
            self.root = {name: int(values[0]) for name, values in column.items()}
        keep = ~dot
        for name, values in column.items():
            self.columns[name].append(values[keep])
        self.names.append(gather(name_data, name_at[keep], column["name_length"][keep]))
        self.moved.append(moved[keep])
        is_directory = keep & ((column["flags"] & DIRECTORY) != 0)
        below = is_directory & ~moved
        self.waiting.append((column["extent"][is_directory & moved], column["size"][is_directory & moved]))
        return column["extent"][below], column["size"][below]

    def _relocate(self, column: dict[str, Int], rock: susp.RockRidge) -> None:
        """CL: a record that looks like an empty file stands for a directory elsewhere, whose '.' record knows
        its size."""
        rows = np.flatnonzero(rock.child >= 0)
        place = rock.child[rows] * self.block_size
        inside = place <= self.reader.size - 34
        self.damage.check(
            inside, "outside", "relocated [directory lies|directories lie] outside the volume", place
        )
        rows, place = rows[inside], place[inside]
        dot = records(self.reader.read_blocks(place, 34), RECORD)
        column["extent"][rows] = place
        column["size"][rows] = widen(dot["data_length"], "data_length")
        column["flags"][rows] |= DIRECTORY

    def result(self) -> Walk:
        """All that was met."""

        def join(parts: list[Int]) -> Int:
            return np.concatenate([EMPTY, *parts])

        return Walk(
            {name: join(parts) for name, parts in self.columns.items()},
            np.concatenate([np.zeros(0, np.uint8), *self.names]),
            np.concatenate([np.zeros(0, bool), *self.moved]), (self.seen, self.seen_size),
            (join([area[0] for area in self.areas]), join([area[1] for area in self.areas])),
            (join([link[0] for link in self.links]), join([link[1] for link in self.links]),
                join([link[2] for link in self.links])), self.root,
        )  # fmt: skip


def _records_of(data: Bytes, base: Int, size: Int) -> tuple[Int, Int, int]:
    """(position, directory) of every record, in order, with one cursor for each sector; and how many sectors
    end in damage."""
    directory, nth = expand(-(-size // SECTOR))
    cursor = base[directory] + nth * SECTOR
    end = np.minimum(cursor + SECTOR, (base + size)[directory])
    found: list[tuple[Int, Int]] = []
    bad = 0
    while len(cursor):
        length = data[cursor].astype(np.int64)
        wrong = (length > 0) & ((length < 34) | (cursor + length > end))
        bad += int(wrong.sum())
        keep = (length > 0) & ~wrong
        cursor, end, directory, length = cursor[keep], end[keep], directory[keep], length[keep]
        found.append((cursor, directory))
        cursor = cursor + length
        keep = cursor < end
        cursor, end, directory = cursor[keep], end[keep], directory[keep]
    at = np.concatenate([EMPTY, *(pair[0] for pair in found)])
    order = np.argsort(at, kind="stable")
    return at[order], np.concatenate([EMPTY, *(pair[1] for pair in found)])[order], bad


def distinct(trees: list[DirectoryTree]) -> list[DirectoryTree]:
    """Without trees that begin at the same root directory: ISO 9660:1999 often shares the plain one's."""
    return list({tree.root: tree for tree in reversed(trees)}.values())[::-1]


def main_tree(walks: list[tuple[DirectoryTree, Walk]]) -> tuple[DirectoryTree, Walk]:
    """The tree that names come from: one with Rock Ridge, else Joliet, else the primary one."""
    rock = [
        pair for pair in walks if pair[1].root.get("mode", -1) >= 0 or (pair[1].column["mode"] >= 0).any()
    ]
    joliet = [pair for pair in walks if pair[0].name == "Joliet" and pair[1].root]
    return (rock or joliet or walks)[0]
