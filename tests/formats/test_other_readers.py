"""Some disks that others made, as a reader of another project sees them: the same paths, the same contents,
the same places. `tests/others` asks all of them of all disks."""

import re
from collections.abc import Collection
from pathlib import Path

import pytest

from others.below import images_judged, tables_judged
from others.corpus import images, inventory
from others.files import Later, Ours, Row, compared, judged
from others.readers import READERS, Tree
from support import need, need_root

SOME = 6
"""Disks of each kind."""
LARGEST = 1 << 20
"""Bytes of a packed image: larger ones take longer."""
FILES = {
    "ext4": "Linux", "xfs": "Linux", "btrfs": "btrfs restore", "ntfs": "ntfs-3g", "fat12": "mtools",
    "fat16": "mtools", "fat32": "mtools", "exfat": "exfat-fuse", "iso9660": "xorriso",
    "squashfs": "unsquashfs", "erofs": "Linux",
}  # fmt: skip
"""Kinds of the inventory, and who reads all of them."""
TELLING = {
    "deep-directory.iso.xz": "xorriso hides the folder that was emptied into others",
    "exfat_encrypted.raw.gz": "exfat-fuse reads what lies beyond the valid data of a file",
}
"""Left out, and why."""


def some(corpus: Path, kind: str, count: int = SOME) -> set[str]:
    """Disks of a kind that a checker calls valid, from all projects that have any."""
    files = [
        row["file"]
        for row in inventory(corpus)
        if re.fullmatch(kind, row["kind"]) and row["valid"].startswith(("valid", "container", "unchecked"))
        if (corpus / row["file"]).is_file() and (corpus / row["file"]).stat().st_size <= LARGEST
        if Path(row["file"]).name not in TELLING
    ]
    return set(files[:: max(1, len(files) // count)])


def agreed(rows: Collection[Row]) -> list[Row]:
    """Those that the reader read, all of them as the map has it."""
    read = [row for row in rows if not row.refused]
    different = [row for row in read if {row.missing, row.extra, row.differ} != {"[]"}]
    assert not different, different[0]
    return read


@pytest.mark.parametrize("kind", FILES)
def test_files(corpus: Path, kind: str) -> None:
    type = {"fat12": "vfat", "fat16": "vfat", "fat32": "vfat"}.get(kind, kind)
    (reader,) = (reader for reader in READERS[type] if reader.name == FILES[kind])
    need(reader.program, reader.package)
    need_root()
    rows = [
        row
        for label, verdict, image in images(corpus, some(corpus, kind))
        for row in judged(image, label, verdict, [reader.name], Later(Path(), {}))
    ]
    read = agreed(rows)
    assert len(read) >= 3, rows
    assert sum(row.contents for row in read) >= 5


def test_tables_of_partitions(corpus: Path) -> None:
    need("sfdisk", "fdisk")
    need("mmls", "sleuthkit")
    names = some(corpus, "mbr-sector", 12) | some(corpus, "pt:(dos|gpt|sun).*", 12)
    rows = [row for label, _, image in images(corpus, names) for row in tables_judged(image, label)]
    assert sum(row.paths for row in agreed(rows)) > 30


def test_disks_in_images(corpus: Path) -> None:
    """Read through the image's own layer."""
    need("qemu-img", "qemu-utils")
    names = some(corpus, "(qcow2|vmdk|vhdx|vpc).*", 12)
    rows = [row for label, _, image in images(corpus, names) for row in images_judged(image, label)]
    assert sum(row.contents for row in agreed(rows)) >= 8
    assert {row.type for row in rows} >= {"qcow2", "vmdk"}


def test_a_reader_that_differs_is_seen(tmp_path: Path) -> None:
    """What only one has, and other content."""
    mine = Ours({b"/a": "1", b"/b": "2", b"/c": None}, {b"/$MFT"}, {b"/c"})
    theirs: Tree = {b"/a": "1", b"/b": "3", b"/d": None, b"/$MFT": "4"}
    row = compared("ntfs", "image", "reader", mine, theirs)
    assert (row.paths, row.contents) == (2, 1)
    assert (row.missing, row.extra, row.differ) == ("[b'/d']", "[]", "[b'/b']")
    with pytest.raises(AssertionError):
        agreed([row])
