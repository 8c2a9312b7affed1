"""`virt-bmap replay`: warm a disk with what a profile says a boot will need."""

import argparse
import sys

from virt_bmap.commands.common import add_trust_options, opening_of
from virt_bmap.commands.paths import INPUT
from virt_bmap.core.amounts import human, plural
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import say
from virt_bmap.open import open_image
from virt_bmap.open.magic import FORMATS

HELP = "warm a disk or NBD source: read ahead what a profile says will be needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", type=INPUT, help="written by virt-bmap profile")
    parser.add_argument("image", metavar="DISK", type=INPUT, help="image, block device or NBD URI")
    parser.add_argument(
        "--disk",
        metavar="N",
        type=int,
        default=1,
        help="the disk of the profile that this is, from 1 (default: 1)",
    )
    parser.add_argument("--common", action="store_true", help="only what every run of the profile needed")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"image format, instead of what its magic says: {', '.join(FORMATS)}",
    )
    add_trust_options(parser)


def run(args: argparse.Namespace) -> int:
    from virt_bmap.accesses.profile.replay import replay
    from virt_bmap.accesses.profile.saved import load

    if args.disk < 1:
        raise UsageError(f"--disk counts from 1; given: {args.disk}")
    profile = load(args.profile)
    reader = open_image(args.image, opening_of(args))
    try:
        done = replay(profile, reader, args.disk, args.common)
    finally:
        reader.close()
    if not args.quiet:
        speed = f" ({human(int(done.bytes / done.seconds))}/s)" if done.seconds else ""
        what = f"{human(done.bytes)} read in {plural(done.ranges, 'range')} in {done.seconds:.1f} s{speed}"
        say(f"{args.image}: {what}, of which {human(done.needed)} needed", file=sys.stderr)
    return 0
