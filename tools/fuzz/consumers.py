"""What people do with a map, on the map of a damaged image.

The cheap consumers look at each; the others at some, by chance, which is the mutation's own.
"""

import contextlib
import io
import json
import os
import random
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from virt_bmap import cli
from virt_bmap.act.extract import extract
from virt_bmap.ask.content import Files, spread
from virt_bmap.ask.explain import explain, fields_at, history_at
from virt_bmap.ask.history import former_owners
from virt_bmap.ask.hits import hits
from virt_bmap.ask.records import owner_records
from virt_bmap.commands import locate as locate_command
from virt_bmap.commands.lookup import line
from virt_bmap.core.errors import BmapError
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.saved import bmap as text_map
from virt_bmap.saved import parquet

from .invariants import Broken, assert_answered
from .seeds import PASSPHRASE

if TYPE_CHECKING:
    from .images import Image

CONTENT = 32 << 20
"""Bytes of a file, or of a volume, that are read: a file can be made to look as long as a format allows, and
reading it takes as long as it takes."""
TREE = 256 << 20
"""Bytes of all files of a tree that is extracted: many can share one place."""


class Use(NamedTuple):
    """A map, and what it was made of."""

    rng: random.Random
    image: "Image"
    bmap: BlockMap
    readers: list[Reader]

    @property
    def sizes(self) -> list[int]:
        sizes = self.bmap.volumes.column("size")
        return [sizes[disk].as_py() for disk in self.bmap.disks]

    def place(self) -> tuple[int, int]:
        """(disk from 1, offset): in metadata mostly."""
        disk, low, high = self.rng.choice(self.rng.choice(self.image.classes))
        at = low + self.rng.randrange(min(high - low, 4096))
        sizes = self.sizes
        disk = disk if disk < len(sizes) else 0
        return disk + 1, min(at, sizes[disk] - 1) if self.rng.random() < 0.8 else self.rng.randrange(
            sizes[disk]
        )

    def words(self) -> list[str]:
        """The disks on a command line."""
        how = ["--host-offsets"] if self.image.host else ["--format", "raw"]
        how += ["--key", f"all:key:{PASSPHRASE.decode()}"]
        return [*how, *(word for path in self.image.paths for word in ("-a", path))]

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for results. What is written anywhere else in the worker's folder is a fault."""
        folder = self.image.work / "results"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        before = set(os.listdir(self.image.work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if more := set(os.listdir(self.image.work)) - before:
            raise Broken(f"written outside the folder for results: {sorted(more)[:3]}")


def command(*words: str) -> str:
    """Run a command in this process; what it printed."""
    kept = sys.stdout, sys.stderr
    printed = io.BytesIO()
    out = io.TextIOWrapper(printed, "utf-8", write_through=True)
    sys.stdout, sys.stderr = out, io.StringIO()
    try:
        cli.run(words)
        sys.stdout.flush()
    except SystemExit:  # argparse's
        pass
    finally:
        sys.stdout, sys.stderr = kept
        out.detach()  # it would close what it wrote to
    return printed.getvalue().decode(errors="replace")


# ---- always ------------------------------------------------------------------------------------------------


def text(use: Use) -> None:
    text_map.save(use.bmap, io.BytesIO())


def lookup(use: Use) -> None:
    for disk, size in enumerate(use.sizes, 1):
        starts = np.array([use.rng.randrange(size) for _ in range(24)])
        ends = np.minimum(starts + 4096, size)
        assert_answered(use.bmap, disk, starts, ends)
        for row in owner_records(use.bmap, disk, starts[:6], ends[:6]):
            line(row)


# ---- by chance ---------------------------------------------------------------------------------------------


def whole_lookup(use: Use) -> None:
    for disk, size in enumerate(use.sizes, 1):
        assert_answered(use.bmap, disk, np.array([0]), np.array([size]))


def explained(use: Use) -> None:
    for _ in range(4):
        disk, at = use.place()
        with contextlib.suppress(BmapError):
            answer = explain(use.bmap, disk, at)
            json.dumps(answer, ensure_ascii=False)
            json.dumps(
                [
                    fields_at(use.bmap, answer["layer"], use.readers, 64),
                    history_at(use.bmap, answer["layer"], use.readers),
                ]
            )


def explain_command(use: Use) -> None:
    disk, at = use.place()
    command("explain", *use.words(), f"{disk}:{at}")


def located(use: Use) -> None:
    inodes = use.bmap.inodes
    for _ in range(min(4, inodes.num_rows)):
        row = use.rng.randrange(inodes.num_rows)
        for piece in locate_command.pieces(
            use.bmap, inodes.column("volume")[row].as_py(), inodes.column("inode")[row].as_py()
        ):
            piece.update(device="d", path="p")
            locate_command.line(piece)


def files(use: Use) -> None:
    """The content of some files, a bounded part of each."""
    for volume in use.bmap.filesystems.column("volume").to_pylist():
        with contextlib.suppress(BmapError):
            found = Files(use.bmap, volume, use.readers[volume])
            inodes = use.bmap.slice_of("inodes", volume)[1].column("inode").to_pylist()
            for inode in use.rng.sample(inodes, min(8, len(inodes))):
                if found.is_kind(inode, tables.T_FILE) and not found.refusal(inode):
                    left = CONTENT
                    for piece in spread(found.pieces([inode]), min(found.length(inode), CONTENT)):
                        left -= len(piece)
                        if left <= 0:
                            break


def past(use: Use) -> None:
    """Who had the free bytes."""
    for volume in use.bmap.filesystems.column("volume").to_pylist():
        reader = use.readers[volume]
        with contextlib.suppress(BmapError):
            found = former_owners(use.bmap, volume, reader, np.array([0]), np.array([reader.size]))
            if found is not None:
                tables.check("former", found)


def _small(use: Use, volume: int) -> bool:
    """Are the files of a filesystem few enough bytes to copy? What they say, and what lies on the disk, which
    is not the same."""
    _, inodes = use.bmap.slice_of("inodes", volume)
    _, extents = use.bmap.slice_of("extents", volume)
    data = np.isin(tables.codes(extents, "kind"), (tables.DATA, tables.SYMLINK))
    length, long = tables.integers(extents, "length")[data], tables.integers(inodes, "size")
    return (
        float(length.astype(float).sum()) <= TREE
        and (len(long) == 0 or int(long.max()) < 1 << 62)
        and inodes.num_rows < 5000
    )


def extracted(use: Use) -> None:
    for volume in use.bmap.filesystems.column("volume").to_pylist()[:2]:
        with contextlib.suppress(BmapError):
            found = Files(use.bmap, volume, use.readers[volume])
            if not _small(use, volume):
                continue
            with use.scratch() as folder:
                extract(found, found.children(found.root), str(folder), False)
                _assert_harmless(folder)


def _assert_harmless(folder: Path) -> None:
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(where, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)) or (
                mode & 0o6000 and not stat.S_ISLNK(mode)
            ):
                raise Broken("extract made a special file, or one that runs as another")


def cat_command(use: Use) -> None:
    volumes = [
        v
        for v in use.bmap.filesystems.column("volume").to_pylist()
        if use.bmap.slice_of("names", v)[1].num_rows
    ]
    if volumes and not use.image.host:
        volume = use.rng.choice(volumes)
        inodes, paths = use.bmap.paths(volume)
        if len(inodes) == 0:
            return
        row = use.rng.randrange(len(inodes))
        found = use.bmap.slice_of("inodes", volume)[1]
        size = tables.integers(found, "size")[tables.integers(found, "inode") == inodes[row]]
        if len(size) and size[0] < CONTENT:
            command(
                "cat",
                *use.words(),
                use.bmap.volumes.column("name")[volume].as_py(),
                os.fsdecode(paths[row].as_py()),
            )


def dump_command(use: Use) -> None:
    volume = use.rng.randrange(use.bmap.volumes.num_rows)
    if use.bmap.volumes.column("size")[volume].as_py() < 4 * CONTENT and not use.image.host:
        with use.scratch() as folder:
            free = ["--skip-free"] if use.rng.random() < 0.5 else []
            command(
                "dump",
                "-q",
                *free,
                *use.words(),
                use.bmap.volumes.column("name")[volume].as_py(),
                str(folder / "volume"),
            )


def many_ranges(use: Use) -> None:
    starts = np.sort(np.array([use.rng.randrange(use.sizes[0]) for _ in range(40)]))
    hits(use.bmap, 1, starts, np.minimum(starts + 512, use.sizes[0]))


def nested(use: Use) -> None:
    from virt_bmap.open.disks import Nested

    with use.image.opened(Nested(frozenset(), True)):
        pass


def saved(use: Use) -> None:
    """The map in Parquet and back: the same tables; and a command that reads it."""
    with use.scratch() as folder:
        path = str(folder / "map.parquet")
        with open(path, "wb") as file:
            parquet.save(use.bmap, file)
        again = parquet.load(path)
        for name in BlockMap.TABLES:
            if not getattr(again, name).equals(getattr(use.bmap, name)):
                raise Broken(f"the table {name} is another after it was saved and loaded")
        disk, at = use.place()
        words = use.rng.choice([
            ["lookup", path, f"{disk}:{at}"], ["lookup", "--json", path, f"{disk}:0-{use.sizes[disk - 1]}"],
            ["explain", path, f"{disk}:{at}"], ["explain", "--json", path, f"{disk}:{at}"], ["info", path],
            ["check", path], ["check", "--json", path], ["report", path, "-o", str(folder / "page.html")],
            ["diff", path, path], ["sql", use.rng.choice(QUERIES), path],
        ])  # fmt: skip
        command(*words)


QUERIES = (
    "select kind, count(*), sum(length) from extents group by 1",
    "select device, path, size from files limit 20",
    "select * from problems",
    "select * from volumes",
)


def info_command(use: Use) -> None:
    if use.image.host and use.rng.random() < 0.8:
        return  # QEMU opens it, which takes long
    command("info", *([] if use.image.host else ["--format", "raw"]), *use.image.paths)


def check_command(use: Use) -> None:
    command("check", *use.words())


def map_command(use: Use) -> None:
    with use.scratch() as folder:
        command(
            "map", "-q", "-o", str(folder / use.rng.choice(("map", "map.parquet", "map.jsonl"))), *use.words()
        )


def estimate_command(use: Use) -> None:
    if not use.image.host:
        command("sparsify", "--estimate", *use.words())


def diff_command(use: Use) -> None:
    """From what it was to what it is."""
    if len(use.image.paths) == 1 and not use.image.host:
        command(
            "diff",
            *use.rng.choice(([], ["--json"], ["--verify"])),
            "--format",
            "raw",
            str(use.image.whole[0]),
            use.image.paths[0],
        )


def report_command(use: Use) -> None:
    from virt_bmap.show.report.page import page

    page(use.bmap, None, "a disk")


CONSUMERS: tuple[tuple[float, Callable[[Use], None]], ...] = (
    (0.5, text), (1, lookup), (0.1, whole_lookup), (0.2, explained), (0.03, explain_command), (0.2, located),
    (0.3, files), (0.1, past), (0.06, extracted), (0.05, cat_command), (0.05, dump_command),
    (0.1, many_ranges), (0.04, nested), (0.04, saved), (0.02, info_command), (0.02, check_command),
    (0.02, map_command), (0.04, estimate_command), (0.03, diff_command), (0.01, report_command),
)  # fmt: skip
"""(how often, which)"""


def consume(use: Use, ran: list[str]) -> None:
    """The consumers that this mutation's chance chooses.

    A refusal in one line is an answer; what else they raise is a fault.
    """
    for chance, consumer in CONSUMERS:
        if use.rng.random() < chance:
            ran.append(consumer.__name__)
            with contextlib.suppress(BmapError):
                consumer(use)
