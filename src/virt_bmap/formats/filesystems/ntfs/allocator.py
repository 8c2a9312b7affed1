"""What the volume says about itself: name, version, whether it was left in order; and which clusters its
allocator calls free.

Sources: ntfs-3g libntfs-3g/logfile.c ntfs_is_logfile_clean(), volume.c ntfs_volume_check_hiberfile(),
ntfs_volume_get_free_space().
"""

import numpy as np

from virt_bmap.core.amounts import plural
from virt_bmap.core.arrays import Int, ints
from virt_bmap.core.layout import record
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.bitmaps import bitmap_runs
from virt_bmap.formats.filesystems.ntfs import journal
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.contents import Contents
from virt_bmap.formats.filesystems.ntfs.inodes import NameTree
from virt_bmap.formats.filesystems.ntfs.mft import Mft, read_stream, resident_value
from virt_bmap.formats.filesystems.ntfs.superblock import Geometry
from virt_bmap.model import tables
from virt_bmap.model.damage import Damage

HIBERNATED = (b"hibr", b"HIBR")
"""First bytes of hiberfil.sys while Windows sleeps in it; after waking they are others."""


def label(mft: Mft) -> str | None:
    """The volume's name; what UTF-8 can't hold is escaped."""
    name = resident_value(mft.system, ntfs.VOLUME, ntfs.VOLUME_NAME)
    return name[: len(name) & ~1].decode("utf-16-le", errors="backslashreplace") or None


def state(
    reader: Reader, geometry: Geometry, mft: Mft, contents: Contents, damage: Damage, asleep: bool
) -> tuple[str, str]:
    """(how the volume was left, its version and notable features)."""
    value = resident_value(mft.system, ntfs.VOLUME, ntfs.VOLUME_INFORMATION)
    features = []
    dirty = False
    if len(value) < ntfs.VOLUME_INFORMATION_VALUE.itemsize:
        damage.say("inode", "the record of $Volume lacks its $VOLUME_INFORMATION")
    else:
        about = record(value, ntfs.VOLUME_INFORMATION_VALUE)
        features.append(f"ntfs{about['major_ver']}.{about['minor_ver']}")
        dirty = bool(about["flags"] & ntfs.VOLUME_IS_DIRTY)
    if asleep:
        return tables.HIBERNATED, " ".join(features)
    if not log_is_clean(contents.read(reader, ntfs.LOGFILE, ntfs.DATA, 2 * ntfs.RESTART_PAGE_SIZE)):
        _say_what_waits(contents.read(reader, ntfs.LOGFILE, ntfs.DATA, journal.MOST), geometry, damage)
        return tables.NEEDS_RECOVERY, " ".join(features)
    return tables.IN_USE if dirty else tables.CLEAN, " ".join(features)


def _say_what_waits(log: bytes, geometry: Geometry, damage: Damage) -> None:
    """The map is of the volume as it is; what may be otherwise once the log is replayed."""
    found = journal.pending(log, geometry)
    words = "its $LogFile is not replayed"
    if found is None:
        damage.say("not-replayed", f"{words}: what changed last may be missing from the map")
    elif found.changes:
        what = f"{plural(found.changes, 'change')} in it to {plural(found.records, 'record')} of the $MFT"
        damage.say("not-replayed", f"{words}: {what}, and to directories and bitmaps, may not be in place")


def hibernated(reader: Reader, tree: NameTree, contents: Contents) -> bool:
    """Does Windows sleep in this volume, or wait for a fast start-up?"""
    rows = np.flatnonzero(tree.parent == ntfs.ROOT)
    hit = rows[tree.name.take(rows).lower().equal(b"hiberfil.sys")]
    return any(contents.read(reader, int(inode), ntfs.DATA, 4) in HIBERNATED for inode in tree.inode[hit[:1]])


def log_is_clean(pages: bytes) -> bool:
    """Was the journal closed? `pages` are its two restart pages, of which the later one counts; an empty log
    is clean."""
    areas = []
    for start in (0, ntfs.RESTART_PAGE_SIZE):
        page = pages[start : start + ntfs.RESTART_PAGE_SIZE]
        if len(page) < ntfs.RESTART_PAGE_SIZE or page[:4] != b"RSTR":
            continue
        at = int(record(page, ntfs.RESTART_PAGE)["restart_area_offset"])
        if at + ntfs.RESTART_AREA.itemsize <= ntfs.STRIDE:
            areas.append(record(page, ntfs.RESTART_AREA, at))
    if not areas:
        return not pages or pages[:4] != b"RCRD"
    last = max(areas, key=lambda area: int(area["current_lsn"]))
    return bool(
        last["client_in_use_list"] == ntfs.LOGFILE_NO_CLIENT or last["flags"] & ntfs.RESTART_VOLUME_IS_CLEAN
    )


# ---- bitmaps -----------------------------------------------------------------------------------------------


def free_space(reader: Reader, geometry: Geometry, contents: Contents, damage: Damage) -> tuple[Int, Int]:
    """(offset, length) in bytes of the clusters that $Bitmap calls free, sorted."""
    stream, _ = contents.stream(reader, ntfs.BITMAP_FILE, ntfs.DATA)
    size = -(-geometry.clusters // 8)
    known = min(size, stream.contiguous(0))
    if known < size:
        damage.say("allocator", f"only {known:,} of the {size:,} bytes of $Bitmap can be read")
    place, length = stream.place(ints(0), ints(known))[2:]
    low, high = bitmap_runs(reader, place, length, geometry.clusters, False)
    inside = reader.size
    low, high = low * geometry.cluster_size, np.minimum(high * geometry.cluster_size, inside)
    return low, np.maximum(high - low, 0)


def check_records(reader: Reader, mft: Mft, contents: Contents, damage: Damage) -> None:
    """Report records that break the rules, or that the $MFT's own bitmap calls used although they can't be
    read."""
    records, size = mft.records, mft.system.size
    numbers = np.arange(len(mft))
    damage.add(
        "inode",
        "[record is|records are] in use, but an attribute breaks the rules",
        _places(mft, numbers[records.damaged & records.in_use]),
    )
    stream, length = contents.stream(reader, ntfs.MFT, ntfs.BITMAP)
    known = min(stream.contiguous(0), length, -(-len(mft) // 8))
    bits = np.unpackbits(read_stream(reader, stream, 0, known), bitorder="little")[: len(mft)].astype(bool)
    used = np.zeros(len(mft), bool)
    used[: len(bits)] = bits
    lost = numbers[(used | records.torn) & ~records.usable]
    damage.add(
        "inode",
        f"[record|records] of {size:,} bytes [is|are] in use, "
        "but [has|have] no signature or a wrong update sequence",
        _places(mft, lost),
    )


def _places(mft: Mft, number: Int) -> Int:
    return mft.stream.place(number * mft.system.size, np.ones(len(number), np.int64))[2]
