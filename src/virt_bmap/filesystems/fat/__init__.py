"""placeholder: FAT12, FAT16 and FAT32"""

from virt_bmap.filesystems.fat.bpb import looks_like_fat
from virt_bmap.reader import Reader

__all__ = ["NAME", "looks_like_fat", "probe"]

NAME = "vfat"


def probe(reader: Reader) -> bool:
    """Does the first sector pass the tests of libblkid?"""
    return looks_like_fat(reader.read_clipped(0, 512))
