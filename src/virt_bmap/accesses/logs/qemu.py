"""What QEMU's trace events say of disk accesses: of a backend's reads and writes (blk_co_preadv,
blk_co_pwritev), or of virtio-blk requests.

    from -trace with the log backend:
    1234@1700000000.123456:blk_co_preadv blk 0x55d665247990 bs 0x55d665252aa0 offset 4096 bytes 8192 flags 0x0
    the same without -msg timestamp=on:
    virtio_blk_handle_read vdev 0x55.. req 0x55.. sector 8 nsectors 16
    from scripts/simpletrace.py:
    blk_co_preadv 12.345 pid=1234 blk=0x55d665247990 bs=0x55d665252aa0 offset=0x1000 bytes=0x2000 flags=0x0

Sources: QEMU docs/devel/tracing.rst; block/trace-events, hw/block/trace-events (v7.2); util/log.c;
scripts/simpletrace.py (times are microseconds since the event before).
"""

import numpy as np
import pyarrow as pa

from virt_bmap.accesses.accesses import Accesses
from virt_bmap.accesses.logs.text import (
    DECIMAL,
    HEX,
    READ,
    SECTOR,
    SECTORS,
    WHOLE,
    WRITE,
    Lines,
    Match,
    Parsed,
    coded,
    numbered,
    zeros,
)
from virt_bmap.core.arrays import Int

NAME = "QEMU's trace output"
EXPECTED = "1234@1700000000.123456:blk_co_preadv blk 0x55d6 bs 0x55d6 offset 4096 bytes 8192 flags 0x0"

OPS = {
    "blk_co_preadv": READ, "blk_co_pwritev": WRITE, "virtio_blk_handle_read": READ,
    "virtio_blk_handle_write": WRITE,
}  # fmt: skip
_STAMP = rf"(?:\d+@(?P<time>{WHOLE}\.\d{{6}}):)?"
_BACKEND = (
    rf"(?P<event>blk_co_p(?:read|write)v) blk (?P<device>{HEX}) bs {HEX} offset "
    rf"(?P<offset>{DECIMAL}) bytes (?P<length>{DECIMAL})\b"
)
_VIRTIO = (
    rf"(?P<event>virtio_blk_handle_(?:read|write)) vdev (?P<device>{HEX}) req {HEX} sector "
    rf"(?P<offset>{SECTORS}) nsectors (?P<length>{SECTORS})\b"
)
_BACKEND_SIMPLE = (
    rf"(?P<event>blk_co_p(?:read|write)v) {{TIME}} pid=\d.*\bblk=(?P<device>{HEX}) "
    rf".*\boffset=(?P<offset>{HEX}) bytes=(?P<length>{HEX})\b"
)
_VIRTIO_SIMPLE = (
    rf"(?P<event>virtio_blk_handle_(?:read|write)) {{TIME}} pid=\d.*\bvdev=(?P<device>{HEX}) "
    rf".*\bsector=(?P<offset>0x[0-9a-f]{{1,12}}) nsectors=(?P<length>0x[0-9a-f]{{1,12}})\b"
)
_SINCE = r"(?P<time>\d{1,12}\.\d{1,6})"
OTHER = r"(?:\d+@\d+\.\d+:)?[a-z][a-z0-9_]+ |\s*$"
"""Other events, and the program's own messages."""


def recognise(head: list[str]) -> bool:
    return any(event in line and "0x" in line for line in head for event in OPS)


def parse(lines: Lines) -> Parsed:
    """The accesses of each block backend; of virtio requests where no backend was traced, since either sees
    the same accesses."""
    simple_times = lines.match(r"[a-z][a-z0-9_]* (?P<time>\d{1,12}\.\d{1,6}) pid=\d")
    simple = len(simple_times.rows) > 0
    backend, virtio = (
        lines.match((pattern if simple else _STAMP + pattern).replace("{TIME}", _SINCE))
        for pattern in ((_BACKEND_SIMPLE, _VIRTIO_SIMPLE) if simple else (_BACKEND, _VIRTIO))
    )
    found, unit = (backend, 1) if len(backend.rows) else (virtio, SECTOR)
    time_ns, note = _running(simple_times, found) if simple else _stamps(found)
    device, devices = found.words("device")
    event, events = found.words("event")
    accesses = Accesses(time_ns, zeros(len(found.rows)), coded(events, OPS)[event] if events else event,
                        found.number("offset") * unit, found.number("length") * unit)  # fmt: skip
    known = backend.known(len(lines)) | virtio.known(len(lines))
    return Parsed(accesses, found.rows + 1, device, devices, lines.unread(known, OTHER), note)


def _stamps(found: Match) -> tuple[Int, tuple[str, ...]]:
    """Times of the log backend; without -msg timestamp=on there are none."""
    if not len(found.rows) or found.text("time")[0].as_py() == b"":
        why = (
            "has no times (QEMU writes them with -msg timestamp=on): its accesses are put a microsecond apart"
        )
        return numbered(len(found.rows)), (why,)
    return found.seconds("time"), ()


def _running(times: Match, found: Match) -> tuple[Int, tuple[str, ...]]:
    """simpletrace's times are those since the event before, of whatever kind, in microseconds."""
    step = np.array(times.text("time").view(pa.large_string()).cast(pa.float64()))
    return np.rint(np.cumsum(step) * 1000).astype(np.int64)[np.searchsorted(times.rows, found.rows)], ()
