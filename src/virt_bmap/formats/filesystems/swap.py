"""Linux swap space, both versions, any page size, either byte order, also while it holds a hibernated system.

Only the header page is read: which pages are in use is known to the running kernel alone, so that all the
space after the header is one piece of content. The signature stands at the end of the first page and so
tells the page's size.

Sources: kernel include/linux/swap.h (union swap_header), mm/swapfile.c, kernel/power/swap.c (swsusp_header);
util-linux libblkid/src/superblocks/swap.c and include/swapheader.h.
"""

import uuid as uuids
from collections.abc import Sequence

import numpy as np

from virt_bmap.core.arrays import EMPTY, Int, complement
from virt_bmap.core.errors import Corrupt, FormatError, Unsupported
from virt_bmap.core.layout import record, struct, widen
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.contract import Checks, Docs, Filesystem, FilesystemFormat
from virt_bmap.model.damage import Damage

NAME = "swap"
FEATURES = (
    "version 1 and version 0",
    "pages of 4 to 64 KiB",
    "both byte orders",
    "label and UUID",
    "bad pages",
    "hibernation images",
)
REFUSED = ("versions above 1",)
ORACLES = ("mkswap and blkid of util-linux",)
CHECKS = Checks(
    checksums=None,
    rules=("header: version, sizes, bad pages",),
    unchecked=("what is swapped out",),
)

PAGE_SIZES = tuple(4096 << shift for shift in range(5))
"""Of the kernel's architectures."""
SIGNATURE = 10
"""Bytes at the end of the header page."""
VERSIONS = {b"SWAP-SPACE": 0, b"SWAPSPACE2": 1}
HIBERNATED = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")
"""In place of the signature while a system sleeps on disk: kernel, uswsusp, new kernels, TuxOnIce."""
BAD_PAGES = 1536
"""Where the list of bad pages begins in the header page; it ends before the signature."""


def _header(order: str) -> np.dtype[np.void]:
    return struct(BAD_PAGES, [
        (1024, "version", f"{order}u4"),
        (1028, "last_page", f"{order}u4"),
        (1032, "nr_badpages", f"{order}u4"),
        (1036, "sws_uuid", "V16"),
        (1052, "sws_volume", "V16"),
    ])  # fmt: skip


def probe(reader: Reader) -> bool:
    """Is there a signature at the end of a page of any size?"""
    return _signature(reader) is not None


def _signature(reader: Reader) -> tuple[int, bytes] | None:
    """(page size, signature), or None."""
    for size in PAGE_SIZES:
        found = reader.read_clipped(size - SIGNATURE, SIGNATURE)
        if found in VERSIONS or found.startswith(HIBERNATED):
            return size, found
    return None


def read(reader: Reader, others: Sequence[Reader], damage: Damage) -> Filesystem:
    """The header page, bad pages, and the space that is left."""
    signature = _signature(reader)
    if signature is None:
        raise Corrupt(f"{reader.name}: no signature of a swap space", 0)
    page, magic = signature
    data = np.frombuffer(reader.read_clipped(0, page), np.uint8)
    hibernated = magic not in VERSIONS
    if VERSIONS.get(magic) == 0:
        pages, bad = _version_0(data)
        label, uuid = b"", bytes(16)
    else:
        try:
            header, pages, bad = _version_1(data, reader.name)
            label, uuid = header["sws_volume"].tobytes().split(b"\0")[0], header["sws_uuid"].tobytes()
        except FormatError:
            if not hibernated:
                raise
            # some that sleep have a header of their own
            pages = reader.size // page
            bad = EMPTY
            label = b""
            uuid = bytes(16)
    size = pages * page
    damage.ends_early(size, reader.size)
    rows = tables.ExtentRows()
    rows.add(tables.METADATA, 0, min(page, reader.size), part="header")
    end = min(size, reader.size)
    starts = np.minimum(bad * page, end)
    rows.add(tables.METADATA, starts, np.minimum(page, end - starts), part="bad pages")
    left = complement(np.append(0, bad * page), np.append(page, (bad + 1) * page), 0, end)
    rows.add(tables.CONTENT, left[0], left[1] - left[0], part="swap space")
    return Filesystem(
        type="swsuspend" if hibernated else NAME, size=size, block_size=page, root=-1,
        state=tables.HIBERNATED if hibernated else tables.CLEAN, reader=reader, inodes=tables.empty("inodes"),
        names=tables.empty("names"), extents=rows.table(0),
        uuid=str(uuids.UUID(bytes=uuid)) if any(uuid) else None, label=label.decode(errors="replace") or None,
        features=f"v{VERSIONS.get(magic, 1)}", traits=tables.SLEEPING if hibernated else 0,
    )  # fmt: skip


def _version_0(data: np.ndarray) -> tuple[int, Int]:
    """(pages, bad pages): the first page is a bitmap of usable pages, with 0 for the bitmap's own page."""
    bits = (len(data) - SIGNATURE) * 8
    usable = np.flatnonzero(np.unpackbits(data, count=bits, bitorder="little"))
    if len(usable) == 0:
        raise Corrupt("the bitmap of the swap space calls no page usable", 0)
    pages = int(usable[-1]) + 1
    return pages, np.setdiff1d(np.arange(1, pages), usable)


def _version_1(data: np.ndarray, name: str) -> tuple[np.void, int, Int]:
    """(header, pages, bad pages); a version of 1 tells the byte order."""
    for order in "<", ">":
        header = record(data, _header(order))
        if header["version"] == 1:
            break
    else:
        raise Unsupported(
            f"{name}: swap space of version {int(header['version'])}; versions 0 and 1 are supported", 1024
        )
    room = (len(data) - BAD_PAGES - SIGNATURE) // 4
    count = int(header["nr_badpages"])
    if count > room:
        raise Corrupt(f"{name}: the swap header lists {count} bad pages, but has room for {room}", 1032)
    pages = int(header["last_page"]) + 1
    bad = widen(np.frombuffer(data, f"{order}u4", count, BAD_PAGES), "bad page")
    return header, pages, np.unique(bad[(bad > 0) & (bad < pages)])


FORMAT = FilesystemFormat(
    NAME, probe, read, Docs(FEATURES, REFUSED, ORACLES), CHECKS, mount=None, scratch=True
)
