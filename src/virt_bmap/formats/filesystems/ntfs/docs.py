"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "clusters of 256 bytes to 2 MiB, sectors of 256 to 4096 bytes, records of 512 to 4096 bytes",
    "fragmented $MFT, its extension records",
    "$MFTMirr and the copy of the boot sector, where the originals are damaged",
    "attribute lists",
    "resident data, exact to the bytes that update sequences move",
    "named streams",
    "sparse, compressed and encrypted attributes",
    "preallocated and unwritten clusters",
    "hard links; names with unpaired surrogates",
    "reparse points: symbolic links, mount points, special files of WSL, WOF, deduplicated files",
    "links and devices of Interix",
    "$Extend with $UsnJrnl, $ObjId, $Quota, $Reparse, $RmMetadata, $Deleted",
    "bad clusters",
    "deleted records, without their clusters",
    "dirty, unclean and hibernated volumes",
)


REFUSED = (
    "records larger than 4096 bytes",
    "clusters larger than 2 MiB",
    (
        "replay of $LogFile: `state` says that it is needed, and a problem how many changes to how many "
        "records of the $MFT may not be in place"
    ),
)


ORACLES = (
    "ntfs-3g (mount, ntfsinfo, ntfscluster)",
    "The Sleuth Kit (fls, istat)",
    "$Bitmap",
    "ntfsrecover (changes in the log)",
    (
        "public volumes of Windows 10 (builds 14393 to 18894), Server 2022 (20348) and Windows 11 (22000), "
        "as their $UpCase:$Info tells: all have the layout 3.1; of Server 2025 (26100) none was found"
    ),
)


CHECKS = Checks(
    checksums="update sequences of records, and of index blocks of directories (torn writes)",
    rules=(
        "boot sector: geometry",
        "records: signature, numbers, attributes' lengths",
        "run lists: place, order, overlaps, against $Bitmap",
        "indexes of directories: blocks, entries' lengths, that every name is there",
    ),
    unchecked=(
        "content of files",
        "order of names in indexes",
        "security descriptors, $UsnJrnl",
        "what a replay of $LogFile would change",
    ),
)
