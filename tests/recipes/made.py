"""What recipes share: what they give back, the files that go into most images, and the truth about them."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ext_images

MIB = 1 << 20
UTF8 = {"LC_ALL": "C.UTF-8"}
Tree = dict[bytes, str | None]
"""The files of a filesystem: the hash of a plain file's content by its path, None for all that is none."""


class Made(NamedTuple):
    """The disks of one machine, in order; and what went into their filesystems, by device, as whoever filled
    them saw it. Devices of which nobody knows are left out."""

    disks: list[Path]
    trees: Mapping[str, Tree] = {}


Recipe = Callable[[Path], Made]


def one(disk: Path, tree: Tree | None = None) -> Made:
    """A single disk with one filesystem on all of it."""
    return Made([disk], {} if tree is None else {"/dev/sda": tree})


def digest(data: bytes) -> str:
    """The hash by which content is compared."""
    return hashlib.sha256(data).hexdigest()


def seen(folder: Path) -> Tree:
    """What the kernel shows in a folder."""
    found: Tree = {}
    top = os.fsencode(folder)
    for where, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = os.path.join(where, name)
            is_plain = os.path.isfile(path) and not os.path.islink(path)
            found[path[len(top) :]] = digest(Path(os.fsdecode(path)).read_bytes()) if is_plain else None
    return found


def blank(path: Path, size: int) -> Path:
    """A file of zeroes that takes no space."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def put(image: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of an image."""
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(data)


def copy(image: Path) -> Path:
    """The image as it is at this moment, under its own name once it is no longer mounted."""
    return Path(shutil.copy(image, image.with_suffix(".copy")))


def tree(folder: Path) -> Path:
    """The files that go into most of these images; the ext recipes' tree, with fewer names and what
    compresses."""
    where = folder / "tree"
    where.mkdir()
    ext_images.fill(where, names=120)
    (where / "text").write_bytes(b"hello world, again and again\n" * 2000)
    return where


def plain_tree(folder: Path) -> Path:
    """The same without what some tools do not take: pipes, names with bytes that are not UTF-8, very long
    links."""
    where = tree(folder)
    (where / "fifo").unlink()
    (where / "long").unlink()
    for path in os.listdir(os.fsencode(where)):
        if not os.fsdecode(path).isprintable():
            os.unlink(os.path.join(os.fsencode(where), path))
    return where
