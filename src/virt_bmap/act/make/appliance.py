"""What only a kernel with device-mapper and md can do, done in the small virtual machine of libguestfs:
arrays, thin volumes, mounts that this host can't make.

Sources: guestfish(1), guestfs(3) of libguestfs 1.48.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from virt_bmap.act.make import tools
from virt_bmap.act.make.filesystems import FILESYSTEMS
from virt_bmap.core.errors import ImageError, MissingTool

TIMEOUT = 900.0
"""Seconds for one launch and all that is done in it: without KVM the launch alone takes up to a minute."""
EMULATED = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}

LABEL = "made"
DISK = f"/dev/disk/guestfs/{LABEL}"
"""The disk's name for programs in the machine itself, where /dev/sda may be the machine's own disk."""

Step = tuple[str, ...]
"""A command of guestfish with its arguments."""


def run(disk: Path, steps: Sequence[Step]) -> None:
    """Run commands of guestfish with a raw image as /dev/sda.

    Where the machine does not start, once more without KVM (there are hosts where /dev/kvm opens and does not
    work). Raises ImageError with guestfish's words."""
    script = "\n".join(
        " ".join([step[0], *map(_quoted, step[1:])])
        for step in [("add", str(disk), "format:raw", f"label:{LABEL}"), ("run",), *steps]
    )
    try:
        tools.run("guestfish", stdin=script + "\n", timeout=TIMEOUT)
    except MissingTool:
        raise
    except ImageError as error:
        if "LIBGUESTFS_BACKEND_SETTINGS" in os.environ or "guestfs_launch failed" not in str(error):
            raise
        tools.run("guestfish", stdin=script + "\n", timeout=TIMEOUT, env=EMULATED)


def shell(*words: str) -> Step:
    """A program of the virtual machine itself, for what guestfish has no command for.

    Words must not need quoting in a shell.
    """
    return ("debug", "sh", " ".join(words))


def fill(device: str, kind: str, archive: Path) -> list[Step]:
    """Put a tar archive into the filesystem on a device."""
    extended = ("xattrs:true", "acls:true") if FILESYSTEMS[kind].extended else ()
    return [("mount", device, "/"), ("tar-in", str(archive), "/", *extended), ("umount", "/")]


def archived(tree: Path, archive: Path) -> Path:
    """A tar archive of what is in a tree, with owners by number, holes, ACLs and extended attributes."""
    tools.run("tar", "-C", tree, "--numeric-owner", "--sparse", "--xattrs", "--acls", "-cf", archive, ".")
    return archive


def _quoted(word: str) -> str:
    """In guestfish's double quotes a backslash escapes these."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
