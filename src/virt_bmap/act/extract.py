"""Writing files and trees of a disk to a folder of this
machine, with nothing on the disk able to lead out of it.

All is made in a new folder beside its place, below descriptors of its directories that were opened without
following links, and takes its names at the end: what fails leaves nothing behind. Names that are no names
('..', '/' or NUL inside) are left out and counted.

Sources: open(2), openat(2), symlink(7) on O_NOFOLLOW and directory descriptors.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from virt_bmap.ask.content import Files, Piece
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import OutputError
from virt_bmap.core.escape import escape
from virt_bmap.core.lost import Missing
from virt_bmap.host import signals
from virt_bmap.host.leftovers import hidden_folder
from virt_bmap.model import tables

MAX_DEPTH = 1024
"""Levels of directories that are made, as many as get a path in a map."""
GROUP = 16384
"""Files whose extents are looked up together."""
HERE_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EFBIG, errno.EOVERFLOW)
"""What one hostile name, size or time can cause: that file is left out, while a full disk ends the job."""
SPECIAL = (tables.T_CHAR, tables.T_BLOCK, tables.T_FIFO, tables.T_SOCKET)
TOLD = 100
"""Files that can't be read whole whose missing bytes are told; all are counted."""
NO_LOSS = (*SPECIAL, tables.T_METADATA)
"""What is left out without being missed."""

Place = tuple[bytes, ...]


def is_name(name: bytes) -> bool:
    """Can these bytes be the name of one file here?"""
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


class NewName(NamedTuple):
    """One name to make: its directory, as names below the new folder, its own name, and the inode with its
    row of columns."""

    folder: Place
    name: bytes
    inode: int
    row: int

    @property
    def path(self) -> bytes:
        return b"/".join((*self.folder, self.name))


@dataclass
class Extraction:
    """What was made, and what was left out: by reason the count and the first path."""

    files: int = 0
    directories: int = 0
    links: int = 0
    size: int = 0
    left: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    lost: bool = False
    """Something was left out that a copy should have: more than devices, fifos and sockets."""
    missing: list[tuple[bytes, Missing]] = field(default_factory=list)
    """The first files that can't be read whole, and what of
    them is missing: left out, or with zeroes in its place."""
    incomplete: int = 0
    """How many such files there are."""

    def miss(self, path: bytes, missing: Missing) -> None:
        """Count a file that can't be read whole."""
        self.incomplete += 1
        if len(self.missing) < TOLD:
            self.missing.append((path, missing))

    def leave(self, reason: str, path: bytes, lost: bool = True) -> None:
        """Count what is left out."""
        count, first = self.left.get(reason, (0, path))
        self.left[reason] = count + 1, first
        self.lost |= lost


def extract(
    files: Files,
    wanted: Sequence[tuple[bytes, int]],
    folder: str,
    same_owner: bool,
    tell: Callable[[int], None] = lambda _: None,
    partial: bool = False,
) -> Extraction:
    """Make (name, inode) of `wanted` in `folder`, trees with all below them; `tell` is called with the bytes
    of files that are done.

    Files that can't be read whole are left out; `partial`: they are made, with zeroes for what is missing.
    Raises OutputError where a name exists already or can't be written; then nothing is left behind.
    """
    try:
        for name, _ in wanted:
            if is_name(name) and os.path.lexists(os.path.join(os.fsencode(folder), name)):
                raise OutputError(f"{folder}: {escape(name)} exists there already")
        with hidden_folder(os.path.join(folder, "extract")) as new, contextlib.ExitStack() as stack:
            work = _Work(
                files, os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), same_owner, tell, partial
            )
            stack.callback(work.close)
            names, directories = work.make(wanted)
            above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, above)
            with signals.held():  # all of them, or none
                for name in names:
                    os.rename(name, name, src_dir_fd=work.top, dst_dir_fd=above)
                # a directory that may not be written can't be moved, so the outermost get their modes last
                for top in directories:
                    work.dress_directory(top, above)
    except OSError as error:
        raise OutputError(f"{folder}: can't be written: {error.strerror or error}") from error
    return work.report


class _Work:
    def __init__(
        self, files: Files, top: int, same_owner: bool, tell: Callable[[int], None], partial: bool
    ) -> None:
        self.files, self.top, self.same_owner, self.tell, self.partial = files, top, same_owner, tell, partial
        self.report = Extraction()
        self._open: tuple[Place, int] = ((), os.dup(top))
        self._made: dict[int, NewName] = {}

    def close(self) -> None:
        os.close(self._open[1])
        os.close(self.top)

    def make(self, wanted: Sequence[tuple[bytes, int]]) -> tuple[list[bytes], list[NewName]]:
        """Everything in the new folder: (names, directories) that lie there now; these directories still lack
        their modes and times."""
        directories, plain, again, links = self._plan(wanted)
        for low in range(0, len(plain), GROUP):
            self._write(plain[low : low + GROUP])
        self._link_again(again)
        for entry in links:
            self._symlink(entry)
        for entry in reversed(directories):
            if entry.folder:
                self.dress_directory(entry, self._enter(entry.folder))
        return [os.fsencode(name) for name in os.listdir(self.top)], [
            entry for entry in directories if not entry.folder
        ]

    def _plan(
        self, wanted: Sequence[tuple[bytes, int]]
    ) -> tuple[list[NewName], list[NewName], list[NewName], list[NewName]]:
        """Make the directories, breadth first, and sort what lies in them: (directories, files, further names
        of files, symbolic links)."""
        directories: list[NewName] = []
        plain: list[NewName] = []
        again: list[NewName] = []
        links: list[NewName] = []
        seen: set[int] = set()
        queue: list[tuple[Place, Sequence[tuple[bytes, int]]]] = [((), wanted)]
        for folder, children in queue:  # grows while it is walked
            rows = self.files.rows_of(ints([inode for _, inode in children]))
            for (name, inode), row in zip(children, rows.tolist(), strict=True):
                entry = NewName(folder, name, inode, row)
                kind = int(self.files.kind[row]) if row >= 0 else tables.T_UNKNOWN
                if reason := self._refusal(entry, kind):
                    self.report.leave(reason, entry.path, kind not in NO_LOSS)
                elif kind == tables.T_SYMLINK:
                    links.append(entry)
                elif kind == tables.T_FILE:
                    (again if inode in seen else plain).append(entry)
                    seen.add(inode)
                elif len(folder) >= MAX_DEPTH or (inode in seen and self.files.children(inode)):
                    self.report.leave(
                        "directories that lie inside themselves, in two places or too deep", entry.path
                    )
                elif self._try(
                    entry, lambda entry: os.mkdir(entry.name, 0o700, dir_fd=self._enter(entry.folder))
                ):
                    seen.add(inode)
                    directories.append(entry)
                    self.report.directories += 1
                    queue.append(((*folder, name), self.files.children(inode)))
        return directories, plain, again, links

    def _refusal(self, entry: NewName, kind: int) -> str | None:
        if not is_name(entry.name):
            return "names that can't be names here"
        if kind in SPECIAL:
            return "devices, fifos and sockets"
        if kind == tables.T_METADATA:
            return "files of the filesystem itself"
        if kind not in (tables.T_FILE, tables.T_DIRECTORY, tables.T_SYMLINK):
            return "inodes that are damaged"
        reason = self.files.refusal(entry.inode) if kind == tables.T_FILE else None
        return f"files whose content can't be read: {reason}" if reason else None

    def _write(self, entries: list[NewName]) -> None:
        """Make files with their content, in order."""
        pieces = self.files.pieces([entry.inode for entry in entries])
        piece = next(pieces, None)
        for number, entry in enumerate(entries):
            size = int(self.files.size[entry.row])
            with self._created(entry, size) as file:
                missing, done, twice = Missing(), 0, False
                while piece is not None and piece.file == number:
                    missing.add(piece.lost)
                    twice |= piece.offset < done
                    done = piece.offset + len(piece.data)
                    if file is not None:
                        _put(file, piece)
                    piece = next(pieces, None)
                if missing:
                    self.report.miss(entry.path, missing)
                    self.report.lost = True
                if twice:
                    self.report.leave("files with two extents for the same bytes", entry.path)
                if file is not None and (twice or (missing and not self.partial)):
                    os.unlink(entry.name, dir_fd=self._enter(entry.folder))
                elif file is not None:
                    self._dress(file, entry.row, 0o666)
                    self._made[entry.inode] = entry
                    self.report.files += 1
                    self.report.size += size
                    self.tell(self.report.size)

    @contextlib.contextmanager
    def _created(self, entry: NewName, size: int) -> Iterator[int | None]:
        """A new file of a size, all of it a hole; None where it can't be had, which is counted."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made: list[int] = []

        def create(entry: NewName) -> None:
            made.append(os.open(entry.name, flags, 0o600, dir_fd=self._enter(entry.folder)))
            os.ftruncate(made[0], size)

        good = self._try(entry, create)
        try:
            yield made[0] if good else None
        finally:
            for file in made:
                os.close(file)
            if made and not good:
                os.unlink(entry.name, dir_fd=self._enter(entry.folder))

    def _link_again(self, entries: list[NewName]) -> None:
        """Further names of files that were made."""
        for entry in entries:
            first = self._made.get(entry.inode)
            if first is None:
                self.report.leave("more names of files that were left out", entry.path)
                continue
            source = os.dup(self._enter(first.folder))

            def link(entry: NewName, name: bytes = first.name, source: int = source) -> None:
                target = self._enter(entry.folder)
                os.link(name, entry.name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

            try:
                self.report.links += self._try(entry, link)
            finally:
                os.close(source)

    def _symlink(self, entry: NewName) -> None:
        target = self.files.target(entry.inode)
        if not target or b"\0" in target:
            self.report.leave("symbolic links whose target is not read", entry.path)
        elif self._try(entry, lambda entry: os.symlink(target, entry.name, dir_fd=self._enter(entry.folder))):
            self.report.links += 1
            where = self._enter(entry.folder)
            with _possible():
                if self.same_owner:
                    os.chown(entry.name, *self._owner(entry.row), dir_fd=where, follow_symlinks=False)
            with _possible():
                if (mtime := self._mtime(entry.row)) is not None:
                    os.utime(entry.name, ns=(mtime, mtime), dir_fd=where, follow_symlinks=False)

    def dress_directory(self, entry: NewName, where: int) -> None:
        """Mode, owner and time of a directory that is complete."""
        made = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
        try:
            self._dress(made, entry.row, 0o777)
        finally:
            os.close(made)

    def _dress(self, file: int, row: int, default: int) -> None:
        """Owner, mode and time of an open file.

        Without the owner, a set-user-ID bit would make it a program of another user's.
        """
        mode = int(self.files.mode[row])
        with _possible():
            if self.same_owner:
                os.fchown(file, *self._owner(row))
        os.fchmod(
            file,
            stat.S_IMODE(mode) & (0o7777 if self.same_owner else 0o777) if mode >= 0 else default & ~_umask(),
        )
        with _possible():
            if (mtime := self._mtime(row)) is not None:
                os.utime(file, ns=(mtime, mtime))

    def _owner(self, row: int) -> tuple[int, int]:
        return int(self.files.uid[row]), int(self.files.gid[row])  # -1 leaves it as it is

    def _mtime(self, row: int) -> int | None:
        mtime: int | None = self.files.mtime[row].as_py()
        return mtime

    def _try(self, entry: NewName, make: Callable[[NewName], None]) -> bool:
        """Make one name; False where this name can't be had here, which is counted."""
        try:
            make(entry)
        except FileExistsError:
            self.report.leave("files whose name is taken already", entry.path)
            return False
        except OSError as error:
            if error.errno not in HERE_IMPOSSIBLE:
                raise
            self.report.leave(
                f"names, sizes or targets that this system refuses ({error.strerror})", entry.path
            )
            return False
        return True

    def _enter(self, folder: Place) -> int:
        """A descriptor of one of the new directories, every name on the way opened without following links;
        good until the next call."""
        if self._open[0] != folder:
            os.close(self._open[1])
            self._open = (), os.dup(self.top)
            for depth, name in enumerate(folder, 1):
                below = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._open[1]
                )
                os.close(self._open[1])
                self._open = folder[:depth], below
        return self._open[1]


@contextlib.contextmanager
def _possible() -> Iterator[None]:
    """Owners and times that this system can't hold are let go."""
    try:
        yield
    except OverflowError:
        pass
    except OSError as error:
        if error.errno not in HERE_IMPOSSIBLE:
            raise


def _put(file: int, piece: Piece) -> None:
    data, at = piece.data.data, piece.offset
    while len(data):
        done = os.pwrite(file, data, at)
        data, at = data[done:], at + done


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
