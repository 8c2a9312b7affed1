"""Text maps, read: those written by `bmap`, and those of the original virt-bmap.

A text map tells where bytes lie on a disk, not where in the volume or file. So the pieces of a partition or
logical volume are taken to follow each other in disk order, and files have no offsets.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import Int, union
from virt_bmap.core.errors import MapError
from virt_bmap.core.escape import unescape
from virt_bmap.core.mapping import Row, Rows
from virt_bmap.model import tables
from virt_bmap.model.blockmap import FILE, BlockMap
from virt_bmap.model.listing import NAMES_OF
from virt_bmap.model.tables import VOLUME_KINDS

LINE = (
    r"^(?P<disk>[0-9]{1,4}) (?P<start>[0-9a-f]{1,15}) (?P<end>[0-9a-f]{1,15}) (?P<kind>[a-z]) "
    r"(?P<device>/[^ ]+)(?: (?P<name>.*))?$"
)


HOLDING = np.zeros(len(tables.KINDS), np.int64)
"""By kind: what holds others' bytes, from what never does (0) to what is in nobody's."""
HOLDING[[tables.METADATA, tables.TREE]], HOLDING[tables.DIRECTORY] = 2, 1


@dataclass
class _MapLines:
    """The lines of a map as columns; `device` is a position in `devices`, `kind` a word of LETTERS."""

    disk: Int
    start: Int
    end: Int
    kind: np.ndarray
    device: Int
    devices: list[str]
    name: pa.Array


@dataclass
class _NamedVolume:
    disk: int
    kind: str
    name: str
    size: int
    rows: list[Row] = field(default_factory=list)


def load(data: bytes, source: str) -> BlockMap:
    """The block map that a text map describes.

    Raises MapError with the number of the first line that is not one.
    """
    lines = _parse(data, source)
    volumes = _volumes(lines)
    extents, inodes, paths = [], [], {}
    for number, volume in enumerate(volumes):
        mine = _of(lines, volume) & ~np.isin(lines.kind, VOLUME_KINDS)
        inode, paths[number] = _objects(lines, mine)
        extents.append(_extents(lines, np.flatnonzero(mine), number, volume, inode))
        inodes.append(
            tables.make(
                "inodes",
                volume=number,
                inode=paths[number][0],
                type=tables.T_UNKNOWN,
                size=0,
                nlink=1,
                flags=0,
            )
        )
    return BlockMap(
        volumes=tables.make("volumes", volume=list(range(len(volumes))), **{
            name: [getattr(volume, name) for volume in volumes] for name in ("disk", "kind", "name",
                "size")}),
        mappings=tables.mappings([Rows.of(volume.rows, number) for number,
                volume in enumerate(volumes) if volume.rows]),
        filesystems=tables.empty("filesystems"), inodes=tables.concat("inodes", inodes),
        names=tables.empty("names"), extents=tables.concat("extents", extents),
        problems=tables.empty("problems"), given_paths=paths,
    )  # fmt: skip


def _parse(data: bytes, source: str) -> _MapLines:
    try:
        lines = pa.array(data.decode().removesuffix("\n").split("\n"), pa.string())
    except UnicodeDecodeError as error:
        raise MapError(f"{source}: is not a block map: byte {error.start:#x} is not UTF-8") from error
    fields = pc.extract_regex(lines, LINE)
    known = pc.is_in(fields.field("kind"), pa.array(list(NAMES_OF))) if len(lines) else fields.is_valid()
    bad = np.flatnonzero(~pc.and_(fields.is_valid(), known).to_numpy(zero_copy_only=False))
    if len(bad):
        raise MapError(
            f"{source}: line {bad[0] + 1} is not a line of a block map: {lines[int(bad[0])].as_py()[:60]!r}"
        )
    start, end = (
        np.array([int(text, 16) for text in fields.field(key).to_pylist()], np.int64)
        for key in ("start", "end")
    )
    backward = np.flatnonzero(end <= start)
    if len(backward):
        raise MapError(
            f"{source}: line {backward[0] + 1}: the range ends at {end[backward[0]]:#x}, before it begins"
        )
    device = fields.field("device").dictionary_encode()
    words = np.array([NAMES_OF.get(chr(code), "") for code in range(128)])
    letters = np.frombuffer("".join(fields.field("kind").to_pylist()).encode(), np.uint8)
    return _MapLines(
        fields.field("disk").cast(pa.int64()).to_numpy(), start, end, words[letters],
        device.indices.to_numpy().astype(np.int64), device.dictionary.to_pylist(), fields.field("name"),
    )  # fmt: skip


def _volumes(lines: _MapLines) -> list[_NamedVolume]:
    """Disks (or the host's files) first, then by kind; a device of which only objects are listed is taken for
    a partition."""
    volumes: list[_NamedVolume] = []
    parent: dict[int, int] = {}
    top = FILE if (lines.kind == FILE).any() else "disk"
    for on in np.unique(lines.disk).tolist():
        mine = lines.disk == on
        names = lines.device[mine & (lines.kind == top)]
        parent[on] = len(volumes)
        volumes.append(
            _NamedVolume(
                on, top, lines.devices[names[0]] if len(names) else f"disk {on}", int(lines.end[mine].max())
            )
        )
    kind_of = dict.fromkeys(range(len(lines.devices)), "partition")
    for word in VOLUME_KINDS:
        kind_of |= dict.fromkeys(np.unique(lines.device[lines.kind == word]).tolist(), word)
    for code, kind in sorted(kind_of.items(), key=lambda item: VOLUME_KINDS.index(item[1])):
        if kind != top:
            volumes.append(_placed(lines, code, kind, parent))
    return volumes


def _placed(lines: _MapLines, code: int, kind: str, parent: dict[int, int]) -> _NamedVolume:
    """A volume whose pieces follow each other as they do on the disks."""
    mine = lines.device == code
    volume = _NamedVolume(int(lines.disk[mine][0]), kind, lines.devices[code], 0)
    for on, number in parent.items():
        for low, high in zip(
            *(
                side.tolist()
                for side in union(
                    lines.start[mine & (lines.disk == on)], lines.end[mine & (lines.disk == on)]
                )
            ),
            strict=True,
        ):
            volume.rows.append(Row(volume.size, number, low, high - low))
            volume.size += high - low
    return volume


def _of(lines: _MapLines, volume: _NamedVolume) -> np.ndarray:
    if volume.name not in lines.devices:
        return np.zeros(len(lines.disk), bool)
    mine: np.ndarray = lines.device == lines.devices.index(volume.name)
    return mine & (lines.disk == volume.disk) if not volume.rows else mine


def _objects(lines: _MapLines, mine: np.ndarray) -> tuple[Int, tuple[Int, pa.Array]]:
    """Numbers for what has a path: for each of the lines
    its number (-1: none), and the table (number, path)."""
    encoded = lines.name.filter(pa.array(mine)).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    words = encoded.dictionary.to_pylist()
    is_path = np.array([word.startswith("/") for word in words] + [False])
    numbers = np.flatnonzero(is_path[:-1])
    paths = pa.array([unescape(words[number]) for number in numbers.tolist()], pa.large_binary())
    return np.where(is_path[codes], codes, -1), (numbers, paths)


def _extents(lines: _MapLines, mine: Int, number: int, volume: _NamedVolume, inode: Int) -> pa.Table:
    start, length, at = lines.start[mine], lines.end[mine] - lines.start[mine], np.arange(len(mine))
    if volume.rows:
        rows = Rows.of(volume.rows, number)
        parts = [
            rows.take(rows.parent == parent).up(start, start + length)
            for parent in np.unique(rows.parent).tolist()
        ]
        at, start, length = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("query", "target", "length")
        )
    bracket = pc.extract_regex(lines.name.take(pa.array(mine[at])), r"^(?:\[|/.*:\[)(?P<part>.*)\]$").field(
        "part"
    )
    codes = np.array([tables.KINDS.index(word) for word in lines.kind[mine[at]]], np.int8)
    encoded = pc.if_else(pc.equal(bracket, ""), pa.scalar(None, pa.string()), bracket).dictionary_encode()
    words = pa.array(
        [unescape(word).decode(errors="backslashreplace") for word in encoded.dictionary.to_pylist()],
        pa.string(),
    )
    return tables.make(
        "extents", volume=number, inode=inode[at], kind=codes, volume_offset=start, length=length,
        flags=np.where(_inside(start, codes), tables.INLINE, 0),
        part=pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int16()), words),
    )  # fmt: skip


def _inside(start: Int, kind: np.ndarray) -> np.ndarray:
    """Which extents lie inside another one's block (a small file in its inode)? The map has a line for each
    owner of the same bytes: what is not the filesystem's own lies inside what is, and what is no directory in
    a directory."""
    rank = HOLDING[kind]
    order = np.lexsort((-rank, start))
    first = np.append(True, np.diff(start[order]) != 0)[: len(order)]
    most = np.empty(len(order), np.int64)
    most[order] = rank[order][first][np.cumsum(first) - 1]
    found: np.ndarray = (rank < most) & (most > 0)
    return found
