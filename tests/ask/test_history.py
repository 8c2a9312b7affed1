"""Whose free bytes were: files of known content are deleted, and what still lies on the disk must be said to
be theirs. The Sleuth Kit as second oracle."""

import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from diff_images import fuse_ntfs
from fat_images import UTF8
from support import mounted, need, need_root, run
from virt_bmap.ask import history
from virt_bmap.model import tables
from virt_bmap.open.disks import Disks
from virt_bmap.survey import maps

KINDS = ("fat12", "fat16", "fat32", "ntfs", "exfat", "ext2", "btrfs")
SLEUTHKIT = {"fat12": "fat12", "fat16": "fat16", "fat32": "fat32", "ntfs": "ntfs", "ext2": "ext2"}
"""How it calls those that it reads; its `fls -d` does not end on these exFATs."""
FILES = {
    "/dir/decoy": 9_000, "/dir/FIRST.TXT": 50_000, "/dir/a long name of a file.html": 30_000,
    "/dir/kept.bin": 70_000, "/gone dir/inside of it.data": 41_000, "/gone dir/deeper/at the bottom": 6_000,
    "/dir/last.txt": 20_000,
}  # fmt: skip
"""Paths and sizes of the first files, in the order in which they are written."""
DELETED = [path for path in FILES if path not in ("/dir/kept.bin", "/dir/last.txt")]
SECTOR, CLUSTER = 512, 4096


def content(path: str, size: int) -> bytes:
    return random.Random(path).randbytes(size)


@dataclass
class Volume:
    """A filesystem, and how to work on it: `change(add, delete)` writes files and deletes files or whole
    directories, as one mount."""

    kind: str
    image: Path
    change: Callable[[dict[str, bytes], list[str]], None]
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, *paths: str, size: int | None = None) -> None:
        new = {path: content(path, FILES[path] if size is None else size) for path in paths}
        self.files |= new
        self.change(new, [])

    def places(self, *paths: str) -> dict[int, tuple[str, int]]:
        """Byte of the disk to (path, byte of the file): what of the files' content lies on the disk, by whole
        sectors."""
        sectors = {
            self.files[path][at : at + SECTOR]: (path, at)
            for path in paths
            for at in range(0, len(self.files[path]) - SECTOR, SECTOR)
        }
        data = self.image.read_bytes()
        found = ((at, sectors.get(data[at : at + SECTOR])) for at in range(0, len(data), SECTOR))
        return {at: place for at, place in found if place}


def mtools(image: Path) -> Callable[[dict[str, bytes], list[str]], None]:
    times = itertools.count(1_700_000_000 if "again" not in str(image) else 1_710_000_000, 10)

    def change(add: dict[str, bytes], delete: list[str]) -> None:
        source = image.parent / "source"
        source.mkdir(exist_ok=True)
        for path, data in add.items():
            for folder in [str(each) for each in reversed(Path(path).parents)][1:]:
                if run("mdir", "-b", "-i", image, f"::{folder}", ok=(0, 1), env=UTF8) == b"":
                    run("mmd", "-i", image, f"::{folder}", env=UTF8)
            file = source / Path(path).name
            file.write_bytes(data)
            os.utime(file, (0, next(times)))
            run("mcopy", "-m", "-i", image, file, f"::{path}", env=UTF8)
        for path in delete:
            run("mdeltree", "-i", image, f"::{path}", env=UTF8)

    return change


def mounting(
    mount: Callable[[], "contextlib.AbstractContextManager[Path]"],
) -> Callable[[dict[str, bytes], list[str]], None]:
    def change(add: dict[str, bytes], delete: list[str]) -> None:
        with mount() as top:
            for path, data in add.items():
                (top / path[1:]).parent.mkdir(parents=True, exist_ok=True)
                (top / path[1:]).write_bytes(data)
            for path in delete:
                run("rm", "-r", top / path[1:])

    return change


def debugfs(image: Path) -> Callable[[dict[str, bytes], list[str]], None]:
    """libext2fs, which leaves a deleted inode its pointers."""
    times = itertools.count(1_700_000_000 if "again" not in str(image) else 1_710_000_000, 10)

    def change(add: dict[str, bytes], delete: list[str]) -> None:
        commands = image.parent / "commands"
        lines = []
        for number, (path, data) in enumerate(add.items()):
            lines += [f'mkdir "{each}"' for each in [str(each) for each in reversed(Path(path).parents)][1:]]
            (image.parent / f"in{number}").write_bytes(data)
            lines.append(f'write {image.parent}/in{number} "{path}"')
        for path in delete:
            lines += [f'rm "{file}"' for file in DELETED if file.startswith(f"{path}/")] or [f'rm "{path}"']
        commands.write_text("\n".join(lines) + "\n")
        run("debugfs", "-w", "-f", commands, image, env={"E2FSPROGS_FAKE_TIME": str(next(times))})

    return change


def make(kind: str, folder: Path, size: int = 0) -> Volume:
    """An empty volume of a kind, as small as it can be."""
    image = folder / f"{kind}.img"
    command, package, megabytes = {
        "fat12": (["mkfs.fat", "-F", "12", "-s", "4"], "dosfstools", 4),
        "fat16": (["mkfs.fat", "-F", "16", "-s", "1"], "dosfstools", 8),
        "fat32": (["mkfs.fat", "-F", "32", "-s", "1"], "dosfstools", 33),
        "ntfs": (["mkntfs", "-QFq"], "ntfs-3g", 16), "exfat": (["mkfs.exfat", "-c", "4k"], "exfatprogs", 16),
        "ext2": (["mke2fs", "-q", "-t", "ext2"], "e2fsprogs", 8),
        "ext4": (["mke2fs", "-q", "-t", "ext4"], "e2fsprogs", 16),
        "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs", 128),
    }[kind]  # fmt: skip
    need(command[0], package)
    with open(image, "wb") as file:
        file.truncate(size or megabytes << 20)
    run(*command, image)
    if kind.startswith("fat"):
        need("mcopy", "mtools")
        return Volume(kind, image, mtools(image))
    if kind == "ext2":
        return Volume(kind, image, debugfs(image))
    need_root()
    if kind == "ntfs":
        return Volume(kind, image, mounting(lambda: fuse_ntfs(image)))
    if kind == "exfat":
        need("mount.exfat-fuse", "exfat-fuse")
    return Volume(kind, image, mounting(lambda: mounted(image, kind={"exfat": "exfat-fuse"}.get(kind, kind))))


@pytest.fixture(scope="module", params=KINDS)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """Files written, some of them deleted, a whole directory among them."""
    made = make(request.param, tmp_path_factory.mktemp("history"))
    made.add(*FILES)
    made.change({}, ["/dir/decoy", "/dir/FIRST.TXT", "/dir/a long name of a file.html", "/gone dir"])
    return made


def explained(image: Path, offset: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "virt_bmap", "explain", "--json", image, str(offset)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    return json.loads(done.stdout)


class Asked:
    """An image opened once, asked of many bytes."""

    def __init__(self, image: Path) -> None:
        self.image = image

    def __enter__(self) -> "Asked":
        self.stack = contextlib.ExitStack()
        self.bmap, self.readers = self.stack.enter_context(maps.opened(Disks([str(self.image)])))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def __call__(self, at: int) -> list[tuple[list[str], int, str | None]]:
        """(paths, byte of the file, doubt) of all former owners of a byte of the disk, the last one first."""
        owners = self.bmap.owners(1, np.array([at]), np.array([at + 1]))
        (row,) = np.flatnonzero(owners.extent >= 0)[:1]
        volume, inside = int(owners.volume[row]), int(owners.inside[row])
        found = history.former_owners(
            self.bmap, volume, self.readers[volume], np.array([inside]), np.array([inside + 1])
        )
        tables.check("former", found)
        return [([name.decode() for name in row["names"]], row["file_offset"] + inside - row["volume_offset"],
                row["doubt"])
                for row in found.to_pylist()]  # fmt: skip

    def kind(self, at: int) -> str:
        owners = self.bmap.owners(1, np.array([at]), np.array([at + 1]))
        return self.bmap.extents.column("kind")[int(owners.extent[owners.extent >= 0][0])].as_py()


def is_told(kind: str, said: str, path: str) -> bool:
    """Is `said` what the metadata can still tell of a path? FAT loses the first letter of names without a
    long one, ext2 the directory."""
    if kind == "ext2":
        return said == Path(path).name
    theirs, ours = said.split("/"), path.split("/")
    lost = kind.startswith("fat")
    return len(theirs) == len(ours) and all(
        a == b or (lost and a == f"?{b[1:]}") for a, b in zip(theirs, ours, strict=True)
    )


def test_bytes_that_still_lie_there_are_said_to_be_the_deleted_files(volume: Volume) -> None:
    with Asked(volume.image) as ask:
        places = volume.places(*DELETED)
        assert len(places) == sum((len(volume.files[path]) - 1) // SECTOR for path in DELETED), (
            "nothing was written since"
        )
        for at, (path, offset) in list(places.items())[::3]:
            assert ask.kind(at + 5) == "free"
            found = ask(at + 5)
            assert any(
                is_told(volume.kind, name, path) and byte == offset + 5
                for names, byte, _ in found
                for name in names
            ), (
                path,
                at,
                found,
            )
            sure = [name for names, _, doubt in found if doubt is None for name in names]
            assert all(is_told(volume.kind, name, path) for name in sure), "what is not certain has a doubt"
        for at in list(volume.places("/dir/kept.bin", "/dir/last.txt"))[::9]:
            assert ask.kind(at) == "data"
            assert ask(at) == []


def test_the_sleuth_kit_names_the_same(volume: Volume) -> None:
    need("ifind", "sleuthkit")
    if volume.kind not in SLEUTHKIT:
        pytest.skip("The Sleuth Kit is no help with it")
    kind = SLEUTHKIT[volume.kind]
    said = run("fsstat", "-f", kind, volume.image).decode()
    unit = int(re.search(r"(?:Cluster|Block) Size: (\d+)", said)[1]) if kind in ("ntfs", "ext2") else 512
    listed = dict(
        re.findall(
            r"^-?.?/.?.? \* (\d+)[-\d]*(?:\(realloc\))?:\t(.*)$",
            run("fls", "-rdp", "-f", kind, volume.image).decode(),
            re.M,
        )
    )
    compared = 0
    with Asked(volume.image) as ask:
        for path in DELETED:
            at, offset = next((at, offset) for at, (_, offset) in volume.places(path).items())
            number = (
                run("ifind", "-f", kind, "-d", str(at // unit), volume.image).decode().strip().split("-")[0]
            )
            if number not in listed:  # what it does not find by itself it can't confirm
                continue
            theirs = Path(listed[number]).name
            mine = {Path(name).name for names, byte, _ in ask(at) if byte == offset for name in names}
            assert theirs.lower().lstrip("_") in {name.lower().lstrip("?") for name in mine}, (
                path,
                listed[number],
                mine,
            )
            compared += 1
    assert compared >= 2, listed


def test_a_cluster_that_was_used_again(volume: Volume, tmp_path: Path) -> None:
    """The disk is filled, so that new files take the places of deleted ones; then these are deleted, too."""
    if volume.kind == "btrfs":
        pytest.skip("other transactions than the last four are gone when the disk is full")
    image = tmp_path / f"again-{volume.image.name}"
    image.write_bytes(volume.image.read_bytes())
    again = Volume(volume.kind, image, _same(volume, image), dict(volume.files))
    old = volume.places(*DELETED)
    for number in range(0, 600, 12):  # a dozen files after the others, until nothing is left to take
        try:
            again.add(*(f"/new/file {each} of many" for each in range(number, number + 12)), size=64_000)
        except (AssertionError, OSError):
            break
        if len(again.places(*DELETED)) < len(old) - 64:
            break
    taken = again.places(*(path for path in again.files if path.startswith("/new/")))
    shared = sorted(set(taken) & set(old))[::4]
    assert shared, "some clusters were used again"
    with Asked(image) as ask:
        for at in shared:
            assert ask.kind(at) == "data"
            assert ask(at) == [], "what is somebody's now has no former owner"
    again.change({}, sorted({taken[at][0] for at in shared}))
    with Asked(image) as ask:
        for at in shared:
            path, offset = taken[at]
            if volume.kind.startswith("fat") and taken.get(at - offset) != (path, 0):
                continue  # not in one piece, of which no entry tells
            if volume.kind == "exfat" and offset >= CLUSTER:
                continue  # the driver wipes the chain of what is not in one piece
            names, byte, _ = ask(at)[0]
            assert (Path(path).name, offset) in [(Path(name).name, byte) for name in names], (
                "the last owner comes first"
            )


def _same(volume: Volume, image: Path) -> Callable[[dict[str, bytes], list[str]], None]:
    if volume.kind.startswith("fat"):
        return mtools(image)
    if volume.kind == "ext2":
        return debugfs(image)
    return mounting(
        (lambda: fuse_ntfs(image)) if volume.kind == "ntfs" else lambda: mounted(image, kind="exfat-fuse")
    )
