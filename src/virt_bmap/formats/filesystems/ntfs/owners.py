"""Attributes to extents: which bytes of the volume each one owns, and what they are called.

Clusters beyond the end of what was ever written (initialized_size) are `unwritten`. A compressed attribute is
kept in units of 16 clusters: one that has all its clusters is stored as it is, one that has fewer is
compressed, one without any is a hole.
"""

from dataclasses import dataclass

import numpy as np

from virt_bmap.core.amounts import counted
from virt_bmap.core.arrays import Bool, Int, expand
from virt_bmap.core.columns import stack, take
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.contents import Contents
from virt_bmap.formats.filesystems.ntfs.extents import HOLE
from virt_bmap.formats.filesystems.ntfs.inodes import NameTree
from virt_bmap.formats.filesystems.ntfs.mft import Mft
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage
from virt_bmap.model.tables import ExtentRows

MAX_PARTS = 1024
"""Different names of streams and metadata in one map; a volume with more of them has the rest under one
name."""
MAX_UNIT = 16
"""log2 of the clusters in a compression unit; Windows uses 4."""
INDEX_NAME = b"$I30"
"""The index of a directory; other indexes are metadata."""


@dataclass
class Claims:
    """Rows of the table `extents` to be, one for each piece; `attribute` is the row of Contents it comes
    from."""

    attribute: Int
    kind: Int
    file_offset: Int
    file_length: Int
    volume_offset: Int
    length: Int
    flags: Int

    def take(self, keep: np.ndarray) -> "Claims":
        """The rows that a boolean or index array asks for."""
        return take(self, keep)


def claim(
    mft: Mft,
    tree: NameTree,
    contents: Contents,
    types: np.ndarray,
    size: int,
    rows: ExtentRows,
    damage: Damage,
) -> None:
    """Add to `rows` what every attribute owns, on a volume of `size` bytes."""
    kinds = kinds_of(mft, tree, contents, types)
    found = [clusters(contents, kinds), residents(mft, contents, kinds)]
    claims = stack(Claims, found)
    claims.length = np.clip(size - claims.volume_offset, 0, claims.length)
    claims.flags |= np.where(
        contents.attributes.flags[contents.head[claims.attribute]] & ntfs.ATTR_ENCRYPTED, tables.ENCRYPTED, 0
    )
    number, parts = parts_of(tree, contents, kinds)
    unnamed = int(number.max(initial=0)) - (MAX_PARTS - 1)
    if unnamed > 0:
        damage.say(
            "simplified",
            counted(
                unnamed,
                "[name of a stream is|names of streams are] more "
                "than a map keeps apart: [its|their] part is 'stream'",
            ),
        )
    number = np.minimum(number, MAX_PARTS)
    order = np.argsort(number[claims.attribute], kind="stable")
    claims = claims.take(order)
    bounds = np.searchsorted(number[claims.attribute], np.arange(min(len(parts), MAX_PARTS + 1) + 1))
    for part, low, high in zip(
        [None, *parts[1:MAX_PARTS], "stream"], bounds[:-1].tolist(), bounds[1:].tolist(), strict=False
    ):
        mine = claims.take(slice(low, high))  # type: ignore[arg-type]
        rows.add(
            mine.kind, mine.volume_offset, mine.length, part=part, inode=contents.owner[mine.attribute],
            file_offset=mine.file_offset, file_length=mine.file_length, flags=mine.flags,
        )  # fmt: skip


# ---- what they are -----------------------------------------------------------------------------------------


def kinds_of(mft: Mft, tree: NameTree, contents: Contents, types: np.ndarray) -> Int:
    """The code of tables.KINDS of every attribute."""
    kind, owner = contents.attributes.type, contents.owner
    result = np.full(len(kind), tables.METADATA, np.int64)
    result[kind == ntfs.DATA] = tables.DATA
    result[(kind == ntfs.DATA) & (types[owner] == tables.T_SYMLINK) & (contents.name == 0)] = tables.SYMLINK
    result[(kind == ntfs.EA) | (kind == ntfs.LOGGED_UTILITY_STREAM)] = tables.XATTR
    result[(kind == ntfs.REPARSE_POINT) & (types[owner] == tables.T_SYMLINK)] = tables.SYMLINK
    result[tree.metadata[owner]] = tables.METADATA
    result[_of_directory(mft, contents)] = tables.DIRECTORY
    result[kind == ntfs.ATTRIBUTE_LIST] = tables.TREE
    result[(owner == ntfs.BOOT) & (kind == ntfs.DATA)] = tables.BOOT
    return result


def _of_directory(mft: Mft, contents: Contents) -> Bool:
    number = contents.texts.index(INDEX_NAME) if INDEX_NAME in contents.texts else -1
    index = np.isin(contents.attributes.type, (ntfs.INDEX_ROOT, ntfs.INDEX_ALLOCATION, ntfs.BITMAP)) & (
        contents.name == number
    )
    result: Bool = index & mft.records.directory[contents.owner]
    return result


def parts_of(tree: NameTree, contents: Contents, kinds: Int) -> tuple[Int, list[str]]:
    """(a number for each attribute, the parts that the numbers stand for); number 0 is plain content, which
    has none."""
    kind, name = contents.attributes.type, contents.name
    own = tree.metadata[contents.owner]
    plain = ~own & (kind == ntfs.DATA) & (name == 0)
    plain |= (kinds == tables.DIRECTORY) & (kind != ntfs.BITMAP) | (kinds == tables.SYMLINK)
    special = np.flatnonzero(~plain)
    key = np.stack([np.where(own, contents.owner, -1)[special], kind[special], name[special]])
    distinct, number = np.unique(key, axis=1, return_inverse=True)
    names = _names_of(tree, distinct[0])
    words = [
        _part(names.get(owner, ""), kind, contents.texts[name])
        for owner, kind, name in distinct[:, : MAX_PARTS + 1].T.tolist()
    ]
    result = np.zeros(len(kind), np.int64)
    result[special] = number.reshape(-1) + 1
    return result, ["", *words]


def _names_of(tree: NameTree, wanted: Int) -> dict[int, str]:
    """What the filesystem's own files are called."""
    first = dict(enumerate(ntfs.SYSTEM_FILES))
    rows = np.flatnonzero(np.isin(tree.inode, wanted))[:MAX_PARTS]
    names = tree.name.take(rows).strings()
    return dict(zip(tree.inode[rows].tolist(), map(_text, names), strict=True)) | first


def _part(owner: str, kind: int, name: bytes) -> str:
    """`stream:NAME` of a file, `$Secure:$SDS` or `$MFT:$BITMAP` of the filesystem's own, else the attribute's
    name."""
    stream = kind in (ntfs.DATA, ntfs.INDEX_ROOT, ntfs.INDEX_ALLOCATION)
    word = "" if stream else ntfs.ATTR_NAMES.get(kind, f"attribute {kind:#x}")
    start = owner or ("stream" if kind == ntfs.DATA else "index" if stream else "")
    return ":".join(filter(None, (start, _text(name), word) if owner else (start, word, _text(name))))


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


# ---- where they are ----------------------------------------------------------------------------------------


def clusters(contents: Contents, kinds: Int) -> Claims:
    """What run lists own."""
    runs = contents.runs.take(contents.runs.lcn != HOLE)
    head = contents.head[runs.row]
    attributes = contents.attributes
    packed = (attributes.flags[head] & ntfs.ATTR_COMPRESSED != 0) & (attributes.compression_unit[head] > 0)
    packed &= attributes.compression_unit[head] <= MAX_UNIT
    size = contents.cluster_size
    plain = runs.take(~packed)
    kind = kinds[plain.row]
    with_place = np.isin(attributes.type[plain.row], (ntfs.DATA, ntfs.INDEX_ALLOCATION)) & (
        kind != tables.SYMLINK
    )
    result = Claims(
        plain.row, kind, np.where(with_place, plain.vcn * size, -1), plain.count * size, plain.lcn * size,
        plain.count * size, np.zeros(len(kind), np.int64),
    )  # fmt: skip
    result = written(contents, result)
    if not packed.any():
        return result
    other = compressed(contents, kinds, np.flatnonzero(packed), head)
    return stack(Claims, [result, other])


def written(contents: Contents, claims: Claims) -> Claims:
    """The claims with content cut where it was written up to: what follows is unwritten."""
    head = contents.head[claims.attribute]
    done, end = contents.attributes.initialized_size[head], contents.attributes.data_size[head]
    size = contents.cluster_size
    limit = np.where(done < end, done, -(-done // size) * size)
    known = (claims.kind == tables.DATA) & (contents.attributes.lowest_vcn[head] == 0)
    over = known & (claims.file_offset + claims.length > limit)
    if not over.any():
        return claims
    row, step = expand(np.where(over, 2, 1))
    result = claims.take(row)
    cut = np.clip(limit[row] - result.file_offset, 0, result.length)
    first, rest = over[row] & (step == 0), over[row] & (step == 1)
    shift = np.where(rest, cut, 0)
    result.length = np.where(first, cut, result.length - shift)
    result.file_length = result.length
    result.file_offset = result.file_offset + shift
    result.volume_offset = result.volume_offset + shift
    result.kind = np.where(rest, tables.UNWRITTEN, result.kind)
    return result.take(result.length > 0)


def compressed(contents: Contents, kinds: Int, packed: Int, heads: Int) -> Claims:
    """What compressed attributes own.

    Pieces of one compressed unit share its file_offset and file_length, in the order of the rows.
    """
    runs = contents.runs.take(contents.runs.lcn != HOLE)
    runs, head = runs.take(packed), heads[packed]
    unit = np.left_shift(1, contents.attributes.compression_unit[head])
    end = runs.vcn + runs.count
    first = np.minimum(-(-runs.vcn // unit) * unit, end)
    last = np.maximum(end // unit * unit, first)
    low = np.stack([runs.vcn, first, last], axis=1).reshape(-1)
    high = np.stack([first, last, end], axis=1).reshape(-1)
    row, keep = np.repeat(np.arange(len(head)), 3), high > low
    row, low, high = row[keep], low[keep], high[keep]
    lcn, unit, head, attribute = runs.lcn[row] + low - runs.vcn[row], unit[row], head[row], runs.row[row]
    start = low // unit * unit
    _, group = np.unique(np.stack([head, start]), axis=1, return_inverse=True)
    group = group.reshape(-1)
    have = np.bincount(group, weights=high - low).astype(np.int64)[group]
    whole = np.minimum(unit, contents.reach[head] - start)
    raw = have >= whole
    size = contents.cluster_size
    return Claims(
        attribute, kinds[attribute], np.where(raw, low, start) * size, np.where(raw, high - low, unit) * size,
        lcn * size, (high - low) * size, np.where(raw, 0, tables.COMPRESSED),
    )  # fmt: skip


def residents(mft: Mft, contents: Contents, kinds: Int) -> Claims:
    """Where resident values lie: in their record, but for the last two bytes of every 512, which are kept in
    its update sequence array."""
    attributes, size = contents.attributes, mft.system.size
    mine = np.flatnonzero((attributes.value >= 0) & (attributes.data_size > 0))
    start, number = attributes.value[mine].astype(np.int64), attributes.record[mine]
    end = np.minimum(start + attributes.data_size[mine], size)
    in_stride = start % ntfs.STRIDE + end - start <= ntfs.STRIDE - 2
    cut = np.flatnonzero(~in_stride)
    row, offset, place, length = _without_tails(
        start[cut], end[cut], mft.records.usa_ofs[number[cut]].astype(np.int64), size
    )
    whole = np.flatnonzero(in_stride)
    row, offset = np.append(whole, cut[row]), np.append(np.zeros(len(whole), np.int64), offset)
    place = np.append(start[whole], place) + number[row] * size
    length = np.append((end - start)[whole], length)
    query, inside, volume_offset, length = mft.stream.place(place, length)
    attribute = mine[row[query]]
    offset = offset[query] + inside - place[query]
    with_place = (attributes.type[attribute] == ntfs.DATA) & (kinds[attribute] != tables.SYMLINK)
    return Claims(
        attribute, kinds[attribute], np.where(with_place, offset, -1), length, volume_offset, length,
        np.full(len(query), tables.INLINE, np.int64),
    )  # fmt: skip


def _without_tails(start: Int, end: Int, usa: Int, size: int) -> tuple[Int, Int, Int, Int]:
    """(row, offset in it, place in its record, length) of what values [start, end) of records are in, whose
    update sequence array is at `usa`."""
    found = []
    for tail in range(ntfs.STRIDE - 2, size, ntfs.STRIDE):
        moved = usa + 2 + tail // ntfs.STRIDE * 2 - tail
        for low, high, away in ((tail + 2 - ntfs.STRIDE, tail, 0), (tail, tail + 2, moved)):
            from_, to = np.maximum(start, low), np.minimum(end, high)
            row = np.flatnonzero(to > from_)
            found.append(np.stack([row, (from_ - start)[row], (from_ + away)[row], (to - from_)[row]]))
    row, offset, place, length = np.concatenate(found, axis=1)
    return row, offset, place, length
