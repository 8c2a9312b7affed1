"""Does KVM work on this machine?"""

import functools
import platform
import struct
import subprocess
import time

from virt_bmap.host import children, programs
from virt_bmap.host.leftovers import private_folder

PATIENCE = 60.0
"""Seconds that emulation gets to count down; it needs less than one on a quiet machine."""
STEPS = 100_000_000


@functools.cache
def accelerator() -> str:
    """kvm where it is faster than emulation, else tcg.

    There are machines where /dev/kvm opens and nothing runs, and others
    (nested, without hardware for it) where guests do run, at a thousandth of
    the speed: so both count down from a hundred million, and KVM has to win."""
    emulated = _seconds_of("tcg", PATIENCE)
    return "kvm" if emulated is not None and _seconds_of("kvm", emulated) is not None else "tcg"


def can_tell() -> bool:
    """Is this a machine whose instructions the race is written in?"""
    return platform.machine() == "x86_64"


def _seconds_of(name: str, limit: float) -> float | None:
    """How long a guest takes to count down; None where it does not end within the limit."""
    program = programs.find("qemu-system-x86_64")
    if not program:
        return None
    # mov ecx, n; again: dec ecx; jnz again
    code = b"\x66\xb9" + struct.pack("<I", STEPS) + b"\x66\x49\x75\xfc"
    code += b"\xba\x01\x05\xb0\x00\xee\xf4"  # mov dx, 0x501; mov al, 0; out dx, al; hlt
    with private_folder() as folder:
        image = f"{folder}/boot.img"
        with open(image, "wb") as file:
            file.write(code.ljust(510, b"\0") + struct.pack("<H", 0xAA55))
        command = [
            program,
            "-accel",
            name,
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0x501,iosize=1",
            "-drive",
            f"file={image},format=raw,if=ide",
        ]
        start = time.monotonic()
        try:
            done = children.run(command, timeout=limit)
        except (OSError, subprocess.TimeoutExpired):
            return None
        # isa-debug-exit: the value written, doubled, plus one
        return time.monotonic() - start if done.returncode == 1 else None
