"""Whose free clusters of a FAT were: deleted directory entries keep first cluster, size, time and all of the
name but one letter.

Deleting overwrites the first byte of an entry, and of the slots of its long name, with 0xE5, and frees the
chain in the FAT. That the clusters of a file followed each other is what every undelete tool assumes, and so
is said as an assumption of all but the first. A deleted directory is looked into as far as its first cluster
goes, where that is free and still begins with the directory's own entry `.`. Windows, which clears the upper
half of the first cluster's number on FAT32, leaves too little: said, too.

Sources: Microsoft FAT specification (fatgen103), DIR_Name[0]; kernel fs/fat/dir.c __fat_remove_entries();
fs/fat/namei_vfat.c (slots, checksum).
"""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import EMPTY, Bool, Bytes, Int, touching
from virt_bmap.core.layout import records
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common import past
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.fat.extents import Heap, inode_table
from virt_bmap.formats.filesystems.fat.inodes import (
    ATTR_DIRECTORY,
    ATTR_LONG_NAME,
    ATTR_LONG_NAME_MASK,
    ATTR_VOLUME_ID,
    DELETED,
    DIRECTORY_ENTRY,
    DOTS,
    END_MARK,
    Parser,
    before_end,
    described,
    first_cluster,
)
from virt_bmap.formats.filesystems.fat.names import MAX_SLOTS, long_names, short_names, utf8
from virt_bmap.formats.filesystems.fat.superblock import ENTRY
from virt_bmap.formats.filesystems.fat.tables import read_directories, read_tables
from virt_bmap.formats.filesystems.fat.tree import ROOT, DirEntries, join_entries
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

ENTRY_ONLY = "the entry keeps the first cluster only: that the file lay in one piece is assumed"
HALF_ONLY = f"{ENTRY_ONLY}, and so is the upper half of that cluster's number, which Windows clears"
DOUBTS = (None, ENTRY_ONLY, HALF_ONLY)
LOST_LETTER = ord("?")
"""Shown for the letter that deleting overwrote: no name on FAT holds it."""
KNOWN_ATTRIBUTES = 0x3F
FORBIDDEN = np.isin(np.arange(256), [*range(0x20), *b'"*+,./:;<=>?[\\]|', 0x7F])
"""Bytes that no short name has: fatgen103, section 6.1."""


def former(reader: Reader, extents: pa.Table, starts: Int, ends: Int) -> pa.Table:
    """What deleted entries say of the bytes [starts[i], ends[i])."""
    geometry, runs, heap = read_tables(reader, Damage())
    parser = DeadParser(Parser(geometry.bits), heap, runs.free)
    tree = read_directories(reader, geometry, heap, parser)
    dead = np.flatnonzero(np.isin(tree.entries.inode, parser.dead) & ~tree.entries.directory)
    entries = tree.entries.take(dead)
    found = heap.follow(entries)
    start = heap.offset(found.cluster)
    length = np.clip(reader.size - start, 0, found.count * heap.cluster_size)
    keep = np.flatnonzero(touching(start, start + length, starts, ends))[: past.MAX_NAMED]
    rows = tables.ExtentRows()
    rows.add(tables.DATA, start[keep], length[keep], inode=entries.inode[found.query[keep]], file_offset=0)
    half = (found.cluster <= 0xFFFF)[keep] & (geometry.bits == 32) & (geometry.clusters > 0xFFFF)
    doubts = np.where(half, 2, (found.count > 1)[keep])
    doubt = [DOUBTS[code] for code in doubts.tolist()]
    return past.former(
        inode_table(tree), tree.names(), ROOT, rows.table(0), said_by="deleted directory entry", doubt=doubt
    )


class DeadParser:
    """Makes entries of living and of dead ones; `dead` are the inodes of the latter.

    Dead files and directories count as contiguous, directories as one cluster.
    """

    def __init__(self, living: Parser, heap: Heap, free: tuple[Int, Int]) -> None:
        self.living, self.heap, self.free = living, heap, free
        self.dead, self.gone = EMPTY, EMPTY

    def __call__(self, raw: Bytes, owner: Int, number: Int) -> DirEntries:
        gone = np.isin(owner, self.gone)
        alive = np.flatnonzero(~gone)
        found = self.living(raw[alive], owner[alive], number[alive])
        good = before_end(raw, owner) & self._are_directories(raw, owner, number, gone)
        kind = raw[:, 11] & ATTR_LONG_NAME_MASK
        dead = (
            good
            & ((raw[:, 0] == DELETED) | gone)
            & (kind != ATTR_LONG_NAME)
            & (raw[:, 11] & ATTR_VOLUME_ID == 0)
        )
        dead &= (
            (raw[:, 11] & ~np.uint8(KNOWN_ATTRIBUTES) == 0)
            & ~FORBIDDEN[raw[:, 1:11]].any(axis=1)
            & ~_dotted(raw)
        )
        rows = np.flatnonzero(dead)
        entries = self._free_only(
            described(raw, owner, number, rows, _names(raw, owner, rows), self.living.bits)
        )
        self.dead = np.append(self.dead, entries.inode)
        self.gone = np.append(self.gone, entries.inode[entries.directory])
        return join_entries([found, entries])

    def _are_directories(self, raw: Bytes, owner: Int, number: Int, gone: Bool) -> Bool:
        """Which entries lie in living directories or in dead ones whose cluster still begins with an entry
        `.` that means this cluster."""
        if not gone.any():
            return ~gone
        first = np.maximum.accumulate(
            np.where(np.append(True, owner[1:] != owner[:-1])[: len(owner)], np.arange(len(owner)), 0)
        )
        entry = records(raw[first], DIRECTORY_ENTRY)
        cluster = first_cluster(entry, self.living.bits)
        own = (raw[first, :11] == DOTS[0]).all(axis=1) & (entry["DIR_Attr"] & ATTR_DIRECTORY != 0)
        found: Bool = ~gone | own & (self.heap.offset(cluster) == number[first] * ENTRY)
        return found

    def _free_only(self, entries: DirEntries) -> DirEntries:
        """Without what begins at a cluster in use, which is somebody's now."""
        low, high = self.free
        at = np.searchsorted(low, entries.cluster, "right") - 1
        free = (at >= 0) & (entries.cluster < np.append(high, 0)[at])
        keep = np.flatnonzero(free & (entries.directory | (entries.size > 0)))
        size = np.where(entries.directory, self.heap.cluster_size, entries.size)[keep]
        kept, name = entries.take(keep), entries.name.take(keep)
        return kept._replace(size=size, valid=size, contiguous=np.ones(len(keep), bool), name=name)


def _dotted(raw: Bytes) -> Bool:
    result: Bool = (raw[:, None, :11] == DOTS).all(axis=2).any(axis=1)
    return result


def _names(raw: Bytes, owner: Int, rows: Int) -> Ragged:
    """The long names of dead entries where their slots are there, else the short ones, without their first
    letter where that was overwritten."""
    short = raw[rows].copy()
    lost = short[:, 0] == DELETED
    short[lost, 0] = LOST_LETTER
    count = _slots(raw, owner, rows)
    with_long = np.flatnonzero(count)
    names, lengths = long_names(raw, rows[with_long], count[with_long])
    units, sizes = short_names(short)
    both = Ragged.concat([names, utf8(units, sizes)])
    pick = len(with_long) + np.arange(len(rows))
    pick[with_long[lengths > 0]] = np.flatnonzero(lengths > 0)
    return both.take(pick)


def _slots(raw: Bytes, owner: Int, rows: Int) -> Int:
    """How many slots of a long name stand right before each dead entry; 0 where their checksum is of no name
    that the entry can have had.

    The numbers of dead slots are overwritten, but the nearest is the first, and the last one ends in zeroes
    and 0xFF or is followed by something else. Exactly one first letter gives the short name the checksum: if
    that no name can have, they are another's.
    """
    count, going = np.zeros(len(rows), np.int64), np.ones(len(rows), bool)
    carried = raw[np.maximum(rows - 1, 0), 13]
    for step in range(1, MAX_SLOTS + 1):
        at = np.maximum(rows - step, 0)
        going &= (
            (rows >= step)
            & (owner[at] == owner[rows])
            & (raw[at, 11] & ATTR_LONG_NAME_MASK == ATTR_LONG_NAME)
        )
        going &= (
            (raw[at, 13] == carried)
            & (raw[at, 0] != END_MARK)
            & ((raw[at, 0] == DELETED) | (raw[rows, 0] != DELETED))
        )
        if not going.any():
            break
        count[going] = step
        text = np.concatenate([raw[at, 1:11], raw[at, 14:26], raw[at, 28:32]], axis=1)
        going &= ~((text[:, 0::2] == 0) & (text[:, 1::2] == 0)).any(axis=1)
    letter = _first_letter(raw[rows, :11], carried)
    known = (raw[rows, 0] == DELETED) | (raw[rows, 0] == letter)
    return np.where(known & (letter > 0x20) & ~FORBIDDEN[letter], count, 0)


def _first_letter(short: Bytes, checksum: Bytes) -> Bytes:
    """The first byte with which these short names have the checksum: each step of the sum can be undone."""
    total = checksum.copy()
    for column in short[:, :0:-1].T:
        total = total - column
        total = total << 1 | total >> 7
    return total
