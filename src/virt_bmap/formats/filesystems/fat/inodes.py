"""Directory entries of FAT12, FAT16 and FAT32."""

from dataclasses import dataclass, field

import numpy as np

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.core.layout import records, struct
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.formats.filesystems.fat.names import entry_names, timestamps
from virt_bmap.formats.filesystems.fat.superblock import ENTRY
from virt_bmap.formats.filesystems.fat.tree import ROOT, DirEntries

DIRECTORY_ENTRY = struct(ENTRY, [
    (0, "DIR_Name", "u1", (11,)),
    (11, "DIR_Attr", "u1"),
    (20, "DIR_FstClusHI", "<u2"),
    (22, "DIR_WrtTime", "<u2"),
    (24, "DIR_WrtDate", "<u2"),
    (26, "DIR_FstClusLO", "<u2"),
    (28, "DIR_FileSize", "<u4"),
])  # fmt: skip

ATTR_VOLUME_ID, ATTR_DIRECTORY, ATTR_LONG_NAME, ATTR_LONG_NAME_MASK = 0x08, 0x10, 0x0F, 0x3F
END_MARK, DELETED = 0x00, 0xE5
DOTS = np.frombuffer(b".          ..         ", np.uint8).reshape(2, 11)


@dataclass
class Parser:
    """Makes entries of raw ones; on the way it notes the volume labels in the root and counts slots of no
    entry."""

    bits: int
    labels: list[bytes] = field(default_factory=list)
    orphans: int = 0

    def __call__(self, raw: Bytes, owner: Int, number: Int) -> DirEntries:
        live = np.flatnonzero((raw[:, 0] != DELETED) & before_end(raw, owner))
        attributes = raw[live, 11]
        is_slot = attributes & ATTR_LONG_NAME_MASK == ATTR_LONG_NAME
        is_label = ~is_slot & (attributes & ATTR_VOLUME_ID != 0)
        first = live[is_label & (owner[live] == ROOT)]
        self.labels += [raw[at, :11].tobytes() for at in first[:1].tolist()]
        files = live[~is_slot & ~is_label]
        dotted = (raw[files, 0] == DOTS[0, 0]) & (raw[files, None, :11] == DOTS).all(2).any(1)
        files = files[~dotted]
        names, orphans = entry_names(raw, owner, live[is_slot], files)
        self.orphans += orphans
        return described(raw, owner, number, files, names, self.bits)


def described(raw: Bytes, owner: Int, number: Int, files: Int, names: Ragged, bits: int) -> DirEntries:
    """What the entries at the positions `files` say; the FAT, entries of `bits`, says which clusters follow
    their first one."""
    entry = records(raw[files], DIRECTORY_ENTRY)
    size = entry["DIR_FileSize"].astype(np.int64)
    return DirEntries(
        inode=number[files], parent=owner[files], directory=entry["DIR_Attr"] & ATTR_DIRECTORY != 0,
        cluster=first_cluster(entry, bits), size=size, valid=size, contiguous=np.zeros(len(files), bool),
        mtime_ns=timestamps(entry["DIR_WrtDate"], entry["DIR_WrtTime"]), name=names,
    )  # fmt: skip


def first_cluster(entry: np.ndarray, bits: int) -> Int:
    """The first clusters that entries name, in a FAT of `bits`."""
    low = entry["DIR_FstClusLO"].astype(np.int64)
    return low | (entry["DIR_FstClusHI"].astype(np.int64) & 0x0FFF) << 16 if bits == 32 else low


def before_end(raw: Bytes, owner: Int) -> np.ndarray:
    """Which entries come before the first of their directory that begins with 0: nothing after it counts."""
    new = np.append(True, owner[1:] != owner[:-1])[: len(owner)]
    directory = np.cumsum(new) - 1
    end = np.full(int(new.sum()), len(raw), np.int64)
    zero = np.flatnonzero(raw[:, 0] == END_MARK)[::-1]
    end[directory[zero]] = zero  # descending: the first is written last
    before: np.ndarray = np.arange(len(raw)) < end[directory]
    return before
