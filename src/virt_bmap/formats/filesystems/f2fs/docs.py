"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "both superblocks and both checkpoints, by their checksums and versions",
    "NAT and SIT with version bitmaps and journals in compact and plain summaries",
    "inodes with extra attributes and checksums, direct, indirect and doubly indirect nodes",
    "inline data, names, links and attributes (of any size), attribute nodes",
    "directories of all levels, casefolded and encrypted ones (names as ciphertext)",
    "compressed files, with released and reserved blocks", "verity trees, quota files",
    "files deleted while open (orphans)", "zoned and read-only volumes, sections of any size",
    "files synced after the checkpoint, rolled forward in memory",
)  # fmt: skip


REFUSED = ("several devices", "blocks of another size than 4 KiB")


ORACLES = (
    "dump.f2fs: the NAT, and the summary area for the owner of each block", "fsck.f2fs",
    "kernel FIEMAP in libguestfs's appliance",
    "content that sload.f2fs and the kernel put in, read back by the map",
    "the kernel's recovery of copies taken while mounted", "the SIT: every block owned or free, none both",
)  # fmt: skip


CHECKS = Checks(
    checksums="checkpoints; superblock and inodes where the features sb_checksum and inode_checksum are set",
    rules=(
        "superblock and checkpoint: geometry, features, versions, counts",
        "nodes: footers against the node address table, each node once",
        "segment information table: against what is owned",
        "names: inodes that are in use, inodes with links have names",
    ),
    unchecked=(
        "content of files",
        "summaries of segments, backups of superblock and checkpoint",
    ),
)
