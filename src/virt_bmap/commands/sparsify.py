"""virt-bmap sparsify: give the free space of disk images back to their host, in place or in a copy, or
estimate how much that is."""

import argparse
import contextlib
import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

from virt_bmap.commands.common import (
    Progress,
    add_disk_options,
    add_partial_option,
    disks_of,
    print_json,
    refuse_shared,
)
from virt_bmap.commands.dump import bar, refuse_target, warn
from virt_bmap.core.amounts import human
from virt_bmap.core.errors import ImageError, UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.layers import raw
from virt_bmap.core.printable import say
from virt_bmap.formats import registry as formats
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import RAW, Asks, Writing
from virt_bmap.open import magic
from virt_bmap.open.disks import Opening
from virt_bmap.open.raw import RawReader
from virt_bmap.survey import maps

HELP = "give the free space of a disk image back to its host"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "disk",
        nargs="*",
        metavar="DISK [OUT]",
        help="an image, block device or NBD URI, and a file to "
        "write; with --in-place or --estimate images only",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--estimate", action="store_true", help="only say what could be given back, and write nothing"
    )
    how.add_argument(
        "--in-place",
        action="store_true",
        help=f"change the images themselves, files or block devices: {', '.join(_written(Writing.FREEING))}",
    )
    parser.add_argument("--swap", action="store_true", help="give back the content of swap space, too")
    parser.add_argument(
        "--convert",
        choices=_written(Writing.ANYWHERE),
        metavar="FORMAT",
        help=f"format of OUT, instead of the disk's own: {', '.join(_written(Writing.ANYWHERE))}",
    )
    parser.add_argument(
        "--compress",
        action="store_true",
        help=f"compress OUT ({', '.join(_written(Writing.COMPRESSED))})",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    add_partial_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary, no progress")
    add_disk_options(parser)


def _written(how: Writing) -> list[str]:
    """The formats whose images can be written so."""
    return [format.name for format in formats.images() if how in format.writing]


def run(args: argparse.Namespace) -> int:
    if args.estimate or args.in_place:
        if args.convert or args.compress or args.force or args.partial:
            raise UsageError(
                "--convert, --compress, --force and --partial are about the copy OUT, which is not made "
                "with --estimate and --in-place"
            )
        return _estimate(args) if args.estimate else _in_place(args)
    return _copy(args)


def _left(bmap: BlockMap, left: dict[int, str]) -> None:
    for volume, reason in left.items():
        warn(bmap, volume, f"left as it is: {reason}")


# ---- a copy ------------------------------------------------------------------------------------------------


def _copy(args: argparse.Namespace) -> int:
    from virt_bmap.act.sparsify.copying import copy
    from virt_bmap.act.sparsify.plan import plan
    from virt_bmap.host.files import new_file

    if len(args.disk) != 2:
        raise UsageError(
            "sparsify needs a disk and OUT, the file to write; or --in-place to change the disk itself, or "
            f"--estimate; given: {' '.join(args.disk) or 'nothing'}"
        )
    image, out = args.disk
    disks = disks_of(args, [image])
    _refuse_out(out, disks.images, args.force)
    format = _format_of_copy(args, image, disks)
    if not disks.force_share:
        _refuse_writers(disks.images)
    with (
        Progress() as progress,
        maps.opened(disks, progress.watch, Asks.SLEEP, status=()) as (bmap, readers),
    ):
        disk = bmap.disks[-1]
        reader = raw(readers[disk])
        space = plan(bmap, disk, args.swap)
        progress.stop()
        _left(bmap, space.left)
        with new_file(out) as name, bar(f"copying {image}", reader.size, args.quiet) as tell:
            missing = copy(reader, space.all(), name, format, args.compress, tell, args.partial)
    if missing:
        say(f"virt-bmap: {image}: zeroes were written for {missing}", file=sys.stderr)
    _tell(
        args,
        [{"disk": len(disks.images), "image": image, "out": out, "size": reader.size, **_sizes(image, out)}],
    )
    return 0


def _sizes(image: str, out: str) -> dict[str, Any]:
    from virt_bmap.act.sparsify.in_place import held

    return {"host_before": None if magic.is_uri(image) else held(image), "host_after": held(out)}


def _refuse_out(out: str, images: Sequence[str], force: bool) -> None:
    """UsageError where OUT is not a plain file or must not be replaced."""
    if out == "-" or magic.is_uri(out) or (os.path.exists(out) and not stat.S_ISREG(os.stat(out).st_mode)):
        raise UsageError(
            f"{out}: OUT must be the name of a file; dump "
            "--skip-free writes to devices, pipes and NBD exports"
        )
    refuse_target(out, images, force)


def _format_of_copy(args: argparse.Namespace, image: str, opening: Opening) -> str:
    """The format of OUT: as asked for, or as the disk has it."""
    found: str = args.convert or RAW
    if args.convert is None and not magic.is_uri(image):
        plain = RawReader(image)
        found = opening.format or magic.recognise(plain)
        plain.close()
        if Writing.ANYWHERE not in magic.known(found).writing:
            raise UsageError(
                f"{image}: a {found} image can't be written; choose another format with --convert: "
                f"{', '.join(_written(Writing.ANYWHERE))}"
            )
    if args.compress and Writing.COMPRESSED not in magic.known(found).writing:
        packed = _written(Writing.COMPRESSED)
        raise UsageError(
            f"--compress needs a {' or '.join(packed)} image, but OUT becomes {found}: use "
            f"--convert {packed[0]}"
        )
    return found


def _refuse_writers(images: Sequence[str]) -> None:
    """ImageError where somebody may change an image while it is copied."""
    from virt_bmap.host.in_use import writer_of

    for image in images:
        if not magic.is_uri(image) and (reason := writer_of(image)):
            raise ImageError(f"{image}: is in use: {reason}; a copy made now could mix several states")


# ---- in place ----------------------------------------------------------------------------------------------


def _in_place(args: argparse.Namespace) -> int:
    from virt_bmap.act.sparsify.in_place import held, kept
    from virt_bmap.act.sparsify.plan import plan
    from virt_bmap.survey.survey import survey

    named = disks_of(args, args.disk)
    refuse_shared(named, "--in-place")
    images = named.images
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack, Progress() as progress:
        disks = [stack.enter_context(kept(image, named)) for image in images]
        readers = [disk.reader for disk in disks]
        bmap = survey(readers, progress.watch(readers), named.keys, asks=Asks.SLEEP, machines=named.machines)
        plans = [plan(bmap, number, args.swap) for number in bmap.disks]
        progress.stop()
        for volume, reason in {
            volume: reason for space in plans for volume, reason in space.left.items()
        }.items():
            warn(bmap, volume, f"left as it is: {reason}")
        before = [held(image) for image in images]
        for number, (image, disk, space) in enumerate(zip(images, disks, plans, strict=True), 1):
            free = space.all()
            with bar(f"sparsifying {image}", int((free[1] - free[0]).sum()), args.quiet) as tell:
                disk.give_back(free, tell)
            rows.append({"disk": number, "image": image, "out": None, "size": disk.reader.size})
    for row, image, had in zip(rows, images, before, strict=True):
        row |= {"host_before": had, "host_after": held(image)}
    _tell(args, rows)
    return 0


def _tell(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        print_json(rows)
    elif not args.quiet:
        for row in rows:
            took, takes = row["host_before"], row["host_after"]
            known = (
                ""
                if took is None or takes is None
                else f", {human(max(0, took - takes))} less than {row['image'] if row['out'] else 'before'}"
            )
            now = "what is free was given back" if takes is None else f"{human(takes)} on the host{known}"
            say(f"{row['out'] or row['image']}: a disk of {human(row['size'])}, {now}")


# ---- an estimate -------------------------------------------------------------------------------------------


def _estimate(args: argparse.Namespace) -> int:
    from virt_bmap.act.sparsify.estimate import estimate, host_of

    disks = disks_of(args, args.disk)
    rows: list[dict[str, Any]] = []
    with Progress() as progress, maps.opened(disks, progress.watch, Asks.SLEEP) as (bmap, readers):
        progress.stop()
        names = [escape(name.encode()) for name in bmap.volumes.column("name").to_pylist()]
        for number, (image, disk) in enumerate(zip(disks.images, bmap.disks, strict=True), 1):
            gains, left = estimate(
                bmap, disk, host_of(image) if isinstance(raw(readers[disk]), RawReader) else None, args.swap
            )
            rows += [{"disk": number, "device": names[gain.volume], "what": gain.what, "bytes": gain.size,
                    "host_bytes": gain.held,
                      "given_back": gain.given_back} for gain in gains]  # fmt: skip
            _left(bmap, left)
    if args.json:
        print_json(rows)
    else:
        _print(rows, names, bmap.disks)
    return 0


def _print(rows: list[dict[str, Any]], names: list[str], disks: list[int]) -> None:
    say(f"{'bytes':>12} {'on the host':>12}  what")
    for number, disk in enumerate(disks, 1):
        mine = [row for row in rows if row["disk"] == number and row["given_back"]]
        for row in mine:
            say(f"{human(row['bytes']):>12} {_held([row]):>12}  {row['what']} of {row['device']}")
        say(
            f"{human(sum(row['bytes'] for row in mine)):>12} "
            f"{_held(mine):>12}  in all of {names[disk]} would be given back"
        )
        for row in rows:
            if row["disk"] == number and not row["given_back"]:
                say(
                    f"{human(row['bytes']):>12} {_held([row]):>12}  "
                    f"{row['what']} of {row['device']} would be kept"
                )


def _held(rows: list[dict[str, Any]]) -> str:
    return (
        "not known"
        if any(row["host_bytes"] is None for row in rows)
        else human(sum(row["host_bytes"] for row in rows))
    )
