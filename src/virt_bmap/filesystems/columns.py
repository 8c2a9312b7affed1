"""Tables as dataclasses whose fields are int64 arrays of one length."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def stack(kind: type[T], parts: Sequence[T]) -> T:
    """The rows of all parts, one after the other."""
    none = np.zeros(0, np.int64)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(*(np.concatenate([none, *(getattr(part, name) for part in parts)]) for name in names))


def take(columns: T, keep: Any) -> T:
    """The rows that a boolean array, an index array or a slice asks for."""
    names = [field.name for field in fields(columns)]  # type: ignore[arg-type]
    return type(columns)(*(getattr(columns, name)[keep] for name in names))
