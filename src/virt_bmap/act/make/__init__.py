"""Prepared disk images: `make("lvfs:/dev/vg/root:ext4:10G", "disk.qcow2", tree="rootfs")`."""

import errno
import os
from pathlib import Path

from virt_bmap.act.make import disk, filesystems, tools
from virt_bmap.act.make.spec import parse
from virt_bmap.core.errors import OutputError, UsageError
from virt_bmap.formats import registry as formats
from virt_bmap.host.files import dress_as
from virt_bmap.host.leftovers import hidden_folder
from virt_bmap.model.contract import RAW


def containers() -> dict[str, str]:
    """Extensions of the output, and what qemu-img calls their format; all others are raw."""
    return {format.suffix: format.name for format in formats.images() if format.suffix}


def make(
    text: str, out: str, tree: str | None = None, key_file: str | None = None, force: bool = False
) -> list[str]:
    """Make the disk that a SPEC describes: the means that were used.

    `out` takes its name when it is complete.

    Raises UsageError (the SPEC, an output that exists),
    MissingTool, ImageError with a tool's words, OutputError.
    """
    spec = parse(text)
    if tree and spec.kind in ("disk", "part", "lv"):
        raise UsageError(f"{spec.kind} makes no filesystem that --tree could fill")
    if key_file and spec.kind != "luks":
        raise UsageError(f"--key-file is for luks; {spec.kind} encrypts nothing")
    if key_file and not os.path.isfile(key_file):
        raise UsageError(f"--key-file {key_file}: there is no such file")
    source = filesystems.folder_of(tree) if tree else None
    target = _target(out, force)
    if source and target.is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies in the tree {tree} that it is to hold; name another place")
    try:
        with hidden_folder(str(target)) as name:
            folder = Path(name)
            trees = (
                {}
                if source is None
                else disk.split(source, folder)
                if spec.kind.startswith("boot")
                else {"/": source}
            )
            work = disk.Work(
                spec, folder, folder / "disk.img", trees, Path(key_file).absolute() if key_file else None
            )
            disk.build(work)
            made = work.disk
            if format := containers().get(target.suffix.lower()):
                made = folder / "converted"
                tools.run("qemu-img", "convert", "-f", RAW, "-O", format, work.disk, made)
            with open(made, "rb") as file:
                dress_as(str(target), file.fileno())
            os.replace(made, target)
    except OSError as error:
        raise OutputError(
            f"{out}: can't be made: {os.strerror(error.errno) if error.errno else error}"
        ) from error
    return sorted(work.how)


def _target(out: str, force: bool) -> Path:
    """The file that is to be made. Raises UsageError and OutputError before anything is done."""
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_file():
        raise UsageError(
            f"{out}: is {'a directory' if target.is_dir() else 'not a regular file'}; "
            "make writes regular files only"
        )
    if target.exists() and not force:
        raise UsageError(f"{out}: exists already; --force replaces it")
    if not target.parent.is_dir():
        raise OutputError(f"{out}: can't be made: {os.strerror(errno.ENOENT)}")
    return target
