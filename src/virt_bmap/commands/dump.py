"""virt-bmap dump: copy a disk, partition, logical volume, array or opened container out of its images."""

import argparse
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from virt_bmap.commands.common import (
    Progress,
    add_disk_options,
    add_nested_option,
    add_partial_option,
    disks_of,
)
from virt_bmap.core.amounts import human
from virt_bmap.core.arrays import EMPTY, total
from virt_bmap.core.errors import OutputError, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.layers import raw
from virt_bmap.core.printable import say
from virt_bmap.host import protection
from virt_bmap.host.files import replacing
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import NOTHING_MORE, Asks
from virt_bmap.open import magic
from virt_bmap.survey import maps

if TYPE_CHECKING:
    from virt_bmap.act.dump import Target

UNRECOVERED = ("journal-replayed", "not-replayed", "journal-missing")
"""Problems that only a filesystem with a journal to replay has."""
HELP = "copy a volume (partition, logical volume, array, opened LUKS, disk) to a file or NBD export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        metavar="[DISK] DEVICE OUT",
        nargs="+",
        help="a disk (not with -a), a device on it such as /dev/sda1, "
        "and a file or NBD URI to write (- is standard output)",
    )
    parser.add_argument(
        "--skip-free", action="store_true", help="leave out what is free: it reads as zeroes in the copy"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT where it exists; needed for block devices and NBD exports",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary, no progress")
    add_partial_option(parser)
    add_disk_options(parser)
    add_nested_option(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.act.dump import dump
    from virt_bmap.ask.space import free_space

    wanted = 2 if args.add else 3
    if len(args.arguments) != wanted:
        raise UsageError(
            f"dump needs {'DEVICE and OUT' if args.add else 'a disk, DEVICE and OUT'}; "
            f"given: {' '.join(args.arguments)}"
        )
    disks, (device, out) = disks_of(args, args.arguments[:-2]), args.arguments[-2:]
    refuse_target(out, disks.images, args.force)
    asks = Asks.SLEEP if args.skip_free else NOTHING_MORE
    with Progress() as progress, maps.opened(disks, progress.watch, asks, status=()) as (bmap, readers):
        volume = device_named(bmap, device)
        reader = raw(readers[volume])
        skip = (EMPTY, EMPTY)
        if args.skip_free:
            space = free_space(bmap, volume)
            skip = space.all()
            for number, reason in space.left.items():
                warn(bmap, number, f"free space is copied as well: {reason}")
        for text in doubts(bmap, volume):
            say(f"virt-bmap: {text}", file=sys.stderr)
        for number in unrecovered(bmap, volume):
            warn(
                bmap,
                number,
                "its journal is not replayed: the copy holds the bytes as they lie on the disk, and needs "
                "recovery, too",
            )
        refuse_small(out, reader.size)
        progress.stop()
        with target(out, reader.size) as where, bar(f"dumping {device}", reader.size, args.quiet) as tell:
            missing = dump(reader, where, skip, tell, partial=args.partial)
    if missing:
        say(f"virt-bmap: {device}: zeroes were written for {missing}", file=sys.stderr)
    if not args.quiet and out != "-":
        left = f", {human(total(*skip))} of it free and left out" if args.skip_free else ""
        say(f"{out}: {human(reader.size)} of {device}{left}")
    return 0


@contextlib.contextmanager
def target(out: str, size: int) -> "Iterator[Target]":
    """What the copy of `size` bytes is written to. Raises OutputError where it can't be written."""
    from virt_bmap.act.dump import SparseFile, StreamTarget

    if magic.is_uri(out):
        from virt_bmap.open.nbd_writer import NbdWriter

        export = NbdWriter(out)
        try:
            if export.size < size:
                raise OutputError(
                    f"{out}: can't be written: the export has {export.size:,} bytes, {size:,} are needed"
                )
            yield export
            export.flush()
        finally:
            export.close()
        return
    with replacing(out) as file:
        yield (
            SparseFile(file, size)
            if out != "-" and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            else StreamTarget(file)
        )


def device_named(bmap: BlockMap, name: str) -> int:
    """The number of a device as a system shows it: of a btrfs filesystem and the partition it lies on, which
    share a name, the partition."""
    volume = bmap.volume_named(name)
    if bmap.volumes.column("kind")[volume].as_py() == "pool":
        names: list[str] = bmap.volumes.column("name").to_pylist()
        return names.index(name)
    return volume


def refuse_target(out: str, images: Sequence[str], force: bool) -> None:
    """UsageError where writing OUT would destroy something that was not named for it, or an image that is
    being read."""
    for image in images:
        protection.reads(image)
    if magic.is_uri(out):
        if not force:
            raise UsageError(f"{out}: what the export holds is overwritten; --force allows that")
        return
    protection.writes(out, None)
    protection.check(force)


def refuse_small(out: str, size: int) -> None:
    """OutputError where OUT is a device with fewer than `size` bytes, before anything is written to it."""
    if out == "-" or not os.path.exists(out) or not stat.S_ISBLK(os.stat(out).st_mode):
        return
    with contextlib.suppress(OSError), open(out, "rb") as file:
        has = file.seek(0, os.SEEK_END)
        if has < size:
            raise OutputError(f"{out}: can't be written: the device has {has:,} bytes, {size:,} are needed")


def doubts(bmap: BlockMap, volume: int) -> Iterator[str]:
    """Errors found on a volume and on what it lies in, one
    line each: its bytes may not be what they should."""
    below, queue = {volume}, [volume]
    while queue:
        queue += list(set(bmap.rows_of(queue.pop()).parent.tolist()) - below)
        below.update(queue)
    for row in bmap.problems.to_pylist():
        if row["volume"] in below and row["severity"] != "note":
            name = escape(bmap.volumes.column("name")[row["volume"]].as_py().encode())
            yield f"{row['severity']}: {name}: {escape(row['detail'].encode())}"


def unrecovered(bmap: BlockMap, volume: int) -> list[int]:
    """The volumes in this one, itself included, whose filesystem a mount would recover first."""
    said = {(row["volume"], row["format"]) for row in bmap.problems.to_pylist() if row["code"] in UNRECOVERED}
    found = {
        row["volume"]
        for row in bmap.filesystems.to_pylist()
        if row["state"] in (tables.RECOVERED, tables.NEEDS_RECOVERY)
        or (row["volume"], row["type"]) in said  # a damaged one has no other state
    }
    return [number for number in bmap.volumes_on(volume) if number in found]


def warn(bmap: BlockMap, volume: int, text: str) -> None:
    """One line about a volume on standard error."""
    say(f"virt-bmap: {escape(bmap.volumes.column('name')[volume].as_py().encode())}: {text}", file=sys.stderr)


@contextlib.contextmanager
def bar(what: str, size: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on a terminal only; what is
    yielded is told how many of `size` bytes are done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn(escape(what.encode()), markup=False), progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
               progress.TransferSpeedColumn(), progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=size or None)
        yield lambda done: shown.update(task, completed=done)
