"""On-disk structures as NumPy dtypes, declared with the names and offsets of the format's own documents."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.core.errors import Corrupt

Field = tuple[int, str, str] | tuple[int, str, str, tuple[int, ...]]

INT64_MAX = np.iinfo(np.int64).max


def struct(size: int, fields: Sequence[Field]) -> np.dtype[np.void]:
    """A record of `size` bytes; only the fields that are used need to be declared.

    `fields` are rows (byte offset, name, NumPy type[, shape]), for example `(0x20, "s_mtime", "<u4")`.
    """
    return np.dtype(
        {
            "names": [field[1] for field in fields],
            "formats": [(field[2], field[3]) if len(field) == 4 else field[2] for field in fields],
            "offsets": [field[0] for field in fields],
            "itemsize": size,
        }
    )


def records(data: Bytes | bytes, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """`data` seen as records of `dtype`, without copying; the last axis of a uint8 array becomes the record.

    The last axis may be longer than one record only when `data` is one-dimensional: then as many as fit.
    """
    flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    if flat.ndim == 1:
        count = len(flat) // dtype.itemsize
        return np.frombuffer(np.ascontiguousarray(flat[: count * dtype.itemsize]), dtype)
    part = np.ascontiguousarray(flat[..., : dtype.itemsize])
    view: NDArray[np.void] = part.view(dtype)[..., 0]
    return view


def record(data: Bytes | bytes, dtype: np.dtype[np.void], offset: int = 0) -> np.void:
    """The single record at `offset` of `data`."""
    found: np.void = np.frombuffer(data, dtype, count=1, offset=offset)[0]
    return found


def widen(values: object, what: str) -> Int:
    """Numbers from a disk as int64; Corrupt where one does not fit, named `what` in the message.

    Every offset, length and id passes here before arithmetic:
    uint32 * 4096 wraps silently, uint64 + int64 is a float.
    """
    array = np.asarray(values)
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and int(array.max()) > INT64_MAX:
        raise Corrupt(f"{what} is {int(array.max()):#x}, more than any disk holds")
    return array.astype(np.int64)


def lo_hi(low: object, high: object, bits: int = 32) -> Int:
    """Join a field that the format splits in a low part of `bits` bits and a high part."""
    return widen(low, "low part") + (widen(high, "high part") << bits)
