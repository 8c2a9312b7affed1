"""How the segments of an image are called: disk.E01 to disk.E99, disk.EAA to disk.EZZ, disk.FAA, and so on.

Sources: libyal/libewf, "Expert Witness Compression Format (EWF)", "Segment file extensions".
"""

import os
import re

from virt_bmap.core.errors import ImageError

NUMBERED, LETTERS = 99, 26
FIRST = re.compile(r"\.[A-Za-z]01")


def segment_name(first: str, number: int) -> str:
    """The name of a segment, beside that of the first; both are names without folders.

    >>> [segment_name("disk.E01", number) for number in (2, 99, 100, 125, 126, 775, 776)]
    ['disk.E02', 'disk.E99', 'disk.EAA', 'disk.EAZ', 'disk.EBA', 'disk.EZZ', 'disk.FAA']
    >>> segment_name("disk.s01", 100)
    'disk.saa'
    """
    stem, ending = os.path.splitext(first)
    if not FIRST.fullmatch(ending):
        raise ImageError(
            f"{first}: goes on in another file, which can't be told from this name: the first segment of an "
            "Expert Witness image ends in .E01 or .s01"
        )
    letter = ending[1]
    if number <= NUMBERED:
        return f"{stem}.{letter}{number:02}"
    rest, third = divmod(number - NUMBERED - 1, LETTERS)
    turn, second = divmod(rest, LETTERS)
    if ord(letter.upper()) + turn > ord("Z"):
        raise ImageError(f"{first}: has more segments than there are names for")
    base = ord("A" if letter.isupper() else "a")
    return f"{stem}.{chr(ord(letter) + turn)}{chr(base + second)}{chr(base + third)}"
