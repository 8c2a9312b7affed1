"""What was observed so far, on disk, so that an interrupted run goes on where it stopped.

A text file beside the map: a line that names the disks, then a line for each thing observed, written when it
is done. A line that was cut off by the end is dropped.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from virt_bmap.core.errors import MapError, OutputError
from virt_bmap.observe.engine import Observed
from virt_bmap.open import magic
from virt_bmap.serve.serve import Source

VERSION = 1
SUFFIX = ".observed"
LARGEST = 1 << 62
"""Offsets and lengths in a journal are below this: sums of two stay in 64 bits."""


def identity(source: Source) -> dict[str, Any]:
    """What tells a disk from another, or from itself after a change."""
    about: dict[str, Any] = {"image": source.image, "format": source.format, "size": source.size}
    if not magic.is_uri(source.image):
        about["mtime_ns"] = os.stat(source.image).st_mtime_ns
    return about


class Journal:
    """An open journal. `seen` holds what an earlier run observed: files by (device, inode)."""

    def __init__(self, path: str, sources: Sequence[Source], resume: bool) -> None:
        """Begin a journal, or go on with one.

        Raises UsageError-like words where one is there and
        `resume` was not said, or where it is of other disks.
        """
        self.path = path
        self.seen: dict[tuple[str, int], Observed] = {}
        head = {"virt-bmap observed": VERSION, "disks": [identity(source) for source in sources]}
        exists = os.path.exists(path)
        if exists and not resume:
            raise OutputError(
                f"{path}: an observation was interrupted: go on with --resume, or remove it to begin anew"
            )
        try:
            length = self._read(head) if exists else 0
            self._file = open(path, "r+b" if exists else "wb")  # noqa: SIM115
            self._file.seek(length)
            self._file.truncate()
            if not length:
                self._write(head)
        except OSError as error:
            raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error

    def add(self, device: str, seen: Observed) -> None:
        """Keep what was seen of a file."""
        self.seen[device, seen.inode] = seen
        try:
            self._write({"device": device, **asdict(seen)})
        except OSError as error:
            raise OutputError(f"{self.path}: can't be written: {error.strerror or error}") from error

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _read(self, head: dict[str, Any]) -> int:
        """Load what is there; the length of its whole lines."""
        with open(self.path, "rb") as file:
            data = file.read()
        length = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:length].splitlines(), 1):
            try:
                found = json.loads(line)
                if number > 1:
                    self._load(found)
                elif "virt-bmap observed" not in found:
                    raise ValueError
                elif found != head:
                    raise MapError(
                        f"{self.path}: was begun on other disks, or they "
                        "have changed since: remove it to begin anew"
                    )
            except (ValueError, KeyError, TypeError) as error:
                raise MapError(
                    f"{self.path}: line {number} does not belong to "
                    "an observation: remove the file to begin anew"
                ) from error
        return length

    def _load(self, line: dict[str, Any]) -> None:
        seen = Observed(
            line["inode"],
            [_numbers(row, 5) for row in line["rows"]],
            [_numbers(row, 2) for row in line["read"]],
            [_numbers(row, 2) for row in line["left"]],
            [_numbers(row, 2) for row in line["unsure"]],
            line["failed"],
        )
        if (
            not isinstance(line["device"], str)
            or not isinstance(seen.inode, int)
            or not isinstance(seen.failed, (str, type(None)))
        ):
            raise ValueError
        self.seen[line["device"], seen.inode] = seen

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The map is written: nothing is left to resume."""
        self.close()
        os.unlink(self.path)


def _numbers(row: list[int], count: int) -> Any:
    if len(row) != count or not all(isinstance(value, int) and 0 <= value < LARGEST for value in row):
        raise ValueError
    return tuple(row)
