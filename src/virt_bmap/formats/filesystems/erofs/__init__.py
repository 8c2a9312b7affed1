"""EROFS: inodes, names and blocks as arrays, compressed files by their cluster indexes.

What is read: the superblock, inodes of both sizes from the root directory on, flat, inline, chunk-based and
compressed files (full and compact indexes, big physical clusters, inline tails, fragments in the packed
inode, deduplicated clusters), attributes inline and shared. Physical clusters are COMPRESSED rows, one each;
PLAIN ones hold the file's bytes as they are, though rotated, and are COMPRESSED rows too. Inodes, their
attributes, indexes and inline tails share blocks, so these blocks are metadata ("inodes"), and what lies in
them are INLINE rows of the inode. A fragment is shown in each file as the clusters of the packed inode that
hold it. There is no allocator: a block without owner is unknown.

Sources: Linux fs/erofs (erofs_fs.h, super.c, inode.c, data.c, dir.c, xattr.c, zmap.c);
Documentation/filesystems/erofs.rst.
"""

from collections.abc import Sequence

from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems.erofs.docs import CHECKS, FEATURES, ORACLES, REFUSED
from virt_bmap.formats.filesystems.erofs.inodes import (
    InodeLayout,
    inode_table,
    name_table,
    walk,
)
from virt_bmap.formats.filesystems.erofs.owners import BlockOwners
from virt_bmap.formats.filesystems.erofs.superblock import (
    COMPAT,
    FRAGMENTS,
    INCOMPAT,
    MAGIC,
    SUPER_OFFSET,
    SUPERBLOCK,
    fixed_areas,
    read_superblock,
)
from virt_bmap.model import tables
from virt_bmap.model.contract import (
    Docs,
    Filesystem,
    FilesystemFormat,
    Structure,
    Structures,
)
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

NAME = "erofs"


def probe(reader: Reader) -> bool:
    """The superblock's magic."""
    return reader.read_clipped(SUPER_OFFSET, 4) == MAGIC.to_bytes(4, "little")


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """All tables of the volume."""
    superblock = read_superblock(reader)
    bits = int(superblock["blkszbits"])
    volume = InodeLayout(
        reader,
        1 << bits,
        int(superblock["meta_blkaddr"]) << bits,
        min(int(superblock["build_time"]), 2**33) * 1_000_000_000 + int(superblock["build_time_nsec"]),
    )
    root, packed = int(superblock["root_nid"]), min(int(superblock["packed_nid"]), 2**56)
    has_packed = packed > 0 and bool(int(superblock["feature_incompat"]) & FRAGMENTS)
    tree = walk(volume, ints([root, packed] if has_packed else [root]), damage)
    if not (tree.column["mode"][tree.column["nid"] == root] >> 12 == 0o4).any():
        raise Corrupt(
            f"{reader.name}: root_nid at byte {SUPER_OFFSET + 14} is {root}, where no directory lies",
            SUPER_OFFSET + 14,
        )
    found = BlockOwners(
        volume,
        min(int(superblock["blocks"]) << bits, reader.size),
        packed if has_packed else -1,
        tree,
        damage,
    )
    found.flat()
    found.chunks(int(superblock["extra_devices"]))
    found.compressed()
    found.attributes(int(superblock["xattr_blkaddr"]) << bits)
    rows = ExtentRows()
    found.metadata(rows, fixed_areas(reader, superblock, found.packed_known()))
    found.content(rows)
    damage.ends_early(int(superblock["blocks"]) << bits, reader.size)
    label = superblock["volume_name"].tobytes().split(b"\0")[0].decode("utf-8", "replace")
    uuid = superblock["uuid"].tobytes().hex()
    return Filesystem(
        type=NAME,
        size=found.size,
        block_size=1 << bits,
        root=root,
        state=tables.CLEAN,
        reader=reader,
        inodes=inode_table(tree, packed if has_packed else -1),
        names=name_table(tree),
        extents=rows.table(0),
        uuid=f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}" if uuid.strip("0") else None,
        label=label or None,
        features=" ".join(
            [name for mask, name in COMPAT.items() if int(superblock["feature_compat"]) & mask]
            + [name for mask, name in INCOMPAT.items() if int(superblock["feature_incompat"]) & mask]
        )
        or None,
    )


def _structures() -> Structures:
    return {
        "superblock": Structure(SUPERBLOCK),
    }


FORMAT = FilesystemFormat(NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, structures=_structures)
