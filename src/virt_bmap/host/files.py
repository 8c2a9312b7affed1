"""Files that appear whole or not at all."""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from virt_bmap.core.errors import OutputError
from virt_bmap.host import protection
from virt_bmap.host.leftovers import hidden_file, hidden_folder


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the
    block ends without an error; `-` is standard output.

    What a symbolic link leads to is replaced, not the link; the new file has the mode, and as far as we may
    the owner, of the one before. Devices, pipes and the like are written directly. Raises OutputError where
    anything can't be written, and leaves no file behind then.
    """
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with _words(path):
        if os.path.isdir(path):
            raise OutputError(f"{path}: can't be written: it is a directory")
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with _device(path) as file:
                yield file
            return
        target = _target(path)
        with hidden_file(target) as (name, descriptor):
            dress_as(target, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                yield file
            os.replace(name, target)


@contextlib.contextmanager
def new_file(path: str) -> Iterator[str]:
    """The name of an empty file that replaces `path` only when the block ends without an error, for other
    programs to write. Raises OutputError as `replacing` does."""
    with _words(path):
        target = _target(path)
        with hidden_folder(target) as folder:  # a lock on the file itself could be in the way of theirs
            name = os.path.join(folder, os.path.basename(target))
            with open(name, "xb") as file:
                dress_as(target, file.fileno())
            yield name
            os.replace(name, target)


@contextlib.contextmanager
def growing(path: str) -> Iterator[TextIO]:
    """A text file that grows for all to see: a live log can't wait for its end to get its name.

    `-` is standard output. Raises OutputError as `replacing` does.
    """
    if path == "-":
        yield sys.stdout
        return
    with _words(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with open(file, "w", encoding="utf-8") as text:
            protection.refuse(os.fstat(file), path)
            if stat.S_ISREG(os.fstat(file).st_mode):
                os.ftruncate(file, 0)
            yield text


@contextlib.contextmanager
def _device(path: str) -> Iterator[BinaryIO]:
    """A device or pipe. A block device that is mounted, or below another one, the kernel keeps from us."""
    about = os.stat(path)
    protection.refuse(about, path)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(about.st_mode) else 0))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise OutputError(
            f"{path}: is in use: it is mounted, or another device lies on it; it is not written"
        ) from error
    with open(file, "wb") as opened:
        yield opened
        if stat.S_ISBLK(about.st_mode):  # what can't be written is told here, and nowhere else
            opened.flush()
            os.fsync(file)


def _target(path: str) -> str:
    """The file that is to be made or replaced. Raises UsageError where it was read meanwhile."""
    target = os.path.realpath(path)
    if os.path.exists(target):
        protection.refuse(os.stat(target), path)
    return target


def dress_as(target: str, file: int) -> None:
    """Give an open file the mode and the owner of the one that it is to replace, if there is one: what was
    private stays so."""
    with contextlib.suppress(FileNotFoundError):
        about = os.stat(target)
        with contextlib.suppress(PermissionError):
            os.fchown(file, about.st_uid, about.st_gid)
        os.fchmod(file, stat.S_IMODE(about.st_mode) & 0o777)


@contextlib.contextmanager
def _words(path: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
