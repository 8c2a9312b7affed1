"""The guest of a judged watch with a kernel of its own: libguestfs' small machine, emulated, with the served
disk as its own and the files of this machine, Python among them, through 9p.

    watch_machine.py SOCKET FOLDER KIND SEED SECONDS [SCENARIO...]     (run by `virt-bmap watch`)

For what this machine's kernel refuses: ext4 grows while it is mounted only with CAP_SYS_RESOURCE.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import watch_guest

DISK = "served"
HOST = "/tmp/host"
"""Where the guest has this machine's files."""
NINE_P = "trans=virtio,version=9p2000.L,msize=262144"


def main() -> int:
    """Run the judge's guest in there."""
    socket, folder = sys.argv[1], Path(sys.argv[2])
    command = [sys.executable, watch_guest.__file__, f"/dev/disk/guestfs/{DISK}", *sys.argv[2:]]
    inside = folder / "inside"
    inside.write_text(
        f"mount --rbind /dev {HOST}/dev\nmount -t proc proc {HOST}/proc\nmount -t sysfs sys {HOST}/sys\n"
        f"exec chroot {HOST} {shlex.join(command)}\n"
    )
    lines = [
        f'add "" format:raw protocol:nbd server:unix:{socket} discard:enable label:{DISK}',
        "config -fsdev local,id=host,path=/,security_model=none,multidevs=remap",
        "config -device virtio-9p-pci,fsdev=host,mount_tag=host",
        "run",
        f'debug sh "mkdir -p {HOST}; modprobe 9pnet_virtio; mount -t 9p -o {NINE_P} host {HOST} 2>&1"',
        f'debug sh "sh -e {HOST}{inside} 2>&1"',
    ]
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    done = subprocess.run(["guestfish"], input="\n".join(lines) + "\n", env=environment, text=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
