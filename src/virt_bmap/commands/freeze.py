"""virt-bmap freeze: run a command while the filesystems of a guest, or some of this host, stand still."""

import argparse
import math
import shutil
import sys

from virt_bmap.act.freeze import LIMIT, Guest, HostMounts, Target
from virt_bmap.core.errors import UsageError
from virt_bmap.core.printable import one_line, say

HELP = "run a command, such as a copy of a disk, while filesystems are frozen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.PARSER, help="what to run meanwhile, after --"
    )
    parser.add_argument(
        "--agent", metavar="SOCKET", help="freeze a guest: the Unix socket of its QEMU guest agent"
    )
    parser.add_argument(
        "--mountpoint",
        metavar="M",
        action="append",
        default=[],
        help="with --agent, only what is mounted there in the guest; repeat it",
    )
    parser.add_argument(
        "--mount",
        metavar="DIR",
        action="append",
        default=[],
        help="freeze a filesystem of this host, by its mount point; repeat it",
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=LIMIT,
                        help="thaw after this time, whatever happens (default: %(default)g)")  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="do not say for how long what was frozen")


def run(args: argparse.Namespace) -> int:
    from virt_bmap.act import freeze

    target = _target(args)
    if not (math.isfinite(args.timeout) and args.timeout > 0):
        raise UsageError("--timeout: a number of seconds above 0")
    # Python from 3.13 on gives a further -- to the command, but Python before 3.13 the first one, too
    command = args.command[1:] if args.command[0] == "--" else args.command
    if not command or not shutil.which(command[0]):
        raise UsageError(
            f"{command[0]}: no such command"
            if command
            else "no command given: what is to be run while filesystems are frozen?"
        )
    status, held = freeze.run(target, command, args.timeout)
    if not args.quiet:
        say(
            f"virt-bmap: frozen for {held.wait().seconds:.2f} s: {one_line(held.filesystems)}",
            file=sys.stderr,
        )
    return status


def _target(args: argparse.Namespace) -> Target:
    if bool(args.agent) == bool(args.mount):
        raise UsageError(
            "say what is to be frozen: --agent SOCKET for a "
            "guest, or --mount DIR for filesystems of this host"
        )
    if args.agent:
        return Guest(args.agent, tuple(args.mountpoint))
    if args.mountpoint:
        raise UsageError(
            "--mountpoint names filesystems inside a guest and goes with --agent; on this host it is --mount"
        )
    from virt_bmap.act.freeze.mounts import refuse_own_output

    refuse_own_output(args.mount)
    return HostMounts(tuple(args.mount))
