"""Discs that are ISO 9660 volumes as well: which of the two trees is mapped, and what becomes of the other
one.

The tree that owns more bytes of files; ISO 9660 where both own the same, since Rock Ridge says more of a
file. What the other one alone owns is named.
"""

import numpy as np
import pyarrow as pa

from virt_bmap.core.arrays import subtract, total, union
from virt_bmap.core.errors import FormatError
from virt_bmap.core.reader import Reader
from virt_bmap.formats.filesystems import iso9660, udf
from virt_bmap.model import tables
from virt_bmap.model.contract import Filesystem
from virt_bmap.model.damage import Damage

NOBODYS = (tables.FREE, tables.UNREFERENCED)


def read(reader: Reader, damage: Damage, start: int = 0, state: int = 0) -> Filesystem:
    """The one of the two volumes that holds more, in the session that begins at byte `start`, which may have
    no UDF volume; `state` as in `read_alone`. Raises what ISO 9660's reader does."""
    if start and not udf.superblock.recognised(reader, start)[0]:
        return iso9660.read_session(reader, start, damage)
    of_udf, of_iso = Damage(), Damage()
    try:
        found = udf.read_alone(reader, of_udf, start, state)
    except FormatError as error:
        other = iso9660.read_session(reader, start, damage)
        damage.say("beside", f"the UDF volume beside it is not read: {error}")
        return other
    other = iso9660.read_session(reader, start, of_iso)
    has_more = _content(found) > _content(other)
    damage.take(of_udf if has_more else of_iso)
    return beside(found, other) if has_more else beside(other, found)


def _content(found: Filesystem) -> int:
    """Bytes of files."""
    mine = tables.codes(found.extents, "kind") == tables.DATA
    start = tables.integers(found.extents, "volume_offset")[mine]
    return total(start, start + tables.integers(found.extents, "length")[mine])


def beside(found: Filesystem, other: Filesystem) -> Filesystem:
    """The filesystem, with what the other one alone owns named instead of left unreferenced.

    Neither's allocator speaks for both: what is left is not free.
    """
    words = f"of the {'UDF' if other.type == udf.NAME else 'ISO 9660'} volume beside it"
    kind, start, length = (
        tables.codes(other.extents, "kind"),
        tables.integers(other.extents, "volume_offset"),
        tables.integers(other.extents, "length"),
    )
    plain = (tables.integers(other.extents, "flags") & tables.INLINE == 0) & ~np.isin(kind, NOBODYS)
    mine, inline = found.extents, tables.integers(found.extents, "flags") & tables.INLINE > 0
    own, low, high = (
        tables.codes(mine, "kind"),
        tables.integers(mine, "volume_offset"),
        tables.integers(mine, "volume_offset") + tables.integers(mine, "length"),
    )
    loose, others = np.isin(own, NOBODYS) & ~inline, np.isin(kind, NOBODYS)
    used = union(low[~loose & ~inline], high[~loose & ~inline])
    rows, taken = tables.ExtentRows(), used
    for name, which in (
        ("structures", ~np.isin(kind, (tables.DATA, tables.DIRECTORY))),
        ("directories", kind == tables.DIRECTORY),
        ("files", kind == tables.DATA),
    ):
        begin, end = subtract(*union(start[plain & which], (start + length)[plain & which]), *taken)
        rows.add(
            tables.CONTENT if name == "files" else tables.METADATA, begin, end - begin, part=f"{name} {words}"
        )
        taken = union(np.append(taken[0], begin), np.append(taken[1], end))
    begin, end = np.append(low[loose], start[others]), np.append(high[loose], (start + length)[others])
    begin, end = subtract(*union(begin, end), *taken)
    rows.add(tables.UNREFERENCED, begin, end - begin)
    found.size = max(found.size, other.size)
    found.extents = tables.concat("extents", [mine.filter(pa.array(~loose)), rows.table(0)])
    found.features = " ".join(
        filter(None, [found.features, "udf-bridge" if other.type == udf.NAME else "iso9660-bridge"])
    )
    return found
