"""The command line: `virt-bmap COMMAND ...`, and `virt-bmap disk.img` as the original was called. Only here are errors printed and exit statuses made."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from virt_bmap import __version__
from virt_bmap.commands import COMMANDS
from virt_bmap.errors import BmapError, UsageError, one_line
from virt_bmap.startup import import_libraries


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one line, exit status 1."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command, or the one that lists the commands."""
    if command is None:
        lines = "\n".join(f"  {name:<10} {about}" for name, about in COMMANDS.items())
        main = _Parser(
            prog="virt-bmap", usage="virt-bmap [COMMAND] [OPTION ...] DISK ...", formatter_class=argparse.RawDescriptionHelpFormatter,
            description="Which file does every byte of a disk image belong to, and which files does a running guest read and write?",
            epilog=f"commands:\n{lines}\n\n'virt-bmap COMMAND --help' tells more, 'man virt-bmap' all.",
        )  # fmt: skip
        main.add_argument("-V", "--version", action="version", version=f"virt-bmap {__version__}")
        return main
    module = importlib.import_module(f"virt_bmap.commands.{command}")
    about = module.HELP[0].upper() + module.HELP[1:]
    made = _Parser(
        prog=f"virt-bmap {command}", description=about if about.endswith("?") else f"{about}.", allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, width=78),  # else it looks for the terminal's whenever an option is added
    )  # fmt: skip
    module.add_arguments(made)
    return made


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status. Raises BmapError."""
    if not arguments or arguments[0] in ("-h", "--help", "-V", "--version"):
        parser().parse_args(arguments or ["--help"])  # prints and leaves
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("map", arguments)
    import_libraries()
    module = importlib.import_module(f"virt_bmap.commands.{command}")
    status: int = module.run(parser(command).parse_args(rest))
    sys.stdout.flush()
    return status


def main() -> NoReturn:
    """The program: every known error is one line on standard error and exit status 1."""
    try:
        status = run(sys.argv[1:])
    except BmapError as error:
        print(f"virt-bmap: {one_line(error)}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("virt-bmap: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nobody reads on; Python must not complain of that when it ends
        status = 141
    except OSError as error:
        print(f"virt-bmap: standard output can't be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except MemoryError:
        print("virt-bmap: not enough memory for this map", file=sys.stderr)
        status = 1
    # tables of millions of rows take long to free one by one, and the process ends anyway
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
