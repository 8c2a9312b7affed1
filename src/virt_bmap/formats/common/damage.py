"""What is wrong on the volume, added up: one row of `problems` for each kind of damage, however often it
occurs."""

import numpy as np

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.model.contract import Problem


class Damage:
    """Collects findings by code. `offset` is in bytes of the volume, -1 where there is no one place."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str, int, int]] = {}

    def add(self, code: str, text: str, offset: int = -1, count: int = 1, severity: str = "error") -> None:
        """`count` times `text`, a phrase that can follow a number; the first call with a code gives text and
        offset."""
        text, severity, before, offset = self._found.get(code, (text, severity, 0, offset))
        self._found[code] = text, severity, before + count, offset

    def check(self, good: Bool, code: str, text: str, offsets: Int, severity: str = "error") -> Bool:
        """Where `good` is False something is wrong at `offsets` (bytes). Returns `good`, to filter with."""
        bad = np.flatnonzero(~good)
        if len(bad):
            self.add(code, text, int(offsets[bad].min()), len(bad), severity)
        return good

    def problems(self) -> list[Problem]:
        """One Problem for each code."""
        return [
            Problem(
                code,
                f"{count} {text}" + (f", the first at byte {offset:#x}" if offset >= 0 else ""),
                offset,
                severity,
            )
            for code, (text, severity, count, offset) in self._found.items()
        ]
