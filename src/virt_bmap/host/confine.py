"""A wall around programs that open images for us: no files but those they are handed, no sockets.

Landlock keeps files away, and a seccomp filter sockets. Both need neither privileges nor another program,
hold for root as well, and work in containers, where namespaces often can't be made. Both bind one thread and
what that thread starts. So a thread of ours puts itself behind the wall, starts the program and waits for its
end: nothing of ours runs between fork and exec, and we ourselves stay as we are.

Where the kernel has neither, the program is started all the same. `python3 -P -m virt_bmap.host.confine` says
what this machine has.

Sources: landlock(7), Linux include/uapi/linux/landlock.h (v6.18); seccomp(2),
include/uapi/linux/{seccomp,filter,audit}.h.
"""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of Landlock's system calls, the same on every architecture."""
RULESET_VERSION, PATH_BENEATH = 1, 1
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
ALL_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights to files, by the Landlock version that brought the last of them."""
ALL_TCP, ALL_SCOPES = 3, 3
"""Bind and connect (version 4); abstract sockets and signals to processes outside (version 6)."""

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198), "riscv64": (0xC00000F3, 198),
    "loongarch64": (0xC0000102, 198),
          "ppc64le": (0xC0000015, 326), "s390x": (0x80000016, 359)}  # fmt: skip
"""(AUDIT_ARCH, number of socket(2)) of 64-bit machines."""
IO_URING_SETUP, X32 = 425, 0x40000000
"""io_uring makes sockets without a call that the filter
would see; x32 is a second set of numbers on x86-64."""
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06

FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libexec", "share")
"""What a program needs of the system: below /, /usr, /usr/local, and the prefix that it is installed in."""
STORES = ("/nix/store", "/gnu/store")
FILES = ("/etc/ld.so.cache", "/etc/ld.so.preload", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


Popen = Callable[..., "subprocess.Popen[bytes]"]


class Walls(NamedTuple):
    """What the kernel has: Landlock's version (0: none), and the filter."""

    landlock: int
    seccomp: bool


@functools.cache
def walls() -> Walls:
    """What can be had on this machine. Nothing is confined by asking."""
    version = _LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(RULESET_VERSION))
    known = platform.machine() in SOCKET and struct.calcsize("P") == 8
    return Walls(max(0, version), known and os.path.exists("/proc/sys/kernel/seccomp/actions_avail"))


def popen(
    program: str, command: Sequence[str], read: Sequence[int] = (), write: Sequence[int] = (), **options: Any
) -> "subprocess.Popen[bytes]":
    """A command that runs `program` behind the wall: it inherits these open files, and may open them, and no
    others, again. `options` are those of subprocess.Popen."""
    found: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []

    def confined() -> None:
        try:
            if any(walls()):
                _checked(_LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            if walls().landlock:
                _restrict_files(program, read, write)
            if walls().seccomp:
                _restrict_sockets()
            found.append(popen_outside(program, command, read, write, **options))
        except BaseException as error:  # for the thread that waits
            failed.append(error)
        started.set()
        for process in found:  # a program that is to end with its parent ends with this thread
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    started = threading.Event()
    threading.Thread(target=confined, name="confined", daemon=True).start()
    started.wait()
    if failed:
        raise failed[0]
    return found[0]


def popen_outside(
    _: str, command: Sequence[str], read: Sequence[int] = (), write: Sequence[int] = (), **options: Any
) -> "subprocess.Popen[bytes]":
    """The same without the wall, for programs that don't bear it."""
    return subprocess.Popen(list(command), pass_fds=[*read, *write], **options)


@functools.cache
def bears(program: str) -> bool:
    """Does a program start behind the wall at all? Its libraries may lie where nobody expects them."""
    with open(os.devnull, "r+b") as nothing:
        try:
            with popen(
                program, [program, "--version"], stdin=nothing, stdout=nothing, stderr=nothing
            ) as process:
                return process.wait() == 0
        except OSError:
            return False


def _restrict_files(program: str, read: Sequence[int], write: Sequence[int]) -> None:
    """Landlock, for this thread."""
    version = walls().landlock
    rights = max(mask for since, mask in ALL_FILES.items() if since <= version)
    attributes = struct.pack("=QQQ", rights, ALL_TCP, ALL_SCOPES)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    rules = _checked(
        _LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    )
    try:
        for place in _places(program):
            with _opened(place) as fd:
                _allow(
                    rules,
                    fd,
                    rights & (READ_FILE | READ_DIR | EXECUTE | (WRITE_FILE if place == os.devnull else 0)),
                )
        for fd in read:
            _allow(rules, fd, rights & (READ_FILE | IOCTL_DEV))
        for fd in write:
            _allow(rules, fd, rights & (READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV))
        _checked(_LIBC.syscall(RESTRICT_SELF, rules, ctypes.c_uint32(0)))
    finally:
        os.close(rules)


def _places(program: str) -> list[str]:
    """What the program needs to start: itself, and the libraries of the system."""
    program = os.path.realpath(program)
    prefixes = dict.fromkeys(("/", "/usr", "/usr/local", os.path.dirname(os.path.dirname(program))))
    found = [os.path.join(prefix, name) for prefix in prefixes for name in FOLDERS]
    return [place for place in (*found, program, *STORES, *FILES) if os.path.exists(place)]


@contextlib.contextmanager
def _opened(place: str) -> Iterator[int]:
    fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _allow(rules: int, fd: int, rights: int) -> None:
    """One rule: by the file itself, whatever its name leads to later.

    Files that are memory only can't be ruled on, and are never kept away.
    """
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
    done = _LIBC.syscall(
        ADD_RULE, rules, ctypes.c_int(PATH_BENEATH), struct.pack("=Qi", rights, fd), ctypes.c_uint32(0)
    )
    if done < 0 and ctypes.get_errno() != errno.EBADFD:
        _checked(done)


def _restrict_sockets() -> None:
    """seccomp, for this thread: no new sockets. Those that are inherited go on."""
    machine, number = SOCKET[platform.machine()]
    code = [
        (LOAD, 0, 0, 4), (EQUAL, 0, 5, machine), (LOAD, 0, 0, 0), (AT_LEAST, 3, 0, X32),
        (EQUAL, 2, 0, number), (EQUAL, 1, 0, IO_URING_SETUP), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE),
    ]  # fmt: skip
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    head = struct.pack("@HP", len(code), ctypes.addressof(text))
    _checked(_LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, head, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main() -> None:
    """Say what this machine has."""
    found = walls()
    print(
        "files: "
        + (
            f"Landlock, version {found.landlock}"
            if found.landlock
            else "no wall: this kernel has no Landlock"
        )
    )
    print(
        "sockets: "
        f"{'seccomp' if found.seccomp else 'no wall: this machine has no seccomp that is supported here'}"
    )


if __name__ == "__main__":
    main()
