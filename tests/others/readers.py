"""Filesystems as readers of other projects see them: each path, and the SHA-256 of each regular file.

They read one image, which holds the filesystem from its first byte to its last. A new reader is a function
and a row of READERS.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

Tree = dict[bytes, str | None]
"""Paths from the root on, `/` itself left out; of a regular file the SHA-256 of its content, None of anything
else and of what is larger than LARGEST."""
UNREAD = "?"
"""Instead of the SHA-256 of a file that the reader does not give."""
LARGEST = 64 << 20
SECONDS = 60
"""For one program."""
MANY = 100
"""Files and directories that are asked for one by one, a process each."""


class Refused(Exception):
    """The reader can't read this image; its own words."""


class Reader(NamedTuple):
    name: str
    package: str
    """Debian's, with the program that must be there."""
    program: str
    read: Callable[[Path, Collection[bytes]], Tree]
    """Of an image, which may be written to, and the paths whose content is asked for."""
    folds: bool = False
    """Its names are the disk's but for capitals."""
    is_kernel: bool = False
    """This machine's: it replays journals, and a disk that was damaged on purpose is none for it."""


def is_here(program: str) -> bool:
    return shutil.which(program, path=_environment()["PATH"]) is not None


def run(*command: str | os.PathLike[str], ok: Collection[int] = (0,)) -> bytes:
    """The standard output of a program."""
    try:
        done = subprocess.run(
            [os.fspath(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True,
            env=_environment(), timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Refused(f"no answer in {SECONDS} s") from error
    if done.returncode not in ok:
        words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise Refused(words[-1] if words else f"status {done.returncode}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- a folder that holds the files -------------------------------------------------------------------------


def of_folder(folder: Path) -> Tree:
    """What lies in a folder, whether it is mounted or was filled."""
    top, tree = os.fsencode(folder), Tree()
    for base, folders, names in os.walk(top):
        for name in folders + names:
            path = os.path.join(base, name)
            tree[path[len(top) :]] = _content(path)
    return tree


def _content(path: bytes) -> str | None:
    try:
        about = os.lstat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return UNREAD


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    where = Path(tempfile.mkdtemp(prefix="bmap-reader-"))
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _filled(*command: str, ok: Collection[int] = (0,)) -> Callable[[Path, Collection[bytes]], Tree]:
    """A program that writes all files to a folder: {image} and {folder} stand for both in its words."""

    def read(image: Path, _: Collection[bytes]) -> Tree:
        with folder() as where:
            out = where / "out"
            out.mkdir()
            run(*(word.format(image=image, folder=out) for word in command), ok=ok)
            return of_folder(out)

    return read


def _mounted(*command: str) -> Callable[[Path, Collection[bytes]], Tree]:
    """The same of one that mounts it there; {loop} is a loop device with the image."""

    def read(image: Path, _: Collection[bytes]) -> Tree:
        loop = run("losetup", "-f", "--show", image).decode().strip() if "{loop}" in command else ""
        try:
            with folder() as where:
                run(*(word.format(image=image, loop=loop, folder=where) for word in command))
                try:
                    return of_folder(where)
                finally:
                    run("umount", where)
        finally:
            if loop:
                run("losetup", "-d", loop)

    return read


# ---- a list, and the files one by one ----------------------------------------------------------------------

FLS = re.compile(rb"(.)/(.) (\* )?([\d-]+)(?:\(realloc\))?:\t(.*)")
"""A line of fls: types by the name and by the inode, `*` if deleted, number, path."""


EXFAT_OWN = (b"$ALLOC_BITMAP", b"$UPCASE_TABLE", b"$VOLUME_GUID", b"$TEX_FAT", b"$ACT")


def _sleuthkit(kind: str) -> Callable[[Path, Collection[bytes]], Tree]:
    """The Sleuth Kit; what it makes up itself (v, V), deleted names, streams and labels are left out."""

    def read(image: Path, wanted: Collection[bytes]) -> Tree:
        tree = Tree()
        for line in run("fls", "-f", kind, "-r", "-p", image).split(b"\n"):
            match = FLS.fullmatch(line)
            if not match:
                continue
            _, found, deleted, number, name = match.groups()
            path = b"/" + name
            is_stream = kind == "ntfs" and b":" in name
            is_none = name.endswith(b" (Volume Label Entry)") or (kind == "exfat" and name in EXFAT_OWN)
            if deleted or found in b"vV" or is_stream or is_none:
                continue
            tree[path] = None
            if path in wanted:
                try:
                    tree[path] = digest(run("icat", "-f", kind, image, number.decode()))
                except Refused:
                    tree[path] = UNREAD
        return tree

    return read


def _grub(image: Path, wanted: Collection[bytes]) -> Tree:
    """GRUB's readers, one directory and one file at a time."""
    tree, left, looked = Tree(), [b"/"], 0
    while left:
        above, looked = left.pop(), looked + 1
        if looked > MANY:
            raise Refused("more directories than it is asked for, one by one")
        place = "(loop0)" + os.fsdecode(above)
        for line in run("grub-fstest", image, "ls", "--", "-l", "-a", place).split(b"\n"):
            words = re.fullmatch(rb"(\S+)\s+(?:[-\d]{14,} )?(.*)", line)
            if not words or words[2] in (b"./", b"../", b".", b".."):
                continue
            path = above + words[2].removesuffix(b"/")
            if words[1] == b"DIR":
                left.append(path + b"/")
            tree[path] = None
            if path in wanted:
                try:
                    tree[path] = digest(run("grub-fstest", image, "cat", "(loop0)" + os.fsdecode(path)))
                except Refused:
                    tree[path] = UNREAD
    return tree


OWN = (b"/[SYS]", b"/[BOOT]", b"/[UNKNOWN]", b"/[DELETED]")
"""Folders that 7-Zip makes up."""

DFVFS = "BMAP_DFVFS"
"""Names a Python that has the package dfvfs: it brings the readers of libyal."""
DFVFS_WALK = """
import hashlib, json, sys
from dfvfs.lib import definitions
from dfvfs.path import factory
from dfvfs.resolver import resolver
kind, image, largest = sys.argv[1], sys.argv[2], int(sys.argv[3])
raw = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=image)
root = factory.Factory.NewPathSpec(kind, location="\\\\" if kind in ("NTFS", "FAT") else "/", parent=raw)
left = [("", resolver.Resolver.OpenFileEntry(root))]
while left:
    above, entry = left.pop()
    for child in entry.sub_file_entries:
        path, content = above + "/" + child.name, None
        if child.IsFile() and (child.size or 0) <= largest:
            try:
                file = child.GetFileObject()
                content = hashlib.sha256(file.read() if file else b"").hexdigest()
            except OSError:
                content = "?"
        print(json.dumps([path, content]))
        if child.IsDirectory() and not child.IsLink():
            left.append((path, child))
"""


def _dfvfs(kind: str) -> Callable[[Path, Collection[bytes]], Tree]:
    """dfVFS, with libyal's reader of this kind."""

    def read(image: Path, _: Collection[bytes]) -> Tree:
        lines = run(os.environ[DFVFS], "-c", DFVFS_WALK, kind, image, str(LARGEST)).splitlines()
        return {path.encode(errors="surrogateescape"): content for path, content in map(json.loads, lines)}

    return read


# ---- all of them -------------------------------------------------------------------------------------------


def _kernel(kind: str, options: str = "") -> Reader:
    mount = _mounted("mount", "-t", kind, "-o", f"ro{options}", "{loop}", "{folder}")
    return Reader("Linux", "mount", "mount", mount, is_kernel=True)


def _seven(kind: str) -> Reader:
    fill = _filled("7zz", "x", "-y", f"-t{kind}", "-o{folder}", "{image}", ok=(0, 1, 2))

    def read(image: Path, wanted: Collection[bytes]) -> Tree:
        """Its own folders are none of the disk's; streams are left out."""
        return {
            path.removeprefix(b"/[SYSTEM]"): found
            for path, found in fill(image, wanted).items()
            if not path.startswith(OWN) and not (kind == "NTFS" and b":" in path) and path != b"/[SYSTEM]"
        }

    return Reader("7-Zip", "7zip", "7zz", read)


def _tsk(kind: str) -> Reader:
    return Reader("The Sleuth Kit", "sleuthkit", "fls", _sleuthkit(kind))


def _libyal(kind: str) -> Reader:
    return Reader(f"libyal ({kind})", "", os.environ.get(DFVFS, "-"), _dfvfs(kind))


GRUB = Reader("GRUB", "grub-common", "grub-fstest", _grub)
SMALL = GRUB._replace(folds=True)
"""It gives names of eight and three letters in small ones."""
EXT = (
    _kernel("ext4"),
    Reader("debugfs", "e2fsprogs", "debugfs", _filled("debugfs", "-R", "rdump / {folder}", "{image}")),
    _tsk("ext"), _libyal("EXT"), _seven("Ext"), GRUB,
)  # fmt: skip
READERS: dict[str, tuple[Reader, ...]] = {
    "ext2": EXT, "ext3": EXT, "ext4": EXT,
    "xfs": (_kernel("xfs", ",nouuid"), _libyal("XFS"), GRUB),
    "btrfs": (
        _kernel("btrfs", ",subvolid=5"),
        Reader("btrfs restore", "btrfs-progs", "btrfs",
               _filled("btrfs", "restore", "-s", "-S", "-i", "-o", "{image}", "{folder}")),
        GRUB,
    ),
    "ntfs": (
        Reader("ntfs-3g", "ntfs-3g", "ntfs-3g",
               _mounted("ntfs-3g", "-o", "ro,norecover,show_sys_files,streams_interface=none",
                        "{image}", "{folder}")),
        _tsk("ntfs"), _libyal("NTFS"), _seven("NTFS"), GRUB,
    ),
    "vfat": (
        Reader("mtools", "mtools", "mcopy", _filled("mcopy", "-s", "-n", "-i", "{image}", "::/", "{folder}")),
        _tsk("fat"), _libyal("FAT"), _seven("FAT"), SMALL,
    ),
    "exfat": (
        Reader("exfat-fuse", "exfat-fuse", "mount.exfat-fuse",
               _mounted("mount.exfat-fuse", "-o", "ro", "{loop}", "{folder}")),
        _tsk("exfat"), _libyal("FAT"), GRUB,
    ),
    "iso9660": (
        Reader("xorriso", "xorriso", "xorriso",
               _filled("xorriso", "-osirrox", "on", "-indev", "stdio:{image}", "-extract", "/", "{folder}")),
        _tsk("iso9660"), _seven("Iso"), SMALL,
    ),
    "udf": (_seven("Udf"), GRUB),
    "squashfs": (
        _kernel("squashfs"),
        Reader("unsquashfs", "squashfs-tools", "unsquashfs",
               _filled("unsquashfs", "-f", "-no-progress", "-d", "{folder}", "{image}", ok=(0, 1, 2))),
        _seven("SquashFS"), GRUB,
    ),
    "erofs": (
        _kernel("erofs"),
        Reader("fsck.erofs", "erofs-utils", "fsck.erofs",
               _filled("fsck.erofs", "--extract={folder}", "--overwrite", "{image}")),
    ),
    "f2fs": (GRUB,),
    "minix": (GRUB,),
}  # fmt: skip
