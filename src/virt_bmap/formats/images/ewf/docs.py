"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import Checks

FEATURES = (
    "E01 as EnCase 1 to 7, FTK Imager, linen and libewf write it, and SMART's s01",
    "segments (E01 to E99, EAA to ZZZ): numbers and set identifiers compared",
    "chunks that are stored and compressed ones; tables and their backups",
    "case, hashes, sessions, and sectors that could not be read, which count as lost",
    "images that were never finished: what they hold, and what is missing",
)
REFUSED = (
    "Ex01 (version 2), L01 and Lx01 (single files): named",
    "AD encryption: named",
)
ORACLES = ("ewfinfo", "ewfverify", "ewfexport", "img_stat and fls of The Sleuth Kit")
CHECKS = Checks(
    checksums="Adler-32 of section descriptors, volume, tables, hashes and lists of sectors",
    rules=(
        "sections: each behind the one before, sizes, the last one",
        "segments: numbers, set identifiers",
        "tables: against their backups, places, each chunk once, as many as the disk has",
    ),
    unchecked=(
        "the guest's bytes, but for --content: the Adler-32 of every chunk, MD5 and SHA-1 of the disk",
        "the text about the case",
    ),
)
