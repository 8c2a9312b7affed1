"""What `map --method observe` and `verify` share: the
disks behind an appliance, with progress on a terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from virt_bmap.commands.common import stages
from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import say
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks
from virt_bmap.serve.source import source


@contextlib.contextmanager
def observe(args: argparse.Namespace, disks: Disks) -> Iterator[BlockMap]:
    """The observed map. What was seen is kept beside the output until the block, which writes the map, has
    ended well."""
    from virt_bmap.observe.journal import SUFFIX, Journal
    from virt_bmap.observe.session import observed_map, session

    if args.output == "-":
        raise UsageError("an observation keeps what it has seen beside the map: give it a file with -o")
    refuse_machines(disks)
    sources = [source(image, disks) for image in disks.images]
    journal = Journal(args.output + SUFFIX, sources, args.resume)
    if journal.seen and not args.quiet:
        say(f"resuming: {plural(len(journal.seen), 'file')} observed before")
    try:
        with stages() as tell, session(sources, disks, tell) as found:
            bmap = observed_map(found, journal, tell)
        say_left(found.left)
        yield bmap
    except BaseException:
        journal.close()
        if journal.seen:
            say(
                f"virt-bmap: {plural(len(journal.seen), 'file')} observed so "
                f"far, kept in {journal.path}: --resume goes on from there",
                file=sys.stderr,
            )
        else:
            journal.remove()
        raise
    journal.remove()


def refuse_machines(disks: Disks) -> None:
    """UsageError where the disks of several machines would become those of one appliance."""
    if disks.machines:
        raise UsageError("an appliance is one machine: without --machines, name the disks of one at a time")


def say_left(left: dict[str, str]) -> None:
    """Filesystems that were not observed, on standard error."""
    for device, why in left.items():
        say(f"virt-bmap: {escape(device.encode())}: not observed: {escape(why.encode())}", file=sys.stderr)
