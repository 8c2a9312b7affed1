"""Filesystems as a map has them, beside what readers of other projects find."""

import hashlib
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from others import appliance
from others import readers as others
from others.corpus import PIECE, sliced
from others.readers import LARGEST, MANY, READERS, UNREAD, Refused, Tree, folder
from virt_bmap import Disks, opened
from virt_bmap.ask.content import Files, spread
from virt_bmap.core.errors import BmapError
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.tables import DAMAGED, RECOVERED
from virt_bmap.open.nbd import NbdReader
from virt_bmap.open.raw import RawReader

DAMAGED_ON_PURPOSE = ("corrupt", "test-of-corruption")
"""What the inventory says of disks that no kernel should be given."""
APPLIANCE = "Linux 6.1 of libguestfs"
DISKS = 100
"""Of one launch."""
FOLDED = ("iso9660", "vfat")
"""Formats of which Linux shows short names in small letters."""
LARGEST_COPY = 1 << 30
"""Bytes of a volume that lies in pieces, which is read and written whole."""


class Row(NamedTuple):
    """One filesystem and one reader."""

    type: str
    image: str
    reader: str
    paths: int
    """In both."""
    contents: int
    """Equal."""
    unread: int
    """Files that one of both does not give."""
    missing: str
    """What only the reader has."""
    extra: str
    """Files and directories that only the map has."""
    differ: str
    """Files of other contents."""
    refused: str
    """Why the reader reads nothing."""


class Ours(NamedTuple):
    tree: Tree
    """As the map has it: living files alone."""
    aside: set[bytes]
    """What is named as a file and holds the filesystem itself, such as $MFT."""
    special: set[bytes]
    """Links, devices, pipes: some readers show none of them."""


def compared(type: str, image: str, name: str, found: Ours, theirs: Tree) -> Row:
    if found.tree and not theirs:
        return refused(type, image, name, "it lists nothing, and says no reason")
    mine, both = found.tree, found.tree.keys() & theirs.keys()
    files = [path for path in both if mine[path] and theirs[path]]
    unread = [path for path in files if UNREAD in (mine[path], theirs[path])]
    differ = [path for path in files if path not in unread and mine[path] != theirs[path]]
    missing, extra = theirs.keys() - both - found.aside, mine.keys() - both - found.special
    told = [repr(sorted(paths)) for paths in (missing, extra, differ)]
    return Row(
        type, image, name, len(both), len(files) - len(unread) - len(differ), len(unread), *told, refused=""
    )


def volume_as_file(bmap: BlockMap, readers: list[Reader], volume: int, image: Path, target: Path) -> None:
    """One volume's bytes, of a pool its only device's. Where they lie in one piece on the disk they come from
    the image itself, through qemu-img if QEMU has to open it, and through nothing of ours."""
    if bmap.volumes.column("kind")[volume].as_py() == "pool":
        parents = set(bmap.rows_of(volume).parent.tolist())
        if len(parents) != 1:
            raise Refused("lies on several devices")
        volume = parents.pop()
    size = readers[volume].size
    rows = bmap.descend(volume, np.zeros(1, np.int64), np.array([size], np.int64))
    disk = int(rows.volume[0]) if len(rows.volume) == 1 else -1
    is_whole = disk >= 0 and int(rows.end[0] - rows.start[0]) == size
    if is_whole and isinstance(readers[disk], RawReader):
        sliced(image, int(rows.start[0]), size, target)
    elif is_whole and isinstance(readers[disk], NbdReader):
        raw = target.with_suffix(".raw")
        others.run("qemu-img", "convert", "-O", "raw", image, raw)
        sliced(raw, int(rows.start[0]), size, target)
    elif size > LARGEST_COPY:
        raise Refused("lies in pieces, and is large")
    else:
        with target.open("wb") as file:
            for at in range(0, size, PIECE):
                file.write(readers[volume].read(at, min(PIECE, size - at)))


def ours(bmap: BlockMap, volume: int, reader: Reader) -> Ours:
    files = Files(bmap, volume, reader)
    inodes, paths = bmap.paths(volume)
    gone = files.is_deleted(inodes.tolist())
    found = Ours({}, {b"/"}, set())
    for inode, path, is_gone in zip(inodes.tolist(), paths.to_pylist(), gone, strict=True):
        if files.is_kind(inode, tables.T_METADATA) or path == b"/":
            found.aside.add(path)
        elif not is_gone:
            found.tree[path] = _content(files, inode)
            if not (files.is_kind(inode, tables.T_FILE) or files.is_kind(inode, tables.T_DIRECTORY)):
                found.special.add(path)
    return found


def _content(files: Files, inode: int) -> str | None:
    if not files.is_kind(inode, tables.T_FILE) or files.length(inode) > LARGEST:
        return None
    if files.refusal(inode):
        return UNREAD
    digest = hashlib.sha256()
    try:
        for piece in spread(files.pieces([inode]), files.length(inode)):
            digest.update(piece)
    except BmapError:
        return UNREAD
    return digest.hexdigest()


class Asked(NamedTuple):
    """A filesystem that the appliance is to look at."""

    label: str
    mine: Ours
    copy: Path


class Later(NamedTuple):
    where: Path
    """For the copies."""
    asked: dict[str, list[Asked]]
    """By format."""


def judged(image: Path, label: str, verdict: str, only: Collection[str], later: Later) -> Iterator[Row]:
    """All filesystems of one image."""
    with opened(Disks([str(image)])) as (bmap, readers), folder() as scratch:
        for system in bmap.filesystems.to_pylist():
            type, volume = system["type"], system["volume"]
            is_damaged = system["state"] == DAMAGED and not verdict.startswith("valid")
            if type not in READERS or system["root"] is None or is_damaged:
                continue
            names = [reader.name for reader in READERS[type]] + [APPLIANCE] * (type in later.asked)
            try:
                copy = scratch / "volume"
                volume_as_file(bmap, readers, volume, image, copy)
                mine = ours(bmap, volume, readers[volume])
            except Refused as error:
                yield from (refused(type, label, name, str(error)) for name in names)
                continue
            if type in later.asked:
                kept = later.where / f"{type}-{len(later.asked[type])}"
                subprocess.run(["cp", "--sparse=always", copy, kept], check=True)
                later.asked[type].append(Asked(label, mine, kept))
            wanted = set([path for path, content in mine.tree.items() if content][:MANY])
            for reader in sorted(READERS[type], key=lambda one: one.is_kernel):  # it may write
                if not others.is_here(reader.program) or (only and reader.name not in only):
                    continue
                if (
                    verdict.startswith(DAMAGED_ON_PURPOSE)
                    if reader.is_kernel
                    else system["state"] == RECOVERED
                ):
                    continue
                try:
                    theirs = reader.read(copy, wanted)
                    if reader.folds:
                        theirs = unfolded(theirs, mine.tree)
                    yield compared(type, label, reader.name, mine, theirs)
                except Refused as error:
                    yield refused(type, label, reader.name, str(error))


def unfolded(theirs: Tree, mine: Tree) -> Tree:
    """With the names of the map where they differ in capitals alone."""
    names = {path.lower(): path for path in mine}
    return {names.get(path.lower(), path): content for path, content in theirs.items()}


def refused(type: str, label: str, name: str, why: str) -> Row:
    return Row(type, label, name, 0, 0, 0, "[]", "[]", "[]", why)


def in_appliance(later: Later) -> Iterator[Row]:
    for type, asked in later.asked.items():
        for at in range(0, len(asked), DISKS):
            some = asked[at : at + DISKS]
            for one, tree in zip(
                some, appliance.trees(type, [one.copy for one in some], LARGEST), strict=True
            ):
                if isinstance(tree, str):
                    yield refused(type, one.label, APPLIANCE, tree)
                else:
                    theirs = unfolded(tree, one.mine.tree) if type in FOLDED else tree
                    yield compared(type, one.label, APPLIANCE, one.mine, theirs)
