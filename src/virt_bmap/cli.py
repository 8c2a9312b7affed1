"""The command line: `virt-bmap COMMAND ...`, and `virt-bmap disk.img` as the original was called.

Only here are errors printed and exit statuses made.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from virt_bmap import __version__
from virt_bmap.commands import COMMANDS
from virt_bmap.core.errors import BmapError, OutputError, UsageError, is_strict, refused, unexpected
from virt_bmap.core.printable import one_line, say
from virt_bmap.host import leftovers, notices, protection, signals
from virt_bmap.startup import import_libraries


class StandardOutput(io.FileIO):
    """Standard output, which says that it is the one that can't be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:  # nobody reads on
            raise
        except OSError as error:
            raise OutputError(f"standard output can't be written: {error.strerror}") from error


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one line, exit status 1."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command, or the one that lists the commands."""
    if command is None:
        lines = "\n".join(f"  {name:<10} {command.about}" for name, command in COMMANDS.items())
        main = _Parser(
            prog="virt-bmap", usage="virt-bmap [COMMAND] [OPTION ...] DISK ...",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description="Which file does every byte of a disk image belong to, and which files does a "
                "running guest read and write?",
            epilog=f"commands:\n{lines}\n\n'virt-bmap COMMAND --help' tells more, 'man virt-bmap' all.",
        )  # fmt: skip
        main.add_argument("-V", "--version", action="version", version=f"virt-bmap {__version__}")
        return main
    module = importlib.import_module(f"virt_bmap.commands.{command}")
    about = module.HELP[0].upper() + module.HELP[1:]
    made = _Parser(
        prog=f"virt-bmap {command}", description=about if about.endswith("?") else f"{about}.",
        allow_abbrev=False,
        # else it looks for the terminal's whenever an option is added
        formatter_class=partial(argparse.HelpFormatter, width=78),
    )  # fmt: skip
    module.add_arguments(made)
    return made


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The words of a command; options may stand between plain arguments."""
    try:
        return parser.parse_intermixed_args(words)
    except TypeError:  # argparse's word for: another program's command line follows
        return parser.parse_args(words)


def prepared(arguments: Sequence[str]) -> Callable[[], int]:
    """The command that the arguments ask for, ready to run: what it returns is the exit status.

    Raises UsageError.
    """
    if not arguments or arguments[0] in ("-h", "--help", "-V", "--version"):
        parser().parse_args(arguments or ["--help"])  # prints and leaves
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("map", arguments)
    import_libraries(COMMANDS[command].process)
    module = importlib.import_module(f"virt_bmap.commands.{command}")
    args = parsed(parser(command), rest)
    protection.check(getattr(args, "force", False))

    def work() -> int:
        with notices.listening(partial(_note, getattr(args, "quiet", False))):
            return int(module.run(args))

    return work


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status. Raises BmapError."""
    with protection.protecting():
        status = prepared(arguments)()
    sys.stdout.flush()
    return status


def _note(quiet: bool, words: str) -> None:
    if not quiet:
        say(f"virt-bmap: {one_line(words)}", file=sys.stderr)


def main() -> NoReturn:
    """The program."""
    program("virt-bmap", lambda: prepared(sys.argv[1:]))


def program(name: str, prepare: Callable[[], Callable[[], int]]) -> NoReturn:
    """Prepare, work and leave, with the exit status that the work gives.

    Every known error is one line on standard error and exit status 1.

    Until the work begins a signal ends us at once: there is nothing to undo yet. Then it is an exception, and
    the status 128 and the signal's number.
    """
    _open_standard_streams()
    try:
        try:
            with protection.protecting():
                status = _worked(prepare)
            sys.stdout.flush()
        finally:
            signals.ignore()
    except BmapError as error:
        status = _failed(f"{name}: {one_line(error)}")
    except signals.Signalled as ended:
        by = "interrupted" if ended.signal == signal.SIGINT else f"ended by {ended.signal.name}"
        status = _failed(f"{name}: {by}", ended.status)
    except KeyboardInterrupt:
        status = _failed(f"{name}: interrupted", 130)
    except BrokenPipeError:  # nobody reads on
        status = 141
    except OSError as error:
        status = _failed(f"{name}: {refused(error)}")
    except MemoryError:
        status = _failed(f"{name}: not enough memory for this map")
    except Exception as error:
        if is_strict():
            import traceback  # seldom needed

            traceback.print_exc()
        status = _failed(f"{name}: {unexpected(error)}")
    leftovers.undo_all()
    # tables of millions of rows take long to free one by one, and the process ends anyway
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, OutputError):
            stream.flush()
    os._exit(status)


def _worked(prepare: Callable[[], Callable[[], int]]) -> int:
    try:
        work = prepare()
    except SystemExit as left:  # --help and --version
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    signals.become_exceptions()
    try:
        return work()
    except Exception as error:
        if signals.raised:  # a library that was interrupted may have words of its own for it
            raise signals.raised from error
        raise


def _failed(words: str, status: int = 1) -> int:
    """Say why, where anybody listens."""
    with contextlib.suppress(OSError, ValueError):
        say(words, file=sys.stderr)
    return status


def _open_standard_streams() -> None:
    """A standard stream that is closed would be the first file that is opened, and whatever is said would be
    written there."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w")  # noqa: SIM115 - fails when something is written, which was to be seen
    plain = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(StandardOutput(1, "wb", closefd=False)),
        encoding=plain.encoding,
        errors=plain.errors,
        line_buffering=bool(plain.line_buffering),
    )
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115
