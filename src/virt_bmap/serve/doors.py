"""Other ways to a served disk, for guests whose VMM takes no NBD URI.

    file     a file, by nbdfuse(1)                                   Firecracker, cloud-hypervisor, crosvm
    vhost    a vhost-user-blk socket, by qemu-storage-daemon(1)      those that take one

A door is a client of the server, in its folder, and as lasting as that: it goes when nobody uses it any more,
and whoever kills the watch leaves it to the caretaker.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Collection, Iterator

from virt_bmap.core.errors import ImageError
from virt_bmap.host import children, leftovers, programs
from virt_bmap.serve import caretaker
from virt_bmap.serve.serve import Served, let_go

START = 30.0
"""Seconds that a door gets to open."""
DOORS = ("file", "vhost")


@contextlib.contextmanager
def opened(names: Collection[str], served: Served, folder: leftovers.Shared) -> Iterator[dict[str, str]]:
    """The doors of these names: where each is. They are closed when the block ends, and they are not in use.

    Raises MissingTool, and ImageError with the words of the program.
    """
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(_open(name, served, folder)) for name in names}


@contextlib.contextmanager
def _open(name: str, served: Served, folder: leftovers.Shared) -> Iterator[str]:
    command, path = (_file if name == "file" else _vhost)(served, folder.name)
    said = f"{folder.name}/{name}.err"
    with (
        open(said, "wb") as errors,
        children.running(
            command,
            subprocess.Popen,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=programs.environment(),
            process_group=0,
        ) as process,
    ):
        try:
            _wait(process, path, f"{folder.name}/{name}.pid", said)
            yield path
        finally:
            caretaker.close_doors(folder.name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            if process.poll() is None and caretaker.in_use(folder.name, name):
                folder.leave()
                let_go(process)


def _file(served: Served, folder: str) -> tuple[list[str], str]:
    program = programs.required("nbdfuse", "$file", "apt-get install libnbd-bin, or dnf install nbdfuse")
    programs.required("fusermount3", "$file", "apt-get install fuse3, or dnf install fuse3")
    top = f"{folder}/{caretaker.MOUNT}"
    os.mkdir(top, 0o700)
    return [program, "--pidfile", f"{folder}/file.pid", f"{top}/disk", served.address.uri()], f"{top}/disk"


def _vhost(served: Served, folder: str) -> tuple[list[str], str]:
    packages = "apt-get install qemu-utils, or dnf install qemu-img"
    program = programs.required("qemu-storage-daemon", "$vhost", packages)
    path = f"{folder}/{caretaker.VHOST}"
    there = path.replace(",", ",,")
    export = f"type=vhost-user-blk,id=door,node-name=disk,writable=on,addr.type=unix,addr.path={there}"
    node = f"driver=nbd,node-name=disk,discard=unmap,{served.address.node}"
    return [program, "--pidfile", f"{folder}/vhost.pid", "--blockdev", node, "--export", export], path


def _wait(process: "subprocess.Popen[bytes]", path: str, pid: str, said: str) -> None:
    """Until it is there, which the program says by writing its process number."""
    end = time.monotonic() + START
    while not (os.path.exists(pid) and os.path.getsize(pid) and os.path.exists(path)):
        if process.poll() is not None or time.monotonic() > end:
            with open(said, errors="replace") as file:
                words = file.read().strip().splitlines() or [f"exit status {process.poll()}"]
            raise ImageError(f"{path}: can't be had: {words[-1]}")
        time.sleep(0.01)
