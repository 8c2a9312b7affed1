"""What the reader does, for docs/formats.md and docs/verification.md."""

from virt_bmap.model.contract import (
    Checks,
)

FEATURES = (
    "ISO 9660 levels 1 to 3 and ISO 9660:1999",
    "Rock Ridge with continuation areas and relocated directories", "Joliet", "multi-extent files",
    "interleaved files", "associated files as a stream", "extended attribute records", "path tables",
    "El Torito boot catalogs and images", "isohybrid system areas", "zisofs (as compressed)",
    "hard links (as shared)", "any session of a disc that was written in several (`--session`)",
)  # fmt: skip


REFUSED = (
    "High Sierra",
    "the sessions of a disc that are not shown: earlier ones are unreferenced, later ones named",
    "HFS and HFS+ of hybrid discs (named)",
)


ORACLES = ("isoinfo", "xorriso", "content read back by the map", "blkid for label and UUID")


CHECKS = Checks(
    checksums=None,
    rules=(
        "descriptors: geometry, boot catalog",
        "directory records: lengths, places, each directory once",
        "system use entries: lengths, continuation areas",
    ),
    unchecked=(
        "content of files",
        "path tables",
    ),
)
