"""UTF-16 names to UTF-8, all names at once."""

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.formats.common.ragged import Ragged

Units = NDArray[np.uint16]


def utf8(units: Units, lengths: NDArray[np.integer]) -> Ragged:
    """Names that lie one after the other in `units` (UTF-16), name i of `lengths[i]` units, in UTF-8.

    NTFS lets any 16-bit unit into a name: a surrogate without its partner becomes three bytes (WTF-8), so
    that no two names fall together.
    """
    if len(units) == 0 or int(units.max()) < 0x80:
        return Ragged(units.astype(np.uint8), lengths.astype(np.uint16))
    ends = np.cumsum(lengths, dtype=np.int64)
    code = units.astype(np.int64)
    joined = ((code[:-1] & 0xFC00) == 0xD800) & ((code[1:] & 0xFC00) == 0xDC00)
    inner = ends[(ends > 0) & (ends < len(units))]
    joined[inner - 1] = False  # two names meet here
    high = np.flatnonzero(joined)
    code[high] = 0x10000 + ((code[high] & 0x3FF) << 10) + (code[high + 1] & 0x3FF)
    width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    width[high + 1] = 0
    reach = np.append(0, np.cumsum(width))
    return Ragged(_encode(code, width, reach), np.diff(reach[ends], prepend=0).astype(np.uint16))


def _encode(code: Int, width: Int, reach: Int) -> Bytes:
    """Code points as UTF-8, each `width` bytes long from `reach`; those of width 0 are left out."""
    data = np.empty(int(reach[-1]), np.uint8)
    for size, lead in ((1, 0), (2, 0xC0), (3, 0xE0), (4, 0xF0)):
        mine = np.flatnonzero(width == size)
        at, value = reach[mine], code[mine]
        for byte in range(size - 1, 0, -1):
            data[at + byte] = 0x80 | (value & 0x3F)
            value = value >> 6
        data[at] = lead | value
    return data
