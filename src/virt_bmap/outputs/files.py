"""Files that appear whole or not at all."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import BinaryIO

from virt_bmap.errors import OutputError


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends without an error; `-` is standard output.

    Devices, pipes and the like are written directly. Raises OutputError where anything can't be written, and leaves no file behind then.
    """
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with _words(path):
        if os.path.isdir(path):
            raise OutputError(f"{path}: can't be written: is a directory")
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb") as file:
                yield file
            return
        with new_file(path) as name, open(name, "wb") as file:
            yield file


@contextlib.contextmanager
def new_file(path: str) -> Iterator[str]:
    """The name of an empty file beside `path` that replaces it only when the block ends without an error. Raises OutputError as `replacing` does."""
    with _words(path):
        target = os.path.realpath(path)
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name[:50]}.{os.urandom(8).hex()}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))  # but what the umask takes
        try:
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def _words(path: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
