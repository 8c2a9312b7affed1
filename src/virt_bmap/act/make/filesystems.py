"""Filesystems made and filled in plain files, by their own tools.

Where a tool can't put a tree into what it makes, a kernel has to, through a mount on this host (root), or in
libguestfs's appliance: `fill` says False then.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from virt_bmap.act.make import tools
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.host.leftovers import private_folder

Maker = Callable[[Path, Path | None], None]


class Type(NamedTuple):
    """One type of filesystem.

    `make(file, tree)` makes it over the whole of a file, and fills it where
    `fills` is "tool". "mount": a kernel has to, by the filesystem type
    `kernel`; "never": it holds no files. Partition types for MBR and GPT.
    `owners`: it keeps owners and modes of files; `extended`: and ACLs and extended attributes."""

    make: Maker
    fills: str
    mbr: str = "83"
    gpt: str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    kernel: str = ""
    owners: bool = True
    extended: bool = False


def _ext(kind: str) -> Maker:
    def make(file: Path, tree: Path | None) -> None:
        tools.run("mke2fs", "-q", "-F", "-t", kind, *(("-d", tree) if tree else ()), file)

    return make


def _command(*command: str) -> Maker:
    def make(file: Path, tree: Path | None) -> None:
        tools.run(*command, file)

    return make


def _btrfs(file: Path, tree: Path | None) -> None:
    tools.run("mkfs.btrfs", "-q", *(("--rootdir", tree) if tree else ()), file)


def _vfat(file: Path, tree: Path | None) -> None:
    tools.run("mkfs.fat", file)
    if tree and (found := tools.entries(tree)):
        tools.run("mcopy", "-s", "-m", "-Q", "-n", "-i", file, *found, "::/", env={"MTOOLS_SKIP_CHECK": "1"})


def _f2fs(file: Path, tree: Path | None) -> None:
    tools.run("mkfs.f2fs", "-q", file)
    if tree:
        tools.run("sload.f2fs", "-P", "-f", tree, file)


BASIC_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
FILESYSTEMS = {
    "ext2": Type(_ext("ext2"), "tool", extended=True),
    "ext3": Type(_ext("ext3"), "tool", extended=True),
    "ext4": Type(_ext("ext4"), "tool", extended=True),
    "xfs": Type(_command("mkfs.xfs", "-q", "-f"), "mount", kernel="xfs", extended=True),
    "btrfs": Type(_btrfs, "tool", extended=True),
    "vfat": Type(_vfat, "tool", "0c", BASIC_DATA, owners=False),
    "ntfs": Type(_command("mkntfs", "-F", "-Q", "-q"), "mount", "07", BASIC_DATA, "ntfs-3g", owners=False),
    "exfat": Type(_command("mkfs.exfat"), "mount", "07", BASIC_DATA, "exfat", owners=False),
    "f2fs": Type(_f2fs, "tool"),
    "minix": Type(_command("mkfs.minix", "-3"), "mount", "81", kernel="minix"),
    "swap": Type(_command("mkswap"), "never", "82", "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"),
}


def refuse_files(kind: str) -> None:
    """UsageError where this type holds no files."""
    if FILESYSTEMS[kind].fills == "never":
        raise UsageError(f"{kind} holds no files: leave --tree away")


def make(kind: str, file: Path, tree: Path | None) -> str | None:
    """Make a filesystem over the whole of a file and fill it with what is in `tree`: how that was done, or
    None where the tree is still to be put in, by the appliance. Raises ImageError with the tool's words,
    MissingTool, UsageError where this type holds no files."""
    found = FILESYSTEMS[kind]
    if tree:
        refuse_files(kind)
    try:
        found.make(file, tree if found.fills == "tool" else None)
    except ImageError as error:
        raise type(error)(f"{kind} of {file.stat().st_size:,} bytes: {error}") from error
    if not tree or found.fills == "tool":
        return "files"
    return "mount" if _filled(found, file, tree) else None


def _filled(found: Type, file: Path, tree: Path) -> bool:
    """Copy the tree in through a mount; False where this host can't mount it."""
    if not tools.can_loop():
        return False
    keep = ["-a"] if found.owners else ["--preserve=timestamps"]
    with private_folder() as folder:
        return tools.filled(file, found.kernel, Path(folder), tree, keep)


def folder_of(tree: str) -> Path:
    """The directory that is to be put in. Raises UsageError where it is not one."""
    if not os.path.isdir(tree):
        raise UsageError(
            f"--tree {tree}: {'is not a directory' if os.path.exists(tree) else 'there is no such directory'}"
        )
    return Path(tree).absolute()
