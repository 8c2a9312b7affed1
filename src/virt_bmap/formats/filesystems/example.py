"""EXAMPLE: a made-up filesystem, complete and small.

The template for new readers, and a test subject; it is not in the probe list.

    block 0                 superblock
    bitmap_block            one bit for each block, 1 is used
    inode_block             inodes of 64 bytes, number 1 first; number 1 is the root directory
    anywhere                content; a directory is records (inode u32, length u8, name), a record of inode 0
                            ends its block

Sources: this docstring. (In a real reader: the specification's sections, the kernel's files and version.)
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, bit_runs, expand, gather, ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.layout import record, records, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.ragged import Ragged
from virt_bmap.model import tables
from virt_bmap.model.contract import Checks, Docs, Filesystem, FilesystemFormat
from virt_bmap.model.damage import Damage

NAME = "example"
FEATURES = ("files and directories with up to six extents", "the allocation bitmap")
REFUSED = ("blocks of another size than 512 bytes",)
ORACLES = ("the writer in tests/formats/test_example.py",)
CHECKS = Checks(
    checksums=None,
    rules=(
        "superblock: what it counts fits",
        "inodes: extents inside the volume",
    ),
    unchecked=("content of files",),
)

MAGIC = b"EXAMPLE1"
BLOCK = 512
ROOT = 1
EXTENTS = 6

SUPERBLOCK = struct(32, [
    (0, "magic", "S8"),
    (8, "blocks", "<u4"),
    (12, "inodes", "<u4"),
    (16, "bitmap_block", "<u4"),
    (20, "inode_block", "<u4"),
])  # fmt: skip
INODE = struct(64, [
    (0, "kind", "u1"),  # 0 unused, 1 file, 2 directory
    (1, "extents", "u1"),
    (4, "size", "<u4"),
    (8, "start", "<u4", (EXTENTS,)),
    (32, "count", "<u4", (EXTENTS,)),
])  # fmt: skip
RECORD = 5
BATCH = 32 << 20
"""Bytes of directories that are looked at together."""
NO_BYTES = np.zeros(0, np.uint8)
TYPE_OF = np.array([tables.T_UNKNOWN, tables.T_FILE, tables.T_DIRECTORY])


def probe(reader: Reader) -> bool:
    """The magic number."""
    return reader.read_clipped(0, len(MAGIC)) == MAGIC


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """Everything the volume holds. Raises Corrupt where the superblock makes no sense."""
    superblock = _superblock(reader)
    rows = tables.ExtentRows()
    _system(reader, superblock, rows)
    inode, found = _inodes(reader, superblock)
    owner, file_offset, start, length = _extents(superblock, found, damage)
    is_directory = found["kind"][owner] == 2
    kind = np.where(is_directory, tables.DIRECTORY, tables.DATA)
    rows.add(kind, start, length, inode=inode[owner], file_offset=file_offset)
    return Filesystem(
        type=NAME, size=int(superblock["blocks"]) * BLOCK, block_size=BLOCK, root=ROOT, state=tables.CLEAN,
        reader=reader, inodes=tables.make(
            "inodes", volume=0, inode=inode, type=TYPE_OF[np.minimum(found["kind"], 2)],
            size=widen(found["size"], "size"), nlink=1, flags=0,
            record_offset=int(superblock["inode_block"]) * BLOCK + (inode - 1) * INODE.itemsize,
        ),
        names=_names(
            reader, inode[owner[is_directory]], start[is_directory], length[is_directory], damage
        ),
        extents=rows.table(0),
    )  # fmt: skip


def _superblock(reader: Reader) -> np.void:
    found = record(reader.read_clipped(0, BLOCK), SUPERBLOCK)
    blocks, inodes = int(found["blocks"]), int(found["inodes"])
    end = int(found["inode_block"]) * BLOCK + inodes * INODE.itemsize
    bitmap_end = int(found["bitmap_block"]) * BLOCK + (blocks + 7) // 8
    if not 0 < blocks * BLOCK <= reader.size or max(end, bitmap_end) > blocks * BLOCK:
        raise Corrupt(
            f"{reader.name}: superblock at byte 0: {plural(blocks, 'block')} "
            f"and {plural(inodes, 'inode')} do not fit into {reader.size} bytes",
            0,
        )
    return found


def _system(reader: Reader, superblock: np.void, rows: tables.ExtentRows) -> None:
    """The filesystem's own structures, and what its allocator calls free."""
    blocks, bitmap = int(superblock["blocks"]), int(superblock["bitmap_block"]) * BLOCK
    size = (blocks + 7) // 8
    rows.add(tables.METADATA, 0, BLOCK, part="superblock")
    rows.add(tables.METADATA, bitmap, -(-size // BLOCK) * BLOCK, part="bitmap")
    table = -(-int(superblock["inodes"]) * INODE.itemsize // BLOCK) * BLOCK
    rows.add(tables.METADATA, int(superblock["inode_block"]) * BLOCK, table, part="inode table")
    first, last = bit_runs(np.frombuffer(reader.read(bitmap, size), np.uint8), blocks, value=False)
    rows.add(tables.FREE, first * BLOCK, (last - first) * BLOCK)


def _inodes(reader: Reader, superblock: np.void) -> tuple[Int, np.ndarray]:
    """(number, record) of every inode in use."""
    data = reader.read(int(superblock["inode_block"]) * BLOCK, int(superblock["inodes"]) * INODE.itemsize)
    found = records(data, INODE)
    used = np.flatnonzero(found["kind"])
    return used + 1, found[used]


def _extents(superblock: np.void, found: np.ndarray, damage: Damage) -> tuple[Int, Int, Int, Int]:
    """(position of the inode, file offset, volume offset, length) of every extent; offsets and lengths in
    bytes."""
    owner, nth = expand(np.minimum(found["extents"], EXTENTS).astype(np.int64))
    start = widen(found["start"][owner, nth], "start") * BLOCK
    length = widen(found["count"][owner, nth], "count") * BLOCK
    size = int(superblock["blocks"]) * BLOCK
    inside = start + length <= size
    if not damage.check(
        inside, "outside", "[extent reaches|extents reach] beyond the filesystem", start
    ).all():
        length = np.clip(length, 0, np.maximum(0, size - start))
    before = np.cumsum(length) - length
    first_of = np.searchsorted(owner, np.arange(len(found)))
    return owner, before - np.append(before, 0)[first_of][owner], start, length


def _names(reader: Reader, directory: Int, start: Int, length: Int, damage: Damage) -> pa.Table:
    """The records of all directory blocks, a batch of blocks at a time: one cursor for each block, all
    stepped at once, as many steps as the fullest block has records."""
    extent, nth = expand(length // BLOCK)
    place, holder = start[extent] + nth * BLOCK, directory[extent]
    parents, children, names = [ints([])], [ints([])], [Ragged.cut(NO_BYTES, ints([]), ints([]))]
    for part, data in reader.batches(place, BLOCK, BATCH):
        flat, block, at = data.reshape(-1), np.arange(len(data)), np.zeros(len(data), np.int64)
        while len(block):
            head = gather(flat, block * BLOCK + at, np.full(len(block), RECORD)).reshape(-1, RECORD)
            inode = widen(np.ascontiguousarray(head[:, :4]).view("<u4")[:, 0], "inode")
            size = head[:, 4].astype(np.int64)
            fits = (inode == 0) | (at + RECORD + size <= BLOCK)
            damage.check(
                fits,
                "directory",
                "[record reaches out of its|records reach out of their] block",
                place[part][block] + at,
            )
            good = fits & (inode > 0)
            block, at, inode, size = block[good], at[good], inode[good], size[good]
            parents.append(holder[part][block])
            children.append(inode)
            names.append(Ragged.cut(flat, block * BLOCK + at + RECORD, size))
            at = at + RECORD + size
            more = at + RECORD <= BLOCK
            block, at = block[more], at[more]
    return tables.make(
        "names", volume=0, parent=np.concatenate(parents), inode=np.concatenate(children),
        name=Ragged.concat(names).arrow(),
    )  # fmt: skip


FORMAT = FilesystemFormat(NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, allocator="the bitmap")
