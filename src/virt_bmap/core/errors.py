"""The exceptions of virt-bmap; each message is one line that a person can act on.

    BmapError
    |-- UsageError         the command or call is wrong: an option, a name, a range
    |-- ImageError         an image can't be opened or read: missing, empty, shrank, I/O error
    |-- MissingTool        a program or package that this job needs is not installed, or can't be run
    |-- FormatError        what is on the disk
    |   |-- Corrupt        bytes contradict the format's own rules
    |   `-- Unsupported    features known but not read; says nothing about damage
    |-- FreezeError        filesystems can't be frozen, or did not stay so
    |-- MapError           a saved map or trace can't be read, or belongs to another disk
    `-- OutputError        a result can't be written

Damage that leaves the rest readable is not an exception but a row of the table `problems`.
"""

import os

from virt_bmap.core.printable import one_line


def is_strict() -> bool:
    """Is what nobody expected to leave the program with all that is known of it? Tests and the fuzzer say so:
    VIRT_BMAP_STRICT in the environment."""
    return bool(os.environ.get("VIRT_BMAP_STRICT"))


def unexpected(error: Exception) -> str:
    """One line about an exception that should not have been: what it is, where it came from, what to do."""
    return (
        f"a fault of virt-bmap itself: {type(error).__name__} at {_where(error)}: "
        f"{one_line(error)}; please report "
        "it (VIRT_BMAP_STRICT=1 in the environment tells more)"
    )


def refused(error: OSError) -> str:
    """One line about what the system refused, and nobody expected it to: the file where the error names one,
    else the place of ours that asked for it."""
    words = error.strerror or one_line(error)
    if error.filename is not None:
        named = error.filename
        return f"{one_line(os.fsdecode(named) if isinstance(named, bytes) else named)}: {words}"
    return f"the system refused what virt-bmap asked for at {_where(error)}: {words}"


def _where(error: Exception) -> str:
    """The line that raised."""
    import traceback  # seldom needed

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(frame.filename.split(os.sep)[-2:])}:{frame.lineno}"


class BmapError(Exception):
    """Base of every error that virt-bmap raises on purpose."""


class UsageError(BmapError):
    """The caller asked for something that does not exist or makes no sense."""


class ImageError(BmapError):
    """An image can't be opened or read."""


class MissingTool(BmapError):
    """A program or package is missing; the message says which command installs it. No image's fault."""


class FormatError(BmapError):
    """Something on the disk; `offset` is in bytes of the volume being read, where it is known, `code` one of
    `model/problems.py`."""

    def __init__(self, message: str, offset: int | None, code: str) -> None:
        super().__init__(message)
        self.offset = offset
        self.code = code


class Corrupt(FormatError):
    """The bytes contradict the format's own rules."""

    def __init__(self, message: str, offset: int | None = None, code: str = "corrupt") -> None:
        super().__init__(message, offset, code)


class Unsupported(FormatError):
    """A feature that is known by name but not read. It does not indicate damage."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message, offset, "unsupported")


class FreezeError(BmapError):
    """Filesystems can't be frozen, or were thawed before they were to be."""


class MapError(BmapError):
    """A saved map or trace can't be read, or belongs to another disk."""


class OutputError(BmapError):
    """A result can't be written."""
