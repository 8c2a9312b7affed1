"""Discs that were written in sessions: which one is shown.

Every session has descriptors of its own, and a tree that shows what it leaves of the sessions before it; all
count blocks from the start of the disc. A drive's table of contents, which says where they begin, no image
has: they are found by their descriptors. Where a medium can be overwritten, those of the newest session are
copied to the start of the disc; what stood there before is lost, unless room was left for it.

Sources: ECMA-119 6.2; OSTA UDF 2.60, 6.10.3; Linux fs/isofs/inode.c (sbsector=), fs/udf/super.c (session=);
libisoburn doc/ (emulated tables of contents).
"""

from collections.abc import Callable, Sequence

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.layers import layers
from virt_bmap.core.reader import DiscSession, Reader

SECTOR = 2048
MAX_AFTER = 64 << 20
"""Bytes after a volume that are searched for later sessions: what stands between two is some 20 MiB."""
SHOWN, OLDER = "session@", "vat@"
"""Features of a filesystem: the sector at which the session begins that a map shows, where that is not the
start of the disc; and where the virtual allocation table lies by which it is, where that may be an older
one."""
LATER = "later [session begins|sessions begin] after this volume; --session shows [its|their] files"
"""What is said of sessions that are not shown."""


def asked(reader: Reader) -> DiscSession | None:
    """The session that the user wants to see of this volume; None: what lies at its start."""
    return next((one.session for one in layers(reader) if one.session), None)


def begin(reader: Reader, wanted: DiscSession | None, find: Callable[[], Sequence[int | None]]) -> int:
    """The byte at which the wanted session begins; `find` gives those of all, by their numbers, None of one
    whose descriptors are overwritten. Raises UsageError where there is no such session."""
    if wanted is None:
        return 0
    if wanted.sector is not None:
        if wanted.sector * SECTOR >= reader.size:
            raise UsageError(
                f"{reader.name}: no session begins at sector {wanted.sector}: it ends at sector "
                f"{reader.size // SECTOR}"
            )
        return wanted.sector * SECTOR
    found = find() or [0]
    if wanted.number > len(found):
        raise UsageError(f"{reader.name}: there is no session {wanted.number}: it has {_those(found)}")
    start = found[wanted.number - 1]
    if start is None:
        raise UsageError(
            f"{reader.name}: the descriptors of session {wanted.number} were overwritten by those of a later "
            f"one: it has {_those(found)}"
        )
    return start


def _those(found: Sequence[int | None]) -> str:
    known = [
        f"{number} at sector {start // SECTOR}" for number, start in enumerate(found, 1) if start is not None
    ]
    return f"{plural(len(found), 'session')} ({', '.join(known)})" if known else "none"


def feature(start: int) -> list[str]:
    """What a map has to say of the session that it shows."""
    return [f"{SHOWN}{start // SECTOR}"] if start else []


def sector_of(features: str | None) -> int:
    """The sector at which the session begins that a map with these features shows."""
    return next((int(word[len(SHOWN) :]) for word in (features or "").split() if word.startswith(SHOWN)), 0)
