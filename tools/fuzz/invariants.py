"""What holds for every map, whatever it was made of: the contract of its tables, the tiling of its volumes,
rows inside what they are in."""

import numpy as np

from virt_bmap.ask.check import Checked
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap

NEVER = ("untiled", "outside", "inline-outside")
"""What `check` must not say of any map that was just made: the map is wrong, not the disk."""


class Broken(Exception):
    """An invariant does not hold. The message has no numbers, so that the same fault is told once."""


def assert_sound(bmap: BlockMap, report: Checked) -> None:
    """Raises Broken."""
    for name in bmap.TABLES:
        try:
            tables.check(name, getattr(bmap, name))
        except ValueError as error:
            raise Broken(
                f"tables.check {name}: "
                + "".join(c for c in str(error).partition(" instead of ")[0][:160] if not c.isdigit())
            ) from error
    said = set(bmap.problems.column("detail").to_pylist())  # by a reader, of the disk
    for found in report.disagreements:
        if found.code in NEVER and found.detail not in said:
            raise Broken(f"check says {found.code} of {bmap.volumes.column('type')[found.volume].as_py()}")
    sizes = tables.integers(bmap.volumes, "size")
    _extents_inside(bmap, sizes)
    _rows_inside(bmap, sizes)
    for total in report.totals:
        owned = sum(total.by_kind.values()) + total.children
        if owned < total.size:
            raise Broken("fewer bytes are owned than a volume has")


def _extents_inside(bmap: BlockMap, sizes: np.ndarray) -> None:
    volume, at, length = (
        tables.integers(bmap.extents, name) for name in ("volume", "volume_offset", "length")
    )
    if (length <= 0).any():
        raise Broken(
            "an extent of no length: "
            f"{tables.KINDS[int(tables.codes(bmap.extents, 'kind')[np.argmax(length <= 0)])]}"
        )
    if (at < 0).any() or (at > sizes[volume] - length).any():
        raise Broken("an extent outside its volume")


def _rows_inside(bmap: BlockMap, sizes: np.ndarray) -> None:
    rows = bmap.mappings
    volume, parent, run, count = (
        tables.integers(rows, name) for name in ("volume", "parent", "run", "count")
    )
    if (run <= 0).any() or (count <= 0).any():
        raise Broken("a mapping row of no length")
    if (volume <= parent).any():
        raise Broken("a volume before its parent")
    for side, size, piece in (
        ("volume", sizes[volume], run),
        ("parent", sizes[parent], tables.integers(rows, "parent_run")),
    ):
        start, step = tables.integers(rows, f"{side}_offset"), tables.integers(rows, f"{side}_step")
        ends = (
            a + (n - 1) * s + p
            for a, n, s, p in zip(*(each.tolist() for each in (start, count, step, piece)), strict=True)
        )
        if (start < 0).any() or any(end > most for end, most in zip(ends, size.tolist(), strict=True)):
            raise Broken(f"a mapping row outside its {side}")


def assert_answered(bmap: BlockMap, disk: int, starts: np.ndarray, ends: np.ndarray) -> None:
    """Every byte that is asked for has an owner."""
    owners = bmap.owners(disk, starts, ends)
    if len(set(owners.query.tolist())) < len(starts):
        raise Broken("a lookup without an answer")
