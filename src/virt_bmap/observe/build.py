"""A block map of what was observed: the volumes as they were read directly, the filesystems as a kernel
showed them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from virt_bmap.ask.hits import grouped_union
from virt_bmap.core.amounts import counted, plural
from virt_bmap.core.arrays import Int, complement, covered_twice, subtract, union
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.damage import Damage, table
from virt_bmap.observe.engine import Observed, joined, merged
from virt_bmap.observe.files import Listing
from virt_bmap.survey.survey import on_volume

Ranges = tuple[Int, Int]


@dataclass
class ObservedFilesystem:
    """What was observed of one filesystem: `directories` are (inode, ranges), `touched` what was read while
    it was mounted and listed."""

    volume: int
    device: str
    type: str
    uuid: str | None
    label: str | None
    block_size: int
    kernel: str
    listing: Listing
    files: list[Observed]
    directories: list[tuple[int, Ranges]]
    touched: Ranges


def block_map(bmap: BlockMap, observed: Sequence[ObservedFilesystem]) -> BlockMap:
    """The map with the filesystems of these volumes replaced by what was seen of them."""
    by_volume = {seen.volume: seen for seen in observed}
    fresh = {
        seen.volume: {
            "filesystems": _filesystem(bmap, seen), "inodes": seen.listing.inodes(),
            "names": seen.listing.names(),
            "extents": _extents(seen, bmap.size_of(seen.volume)),
            "problems": _problems(seen),
        }
        for seen in observed
    }  # fmt: skip

    def together(name: str) -> pa.Table:
        parts = []
        for volume in range(bmap.volumes.num_rows):
            if volume in fresh:
                parts.append(on_volume(fresh[volume][name], volume))
            elif name == "problems":
                parts.append(
                    bmap.problems.filter(pa.array(tables.integers(bmap.problems, "volume") == volume))
                )
            else:
                parts.append(bmap.slice_of(name, volume)[1])
        return tables.concat(name, parts)

    types = [
        by_volume[row].type if row in by_volume else old
        for row, old in enumerate(bmap.volumes.column("type").to_pylist())
    ]
    at = bmap.volumes.schema.get_field_index("type")
    volumes = bmap.volumes.set_column(at, bmap.volumes.schema.field("type"), pa.array(types, tables.TEXT))
    return replace(
        bmap,
        volumes=volumes,
        _cache={},
        **{name: together(name) for name in ("filesystems", "inodes", "names", "extents", "problems")},
    )


def _filesystem(bmap: BlockMap, seen: ObservedFilesystem) -> pa.Table:
    return tables.make(
        "filesystems", volume=0, type=[seen.type], uuid=[seen.uuid], label=[seen.label],
        block_size=max(1, seen.block_size), size=bmap.size_of(seen.volume),
        root=seen.listing.root, state=tables.OBSERVED,
    )  # fmt: skip


def _extents(seen: ObservedFilesystem, size: int) -> pa.Table:
    """Content by file, directories, what else was read, and the rest, of which nothing is known."""
    inode, columns = _content(seen.files)
    offset, place, length, file_length, flags = columns
    keep = (place >= 0) & (length > 0) & (place + length <= size)
    inode, (offset, place, length, file_length, flags) = inode[keep], columns[:, keep]
    rows = tables.ExtentRows()
    rows.add(
        tables.DATA,
        place,
        length,
        inode=inode,
        file_offset=offset,
        file_length=file_length,
        flags=flags | _shared(inode, place, length, flags),
    )
    blocks = (flags & tables.INLINE) == 0
    taken = union(place[blocks], (place + length)[blocks])
    for directory, ranges in seen.directories:
        low, high = subtract(*_inside(ranges, size), *taken)
        rows.add(tables.DIRECTORY, low, high - low, inode=directory)
        taken = union(np.append(taken[0], low), np.append(taken[1], high))
    read = [piece for file in seen.files for piece in file.read]
    low, high = merged([*read, *zip(seen.touched[0].tolist(), seen.touched[1].tolist(), strict=True)])
    packed = ~blocks  # what holds packed content was read, if not in this run, then in one before
    low, high = union(np.append(low, place[packed]), np.append(high, (place + length)[packed]))
    low, high = subtract(*_inside((low, high), size), *taken)
    rows.add(tables.METADATA, low, high - low, part="read on the way")
    low, high = complement(np.append(taken[0], low), np.append(taken[1], high), 0, size)
    rows.add(tables.UNKNOWN, low, high - low, part="not observed")
    return rows.table(0)


def _content(files: Sequence[Observed]) -> tuple[Int, Int]:
    """(inode of each row, the five columns of `Observed.rows` as an array (5, n)) of all files."""
    tables_ = [joined(file.rows) for file in files]
    inode = np.repeat(np.array([file.inode for file in files], np.int64), [len(table) for table in tables_])
    return inode, np.concatenate([*tables_, np.zeros((0, 5), np.int64)]).T


def _shared(inode: Int, place: Int, length: Int, flags: Int) -> Int:
    """The flag of rows whose bytes were seen in several files, or several times in one."""
    own = (flags & tables.INLINE) == 0
    _, group = np.unique(inode, return_inverse=True)
    _, low, high = grouped_union(group[own], place[own], (place + length)[own])
    twice = covered_twice(low, high)
    at = np.minimum(np.searchsorted(twice[1], place, "right"), max(0, len(twice[0]) - 1))
    hit = (
        own & (twice[0][at] < place + length) & (twice[1][at] > place)
        if len(twice[0])
        else np.zeros(len(place), bool)
    )
    return np.where(hit, tables.SHARED, 0)


def _inside(ranges: Ranges, size: int) -> Ranges:
    return union(np.clip(ranges[0], 0, size), np.clip(ranges[1], 0, size))


def _problems(seen: ObservedFilesystem) -> pa.Table:
    """That this was observed, by whom, and what could not be."""
    damage = Damage("observe")
    unknown = "where no content was read from, the owner is not known"
    damage.say("observed", f"mapped by reading its files through {seen.kernel}; {unknown}")
    failed = [file for file in seen.files if file.failed]
    if failed:
        words = counted(len(failed), "[file could not be read to its|files could not be read to their] end")
        damage.say("unreadable", f"{words}; inode {failed[0].inode}: {failed[0].failed}")
    left = [file for file in seen.files if file.left]
    if left:
        size = sum(end - start for file in left for start, end in file.left)
        what = (
            f"{plural(size, 'byte')} of {plural(len(left), 'file')} came without a read that holds them "
            f"(packed with metadata, or cached); first: inode {left[0].inode}"
        )
        damage.say("not-seen", what)
    for reason, (count, path) in seen.listing.left.items():
        words = counted(count, "[name is|names are] missing")
        damage.say("not-listed", f"{words}: {reason}; first: {path}")
    return table([(0, damage)])
