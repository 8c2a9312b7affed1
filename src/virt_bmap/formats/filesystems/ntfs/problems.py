"""Damage gathered by kind: one row for each kind, with how often it was seen and where first."""

import numpy as np

from virt_bmap.core.arrays import Int
from virt_bmap.model.contract import Problem


class Problems(list[Problem]):
    """The problems of one volume."""

    def add(self, code: str, what: str, offsets: Int, severity: str = "error") -> None:
        """`what` was seen at each of `offsets` (bytes of the volume); nothing where there are none."""
        if len(offsets):
            self.append(Problem(code, f"{len(offsets)} {what}", int(np.min(offsets)), severity))
