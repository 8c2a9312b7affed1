"""Allocation bitmaps as runs.

Free space is few runs of many bits, and most of a large bitmap can lie in a hole.
"""

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, bit_runs, complement, union
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import ROW, afford, held

BATCH = 1 << 20
"""Bytes that are looked at together."""


def bitmap_runs(reader: Reader, starts: Int, lengths: Int, bits: int, value: bool) -> tuple[Int, Int]:
    """(starts, ends), in bits, of the runs of `value` in the bitmap whose bytes lie in these ranges of the
    volume, one after the other; of its first `bits` bits."""
    bits = min(bits, 8 * int(lengths.sum()))
    low, high, count = [EMPTY], [EMPTY], 0
    for at, data in held(reader, starts, lengths, BATCH):
        begin, end = bit_runs(data, max(0, min(8 * len(data), bits - 8 * at)), True)
        count += len(begin)
        afford(reader, count * ROW, f"the rows of {count:,} runs of a bitmap")
        low.append(begin + 8 * at)
        high.append(end + 8 * at)
    found = union(np.concatenate(low), np.concatenate(high))
    return found if value else complement(*found, 0, bits)
