"""Two profiles: what the second needed that the first did not, and the other way round; what came earlier or
later, and what more or less was read of."""

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.profile.saved import Profile
from virt_bmap.accesses.profile.summary import files
from virt_bmap.core.arrays import Int
from virt_bmap.saved.results import field

EARLIER = 0.05
"""A file moved when its place in the order of first use did by more than this share of all files: boots are
never quite alike, and neither are clocks."""
CHANGES = ("new", "gone", "more", "less", "earlier", "later")
COMPARED = pa.schema([
    field("change", pa.large_string(), f"{', '.join(CHANGES)}: what the second "
        "profile is, compared with the first"),
    field("bytes", pa.int64(), "bytes needed more (or, negative, less) than in the first", "bytes"),
    field("needed_before", pa.int64(), "bytes needed in the first, each counted once", "bytes",
        null="not in it"),
    field("needed_after", pa.int64(), "bytes needed in the second", "bytes", null="not in it"),
    field("place_before", pa.int64(), "place in the first's order of first use, from 1", "count",
        null="not in it"),
    field("place_after", pa.int64(), "place in the second's", "count", null="not in it"),
    field("first_s_before", pa.float64(), "seconds to the first use in the first", null="not in it"),
    field("first_s_after", pa.float64(), "seconds to the first use in the second", null="not in it"),
    field("kind", pa.large_string(), "kind of the object"),
    field("device", pa.large_string(), "the volume it lies on"),
    field("name", pa.large_string(), "path, or name of the metadata, escaped"),
])  # fmt: skip


def compare(before: Profile, after: Profile) -> pa.Table:
    """A row for each object that changed, by CHANGES, the largest first.

    An object that is needed differently and moved has two rows.
    """
    old, new = files(before), files(after)
    a, b = _matched(old, new)
    only_old, only_new = (np.setdiff1d(np.arange(len(table)), rows) for table, rows in ((old, a), (new, b)))
    grown = _column(new, "needed")[b] - _column(old, "needed")[a]
    moved = _places(b) - _places(a)
    far = max(1, int(EARLIER * max(len(old), len(new))))
    none = np.full
    parts = [
        (none(len(only_new), -1), only_new, "new"), (only_old, none(len(only_old), -1), "gone"),
        (a[grown > 0], b[grown > 0], "more"), (a[grown < 0], b[grown < 0], "less"),
        (a[moved < -far], b[moved < -far], "earlier"), (a[moved > far], b[moved > far], "later"),
    ]  # fmt: skip
    return pa.concat_tables([_rows(old, new, left, right, change) for left, right, change in parts])


def _matched(old: pa.Table, new: pa.Table) -> tuple[Int, Int]:
    """Rows of both that are the same object."""
    keys = ["kind", "device", "name"]
    left, right = (
        table.select(keys).append_column("row", pa.array(np.arange(len(table)))) for table in (old, new)
    )
    pairs = left.join(right, keys, join_type="inner", left_suffix="", right_suffix="_new")
    a, b = (pairs.column(name).to_numpy().astype(np.int64) for name in ("row", "row_new"))
    order = np.argsort(a)
    return a[order], b[order]


def _places(rows: Int) -> Int:
    """The order of first use among the objects that both have:
    what is new must not move all that comes after it."""
    places: Int = np.argsort(np.argsort(rows))
    return places


def _column(table: pa.Table, name: str) -> Int:
    values: Int = table.column(name).to_numpy()
    return values


def _rows(old: pa.Table, new: pa.Table, left: Int, right: Int, change: str) -> pa.Table:
    def of(table: pa.Table, rows: Int) -> pa.Table:
        return table.take(pa.array(rows, mask=rows < 0, type=pa.int64()))

    before, after = of(old, left), of(new, right)
    named = after if change == "new" else before
    needed = [column.column("needed").fill_null(0).to_numpy() for column in (before, after)]
    table = pa.table([
        pa.repeat(pa.scalar(change, pa.large_string()), len(left)), pa.array(needed[1] - needed[0]),
        before.column("needed"), after.column("needed"), pa.array(left + 1, mask=left < 0),
        pa.array(right + 1, mask=right < 0), before.column("first_s"), after.column("first_s"),
        named.column("kind"), named.column("device"), named.column("name"),
    ], schema=COMPARED)  # fmt: skip
    by = np.abs(needed[1] - needed[0]) if change in ("new", "gone", "more", "less") else np.abs(left - right)
    return table.take(pa.array(np.argsort(-by, kind="stable")))
