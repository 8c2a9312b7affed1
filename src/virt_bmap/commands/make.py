"""virt-bmap make: prepared disk images, by the words of `guestfish -N`."""

import argparse
import os
import time

from virt_bmap.commands.common import elapsed
from virt_bmap.commands.paths import INPUT, Output
from virt_bmap.core.amounts import human
from virt_bmap.core.printable import say

HELP = (
    "make a prepared disk image: partitions, filesystems, logical volumes, arrays, LUKS, filled with a tree"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from virt_bmap.act.make import containers
    from virt_bmap.act.make.spec import KINDS, usage

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "SPEC is one of:\n" + "\n".join(
        f"  {usage(name)}\n      {kind.about}" for name, kind in KINDS.items()
    )
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="what to make, such as fs:ext4:2G; parameters that are left out or empty have defaults",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Output(None),
        help=f"the file to make; {', '.join(containers())} say its format, else raw",
    )
    parser.add_argument("--tree", metavar="DIR", type=INPUT, help="fill it with what is in this directory")
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        type=INPUT,
        help="the passphrase for luks: the whole content of this file",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="do not say what was made, and by which means"
    )


def run(args: argparse.Namespace) -> int:
    from virt_bmap.act.make import make

    begin = time.monotonic()
    how = make(args.spec, args.out, args.tree, args.key_file, args.force)
    if not args.quiet:
        say(
            f"{args.out}: {args.spec}, {human(os.stat(args.out).st_blocks * 512)} on this host, made in "
            f"{elapsed(begin)} with {', '.join(how)}"
        )
    return 0
