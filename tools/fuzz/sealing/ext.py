"""ext4: superblock, group descriptors, bitmaps, inodes, and the blocks of files and directories; jbd2's
journal.

Sources: fs/ext4/super.c ext4_group_desc_csum; bitmap.c; inode.c ext4_inode_csum; namei.c ext4_dirblock_csum,
ext4_dx_csum; extents.c; xattr.c; mmp.c; orphan.c; fs/jbd2/commit.c, recovery.c.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from virt_bmap.model import tables

from ..disk import Disk
from .unit import Unit, Volume, be32, crc32c, le16, le32, own

METADATA_CSUM, GDT_CSUM, BIT64, META_BG, CSUM_SEED = 0x400, 0x10, 0x80, 0x10, 0x2000
JOURNAL = b"\xc0\x3b\x39\x98"
DESCRIPTOR, COMMIT, SUPERBLOCK, REVOKE = 1, 2, 4, 5
SAME_UUID, LAST_TAG = 2, 8
ORPHANS = 0x0B10CA04


class _Geometry(NamedTuple):
    """What the undamaged superblock says.

    `start` is the volume's, `seed` what all checksums of its metadata begin with.
    """

    start: int
    block: int
    groups: int
    descriptor: int
    table: int
    inode: int
    inodes: int
    blocks: int
    seed: int
    uuid: bytes


def units(disks: list[Disk], volume: Volume) -> Iterator[Unit]:
    """The units of one volume, as far as its features give them checksums."""
    image, base = disks[volume.disk], volume.base
    head = image.read(base + 1024, 1024)
    ro, incompat = le32(head, 0x64), le32(head, 0x60)
    block = 1024 << le32(head, 0x18)
    geometry = _Geometry(
        base, block, -(-(le32(head, 4) - le32(head, 0x14)) // le32(head, 0x20)),
        le16(head, 0xFE) if incompat & BIT64 else 32, base + (1024 // block + 1) * block,
        le16(head, 0x58) or 128, le32(head, 0x28), le32(head, 0x24),
        le32(head, 0x270) if incompat & CSUM_SEED else crc32c(head[0x68:0x78]), head[0x68:0x78],
    )  # fmt: skip
    if ro & METADATA_CSUM:
        yield own(volume.disk, base + 1024, 1024, 0x3FC, 4, lambda data: crc32c(data[:0x3FC]))
    if ro & (METADATA_CSUM | GDT_CSUM):
        for group, at in _descriptors(geometry, bool(incompat & META_BG)):
            value = partial(_group_crc32c if ro & METADATA_CSUM else _group_crc16, geometry, group)
            yield own(volume.disk, at, geometry.descriptor, 0x1E, 2, value)
            if ro & METADATA_CSUM:
                yield from _bitmaps(volume.disk, image, geometry, at)
                yield from _inodes(volume.disk, image, geometry, group, at)
    if ro & METADATA_CSUM:
        yield from _blocks(volume, image, geometry)
        if incompat & 0x100:
            at = base + le32(head, 0x168) * block
            yield own(volume.disk, at, 1024, 1020, 4, lambda data: crc32c(data[:1020], geometry.seed))
    yield from _journal(volume, image, block)


def _descriptors(g: _Geometry, meta: bool) -> Iterator[tuple[int, int]]:
    """(group, where its descriptor lies).

    With meta_bg each block of them lies in the first of its groups, behind a copy of the superblock where
    there is one: both places are tried.
    """
    each = g.block // g.descriptor
    for group in range(g.groups):
        if not meta or group < each:
            yield group, g.table + group * g.descriptor
        else:
            first = g.table + group // each * each * g.blocks * g.block + group % each * g.descriptor
            yield from ((group, first), (group, first - g.block))


def _group_crc32c(g: _Geometry, group: int, data: bytes) -> int:
    return crc32c(group.to_bytes(4, "little") + data, g.seed)


def _group_crc16(g: _Geometry, group: int, data: bytes) -> int:
    crc = 0xFFFF
    for byte in g.uuid + group.to_bytes(4, "little") + data[:0x1E] + data[0x20:]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


def _bitmaps(disk: int, image: Disk, g: _Geometry, at: int) -> Iterator[Unit]:
    """A bitmap's checksum lies in its group's descriptor, in two halves where that is long enough."""
    data = image.read(at, g.descriptor)
    for where, high, low_sum, high_sum, bits in (
        (0, 0x20, 0x18, 0x38, g.blocks),
        (4, 0x24, 0x1A, 0x3A, g.inodes),
    ):
        number = le32(data, where) + (le32(data, high) << 32 if g.descriptor >= 64 else 0)
        start = g.start + number * g.block
        yield Unit(
            disk,
            start,
            start + bits // 8,
            partial(
                _seal_bitmap,
                start,
                bits // 8,
                at + low_sum,
                at + high_sum if g.descriptor >= 64 else 0,
                g.seed,
            ),
        )


def _seal_bitmap(start: int, length: int, low: int, high: int, seed: int, image: Disk) -> None:
    value = crc32c(image.read(start, length), seed).to_bytes(4, "little")
    image.write(low, value[:2])
    if high:
        image.write(high, value[2:])


def _inodes(disk: int, image: Disk, g: _Geometry, group: int, at: int) -> Iterator[Unit]:
    data = image.read(at, g.descriptor)
    table = g.start + (le32(data, 8) + (le32(data, 0x28) << 32 if g.descriptor >= 64 else 0)) * g.block
    for number in range(g.inodes):
        start = table + number * g.inode
        yield Unit(
            disk,
            start,
            start + g.inode,
            partial(_seal_inode, start, g.inode, group * g.inodes + number + 1, g.seed),
        )


def _seal_inode(start: int, size: int, number: int, seed: int, image: Disk) -> None:
    data = bytearray(image.read(start, size))
    if len(data) < size or not any(data):
        return
    high = size > 128 and le16(bytes(data), 0x80) >= 4
    data[0x7C:0x7E] = bytes(2)
    if high:
        data[0x82:0x84] = bytes(2)
    value = crc32c(bytes(data), _of_inode(seed, number, bytes(data[0x64:0x68]))).to_bytes(4, "little")
    image.write(start + 0x7C, value[:2])
    if high:
        image.write(start + 0x82, value[2:])


def _of_inode(seed: int, number: int, generation: bytes) -> int:
    return crc32c(number.to_bytes(4, "little") + generation, seed)


def _blocks(volume: Volume, image: Disk, g: _Geometry) -> Iterator[Unit]:
    """What the undamaged map calls directories, extent trees, attributes and the file of orphans, a block at
    a time."""
    _, extents = volume.bmap.slice_of("extents", volume.number)
    _, inodes = volume.bmap.slice_of("inodes", volume.number)
    record = dict(
        zip(
            tables.integers(inodes, "inode").tolist(),
            tables.integers(inodes, "record_offset").tolist(),
            strict=True,
        )
    )
    seals = {
        tables.DIRECTORY: _seal_directory,
        tables.TREE: _seal_extents,
        tables.XATTR: _seal_xattr,
        tables.METADATA: _seal_orphans,
        tables.DATA: _seal_orphans,
    }
    rows = zip(
        *(tables.integers(extents, name).tolist() for name in ("inode", "volume_offset", "length", "flags")),
        tables.codes(extents, "kind").tolist(),
        strict=True,
    )
    for inode, at, length, flags, kind in rows:
        if kind in seals and record.get(inode, -1) >= 0 and not flags & tables.INLINE and length <= 1 << 20:
            for start in range(volume.base + at, volume.base + at + length, g.block):
                if (
                    seals[kind] is not _seal_orphans
                    or le32(image.read(start, g.block), g.block - 8) == ORPHANS
                ):
                    yield Unit(
                        volume.disk,
                        start,
                        start + g.block,
                        partial(seals[kind], start, g, inode, volume.base + record[inode]),
                    )


def _generation(image: Disk, record: int) -> bytes:
    return image.read(record + 0x64, 4)


def _seal_directory(start: int, g: _Geometry, inode: int, record: int, image: Disk) -> None:
    """A leaf ends with a false entry of 12 bytes; a node of the hash tree has its tail behind its last
    possible entry."""
    data, seed = image.read(start, g.block), _of_inode(g.seed, inode, _generation(image, record))
    if data[-8:-4] == b"\x0c\0\0\xde":
        image.write(start + g.block - 4, crc32c(data[:-12], seed).to_bytes(4, "little"))
        return
    for at in (0x20, 8):
        limit, count = le16(data, at), le16(data, at + 2)
        tail = at + 8 * limit
        if count <= limit and tail == g.block - 8:
            value = crc32c(data[: at + 8 * count] + data[tail : tail + 4] + bytes(4), seed)
            image.write(start + tail + 4, value.to_bytes(4, "little"))
            return


def _seal_extents(start: int, g: _Geometry, inode: int, record: int, image: Disk) -> None:
    data = image.read(start, g.block)
    tail = 12 + 12 * le16(data, 4)
    if data[:2] == b"\x0a\xf3" and tail + 4 <= g.block:
        image.write(
            start + tail,
            crc32c(data[:tail], _of_inode(g.seed, inode, _generation(image, record))).to_bytes(4, "little"),
        )


def _seal_xattr(start: int, g: _Geometry, _inode: int, _record: int, image: Disk) -> None:
    data = image.read(start, g.block)
    if data[:4] == b"\0\0\x02\xea":
        number = (start - g.start) // g.block
        value = crc32c(data[:16] + bytes(4) + data[20:], crc32c(number.to_bytes(8, "little"), g.seed))
        image.write(start + 16, value.to_bytes(4, "little"))


def _seal_orphans(start: int, g: _Geometry, inode: int, record: int, image: Disk) -> None:
    data = image.read(start, g.block)
    if le32(data, g.block - 8) == ORPHANS:
        seed = _of_inode(g.seed, inode, _generation(image, record))
        number = (start - g.start) // g.block
        image.write(
            start + g.block - 4, crc32c(number.to_bytes(8, "little") + data[:-8], seed).to_bytes(4, "little")
        )


# ---- the journal -------------------------------------------------------------------------------------------


def _journal(volume: Volume, image: Disk, block: int) -> Iterator[Unit]:
    """The blocks of inode 8 in order, where they lie in one piece. Numbers are big endian."""
    _, extents = volume.bmap.slice_of("extents", volume.number)
    mine = (tables.integers(extents, "inode") == 8) & (tables.integers(extents, "file_offset") == 0)
    if mine.sum() != 1:
        return
    start = volume.base + int(tables.integers(extents, "volume_offset")[mine][0])
    end = start + int(tables.integers(extents, "length")[mine][0])
    head = image.read(start, 1024)
    if head[:4] != JOURNAL or not be32(head, 0x28) & 0x18:  # checksums of version 2 or 3
        return
    seed, wide = crc32c(head[0x30:0x40]), be32(head, 0x28) & 0x10 != 0
    yield own(volume.disk, start, 1024, 0xFC, 4, crc32c, "big")
    for at in range(start + block, end, block):
        data = image.read(at, block)
        kind = be32(data, 4) if data[:4] == JOURNAL else 0
        if kind in (DESCRIPTOR, REVOKE):
            yield own(volume.disk, at, block, block - 4, 4, partial(crc32c, crc=seed), "big")
        elif kind == COMMIT:
            yield own(volume.disk, at, block, 16, 4, partial(crc32c, crc=seed), "big")
        if kind == DESCRIPTOR and wide:
            yield from _tagged(volume.disk, data, at, block, end, seed)


def _tagged(disk: int, data: bytes, at: int, block: int, end: int, seed: int) -> Iterator[Unit]:
    """The blocks behind a descriptor: the checksum of each lies in its tag of 16 bytes."""
    tag, where = 12, at + block
    while tag + 16 <= block - 4 and where < end:
        flags = be32(data, tag + 4)
        yield Unit(
            disk, where, where + block, partial(_seal_logged, where, block, at + tag + 12, data[8:12], seed)
        )
        tag += 16 if flags & SAME_UUID else 32
        where += block
        if flags & LAST_TAG:
            return


def _seal_logged(start: int, block: int, tag: int, sequence: bytes, seed: int, image: Disk) -> None:
    image.write(tag, crc32c(image.read(start, block), crc32c(sequence, seed)).to_bytes(4, "big"))
