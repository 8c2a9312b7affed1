"""placeholder"""

from virt_bmap.reader import Reader

NAME = "lvm"
SPANS = False


def probe(reader: Reader) -> bool:
    return False
