"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "versions 4 and 5, blocks of 512 bytes to 64 KiB, inodes of 256 bytes to 2 KiB, larger directory blocks",
    "short, block, leaf, node and B-tree directories, with or without file types, ASCII case-insensitive too",
    "extents in inodes and in B-trees, unwritten extents, attribute forks with remote values",
    (
        "reverse-map and reference-count B-trees: shared (reflinked) extents with all owners, "
        "copy-on-write staging"
    ),
    "sparse inode chunks, large extent counters, big timestamps",
    "orphans: files deleted while open, shown as deleted until a mount frees them",
    "quota inodes, bitmap and summary of a real-time device",
    (
        "the log, internal or on another disk, replayed in memory (version 5); operations that were begun "
        "and not ended are finished: extents freed, mapped, their owners counted"
    ),
)


REFUSED = (
    "directories of version 1 (IRIX before 6.5)",
    "metadata directory trees and real-time groups (metadir)",
    "zoned devices",
    "incompatible features that are not known",
    "replay of version 4 logs: the state says that recovery is needed",
    "content on a real-time device: a note",
    (
        "what the kernel does later than recovery: space preallocated beyond the end of a file is shown, "
        "though it is given back when the file is closed"
    ),
)


ORACLES = (
    "kernel FIEMAP, GETFSMAP, stat and contents through a loop mount",
    "the kernel's own log recovery, and its recovery of copies taken while it was written",
    "xfs_db blockuse and bmap on version 4",
    "head and tail of xfs_logprint",
    "truth tables of images from other projects",
)


CHECKS = Checks(
    checksums="version 5: superblocks, AG headers, B-tree blocks, inodes, directory and attribute blocks, "
    "symbolic links, quotas, log records",
    rules=(
        "superblock and AG headers: geometry, group numbers, lengths, features known",
        (
            "B-trees: magic, levels, counts, order and overlaps of records, keys against children, each "
            "block once"
        ),
        "inodes: numbers, forks, extents in order and inside the volume",
        "directories: blocks, entries, names that lead to inodes in use",
        "free lists and orphans: places, who is on them",
    ),
    unchecked=(
        "content of files, names and values of attributes",
        "hash indexes and free indexes of directories but for their checksums",
        "free counts and link counts",
    ),
)
