"""Records of columns: named tuples, or dataclasses, whose fields are arrays of one length, or columns of
another kind with a `take` of their own (ragged ones)."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def stack(kind: type[T], parts: Sequence[T]) -> T:
    """The rows of all parts, one after the other; of no parts, columns of int64 without rows."""
    none = [np.zeros(0, np.int64)]
    return kind(*(np.concatenate([getattr(part, name) for part in parts] or none) for name in _names(kind)))


def take(columns: T, keep: Any) -> T:
    """The rows that a boolean array, an index array or a slice asks for."""
    found = (getattr(columns, name) for name in _names(type(columns)))
    return type(columns)(
        *(column[keep] if isinstance(column, np.ndarray) else column.take(keep) for column in found)
    )


def _names(kind: type) -> tuple[str, ...]:
    found: tuple[str, ...] = kind.__match_args__  # type: ignore[attr-defined]
    return found
