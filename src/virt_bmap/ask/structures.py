"""The fields of metadata by name, for people who look at bytes.

The readers declare what they read as NumPy records with the formats' own field names; a format's declaration
says which record lies where.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from virt_bmap.core.escape import escape
from virt_bmap.formats import registry as formats
from virt_bmap.model.contract import Structure


def structure(type: str | None, part: str | None, features: str = "") -> Structure | None:
    """What lies in a part of a volume of this type; copies are named after what they copy, `backup
    superblock`."""
    format = formats.filesystem(type) or formats.volume(type) or formats.image(type)
    found = format.structures() if format else {}
    plain = (part or "").removeprefix("backup ").removeprefix("primary ")
    special = (found.get(f"{plain}, {word}") for word in features.split())
    return next(filter(None, special), None) or found.get(part or "") or found.get(plain)


def fields(
    found: Structure, start: int, end: int, low: int, high: int, read: Callable[[int, int], bytes]
) -> list[dict[str, Any]]:
    """The fields that overlap bytes [low, high) of a volume, where records lie in the extent [start, end).

    `read(offset, length)` gives the volume's bytes. Each field is a dictionary: record (its number in the
    extent), name, start, end, value.
    """
    dtype = found.dtype
    size = dtype.itemsize
    first, last = (
        (max(0, (low - start) // size), min((end - start) // size, -(-(high - start) // size)))
        if found.many
        else (0, 1)
    )
    result = []
    for number in range(first, last):
        at = start + number * size
        record = np.frombuffer(read(at, min(size, end - at)).ljust(size, b"\0"), dtype)[
            0
        ]  # an ext inode of 128 bytes ends before its last fields
        for name, (kind, offset, *_) in sorted((dtype.fields or {}).items(), key=lambda item: item[1][1]):
            begin, behind = at + offset, at + offset + kind.itemsize
            if begin < high and behind > low and behind <= end:
                result.append(
                    {
                        "record": number if found.many else None,
                        "name": name,
                        "start": begin,
                        "end": behind,
                        "value": _value(record[name]),
                    }
                )
    return result


def _value(value: np.generic | np.ndarray | bytes) -> int | str | list[int]:
    """A number, text as escaped text, an array of numbers as a list, raw bytes as hexadecimal digits."""
    if isinstance(value, np.ndarray):
        return value.tobytes().hex() if value.dtype.itemsize == 1 else [int(each) for each in value.ravel()]
    if isinstance(value, np.void):
        return value.tobytes().hex()
    return escape(value) if isinstance(value, bytes) else int(value)
