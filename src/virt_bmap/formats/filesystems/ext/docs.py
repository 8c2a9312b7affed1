"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "ext2 rev 0 to ext4, blocks of 1 to 64 KiB, inodes of 128 bytes to a block, Hurd's translators",
    "extent trees, block pointers with three levels of indirection, sparse files, unwritten extents",
    (
        "flex_bg, meta_bg, sparse_super, sparse_super2, 64bit, bigalloc with the slack of its clusters, "
        "uninitialised groups and tables"
    ),
    (
        "plain, hashed (htree, large_dir), casefolded and encrypted directories (names as ciphertext), "
        "with or without file types"
    ),
    "inline data with its overflow, inline directories, short and long symbolic links",
    "attribute blocks, shared ones with all owners, attributes in inodes of their own (ea_inode)",
    (
        "journal in an inode or on another disk, replayed in memory: revokes, escapes, 64bit, checksums "
        "v1 to v3, asynchronous commits"
    ),
    (
        "resize inode, reserved descriptors, quota (hidden and plain), orphan files, project ids, mmp, "
        "bad blocks, verity, Android's shared blocks"
    ),
    (
        "backups of the superblock and of descriptors where the primary ones are damaged; checksums of "
        "both verified"
    ),
    (
        'files deleted while open; what a file that was being cut has beyond its end: part "cut off", which '
        "the next mount frees"
    ),
    "times from 1901 to 2262 in nanoseconds",
)


REFUSED = (
    "features that the superblock calls incompatible and that no released kernel knows",
    "compression (e2compr)",
    "a block that two directories claim, as in torn copies: its names are told of one, and a problem says so",
    "fast commits: not replayed, and named where there are any that a mount would replay",
    (
        "a journal on another disk that is not among the disks: the state before recovery is mapped, and "
        "a problem says so"
    ),
)


ORACLES = (
    "kernel FIEMAP of every file and directory through a loop mount",
    "debugfs blocks of inodes, dumpe2fs for places and counts, blkid for types",
    "content by SHA-256 through the map, also of files in blocks larger than this kernel mounts",
    "the block bitmap: every byte owned or free, none both",
    "the kernel's own recovery of copies taken while it was written",
    "e2fsck: the map of a crashed disk equals that of the same disk recovered, and its blocks byte for byte",
    "tables of mounted walks over images of other projects",
)


CHECKS = Checks(
    checksums=(
        "metadata_csum: superblock, descriptors, bitmaps, inodes, extent tree nodes, directory "
        "blocks, hash tree nodes, attribute blocks, mmp, orphan file, "
        "the journal's superblock; what is replayed of the journal; uninit_bg: descriptors"
    ),
    rules=(
        (
            "extent tree nodes: magic, counts, depth, order, overlaps, agreement with the parent's key, "
            "place in the volume, each node once"
        ),
        "block pointers: place in the volume, each block once",
        (
            "directory entries: lengths, names, inode numbers; names lead to used inodes, inodes with "
            "links have names"
        ),
        "hash trees: limits and counts, order of hashes, depth, place of children",
        "superblock and descriptors: geometry, places, features known",
        "journal: sequence and order of its blocks, revocations",
    ),
    unchecked=(
        "content of files; what is in attributes, and checksums of those in inodes of their own",
        "link counts, block counts of inodes and free counts of groups",
        "whether a name's hash fits the leaf that holds it, `.` and `..`",
        "backups of superblock and descriptors where the primary ones are sound; quota files",
    ),
)
