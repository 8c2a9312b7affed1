"""Which clusters files and directories own, for FAT and exFAT alike: chains in the FAT, or simply one after
the other."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.formats.filesystems.fat.allocator import (
    CUT,
    LOOP,
    NOTHING,
    TANGLED,
    WHOLE,
    ClusterChains,
    Followed,
)
from virt_bmap.formats.filesystems.fat.names import NO_TIME
from virt_bmap.formats.filesystems.fat.superblock import ENTRY
from virt_bmap.formats.filesystems.fat.tree import ROOT, DirectoryRanges, DirEntries, FileTree
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING


@dataclass
class Heap:
    """The clusters of a volume: cluster c, from 2 to clusters + 1, begins at byte start + (c - 2) *
    cluster_size."""

    start: int
    cluster_size: int
    clusters: int
    chains: ClusterChains
    damage: Damage

    def offset(self, cluster: Int) -> Int:
        """Where clusters begin, in bytes of the volume."""
        return self.start + (cluster - 2) * self.cluster_size

    def needed(self, size: Int) -> Int:
        """How many clusters hold `size` bytes."""
        return -(-size // self.cluster_size)

    def follow(self, entries: DirEntries) -> Followed:
        """All runs of clusters of the entries; what is wrong with them is damage."""
        exists = (entries.cluster >= 2) & (entries.cluster < self.clusters + 2)
        by_fat = np.flatnonzero(exists & ~entries.contiguous)
        straight = np.flatnonzero(exists & entries.contiguous)
        chained = self.chains.follow(entries.cluster[by_fat])
        count = np.minimum(self.needed(entries.size[straight]), self.clusters + 2 - entries.cluster[straight])
        length, fate = np.zeros(len(exists), np.int64), np.full(len(exists), WHOLE)
        length[by_fat], fate[by_fat] = chained.length, chained.fate
        length[straight] = count
        query = np.concatenate([by_fat[chained.query], straight])
        cluster = np.concatenate([chained.cluster, entries.cluster[straight]])
        before = np.concatenate([chained.before, np.zeros(len(straight), np.int64)])
        count = np.concatenate([chained.count, count])
        if len(straight) and len(by_fat):
            order = np.argsort(query, kind="stable")
            query, cluster, before, count = query[order], cluster[order], before[order], count[order]
        self._check(entries, exists, length, fate)
        return Followed(query, cluster, count, before, length, fate)

    def _check(self, entries: DirEntries, exists: np.ndarray, length: Int, fate: Int) -> None:
        none = (entries.cluster == 0) & (entries.directory | (entries.size > 0))
        size = np.where(entries.directory, length, self.needed(entries.size))

        def say(code: str, what: str, which: Bool, severity: str | None = None) -> None:
            self.damage.add(code, what, entries.inode[which] * ENTRY, severity=severity)

        say("extents", "[entry has|entries have] a size but no first cluster", none)
        absent = ~exists & (entries.cluster != 0)
        say("outside", "[entry begins|entries begin] at a cluster that does not exist", absent)
        lost = "[entry begins|entries begin] at a cluster that the FAT calls free or bad"
        say("extents", lost, fate == NOTHING)
        cut = (
            "[chain of clusters leads|chains of clusters lead] to a free, bad or non-existent cluster: the "
            "rest is lost"
        )
        say("extents", cut, fate == CUT)
        loop = "[chain of clusters leads back into itself|chains of clusters lead back into themselves]"
        say("twice", loop, fate == LOOP)
        tangled = (
            "[chain of clusters meets|chains of clusters meet] others too often: not followed to the end"
        )
        say("too-many", tangled, fate == TANGLED)
        short = "[file has fewer clusters than its|files have fewer clusters than their] size needs"
        say("extents", short, (fate == WHOLE) & exists & (length < size))
        long = "[file has more clusters than its|files have more clusters than their] size needs"
        say("extents", long, exists & (length > size), WARNING)  # nothing is lost

    def locate(self, directories: DirEntries) -> DirectoryRanges:
        """Where directories lie."""
        found = self.follow(directories)
        return DirectoryRanges(
            directories.inode[found.query], self.offset(found.cluster), found.count * self.cluster_size,
            found.before * self.cluster_size,
        )  # fmt: skip


def add_owned(rows: tables.ExtentRows, heap: Heap, tree: FileTree) -> None:
    """Rows for all files and directories."""
    ranges = tree.ranges
    rows.add(tables.DIRECTORY, ranges.start, ranges.length, inode=ranges.inode, file_offset=ranges.offset)
    files = tree.entries.take(~tree.entries.directory)
    found = heap.follow(files)
    start = heap.offset(found.cluster)
    length = found.count * heap.cluster_size
    offset = found.before * heap.cluster_size
    owner = files.inode[found.query]
    written = np.clip(heap.needed(files.valid)[found.query] * heap.cluster_size - offset, 0, length)
    for kind, from_, size in ((tables.DATA, 0, written), (tables.UNWRITTEN, written, length - written)):
        some = slice(None) if size.all() else np.flatnonzero(size)
        rows.add(
            kind, (start + from_)[some], size[some], inode=owner[some], file_offset=(offset + from_)[some]
        )


def inode_table(tree: FileTree) -> pa.Table:
    """The inodes, the root first. Sizes of directories are those of their clusters, as the kernel says."""
    entries = tree.entries
    inode = np.append(ROOT, entries.inode)
    directory = np.append(True, entries.directory)
    size = np.append(0, entries.size)
    size[directory] = _by_inode(inode[directory], tree.ranges.inode, tree.ranges.length)
    links = np.ones(len(inode), np.int64)
    inner = entries.parent[entries.directory]
    links[directory] = 2 + _by_inode(inode[directory], inner, np.ones(len(inner), np.int64))
    return tables.make(
        "inodes", volume=0, inode=inode, type=np.where(directory, tables.T_DIRECTORY, tables.T_FILE),
        size=size, nlink=links, mtime_ns=np.append(NO_TIME, entries.mtime_ns), flags=0,
        record_offset=np.append(-1, entries.inode * ENTRY),
    )  # fmt: skip


def _by_inode(inode: Int, keys: Int, values: Int) -> Int:
    """For each inode the sum of the values whose key it is. All keys must be among the inodes."""
    order = np.argsort(inode, kind="stable")
    at = np.searchsorted(inode[order], keys)
    total = np.zeros(len(inode), np.int64)
    total[order] = np.bincount(at, values, len(inode)).astype(np.int64)
    return total


def clipped(extents: pa.Table, size: int) -> pa.Table:
    """The extents as far as they lie in the first `size` bytes: a volume can be shorter than its filesystem
    says."""
    start, length = tables.integers(extents, "volume_offset"), tables.integers(extents, "length")
    inside = np.clip(size - start, 0, length)
    if (inside == length).all():
        return extents
    file_length = np.where(tables.integers(extents, "file_offset") < 0, -1, inside)
    for name, values in (("length", inside), ("file_length", file_length)):
        at = extents.schema.get_field_index(name)
        extents = extents.set_column(at, extents.schema.field(at), tables.arrow(values, values < 0))
    return extents.filter(pa.array(inside > 0))
