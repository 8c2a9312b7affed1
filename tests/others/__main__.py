"""Do readers of other projects find the same paths and the same contents on disks that others made?

    PYTHONPATH=tests python -m others CORPUS OUT.tsv [--what files|tables|images|volumes] [--only WORD]...
                                      [--reader NAME]... [--appliance FORMAT]... [--figures]

CORPUS is a folder with INVENTORY.tsv and images. Each filesystem that a map has files of, and that nobody
calls damaged, is given to all readers of its format that are here (BMAP_DFVFS names a Python with dfvfs).
Rows are added to OUT: one filesystem and one reader, and what differs by name. `--appliance` asks the kernel
of libguestfs's appliance as well. Printed is the sum of all rows of OUT; with `--figures` nothing is added.
"""

import argparse
import ast
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from others.below import images_judged, tables_judged, volumes_judged
from others.corpus import images, inventory
from others.files import Later, Row, in_appliance, judged
from others.readers import folder
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import BmapError

WHY: dict[str, dict[str, str]] = {
    "btrfs": {
        "btrfs restore": "single members of RAID0 and RAID5",
        "Linux": "members whose pool is not whole",
    },
    "dmg": {
        "7-Zip": "shows the partitions, not the disk",
    },
    "dos": {
        "sfdisk": "a table in sectors of 4096 bytes, which it was not told",
        "The Sleuth Kit": "the same",
    },
    "erofs": {
        "fsck.erofs": "version 1.5 reads no chunks",
    },
    "exfat": {
        "exfat-fuse": "entries behind unused ones; names of control characters; cut off; see *",
        "GRUB": "names with a slash or none; see *",
        "libyal (FAT)": "a name that is none; see *",
        "The Sleuth Kit": "deleted entries as if alive; control characters as ^; see *",
        "Linux 6.1 of libguestfs": "names that are none; see *",
    },
    "ext": {
        "7-Zip": "features that it does not know; sparse files read otherwise",
        "debugfs": "files inside of inodes are padded to 60 bytes; wrong checksums; cut off",
        "GRUB": "features that it does not know; slow on large directories",
        "libyal (EXT)": "inline data in attributes; metadata images; features that it does not know",
        "Linux": "cut off; damaged journals",
        "The Sleuth Kit": "control characters as ^; damage; features that it does not know",
    },
    "f2fs": {
        "GRUB": "features that it does not know",
    },
    "gpt": {
        "sfdisk": "disks cut off inside a partition: the map cuts it, too; a table in sectors of 4096 bytes",
        "The Sleuth Kit": "disks cut off inside a partition: the map cuts it, too",
    },
    "iso9660": {
        "7-Zip": "leaves directories where Rock Ridge moved them from; takes the other tree of two",
        "GRUB": "leaves directories where Rock Ridge moved them from",
        "Linux 6.1 of libguestfs": "hides the folder of moved directories; one plain name beside Apple's",
        "The Sleuth Kit": "plain names beside Rock Ridge's, the other tree of two; one extent of several",
        "xorriso": "hides the folder of moved directories",
    },
    "mac": {
        "The Sleuth Kit": "cut off",
    },
    "ntfs": {
        "7-Zip": "sectors of more than 512 bytes; a sparse file reads otherwise",
        "GRUB": "files with many runs; clusters of 2 MiB; more than 100 directories are not asked for",
        "The Sleuth Kit": "sectors of 256 bytes; clusters of 2 MiB",
    },
    "qcow2": {
        "7-Zip": "overlays",
        "libyal (pyqcow)": "compressed clusters read as zeroes; overlays",
    },
    "sgi": {
        "sfdisk": "lists the whole volume and its header as slices",
    },
    "squashfs": {
        "7-Zip": "LZ4; `..` in a name",
        "GRUB": "LZ4; one with a large directory; `..` in a name",
        "Linux": "compressors that this kernel lacks; hides `..` in a name",
        "Linux 6.1 of libguestfs": "a compressor that it lacks; hides `..` in a name",
        "unsquashfs": "`..` in a name",
    },
    "udf": {
        "7-Zip": "anchors elsewhere than at block 256",
        "GRUB": "the same",
        "Linux 6.1 of libguestfs": "hides files that are marked so; VAT that is not at the end",
    },
    "vfat": {
        "Linux 6.1 of libguestfs": "a loop of directories goes one level deeper",
        "7-Zip": "FAT32 with few clusters",
        "GRUB": "more than 100 directories are not asked for",
        "libyal (FAT)": "FAT32 with few clusters",
        "mtools": "FAT32 with few clusters; more than two FATs",
        "The Sleuth Kit": "FAT32 with few clusters; a loop of directories goes one level deeper",
    },
    "vhdx": {
        "QEMU": "too large to be compared, or a parent is not there",
    },
    "vmdk": {
        "7-Zip": "extents in other files",
    },
    "xfs": {
        "GRUB": "lists not all of large directories; shows what was never written",
        "libyal (XFS)": "extent trees of several levels",
        "Linux": "version 4, which this kernel lacks, and cut off",
    },
    "vpc": {
        "QEMU": "a parent that is not there; a wrong checksum",
    },
}
"""Whatever differs was looked into. What was a fault of the maps was mended; here is what is left."""
EXT = ("ext2", "ext3", "ext4")


def figures(rows: list[Row]) -> str:
    """A line of a table for each format and reader."""
    once = {(row.type, row.image, row.reader, row.paths, row.contents): row for row in rows}.values()
    of: dict[tuple[str, str], list[Row]] = {}
    for row in once:
        of.setdefault(("ext" if row.type in EXT else row.type, row.reader), []).append(row)
    lines = [
        "| format | reader | disks | paths | contents | other | why |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for (type, name), mine in sorted(of.items(), key=lambda pair: (pair[0][0], pair[0][1].lower())):
        read = [row for row in mine if not row.refused]
        other = sum(
            len(ast.literal_eval(told)) for row in read for told in (row.missing, row.extra, row.differ)
        )
        unread = len(mine) - len(read)
        counts = (len(read), sum(row.paths for row in read), sum(row.contents for row in read), other)
        why = WHY.get(type, {}).get(name, "")
        if unread:
            why = "; ".join(filter(None, [why, f"{plural(unread, 'disk')} refused"]))
        lines.append(f"| {type} | {name} | {' | '.join(f'{count:,}' for count in counts)} | {why} |")
    return "\n".join(lines)


def rows(args: argparse.Namespace, where: Path) -> Iterator[Row]:
    if args.what == "volumes":
        yield from volumes_judged(args.corpus)
        return
    later = Later(where, {type: [] for type in args.appliance})
    files = {
        row["file"]
        for row in inventory(args.corpus)
        if not args.only or any(word in f"{row['file']} {row['kind']}" for word in args.only)
    }
    for label, verdict, image in images(args.corpus, files):
        try:
            if args.what == "tables":
                yield from tables_judged(image, label)
            elif args.what == "images":
                yield from images_judged(image, label)
            else:
                yield from judged(image, label, verdict, args.reader, later)
        except BmapError as error:
            sys.stderr.write(f"{label}: {error}\n")
    yield from in_appliance(later)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--what", choices=("files", "tables", "images", "volumes"), default="files")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--reader", action="append", default=[])
    parser.add_argument("--appliance", action="append", default=[])
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if not args.figures:
        with args.out.open("a", newline="") as file, folder() as where:
            out = csv.writer(file, delimiter="\t")
            for row in rows(args, where):
                out.writerow(row)
                file.flush()
    with args.out.open(newline="") as file:
        csv.field_size_limit(1 << 30)
        lines = list(csv.reader(file, delimiter="\t"))
    sys.stdout.write(figures([Row(*line[:3], *map(int, line[3:6]), *line[6:]) for line in lines]) + "\n")


if __name__ == "__main__":
    main()
