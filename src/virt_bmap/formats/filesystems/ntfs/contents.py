"""Attributes joined: whose they are, their pieces under the head that has sizes and flags, and where their
clusters lie."""

from dataclasses import dataclass

import numpy as np

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.extents import HOLE, AttributeStream, RunLists, decode
from virt_bmap.formats.filesystems.ntfs.inodes import NameTree, owner_of, record_offset
from virt_bmap.formats.filesystems.ntfs.mft import Mft, read_stream
from virt_bmap.formats.filesystems.ntfs.records import Attributes
from virt_bmap.formats.filesystems.ntfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

INTX_HEAD, MAX_LINK = 8, 2 * 4096
"""Bytes of the magic of an Interix link, and of the longest target after it: PATH_MAX characters (ntfs-3g
libntfs-3g/dir.c ntfs_interix_types)."""


@dataclass
class Contents:
    """The attributes of inodes in use, and their runs (`runs.row` counts attributes).

    For each attribute: its inode, the row of its first piece (its own where that is lost), and its name as a
    number in `texts`; 0 is none. `reach`: the VCN after the last, by head."""

    attributes: Attributes
    owner: Int
    head: Int
    name: Int
    texts: list[bytes]
    runs: RunLists
    reach: Int
    cluster_size: int

    def rows(self, owner: int, kind: int, name: bytes = b"") -> Bool:
        """Which attributes are pieces of one attribute."""
        number = self.texts.index(name) if name in self.texts else -1
        found: Bool = (self.owner == owner) & (self.attributes.type == kind) & (self.name == number)
        return found

    def stream(self, reader: Reader, owner: int, kind: int) -> tuple[AttributeStream, int]:
        """Where an unnamed attribute with run lists lies, and how many bytes it has."""
        mine = self.rows(owner, kind)
        size = int(self.attributes.data_size[mine].max(initial=0))
        return AttributeStream.of(self.runs.take(mine[self.runs.row]), self.cluster_size, reader.size), size

    def read(self, reader: Reader, owner: int, kind: int, most: int) -> bytes:
        """The first bytes of an unnamed attribute with run lists, at most `most`, and no more than lie
        together from its start."""
        stream, size = self.stream(reader, owner, kind)
        return read_stream(reader, stream, 0, min(stream.contiguous(0), size, most)).tobytes()


def read_contents(mft: Mft, geometry: Geometry, damage: Damage) -> Contents:
    """Join and decode the attributes of all inodes in use."""
    owner, good = owner_of(mft.records, mft.attributes.record)
    stale = mft.records.in_use[mft.attributes.record] & ~good
    numbers = np.flatnonzero(np.bincount(mft.attributes.record[stale]))
    damage.add(
        "inode",
        "extension [record belongs|records belong] to a file that is gone",
        record_offset(mft, numbers),
        severity=WARNING,
    )
    rows = np.flatnonzero(good)
    found, owner = (
        (mft.attributes.take(rows), owner[rows]) if len(rows) < len(good) else (mft.attributes, owner)
    )
    name, texts = found.name.distinct()
    head, lost = _heads(found, owner, name)
    damage.add(
        "inode",
        "[attribute has lost its|attributes have lost their] first piece",
        record_offset(mft, found.record[lost]),
    )
    listed = np.flatnonzero(found.value < 0)
    decoded = decode(
        found.pairs.data,
        found.pairs.lengths[listed],
        found.lowest_vcn[listed],
        geometry.clusters,
        geometry.cluster_size,
    )
    short = decoded.bad | (~decoded.outside & (decoded.reach != found.highest_vcn[listed] + 1))
    damage.add(
        "extents",
        "run [list breaks off or ends elsewhere than it "
        "should|lists break off or end elsewhere than they should]",
        record_offset(mft, found.record[listed[short]]),
    )
    damage.add(
        "outside",
        "run [list leads|lists lead] out of the volume",
        record_offset(mft, found.record[listed[decoded.outside]]),
    )
    runs = decoded.runs
    reach = np.zeros(len(found), np.int64)
    np.maximum.at(reach, head[listed], decoded.reach)
    return Contents(
        found,
        owner,
        head,
        name,
        texts,
        RunLists(listed[runs.row], runs.vcn, runs.lcn, runs.count),
        reach,
        geometry.cluster_size,
    )


def _heads(found: Attributes, owner: Int, name: Int) -> tuple[Int, Int]:
    """(for each attribute the row of its first piece, rows whose first piece is lost)."""
    head = np.arange(len(found), dtype=np.int64)
    later = np.flatnonzero(found.lowest_vcn > 0)
    if len(later) == 0:
        return head, later
    first = np.flatnonzero((found.lowest_vcn == 0) & (found.value < 0) & np.isin(owner, owner[later]))
    both = np.concatenate([first, later])
    _, group = np.unique(np.stack([owner[both], found.type[both], name[both]]), axis=1, return_inverse=True)
    group = group.reshape(-1)
    where = np.full(int(group.max()) + 1, -1, np.int64)
    where[group[: len(first)][::-1]] = first[::-1]
    at = where[group[len(first) :]]
    head[later] = np.where(at >= 0, at, later)
    return head, later[at < 0]


def reparse_tags(reader: Reader, count: int, contents: Contents) -> Int:
    """The reparse tag of each of `count` records, 0 where there is none."""
    tags = np.zeros(count, np.int64)
    point = contents.attributes.type == ntfs.REPARSE_POINT
    resident = np.flatnonzero(point & (contents.attributes.value >= 0))
    tags[contents.owner[resident]] = contents.attributes.start[resident] & 0xFFFFFFFF
    runs = contents.runs.take(
        point[contents.runs.row] & (contents.runs.vcn == 0) & (contents.runs.lcn != HOLE)
    )
    place = runs.lcn * contents.cluster_size
    inside = place <= reader.size - 4
    data = reader.read_blocks(place[inside], 4)
    tags[contents.owner[runs.row[inside]]] = data.view("<u4").reshape(-1)
    return tags


def interix_starts(reader: Reader, mft: Mft, contents: Contents) -> Int:
    """The first eight bytes, as a number, of each record's content where it is a system file small enough for
    a link, else 0."""
    starts, found = np.zeros(len(mft), np.int64), contents.attributes
    plain = (found.type == ntfs.DATA) & (contents.name == 0)
    plain &= mft.records.file_attributes[contents.owner] & ntfs.FILE_ATTR_SYSTEM != 0
    mine = np.flatnonzero(plain & (found.value >= 0))
    starts[contents.owner[mine]] = found.start[mine]
    runs, size = contents.runs, contents.cluster_size
    wanted = (
        plain & (found.value < 0) & (found.data_size > INTX_HEAD) & (found.data_size <= INTX_HEAD + MAX_LINK)
    )
    first = np.flatnonzero(wanted[runs.row] & (runs.vcn == 0) & (runs.lcn != HOLE))
    first = first[(runs.lcn[first] >= 0) & (runs.lcn[first] * size <= reader.size - INTX_HEAD)]
    starts[contents.owner[runs.row[first]]] = reader.read_blocks(runs.lcn[first] * size, INTX_HEAD).view(
        "<i8"
    )[:, 0]
    return starts


def sizes_and_flags(mft: Mft, tree: NameTree, contents: Contents, tags: Int) -> tuple[Int, Int]:
    """(bytes, mask of tables.INODE_FLAGS) of each record: of the plain content of a file, of the index of a
    directory."""
    sizes, flags = np.zeros(len(mft), np.int64), np.zeros(len(mft), np.int64)
    found = mft.attributes
    unnamed = found.name.lengths == 0
    of_deleted = np.flatnonzero(
        (found.type == ntfs.DATA) & (found.lowest_vcn == 0) & unnamed & tree.deleted[found.record]
    )
    sizes[found.record[of_deleted]] = found.data_size[of_deleted]
    found, first = contents.attributes, contents.attributes.lowest_vcn == 0
    for kind in (ntfs.INDEX_ROOT, ntfs.INDEX_ALLOCATION):
        index = np.flatnonzero((found.type == kind) & first & mft.records.directory[contents.owner])
        sizes[contents.owner[index]] = found.data_size[index]
    data = np.flatnonzero((found.type == ntfs.DATA) & first & (contents.name == 0))
    sizes[contents.owner[data]] = found.data_size[data]
    state = found.flags[data]
    flags[contents.owner[data]] = np.where(state & ntfs.ATTR_COMPRESSED, tables.I_COMPRESSED, 0) | np.where(
        state & ntfs.ATTR_ENCRYPTED, tables.I_ENCRYPTED, 0
    )
    flags[tags == ntfs.REPARSE_WOF] |= tables.I_COMPRESSED
    return sizes, flags
