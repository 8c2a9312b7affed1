"""What several commands share: how disks are named on the command line, sizes for people, progress, tables on
a terminal."""

import argparse
import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from virt_bmap.commands.paths import INPUT, Input, Output
from virt_bmap.core import keys
from virt_bmap.core.amounts import human
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import say, to_json
from virt_bmap.core.reader import SECTORS, DiscSession, Reader
from virt_bmap.host import ours
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.model.contract import NOTHING_MORE, Asks
from virt_bmap.open.disks import Disks, Opening, nested
from virt_bmap.open.magic import FORMATS
from virt_bmap.survey import maps

if TYPE_CHECKING:
    import pyarrow as pa

KEY = Input(keys.file_of)
PATIENCE = 0.7
"""Seconds before a progress line appears: most maps are done by then."""


def add_disk_options(parser: argparse.ArgumentParser) -> None:
    """How images are opened; the names are those of the virt tools."""
    group = parser.add_argument_group("disks")
    group.add_argument(
        "-a",
        "--add",
        metavar="IMAGE",
        action="append",
        default=[],
        type=INPUT,
        help="an image, block device or NBD URI; repeat it for /dev/sdb, ...",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"image format, instead of what its magic says: {', '.join(FORMATS)}",
    )
    add_mapping_options(group)


def add_mapping_options(group: "argparse._ArgumentGroup") -> None:
    """What whoever maps disks can be told of them, whichever disks these are."""
    group.add_argument(
        "--blocksize",
        metavar="BYTES",
        type=int,
        choices=SECTORS,
        help="the disk's sectors, in which its DOS table counts: 512, 1024, 2048 or 4096 bytes",
    )
    group.add_argument(
        "--session",
        metavar="N|last|sector:N",
        type=session,
        help="of a disc that was written in sessions show this one (from 1), not what lies at its start",
    )
    group.add_argument(
        "--machines",
        action="store_true",
        help="the disks are of several machines: which belong together their volumes tell, clones are apart, "
        "and names begin with the machine's first disk",
    )
    add_trust_options(group)
    group.add_argument(
        "--key",
        metavar="SELECTOR:key:PASSPHRASE|SELECTOR:file:FILE|DEVICE:header:FILE",
        action="append",
        default=[],
        type=KEY,
        help="open encrypted volumes; SELECTOR is a device, a "
        "UUID or all; `header` gives a detached LUKS header",
    )
    group.add_argument(
        "--keys-from-stdin",
        action="store_true",
        help="read passphrases for encrypted volumes from standard input, one a line",
    )


def add_trust_options(group: "argparse._ArgumentGroup | argparse.ArgumentParser") -> None:
    """What is opened only by those who say that they know what they do."""
    group.add_argument(
        "--references",
        action="store_true",
        help="open the backing and data files that an image's header names (only for images you trust)",
    )
    group.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read images that QEMU has open for writing, too (a "
        "running guest's): what is read may then mix several states",
    )


def refuse_shared(opening: Opening, what: str) -> None:
    """UsageError where an image is to be written though others may have it open."""
    if opening.force_share:
        raise UsageError(f"-U is for reading images that are in use; {what} writes to them")


def add_nested_option(parser: argparse.ArgumentParser) -> None:
    """Files of a guest that are disk images."""
    parser.add_argument(
        "--nested",
        metavar="PATH|all",
        action="append",
        default=[],
        help="open this file of a filesystem on the disks as another disk; "
        "repeat it; `all`: every file that begins as a disk does",
    )


def add_partial_option(parser: argparse.ArgumentParser) -> None:
    """For commands that move bytes. The rule is that of EXIT STATUS in virt-bmap(1)."""
    parser.add_argument(
        "--partial",
        action="store_true",
        help="fill what can't be read with zeroes; it is still named, but the command does not fail",
    )


def add_host_option(parser: argparse.ArgumentParser) -> None:
    """For commands that can count in bytes of image files."""
    parser.add_argument(
        "--host-offsets",
        action="store_true",
        help="count in bytes of the image files on the host, whose own metadata is named, too; disk 1, 2, "
        "... are these files",
    )


def opening_of(args: argparse.Namespace) -> Opening:
    """How images are to be opened."""
    return Opening(
        format=args.format,
        references=args.references,
        force_share=args.force_share,
        blocksize=getattr(args, "blocksize", None),
        session=getattr(args, "session", None),
    )


def disks_of(args: argparse.Namespace, given: Sequence[str] = (), first: Sequence[str] = ()) -> Disks:
    """The disks of -a and of plain arguments, and all that the command line says of them; UsageError without
    any. Standard input may be read for it: once."""
    images = [*first, *args.add, *given]
    if not images:
        raise UsageError("no disk given: name an image, a block device or an NBD URI")
    passphrases = sys.stdin.buffer.read().splitlines() if args.keys_from_stdin else []
    return Disks(
        images, keys=keys.parse(args.key, passphrases), nested=nested(getattr(args, "nested", [])),
        machines=args.machines, host_offsets=getattr(args, "host_offsets", False), **vars(opening_of(args)),
    )  # fmt: skip


def mapped(disks: Disks, asks: Asks = NOTHING_MORE) -> BlockMap:
    """Map the disks, with progress on a terminal."""
    with Progress() as progress:
        return maps.mapped(disks, progress.watch, asks)


def map_or_disks(args: argparse.Namespace, given: Sequence[str], asks: Asks = NOTHING_MORE) -> BlockMap:
    """A single saved map is loaded, disks are mapped (and
    proven as far as the readers can); -a names disks only."""
    if len(given) == 1 and not args.add and maps.is_saved(given[0]):
        return load(args, given[0])
    return mapped(disks_of(args, given), asks)


def load(args: argparse.Namespace, path: str) -> BlockMap:
    """A saved map; UsageError where --host-offsets is said
    of one that counts in bytes of the guest's disks."""
    bmap = maps.load(path)
    if getattr(args, "host_offsets", False) and not bmap.on_files:
        raise UsageError(
            f"{path}: this map counts in bytes of the guest's "
            "disks; say --host-offsets when the images are mapped"
        )
    return bmap


class Progress:
    """A line on standard error that says what is being
    read: on a terminal only, and only if it takes long."""

    def __init__(self) -> None:
        self._what, self._done = "", threading.Event()
        self._disks: Sequence[Reader] = ()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away: the map is done, what follows has an output of its own."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def watch(self, disks: Sequence[Reader]) -> Callable[[str], None]:
        """Count what is read from these disks; the function returned is told of each volume."""
        self._disks = disks

        def tell(volume: str) -> None:
            self._what = volume

        return tell

    def _show(self) -> None:
        if self._done.wait(PATIENCE):
            return
        from rich import progress
        from rich.console import Console

        columns = (progress.TextColumn("mapping {task.description}"), progress.BarColumn(),
            progress.TextColumn("{task.fields[read]} read"),
                   progress.TimeElapsedColumn())  # fmt: skip
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None, read="")
            while not self._done.wait(0.1):
                bar.update(
                    task, description=self._what, read=human(sum(disk.requested for disk in self._disks))
                )


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, on a terminal only, for work in stages; what is yielded is told the stage and
    how many of how many bytes are done."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda what, done, total: shown.update(
            task, description=what, completed=done, total=total or None
        )


SUFFIXES = {"": 1, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def number(text: str) -> int:
    """A number of bytes: decimal or 0x hexadecimal, with s (sectors of 512), k, M, G, T, P."""
    match = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)([skmgtp]?)(?:i?b)?", text.lower()) or re.fullmatch(
        r"(0x[0-9a-f]+)()", text.lower()
    )
    if not match:
        raise UsageError(
            f"{text!r} is not a number of bytes: decimal or 0x "
            "hexadecimal, with s (sectors), k, M, G, T or P after it"
        )
    return int(match[1], 0 if match[1].startswith("0x") else 10) * SUFFIXES[match[2]]


def add_result_options(
    parser: argparse.ArgumentParser,
    columns: ours.Columns,
    json: str = "one JSON object a line",
    more: str = "",
) -> None:
    """How a result is written: for people, or what `emit` and `emit_records` make of these.

    `columns` are those of each result that the command may have.
    """
    parser.add_argument("--json", action="store_true", help=json)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=ResultFile(ours.is_result(columns)),
        help="write the result to a file instead: .csv, .parquet or .jsonl (JSON lines)",
    )
    add_force_option(parser, more)


def session(text: str) -> DiscSession:
    """The session that --session names."""
    match = re.fullmatch(r"(last)|([1-9][0-9]{0,8})|sector:([0-9]{1,12})", text)
    if not match:
        raise UsageError(
            f"--session {text}: a session is a number from 1, `last`, or `sector:N` for the one that begins "
            "at sector N of 2,048 bytes"
        )
    return DiscSession(int(match[2] or 0), None if match[3] is None else int(match[3]))


class ResultFile(Output):
    """A file for a table; refused before the disk is read, where its ending says nothing."""

    def __call__(self, path: str) -> str:
        from virt_bmap.saved import results

        results.check_name(path)
        return super().__call__(path)


def add_force_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """For commands that write files; `more` it allows."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an output file that holds anything but such a result, and write to block devices"
        + more,
    )


def emit(
    args: argparse.Namespace,
    table: "pa.Table",
    columns: Sequence[str] | None = None,
    limit: int | None = None,
) -> int:
    """Write a result, its names safe already, as `add_result_options` asks; for people `columns` and at most
    `limit` rows. How many were left out."""
    from virt_bmap.saved import results

    if args.output is not None:
        results.save(table, args.output)
        return 0
    if args.json:
        sys.stdout.writelines(f"{line}\n" for line in results.json_lines(table))
        return 0
    return results.show(table, sys.stdout, columns, limit)


def emit_records(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    schema: "pa.Schema",
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Write records, their names safe already, as `add_result_options` asks; for people a `line` each."""
    if args.output is not None:
        import pyarrow as pa

        from virt_bmap.saved import results

        results.save(pa.Table.from_pylist(rows, schema=schema), args.output)
    elif args.json:
        print_json(rows)
    else:
        for row in rows:
            say(line(row))


def print_json(rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    for row in rows:
        say(to_json(row))


def elapsed(since: float) -> str:
    """Seconds since a time.monotonic() value."""
    return f"{time.monotonic() - since:.1f} s"
