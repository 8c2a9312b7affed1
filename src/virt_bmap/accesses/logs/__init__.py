"""Accesses to a disk as other tools log them, one module for each tool: text in, columns out.

A module has NAME, EXPECTED (what a line of it looks like, for messages), `recognise(head)` on the first
lines, and `parse(lines) -> Rows`. All work is done on whole columns; a million lines take seconds. Lines that
do not belong to the format are left out, and their numbers kept for whoever wants to say so.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from virt_bmap.accesses.logs import blkparse, csv, fio, nbdkit, qemu
from virt_bmap.accesses.logs.text import HEAD, AccessLog, Lines, Parsed
from virt_bmap.core.errors import MapError, UsageError

LOGS: Sequence[ModuleType] = (nbdkit, fio, qemu, blkparse, csv)
"""In probe order: those with a first line that names them
come first, the one that goes by column names last."""
NAMES = {"nbdkit": nbdkit, "qemu": qemu, "blkparse": blkparse, "fio": fio, "csv": csv}
"""What a format is called on a command line."""


def parse(data: bytes, source: str, format: str | None = None, device: str | None = None) -> AccessLog:
    """The accesses in a log's content; `source` is its name for messages, `format` a key of NAMES (default:
    found by content).

    Raises MapError where it is of no known format or holds no access, UsageError where it is of several
    devices and none is chosen.
    """
    lines = Lines(data)
    head = lines.head(HEAD)
    found = NAMES[format] if format else next((module for module in LOGS if module.recognise(head)), None)
    if found is None:
        known = ", ".join(str(module.NAME) for module in LOGS)
        raise MapError(
            f"{source}: is {'empty' if not data.strip() else 'not a log of accesses that is known here'}; "
            f"known are: {known}"
        )
    try:
        rows: Parsed = found.parse(lines)
    except ValueError as error:
        raise MapError(f"{source}: {error}") from error
    if not len(rows.accesses):
        first = f"; line {rows.unread[0]} is {lines.shown(rows.unread[0])}" if len(rows.unread) else ""
        raise MapError(
            f"{source}: holds no access; lines of {found.NAME} look like {found.EXPECTED!r}{first}"
        )
    rows = _of_device(rows, source, device)
    order = np.argsort(rows.accesses.time_ns, kind="stable")
    example = lines.shown(rows.unread[0]) if len(rows.unread) else ""
    return AccessLog(
        source, found.NAME, rows.accesses.take(order), rows.line[order], rows.unread, example, rows.notes
    )


def _of_device(rows: Parsed, source: str, device: str | None) -> Parsed:
    """The rows of the device that was chosen, or of the only one."""
    if device is None:
        if len(rows.devices) > 1:
            raise UsageError(
                f"{source}: has accesses of several devices: choose one with --device: "
                f"{', '.join(map(_quoted, rows.devices))}"
            )
        return rows
    if device not in rows.devices:
        there = (
            f"there are: {', '.join(map(_quoted, rows.devices))}"
            if rows.devices
            else "this log does not name devices"
        )
        raise UsageError(f"{source}: has no accesses of device {device}; {there}")
    return rows.take(rows.device == rows.devices.index(device))


def _quoted(device: str) -> str:
    return device if device.isprintable() and " " not in device else repr(device)
