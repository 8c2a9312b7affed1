"""libguestfs's small virtual machine ("appliance"), which mounts the filesystems and reads the files.

Its Python binding is tied to the distribution's own interpreter, so `guest.py` runs under that one, as a
process of its own, and calls pass as lines.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from virt_bmap.core.errors import ImageError, MissingTool
from virt_bmap.host import children, kvm, programs
from virt_bmap.model.contract import RAW
from virt_bmap.observe.advice import INSTALL

GUEST = Path(__file__).with_name("guest.py")
LAUNCH_TIMEOUT = 600.0
"""Seconds: under emulation a launch takes 11 to 60, on a busy machine and with a new appliance to build
several times as long."""
CALL_TIMEOUT = 600.0
"""Seconds for one call; the longest, mounting with a journal to replay, takes some ten under emulation."""
CLOSE_TIMEOUT = 15.0
LONGEST_ANSWER = 256 << 20
"""Bytes of one answer: libguestfs itself sends 4 MiB at most, but for lists of files."""


class CallFailed(ImageError):
    """What libguestfs says of a call that the appliance could not do; it lives on."""


class Appliance:
    """A running process that answers calls of libguestfs.

    `died` tells what to do when it doesn't any more.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", messages: str) -> None:
        self._process, self._messages = process, messages
        self._launched = False

    def call(self, name: str, *arguments: Any, timeout: float = CALL_TIMEOUT, **named: Any) -> Any:
        """One call of libguestfs.

        Raises CallFailed with its words, ImageError where the appliance is gone or hangs.
        """
        assert self._process.stdin
        assert self._process.stdout
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            self._process.kill()

        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps([name, arguments, named]).encode() + b"\n")
            self._process.stdin.flush()
            head = json.loads(self._process.stdout.readline(LONGEST_ANSWER))
            if "bytes" in head:
                if not 0 <= head["bytes"] <= LONGEST_ANSWER:
                    raise ValueError
                body = self._process.stdout.read(head["bytes"])
                if len(body) == head["bytes"]:
                    return body
                raise EOFError
        except (OSError, EOFError, ValueError, TypeError) as error:
            what = (
                f"did not answer {name} for {timeout:.0f} seconds"
                if hung.is_set()
                else f"died during {name}{self._last_words()}"
            )
            raise ImageError(f"libguestfs's appliance {what}") from error
        finally:
            timer.cancel()
        if "error" in head:
            if self._launched and not head.get("ready"):
                raise ImageError(f"libguestfs's appliance died during {name}: {_first_words(head['error'])}")
            raise CallFailed(head["error"])
        self._launched |= name == "launch"
        return head.get("result")

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT)
        with open(self._messages, errors="replace") as file:
            lines = file.read().strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End it: the virtual machine goes when its input ends."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def started(
    folder: str, command: Sequence[str] | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Appliance]:
    """The process that answers calls, without a virtual machine yet, until the block ends.

    `folder` takes its messages and its own temporary files.
    """
    messages = f"{folder}/guestfs.err"
    places = {"LIBGUESTFS_TMPDIR": folder, "XDG_RUNTIME_DIR": folder}  # what it leaves when it is killed
    # signals of the terminal are for us: it ends when we close its input
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "process_group": 0}
    with (
        open(messages, "wb") as errors,
        children.running(
            command or [interpreter(), "-I", str(GUEST)],
            stderr=errors,
            env=programs.environment({**places, **(env or {})}),
            **pipes,
        ) as process,
        contextlib.closing(Appliance(process, messages)) as appliance,
    ):
        yield appliance


def interpreter() -> str:
    """A Python that has the binding. Raises MissingTool."""
    for candidate in dict.fromkeys(
        (sys.executable, "/usr/bin/python3", programs.find("python3") or "/usr/bin/python3")
    ):
        with contextlib.suppress(OSError):
            if (
                subprocess.run(
                    [candidate, "-Ic", "import guestfs"], capture_output=True, stdin=subprocess.DEVNULL
                ).returncode
                == 0
            ):
                return candidate
    raise MissingTool(
        f"observing needs libguestfs and its Python binding, which no python3 here has ({INSTALL}); without "
        "--method observe no appliance is needed"
    )


@contextlib.contextmanager
def launched(sockets: Sequence[str], folder: str) -> Iterator[Appliance]:
    """A running appliance with these disks, each an NBD server's Unix socket, as /dev/sda, /dev/sdb, ..."""
    with started(folder) as appliance:
        if "LIBGUESTFS_BACKEND" not in os.environ:
            appliance.call("set_backend", "direct")  # libvirt's confinement keeps QEMU from our sockets
        if "LIBGUESTFS_BACKEND_SETTINGS" not in os.environ and kvm.can_tell() and kvm.accelerator() == "tcg":
            appliance.call("set_backend_settings", ["force_tcg"])
        for socket in sockets:
            appliance.call("add_drive_opts", "", format=RAW, protocol="nbd", server=[f"unix:{socket}"])
        try:
            appliance.call("launch", timeout=LAUNCH_TIMEOUT)
        except CallFailed as error:
            raise ImageError(
                f"libguestfs's appliance did not start: {_first_words(str(error))} (libguestfs-test-tool "
                f"says why; it needs QEMU and a kernel: {INSTALL})"
            ) from error
        yield appliance


def _first_words(error: str) -> str:
    """What went wrong, without libguestfs's paragraph on how to find out more."""
    return error.partition(" This usually means")[0].partition(" To see full error messages")[0]
