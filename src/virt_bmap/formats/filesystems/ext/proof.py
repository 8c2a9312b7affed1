"""What `check` asks of ext beyond what a map needs: every checksum of metadata_csum, and the order in hash
trees.

A second pass over the metadata whose places the tables give; the state after recovery, as the map shows it.

Sources: kernel Documentation/filesystems/ext4/checksums.rst; fs/ext4 (v6.12): inode.c ext4_inode_csum,
bitmap.c, extents.c ext4_extent_block_csum, namei.c ext4_dirblock_csum, ext4_dx_csum, dx_probe, xattr.c
ext4_xattr_block_csum, mmp.c, orphan.c; fs/jbd2/journal.c jbd2_superblock_csum.
"""

import numpy as np

from virt_bmap.core.arrays import Bool, Bytes, Int
from virt_bmap.core.checksums import U32, crc32c, crc32c_each, crc32c_without
from virt_bmap.core.layout import record, records, struct
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.proving import Compared, Places, blocks, check_names, check_targets
from virt_bmap.formats.filesystems.ext import allocator, journal
from virt_bmap.formats.filesystems.ext.extents import EXTENT_MAGIC
from virt_bmap.formats.filesystems.ext.inodes import EXTENTS_FL
from virt_bmap.formats.filesystems.ext.superblock import Superblock, read_superblock
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem, Proof
from virt_bmap.model.damage import Damage

INODE = struct(
    128, [(0x20, "i_flags", "<u4"), (0x64, "i_generation", "<u4"), (0x7C, "l_i_checksum_lo", "<u2")]
)
EXTRA_ISIZE, CHECKSUM_HI = 0x80, 0x82
INDEX_FL = 0x1000
DX_INFO_LENGTH, DX_ENTRY, DX_TAIL = 8, 8, 8
DX_MAX_INDIRECT = 3
XATTR_MAGIC, XATTR_CHECKSUM = 0xEA020000, 0x10
DIRECTORY_TAIL = np.frombuffer(b"\0\0\0\0\x0c\0\0\xde", np.uint8)
"""struct ext4_dir_entry_tail: an entry of 12 bytes without inode or name, of file type 0xde, whose last four
bytes are the checksum."""
MMP_CHECKSUM = 0x3FC
ORPHAN_MAGIC = 0x0B10CA04
JOURNAL_CHECKSUM = 0xFC


class _Inodes:
    """The inodes of the map by number, with what checksums of their blocks begin with."""

    def __init__(self, found: Filesystem) -> None:
        self.number, self.place = (
            tables.integers(found.inodes, "inode"),
            tables.integers(found.inodes, "record_offset"),
        )
        self.size = tables.integers(found.inodes, "size")
        self.flags = np.zeros(len(self.number), np.uint32)
        self.seed = np.zeros(len(self.number), np.uint32)

    def rows(self, numbers: Int) -> Int:
        """The rows of these numbers, all of which the map has."""
        return np.minimum(np.searchsorted(self.number, numbers), len(self.number) - 1)


def prove(found: Filesystem, damage: Damage) -> list[Proof]:
    """Compare all checksums, look into all hash trees."""
    reader = found.reader
    superblock = read_superblock(reader, Damage())  # its faults are known by now
    compared, places, inodes = Compared(damage), Places(found, superblock.block_size), _Inodes(found)
    checked = superblock.has("metadata_csum")
    if checked:
        # its reader has said so if it is wrong
        compared.compare("superblocks", np.ones(1, bool), np.zeros(1, np.int64))
        _bitmaps(reader, superblock, compared)
    _inodes(reader, superblock, inodes, compared)
    _directories(reader, superblock, places, inodes, compared)
    if checked:
        _trees(reader, superblock, places, inodes, compared)
        _attributes(reader, superblock, places, compared)
        _others(reader, superblock, places, inodes, compared)
    check_names(found, damage)
    check_targets(found, damage)
    if not checked:
        only = " but for group descriptors" if superblock.has("uninit_bg") else ""
        return [Compared(Damage()).proof(f"the filesystem has none{only} (no metadata_csum)")]
    return [compared.proof()]


def _bitmaps(reader: Reader, superblock: Superblock, compared: Compared) -> None:
    """Bitmaps of groups that have any; their checksums stand in the descriptors, which are compared by their
    reader."""
    raw = allocator.raw_descriptors(reader, superblock)
    found = allocator.read_groups(reader, superblock, Damage())
    compared.compare("group descriptors", np.ones(len(raw), bool), np.zeros(len(raw), np.int64))
    flat = np.ascontiguousarray(raw).view(np.uint8).reshape(len(raw), -1)
    for kind, at, unused, blocks_, bits in (
        (
            "block bitmaps",
            0x18,
            found.blocks_unused,
            found.block_bitmap,
            superblock.blocks_per_group // superblock.cluster,
        ),
        ("inode bitmaps", 0x1A, found.inodes_unused, found.inode_bitmap, superblock.inodes_per_group),
    ):
        some = np.flatnonzero((blocks_ > 0) & ~unused)
        said = _number(flat[some], at, 2)
        if superblock.desc_size >= 64:
            said |= _number(flat[some], at + 0x20, 2) << np.uint32(16)
        offsets = blocks_[some] * superblock.block_size
        for part, data in blocks(reader, offsets, superblock.block_size):
            is_ = crc32c(data[:, : bits // 8], superblock.checksum_seed)
            mask = np.uint32(0xFFFFFFFF if superblock.desc_size >= 64 else 0xFFFF)
            compared.compare(kind, (is_ & mask) == said[part], offsets[part])


def _inodes(reader: Reader, superblock: Superblock, inodes: _Inodes, compared: Compared) -> None:
    """Checksums of records, where there are any, and from where those of their blocks begin."""
    size = superblock.inode_size
    for part, data in blocks(reader, inodes.place, size):
        raw = records(data, INODE)
        inodes.flags[part] = raw["i_flags"]
        if not superblock.has("metadata_csum"):
            continue
        number = _bytes(inodes.number[part].astype("<u4"))
        seed = crc32c(np.concatenate([number, _bytes(raw["i_generation"])], axis=1), superblock.checksum_seed)
        inodes.seed[part] = seed
        said, high = raw["l_i_checksum_lo"].astype(np.uint32), np.zeros(len(data), bool)
        blank = data.copy()
        blank[:, 0x7C:0x7E] = 0
        if size > 128:
            high = _number(data, EXTRA_ISIZE, 2) >= CHECKSUM_HI + 2 - EXTRA_ISIZE
            said |= np.where(high, _number(data, CHECKSUM_HI, 2) << np.uint32(16), np.uint32(0))
            blank[high, CHECKSUM_HI : CHECKSUM_HI + 2] = 0
        is_ = crc32c(blank, seed)
        good = np.where(high, is_, is_ & np.uint32(0xFFFF)) == said
        compared.compare("inodes", good | ~data.any(axis=1), inodes.place[part])


def _trees(
    reader: Reader, superblock: Superblock, places: Places, inodes: _Inodes, compared: Compared
) -> None:
    """Extent tree nodes: the checksum follows the last entry that has room, eh_max of them."""
    offset, owner, _ = places.of_kind(tables.TREE)
    row = inodes.rows(owner)
    mine = np.flatnonzero(inodes.flags[row] & EXTENTS_FL) if len(row) else row
    offset, row = offset[mine], row[mine]
    tail = superblock.block_size // 12 * 12  # a header of 12 bytes, then entries of 12
    tail = tail if superblock.block_size - tail >= 4 else tail - 12
    for part, data in blocks(reader, offset, superblock.block_size):
        known = _number(data, 0, 2) == EXTENT_MAGIC
        good = crc32c(data[:, :tail], inodes.seed[row[part]]) == _number(data, tail, 4)
        compared.compare("extent tree nodes", good & known, offset[part])


def _directories(
    reader: Reader, superblock: Superblock, places: Places, inodes: _Inodes, compared: Compared
) -> None:
    """Directory blocks: nodes of hash trees and blocks of names."""
    size = superblock.block_size
    offset, owner, place = places.of_kind(tables.DIRECTORY)
    row = inodes.rows(owner)
    mine = np.flatnonzero((place >= 0) & (place < inodes.size[row])) if len(row) else row
    offset, row, place = offset[mine], row[mine], place[mine]
    for part, data in blocks(reader, offset, size):
        indexed = inodes.flags[row[part]] & INDEX_FL != 0
        length = _number(data, 4, 2).astype(np.int64)
        whole = (length == size) if size <= 0xFFFC else (length == 0xFFFF) | (length == 0)
        root = indexed & (place[part] == 0)
        node = indexed & ~root & whole & (_number(data, 0, 4) == 0)
        index = root | node
        if index.any():
            at = np.flatnonzero(index)
            _hash_nodes(superblock, data[at], root[at], inodes, row[part][at], offset[part][at], compared)
        if superblock.has("metadata_csum"):
            leaf = np.flatnonzero(~index)
            names = data[leaf]
            good = crc32c(names[:, :-12], inodes.seed[row[part][leaf]]) == _number(names, size - 4, 4)
            compared.compare(
                "directory blocks",
                good & (names[:, -12:-4] == DIRECTORY_TAIL).all(axis=1),
                offset[part][leaf],
            )


def _hash_nodes(
    superblock: Superblock,
    data: Bytes,
    root: Bool,
    inodes: _Inodes,
    row: Int,
    offset: Int,
    compared: Compared,
) -> None:
    """Nodes of hash trees: limit, count, the order of hashes, where they lead, and the checksum after the
    last entry that has room."""
    size, checked = superblock.block_size, superblock.has("metadata_csum")
    begin = np.where(root, 0x20, 8)
    info_length, reserved, depth = data[:, 0x1D], _number(data, 0x18, 4), data[:, 0x1E].astype(np.int64)
    limit, count = _at(data, begin, 2).astype(np.int64), _at(data, begin + 2, 2).astype(np.int64)
    good = ~root | ((info_length == DX_INFO_LENGTH) & (reserved == 0) & (depth < DX_MAX_INDIRECT))
    good &= limit == (size - begin - DX_TAIL * checked) // DX_ENTRY
    good &= (count >= 1) & (count <= limit)
    at = np.flatnonzero(good)
    most = (size - 8) // DX_ENTRY
    step = np.arange(most)
    where = np.minimum(begin[at, None] + step * DX_ENTRY, size - 8) // 4
    words = data[at].view("<u4")
    hashes = np.take_along_axis(words, where, axis=1)
    block = np.take_along_axis(words, where + 1, axis=1) & 0x0FFFFFFF
    used = step < count[at, None]
    hashes[:, 0] = 0  # limit and count lie where the first entry would have its hash
    good[at] &= ~((hashes[:, 1:] < hashes[:, :-1]) & used[:, 1:]).any(axis=1)
    blocks_ = -(-inodes.size[row[at]] // size)
    good[at] &= ~((block >= blocks_[:, None]) & used).any(axis=1)
    what = (
        "hash tree [node has impossible counts, has hashes out of order or leads nowhere"
        "|nodes have impossible counts, have hashes out of order or lead nowhere]"
    )
    compared.damage.check(good, "directory", what, offset)
    if not checked:
        return
    fits = np.flatnonzero(begin + limit * DX_ENTRY + DX_TAIL <= size)
    data, begin, row, limit = data[fits], begin[fits], row[fits], limit[fits]
    count = np.minimum(count[fits], (size - begin) // DX_ENTRY)
    words = data.reshape(-1).view("<u4").astype(np.uint32)
    is_ = crc32c_each(
        words, np.arange(len(data)) * (size // 4), (begin + count * DX_ENTRY) // 4, inodes.seed[row]
    )
    tail = begin + limit * DX_ENTRY
    reserved = _at(data, tail, 4)
    is_ = crc32c(np.concatenate([_bytes(reserved), np.zeros((len(data), 4), np.uint8)], axis=1), is_)
    sound = np.zeros(len(offset), bool)
    sound[fits] = is_ == _at(data, tail + 4, 4)
    compared.compare("hash tree nodes", sound, offset)


def _attributes(reader: Reader, superblock: Superblock, places: Places, compared: Compared) -> None:
    """Attribute blocks, which begin with their magic; not the content of attributes in inodes of their
    own."""
    offset, _, place = places.of_kind(tables.XATTR, None)
    offset = np.unique(offset[place < 0])
    for part, data in blocks(reader, offset, superblock.block_size):
        seed = crc32c(_bytes((offset[part] // superblock.block_size).astype("<u8")), superblock.checksum_seed)
        good = crc32c_without(data, XATTR_CHECKSUM, seed=seed) == _number(data, XATTR_CHECKSUM, 4)
        compared.compare("attribute blocks", good & (_number(data, 0, 4) == XATTR_MAGIC), offset[part])


def _others(
    reader: Reader, superblock: Superblock, places: Places, inodes: _Inodes, compared: Compared
) -> None:
    """The mmp block, the blocks of the orphan file, the journal's superblock."""
    size = superblock.block_size
    offset, _, _ = places.of_kind(tables.METADATA, "mmp block")
    for part, data in blocks(reader, offset, size):
        good = crc32c(data[:, :MMP_CHECKSUM], superblock.checksum_seed) == _number(data, MMP_CHECKSUM, 4)
        compared.compare("mmp blocks", good, offset[part])
    offset, owner, _ = places.of_kind(tables.METADATA, "orphan file")
    row = inodes.rows(owner)
    for part, data in blocks(reader, offset, size):
        seed = crc32c(_bytes((offset[part] // size).astype("<u8")), inodes.seed[row[part]])
        good = crc32c(data[:, :-8], seed) == _number(data, size - 4, 4)
        compared.compare(
            "orphan file blocks", good & (_number(data, size - 8, 4) == ORPHAN_MAGIC), offset[part]
        )
    offset, _, place = places.of_kind(tables.METADATA, "journal")
    first = offset[place == 0]
    if len(first) == 1:
        data = reader.read_blocks(first, journal.JOURNAL_SUPER.itemsize)
        head = record(data[0].tobytes(), journal.JOURNAL_SUPER)
        if int(head["s_feature_incompat"]) & (journal.CSUM_V2 | journal.CSUM_V3):
            said = data[:, JOURNAL_CHECKSUM : JOURNAL_CHECKSUM + 4].copy().view(">u4")[:, 0]
            compared.compare("journal superblocks", crc32c_without(data, JOURNAL_CHECKSUM) == said, first)


def _number(data: Bytes, at: int, size: int) -> U32:
    """A little-endian number of 2 or 4 bytes at byte `at` of each row."""
    found: U32 = np.ascontiguousarray(data[:, at : at + size]).view(f"<u{size}")[:, 0].astype(np.uint32)
    return found


def _at(data: Bytes, at: Int, size: int) -> U32:
    """Likewise at another byte in each row."""
    place = np.clip(at[:, None] + np.arange(size), 0, data.shape[1] - 1)
    return _number(np.take_along_axis(data, place, axis=1), 0, size)


def _bytes(values: np.ndarray) -> Bytes:
    """Numbers as rows of bytes."""
    flat = np.ascontiguousarray(values)
    return flat.view(np.uint8).reshape(len(flat), flat.dtype.itemsize)
