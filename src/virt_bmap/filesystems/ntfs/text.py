"""UTF-16 names to UTF-8, all names at once."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from virt_bmap.arrays import Bytes, Int
from virt_bmap.errors import Unsupported

Units = NDArray[np.uint16]

MAX_BYTES = 2**31 - 1
"""Arrow's binary arrays count their bytes in int32; a batch of the $MFT never comes near."""


def utf8(units: Units, lengths: Int) -> pa.Array:
    """Names that lie one after the other in `units` (UTF-16), name i of `lengths[i]` units, as Arrow binary in UTF-8.

    NTFS lets any 16-bit unit into a name: a surrogate without its partner becomes three bytes (WTF-8), so that no two names fall together.
    """
    ends = np.cumsum(lengths)
    if len(units) == 0 or int(units.max()) < 0x80:
        return _binary(units.astype(np.uint8), ends)
    code = units.astype(np.int64)
    joined = ((code[:-1] & 0xFC00) == 0xD800) & ((code[1:] & 0xFC00) == 0xDC00)
    inner = ends[(ends > 0) & (ends < len(units))]
    joined[inner - 1] = False  # two names meet here
    high = np.flatnonzero(joined)
    code[high] = 0x10000 + ((code[high] & 0x3FF) << 10) + (code[high + 1] & 0x3FF)
    width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    width[high + 1] = 0
    reach = np.append(0, np.cumsum(width))
    return _binary(_encode(code, width, reach), reach[ends])


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


def _binary(data: Bytes, ends: Int) -> pa.Array:
    if len(data) > MAX_BYTES:
        raise Unsupported(f"names of {len(data)} bytes together; the most that a table can hold is {MAX_BYTES}")
    offsets = np.append(0, ends).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
