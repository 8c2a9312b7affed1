"""$LogFile: how much it holds that may not be in place.

It is not replayed: which of its changes reached the disk only its own tables of dirty pages say, and their
layout differs from Windows to Windows. It is counted: what changed since the oldest record that a restart
would look at, and how many records of the $MFT that concerns.

A record's LSN says where in the log it lies. So records are found wherever their LSN fits their place, all
pages at once; what is left of an older round of the log does not fit, or is older than what counts.

Sources: ntfs-3g include/ntfs-3g/logfile.h, ntfsprogs/ntfsrecover.c; fs/ntfs3/fslog.c (v6.12).
"""

from typing import NamedTuple

import numpy as np

from virt_bmap.core.arrays import Bytes
from virt_bmap.core.layout import record, records, struct
from virt_bmap.formats.filesystems.ntfs import ondisk as ntfs
from virt_bmap.formats.filesystems.ntfs.records import put_back
from virt_bmap.formats.filesystems.ntfs.superblock import Geometry

MOST = 256 << 20
"""Bytes of the log that are looked at: Windows makes it 64 MiB unless it is told otherwise."""
RESTART = struct(0x30, [
    (0x00, "current_lsn", "<u8"), (0x0C, "client_in_use_list", "<u2"), (0x10, "seq_number_bits", "<u4"),
    (0x16, "client_array_offset", "<u2"), (0x26, "log_page_data_offset", "<u2"),
])  # fmt: skip
CLIENT = struct(0xA0, [(0x00, "oldest_lsn", "<u8"), (0x08, "client_restart_lsn", "<u8")])
PAGE_SIZES = 0x10
"""In a restart page: system_page_size and log_page_size."""
PAGE = struct(0x28, [(0x04, "usa_ofs", "<u2"), (0x06, "usa_count", "<u2"), (0x08, "copy", "<u8")])
"""`copy`: where a page belongs that is kept at the start of the log until it is full."""
RECORD = struct(0x58, [
    (0x00, "this_lsn", "<u8"), (0x18, "client_data_length", "<u4"), (0x20, "record_type", "<u4"),
    (0x30, "redo_operation", "<u2"), (0x44, "cluster_index", "<u2"), (0x48, "target_vcn", "<u4"),
])  # fmt: skip
HEADER_SIZE = 0x30
"""What of a record never lies in two pages."""
UPDATE = 1
CHANGES = np.array([*range(0x02, 0x17), 0x25, 0x26])
"""Operations that change metadata; others are of transactions and of checkpoints."""
OF_RECORDS = np.array([0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x09, 0x0B, 0x0C, 0x0D, 0x11, 0x13])
"""Those of them whose place is a record of the $MFT."""


class Pending(NamedTuple):
    """Changes that may not be in place, and the records of the $MFT among what they change."""

    changes: int
    records: int


def pending(log: bytes, geometry: Geometry) -> Pending | None:
    """What a log may still have to do; None where it does not say."""
    found = _restart(log)
    if found is None:
        return None
    oldest, bits, size, first = found
    pages = np.frombuffer(log, np.uint8)[: len(log) // size * size].reshape(-1, size)
    number = np.flatnonzero(pages[:, :4].copy().view("S4")[:, 0] == b"RCRD")
    pages, own = _without_fixups(pages[number]), number * size
    copy = records(pages[:, : PAGE.itemsize].copy(), PAGE)["copy"]
    step = np.arange(0, size - HEADER_SIZE + 1, 8, dtype=np.uint64)
    words = pages.view("<u8")[:, : len(step)]
    place = (words & np.uint64((1 << bits) - 1)) << np.uint64(3)
    fits = (place == (own[:, None] + step).astype(np.uint64)) | (
        place == copy[:, None] + step.astype(np.uint64)
    )
    page, at = np.nonzero(fits & (words >= oldest))
    column = 8 * at[:, None] + np.arange(RECORD.itemsize)
    behind = column >= size  # goes on in the next page
    row = np.minimum(page[:, None] + behind, len(pages) - 1)
    heads = records(pages[row, np.where(behind, column - size + first, column)], RECORD)
    heads = heads[np.unique(heads["this_lsn"], return_index=True)[1]]
    heads = heads[(heads["record_type"] == UPDATE) & np.isin(heads["redo_operation"], CHANGES)]
    mine = heads[np.isin(heads["redo_operation"], OF_RECORDS)]
    place = mine["target_vcn"].astype(np.int64) * geometry.cluster_size
    place += mine["cluster_index"].astype(np.int64) * ntfs.STRIDE
    return Pending(len(heads), len(np.unique(place // geometry.record_size)))


def _restart(log: bytes) -> tuple[int, int, int, int] | None:
    """(oldest LSN that counts, bits of an LSN that are its place, size of a page, first byte of records in
    it) by the later restart page."""
    found = []
    for start in (0, ntfs.RESTART_PAGE_SIZE):
        page = log[start : start + ntfs.RESTART_PAGE_SIZE]
        if len(page) < ntfs.RESTART_PAGE_SIZE or page[:4] != b"RSTR":
            continue
        at = int(record(page, ntfs.RESTART_PAGE)["restart_area_offset"])
        size = int.from_bytes(page[PAGE_SIZES + 4 : PAGE_SIZES + 8], "little")
        if at + RESTART.itemsize > len(page) or size not in (1 << bit for bit in range(9, 17)):
            continue
        area = record(page, RESTART, at)
        bits = 64 - int(area["seq_number_bits"])
        client = at + int(area["client_array_offset"])
        first = int(area["log_page_data_offset"])
        if 9 <= bits <= 60 and client + CLIENT.itemsize <= len(page) and first <= ntfs.STRIDE:
            oldest = record(page, CLIENT, client)
            lsn = min(int(oldest["oldest_lsn"]), int(oldest["client_restart_lsn"]))
            found.append((int(area["current_lsn"]), (lsn, bits, size, first)))
    return max(found)[1] if found else None


def _without_fixups(pages: Bytes) -> Bytes:
    """Pages with the last two bytes of every 512 put back."""
    pages = pages.copy()
    heads = records(pages[:, : PAGE.itemsize].copy(), PAGE)
    strides = pages.shape[1] // ntfs.STRIDE
    start = heads["usa_ofs"].astype(np.int64)
    good = np.flatnonzero((heads["usa_count"] == strides + 1) & (start % 2 == 0) & (start < ntfs.STRIDE // 2))
    put_back(pages.reshape(-1).view("<u2"), good * pages.shape[1], start[good], strides)
    return pages
