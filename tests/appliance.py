"""Images that only a kernel with md, device-mapper or dm-crypt can make: commands run in the small virtual
machine of libguestfs.

One launch takes 15 to 60 s under emulation, so what it made is kept in the temporary folder, under a name
made of the commands; the next run of the tests finds it there.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TIMEOUT = 900
"""Seconds for one launch with all its commands."""
Step = tuple[str, str]
"""("sh", commands for the virtual machine) or ("host", commands for this one, in the folder of the
images; python3 is the one of the tests)."""


def made(name: str, disks: dict[str, int], steps: list[Step]) -> Path:
    """The folder with what the steps made, from the cache or fresh.

    `disks` are files (named with letters alone) and their sizes in bytes, in the machine
    /dev/disk/guestfs/NAME (/dev/sda and so on come in any order); a size of 0 stands for a file that a first
    step made.
    """
    if not shutil.which("guestfish"):
        pytest.skip("guestfish is not installed (apt-get install libguestfs-tools linux-image-amd64)")
    digest = hashlib.sha256(repr((disks, steps)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"virt-bmap-appliance-{os.getuid()}" / f"{name}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
    try:
        _run(work, disks, steps)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _run(work: Path, disks: dict[str, int], steps: list[Step]) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ.get("PATH", ""), "/usr/sbin:/sbin"]
        ),
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
    }
    first = next((at for at, (where, _) in enumerate(steps) if where == "sh"), len(steps))
    for _, command in steps[:first]:
        subprocess.run(["sh", "-ec", command], cwd=work, check=True, env=environment)
    for disk, size in disks.items():
        if size:
            with (work / disk).open("wb") as file:
                file.truncate(size)
    lines = [f"add {disk} format:raw label:{disk}" for disk in disks] + ["run"]
    for where, command in steps[first:]:
        if where == "host":
            lines.append(f"!set -e; {command}")
        else:
            lines.append(
                f'debug sh "echo {base64.b64encode(command.encode()).decode()} | base64 -d > '
                '/tmp/step; sh -e /tmp/step 2>&1"'
            )
    done = subprocess.run(["guestfish"], input="\n".join(lines) + "\n", cwd=work, env=environment,
        capture_output=True, text=True,
                          timeout=TIMEOUT)  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the appliance failed: {(done.stdout + done.stderr)[-3000:]}")
    (work / "log").write_text(done.stdout + done.stderr)
