"""placeholder"""

from virt_bmap.reader import Reader

NAME = "mbr"
SPANS = False


def probe(reader: Reader) -> bool:
    return False
