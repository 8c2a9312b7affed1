"""Damage as rows: one problem for each kind of damage, however many records have it."""

import numpy as np

from virt_bmap.core.arrays import Bool, Int
from virt_bmap.model.contract import Problem

Problems = list[Problem]


def complain(problems: Problems, code: str, what: str, offsets: Int, severity: str = "error") -> None:
    """Add one problem for all these places (bytes of the volume), if there are any; `what` follows the
    count."""
    if len(offsets):
        first = int(np.min(offsets))
        where = f", the first at byte {first:#x}" if first >= 0 else ""
        problems.append(Problem(code, f"{len(offsets)} {what}{where}", first, severity))


def complain_where(
    problems: Problems, code: str, what: str, bad: Bool, offsets: Int, severity: str = "error"
) -> None:
    """Like `complain`, for those of `offsets` where `bad` is set."""
    if bad.any():
        complain(problems, code, what, offsets[bad], severity)
