"""placeholder"""

from virt_bmap.reader import Reader

NAME = "ext"


def probe(reader: Reader) -> bool:
    return False
