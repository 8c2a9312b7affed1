"""placeholder"""

from virt_bmap.reader import Reader

NAME = "gpt"
SPANS = False


def probe(reader: Reader) -> bool:
    return False
