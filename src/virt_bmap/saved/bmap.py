"""The text map, in the format of the original virt-bmap (2014).

    1 541000 541400 d /dev/sda1 /lost+found

Number of the disk, first byte, byte after the last (hexadecimal), kind, device, path. Ranges are split where
owners change; a range has one line for each owner, the most specific first. Kinds that the original lacks
have letters of their own (`listing.LETTERS`). What has no path is written in brackets: `[superblock]`,
`[inode 12]`; a named stream of a file as `path:[stream]`. Names are escaped as `escape` says.
"""

from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from virt_bmap.core.arrays import Int, expand
from virt_bmap.core.escape import escape, escape_all
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap, Owners
from virt_bmap.model.listing import LETTERS, describe, specificity

BATCH = 1 << 18
"""Lines that are put together at a time."""


def save(bmap: BlockMap, file: BinaryIO) -> int:
    """Write the text map of every disk; the number of lines."""
    lines = 0
    for disk in range(1, len(bmap.disks) + 1):
        owners = bmap.disk_extents(disk)
        owners = owners.take(specificity(bmap, owners))
        bounds = np.unique(np.concatenate([owners.start, owners.end]))
        low, high = np.searchsorted(bounds, owners.start), np.searchsorted(bounds, owners.end)
        owner, step = expand(high - low)
        segment = low[owner] + step
        order = np.argsort(segment, kind="stable")
        owner, segment = owner[order], segment[order]
        for at in range(0, len(owner), BATCH):
            mine, place = np.unique(owner[at : at + BATCH], return_inverse=True)
            first, words = _words(bmap, disk, owners.take(mine))
            lines += _write(file, disk, bounds, place, segment[at : at + BATCH], first, words)
    return lines


def _words(bmap: BlockMap, disk: int, owners: Owners) -> tuple[Int, pa.Array]:
    """The end of the lines, kind, device and path: those of owner i are rows [first[i], first[i + 1])."""
    n = len(owners.query)
    listed = describe(bmap, disk, owners._replace(query=np.arange(n)))
    kind = listed.column("kind").combine_chunks()
    letter = pa.array([LETTERS[word] for word in kind.dictionary.to_pylist()]).take(kind.indices)
    device = listed.column("device").combine_chunks()
    device = pa.array([_word(name) for name in device.dictionary.to_pylist()]).take(device.indices)
    line = pc.binary_join_element_wise("", letter, device, names(listed), " ")
    line = pc.binary_join_element_wise(pc.utf8_rtrim(line, " "), "\n", "")
    return np.searchsorted(tables.integers(listed, "query"), np.arange(n + 1)), line


def _word(device: str) -> str:
    """A device name as one word of a line; array and group names come from the disk."""
    return escape(device.encode(errors="surrogateescape")).replace(" ", "\\x20")


def names(listed: pa.Table) -> pa.Array:
    """The last column of the text map for rows of a listing: the escaped path, or what stands for one; empty
    for volumes."""
    path = escape_all(listed.column("path").combine_chunks()).cast(pa.string())
    part = listed.column("part").combine_chunks()
    part = pa.array([escape(word.encode()) for word in part.dictionary.to_pylist()], pa.string()).take(
        part.indices
    )
    inode = listed.column("inode").combine_chunks().cast(pa.string())
    part = pc.binary_join_element_wise("[", part, "]", "")
    content = pc.is_in(
        listed.column("kind").combine_chunks().cast(pa.string()), pa.array(["data", "unwritten"])
    )
    stream = pc.if_else(content, pc.binary_join_element_wise(path, part, ":"), pa.scalar(None, pa.string()))
    return pc.coalesce(
        stream, path, part, pc.binary_join_element_wise("[inode ", inode, "]", ""), pa.scalar("")
    )


def _write(
    file: BinaryIO, disk: int, bounds: Int, owner: Int, segment: Int, first: Int, words: pa.Array
) -> int:
    row, step = expand(first[owner + 1] - first[owner])
    start, end = hexadecimal(bounds[segment[row]]), hexadecimal(bounds[segment[row] + 1])
    tail = words.take(pa.array(first[owner][row] + step))
    lines = pc.binary_join_element_wise(pc.binary_join_element_wise(str(disk), start, end, " "), tail, "")
    ends = np.frombuffer(lines.buffers()[1], np.int32)
    file.write(memoryview(lines.buffers()[2])[: ends[len(lines)]])
    return len(lines)


def hexadecimal(values: Int) -> pa.Array:
    """Numbers as lower-case hexadecimal text without leading zeroes, as a string array."""
    nibbles = (values[:, None] >> np.arange(60, -4, -4)) & 15
    text = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
    digits = np.maximum(1, 16 - (nibbles != 0).argmax(axis=1))
    digits[values == 0] = 1
    keep = np.arange(16) >= (16 - digits)[:, None]
    offsets = np.append(0, np.cumsum(digits)).astype(np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(text[keep].tobytes()))
