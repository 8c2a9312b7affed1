"""What must not stay behind: temporary files and folders, children, whatever has to be undone.

One list, worked off however a command ends.

A block undoes its own when it ends, well or by an exception. A signal is
an exception, too (`signals`), and may strike anywhere, also amid such an
end: so programs call `undo_all` last, and what undoes may be called twice.

What a SIGKILL leaves is known by its name, which is the same in each run, and by the lock (flock(2)) that its
owner has no longer: the next run that needs the name removes it. A lock lives as long as a process on
whatever machine and in whatever container, which numbers of processes do not tell.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from virt_bmap.host import protection, signals

MARK = "virt-bmap"
LONGEST = 200
"""Bytes of a name that a hidden name repeats: names may have 255."""
MOST = 10_000
"""Runs at the same time that want one name."""

_left: dict[object, Callable[[], None]] = {}


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the block ends. It may be called twice, where a signal comes while it runs."""
    key = object()
    _left[key] = undo
    try:
        yield
    finally:
        undo()
        del _left[key]


def undo_all() -> None:
    """Undo what is left, the youngest first. For the end of a program; errors change nothing any more."""
    while _left:
        _, undo = _left.popitem()
        with contextlib.suppress(Exception):
            undo()


# ---- files and folders -------------------------------------------------------------------------------------


def temporary() -> str:
    """Where temporary files lie, as tempfile finds it, but that nothing is written to see whether it can be.

    That file would have a random name, so that nobody ever removed what a SIGKILL left of it.
    """
    for folder in (*map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), "/tmp", "/var/tmp"):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return os.path.abspath(folder)
    return tempfile.gettempdir()


@contextlib.contextmanager
def hidden_file(target: str) -> Iterator[tuple[str, int]]:
    """A new empty file beside `target`: (its name, a descriptor). It is removed when the block ends, unless
    it was renamed until then."""
    with contextlib.ExitStack() as stack:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        # but what the umask takes
        yield _taken(stack, _beside(target), lambda name: os.open(name, flags, 0o666))[:2]


@contextlib.contextmanager
def hidden_folder(target: str) -> Iterator[str]:
    """A new folder beside `target`, for files that are to be renamed; removed with all that is in it when the
    block ends."""
    with contextlib.ExitStack() as stack:
        yield _taken(stack, _beside(target), _new_folder)[0]


@contextlib.contextmanager
def private_folder(where: str | None = None) -> Iterator[str]:
    """A new folder that only this user can enter, for sockets and the like, in `where` or where temporary
    files lie; removed when the block ends."""
    with contextlib.ExitStack() as stack:
        yield _taken(stack, os.path.join(where or temporary(), f"{MARK}-{os.geteuid()}"), _new_folder)[0]


class Shared(NamedTuple):
    """A folder that another process may look after: whoever has `lock` open keeps it, and after `leave()` it
    is not removed here."""

    name: str
    lock: int
    leave: Callable[[], None]


@contextlib.contextmanager
def shared_folder(where: str | None = None) -> Iterator[Shared]:
    """As `private_folder`."""
    with contextlib.ExitStack() as stack:
        name, lock, removal = _taken(
            stack, os.path.join(where or temporary(), f"{MARK}-{os.geteuid()}"), _new_folder
        )
        yield Shared(name, lock, removal.forget)


def _beside(target: str) -> str:
    folder, name = os.path.split(os.path.abspath(target))
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:LONGEST])}.{MARK}")


def _new_folder(name: str) -> int:
    os.mkdir(name, 0o700)
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # nobody had locked it yet, so another process took it for a dead one's
        raise FileExistsError(name) from None


def _taken(
    stack: contextlib.ExitStack, first: str, make: Callable[[str], int]
) -> "tuple[str, int, _Removal]":
    """Make the first of the names `first`, `first`-1, ... that is free, or whose owner is dead: its name and
    a locked descriptor, both until `stack` ends, and what removes them then."""
    for number in range(MOST):
        name = f"{first}-{number}" if number else first
        while True:
            with signals.held():
                try:
                    file = make(name)
                except FileExistsError:
                    file = -1
                removal = _Removal(name, file)
                if file >= 0:
                    stack.enter_context(undoing(removal))
            if file >= 0 and _locked(file) and _is(name, file):
                _reap_others(first, number)
                return name, file, removal
            if file < 0 and not _reap(name):
                break  # in use: the next name
            # else somebody took it for a dead one's in the moment
            # before it was locked, or it was one: once more
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), first)


class _Removal:
    """Removes what a name leads to, if that is still the open file, and closes it."""

    def __init__(self, name: str, file: int) -> None:
        self._name, self._file = name, file

    def __call__(self) -> None:
        if self._file < 0:
            return
        if _is(self._name, self._file):
            _remove(self._name, self._file)
        self.forget()

    def forget(self) -> None:
        """Close it only."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _remove(name: str, file: int) -> None:
    if stat.S_ISDIR(os.fstat(file).st_mode):
        shutil.rmtree(name, ignore_errors=True)
        if os.path.lexists(name):  # a copied tree may have folders that nobody may write to
            _make_writable(name)
            shutil.rmtree(name, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _make_writable(folder: str) -> None:
    """All folders of a tree of our own."""
    os.chmod(folder, 0o700)
    for above, below, _ in os.walk(folder):
        for name in below:
            path = os.path.join(above, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)


def _is(name: str, file: int) -> bool:
    """Does the name lead to this open file?"""
    try:
        return os.path.samestat(os.lstat(name), os.fstat(file))
    except OSError:
        return False


def _locked(file: int) -> bool:
    """Lock it; True also where nothing can be locked, and so nothing is ever taken for a dead one's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _reap(name: str) -> bool:
    """Remove what a dead process of this user has left under a name; False where its owner lives, is another
    user, or can't be told to be dead."""
    for mode in (os.O_RDWR, os.O_RDONLY | os.O_DIRECTORY):
        with contextlib.suppress(OSError):
            file = os.open(name, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                about = os.fstat(file)
                if about.st_uid != os.geteuid() or protection.is_read(about):
                    return False
                if stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is(name, file):
                        _remove(name, file)
                    return not _is(name, file)
            finally:
                os.close(file)
    return not os.path.lexists(name)


def _reap_others(first: str, number: int) -> None:
    """What dead runs have left under the names after this one."""
    while os.path.lexists(f"{first}-{number + 1}"):
        number += 1
        _reap(f"{first}-{number}")
