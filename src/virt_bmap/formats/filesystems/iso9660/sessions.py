"""Where the sessions of a disc begin, and which of them is shown.

Sources: as in `formats/common/sessions.py`; libburn and libisofs for what is kept at the start of a medium
that can be overwritten; growisofs(1) for where nothing is.
"""

import numpy as np

from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.reader import Reader
from virt_bmap.core.stored import held
from virt_bmap.formats.common import sessions
from virt_bmap.formats.filesystems.iso9660.superblock import FIRST_DESCRIPTOR, SECTOR
from virt_bmap.model.damage import Damage
from virt_bmap.model.problems import WARNING

STANDARD = b"CD001"
PRIMARY_VOLUME = np.frombuffer(b"\1CD001\1", np.uint8)
ROOT_AT = 158
"""Where a volume descriptor says at which block the root directory lies."""
DOT = 34
"""Bytes of a directory's record of itself, its first."""
ROOM = 32 * SECTOR
"""Where libburn's programs begin on media that can be overwritten: so the first session keeps descriptors of
its own when later ones are copied to the start."""


def wanted(reader: Reader) -> int:
    """The byte at which the session begins that is to be shown."""
    return sessions.begin(reader, sessions.asked(reader), lambda: starts(reader))


def say_others(reader: Reader, start: int, end: int, damage: Damage) -> None:
    """Say that there are others than the session at byte `start`, which ends at byte `end`: later ones, of
    which a drive shows the last, and those before the one that was copied to the start of the disc."""
    first = -(-end // SECTOR) * SECTOR
    later, _ = _sessions_in(reader, first, sessions.MAX_AFTER)
    damage.add("hidden", sessions.LATER, later, severity=WARNING)
    if start:
        return
    place, roots = _sessions_in(reader, 0, ROOM + FIRST_DESCRIPTOR + SECTOR)
    if place.tolist() == [0, ROOM] and roots[0] != roots[1]:
        words = "the files of earlier sessions are not shown, of which the first begins here: --session shows"
        damage.say("hidden", f"{words} them", ROOM)


def starts(reader: Reader) -> list[int | None]:
    """Where all sessions begin, in bytes, in the order in which they were written; None for the first one
    where others' descriptors took the place of its own."""
    found, roots = _sessions_in(reader, 0, reader.size)
    result: list[int | None] = list(found.tolist())
    if found[:1].tolist() == [0] and (roots[1:] == roots[0]).any():
        result[0] = None
        if result[1] == ROOM:
            del result[0]
    return result


def _sessions_in(reader: Reader, start: int, length: int) -> tuple[Int, Int]:
    """(first bytes, places of the root directories) of sessions whose primary descriptors lie in this range:
    the root, counted from the start of the disc, lies after them and says itself that it lies there. So an
    image that is a file of the disc, or was copied there, is none."""
    count = max(0, min(length, reader.size - start) // SECTOR)
    found = []
    for at, raw in held(reader, ints(start), ints(count * SECTOR), sessions.MAX_AFTER):
        skip = -at % SECTOR
        data = raw[skip : skip + (len(raw) - skip) // SECTOR * SECTOR].reshape(-1, SECTOR)
        rows = np.flatnonzero((data[:, :7] == PRIMARY_VOLUME).all(axis=1))
        root = data[rows, ROOT_AT : ROOT_AT + 4].copy().view("<u4")[:, 0].astype(np.int64)
        found.append(np.stack([start + at + skip + rows * SECTOR, root * SECTOR]))
    place, root = np.concatenate([np.zeros((2, 0), np.int64), *found], axis=1)
    good = (place >= FIRST_DESCRIPTOR) & (root > place) & (root + SECTOR <= reader.size)
    place, root = place[good], root[good]
    dot = reader.read_blocks(root, DOT)
    said = dot[:, 2:6].copy().view("<u4")[:, 0].astype(np.int64) * SECTOR
    before = reader.read_blocks(place - SECTOR + 1, len(STANDARD))
    is_first = ~(before == np.frombuffer(STANDARD, np.uint8)).all(axis=1)
    good = (said == root) & is_first
    return place[good] - FIRST_DESCRIPTOR, root[good]
