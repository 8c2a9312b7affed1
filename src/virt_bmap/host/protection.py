"""A command does not overwrite what it reads, and replaces what is not a result of ours only when told to.

A command line is asked once, before anything is done: its arguments say by their type what they are
(`commands/paths.py`). What turns out later to be read, such as a backing file, is noted when it is opened,
and asked again by whoever opens an output (`host/files.py`). A program that uses the library knows by
itself what it writes, so all this is for the time of a command only.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from virt_bmap.core.errors import OutputError, UsageError
from virt_bmap.host import in_use
from virt_bmap.host.devices import overlap

STREAMS = {1: "standard output", 2: "standard error"}


class Written(NamedTuple):
    """A file to write. `ours`: is what is there such a result already, which may be replaced without a word?
    None: nothing is."""

    path: str
    ours: Callable[[str], bool] | None


class _Command(NamedTuple):
    reads: list[tuple[os.stat_result, str]]
    outputs: list[Written]


_command: _Command | None = None


@contextlib.contextmanager
def protecting() -> Iterator[None]:
    """For the time of a command: note what it reads."""
    global _command
    before, _command = _command, _Command([], [])
    try:
        yield
    finally:
        _command = before


def reads(path: str) -> None:
    """This is read; `-` is standard input. What is not there does not matter here."""
    if _command:
        with contextlib.suppress(OSError, ValueError):
            about = os.fstat(0) if path == "-" else os.stat(path)
            if stat.S_ISREG(about.st_mode) or stat.S_ISBLK(about.st_mode):
                _command.reads.append((about, "standard input" if path == "-" else path))


def reads_open(file: int, path: str) -> None:
    """Likewise of what is open."""
    if _command:
        _command.reads.append((os.fstat(file), path))


def writes(path: str, ours: Callable[[str], bool] | None) -> None:
    """This is to be written."""
    if _command and path != "-":
        _command.outputs.append(Written(path, ours))


def check(force: bool) -> None:
    """Raises UsageError where an output would overwrite what is read or, without `force`, what is not a
    result of ours; OutputError where somebody uses it."""
    if not _command:
        return
    for number, name in STREAMS.items():
        with contextlib.suppress(OSError):
            refuse(os.fstat(number), name)
    for at, output in enumerate(_command.outputs):
        try:
            about = os.stat(output.path)
        except (OSError, ValueError):
            _refuse_twice(output, _command.outputs[:at])
            continue  # it is new
        refuse(about, output.path)
        _refuse_twice(output, _command.outputs[:at])
        _refuse_others(output, about, force)


def is_read(about: os.stat_result) -> bool:
    """Is this, by whatever name, something that the command reads?"""
    return any(overlap(about, read) for read, _ in (_command.reads if _command else ()))


def refuse(about: os.stat_result, name: str) -> None:
    """UsageError where a write to this would change what is read."""
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISBLK(about.st_mode)):
        return
    for read, what in _command.reads if _command else ():
        if overlap(about, read):
            raise UsageError(
                f"{name}: would overwrite {'the file' if what == name else what} "
                "that is read; name another file"
            )


def _refuse_twice(output: Written, others: list[Written]) -> None:
    """Two results in one file would each destroy the other."""
    for other in others:
        with contextlib.suppress(OSError):
            mode = os.stat(output.path).st_mode if os.path.exists(output.path) else stat.S_IFREG
            if not stat.S_ISCHR(mode) and os.path.realpath(output.path) == os.path.realpath(other.path):
                raise UsageError(f"{output.path}: is named for two results; name another file for one")


def _refuse_others(output: Written, about: os.stat_result, force: bool) -> None:
    """UsageError where something of value is there, without
    `force`; with it, OutputError where somebody uses that."""
    path = output.path
    if stat.S_ISREG(about.st_mode):
        if output.ours and (not about.st_size or output.ours(path)):
            return
        what = (
            "exists already"
            if output.ours is None
            else "exists already, and is not an older result of this kind"
        )
    elif stat.S_ISBLK(about.st_mode):
        what = "is a block device"
    else:
        return
    if not force:
        raise UsageError(
            f"{path}: {what}; --force {'overwrites' if stat.S_ISBLK(about.st_mode) else 'replaces'} it"
        )
    if reason := in_use.user_of(path):
        raise OutputError(f"{path}: is in use: {reason}; it is not replaced")
