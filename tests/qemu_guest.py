"""A guest in QEMU that does nothing but write files: the demo guest's kernel and initramfs, with a small init
of our own in front of a second disk."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "demo"
sys.path.insert(0, str(DEMO))

import build  # noqa: E402

_loader = SourceFileLoader("demo_run", str(DEMO / "run"))
demo: Any = module_from_spec(spec_from_loader("demo_run", _loader))  # type: ignore[arg-type]
_loader.exec_module(demo)

INIT = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
/bin/busybox mkdir -p /usr/sbin /usr/bin /sbin /bin /proc /dev /sys
/bin/busybox --install -s
mount -t proc proc /proc; mount -t devtmpfs dev /dev; mount -t sysfs sys /sys
modprobe virtio_pci; modprobe virtio_blk; modprobe {kind}
mkdir /data; mount -t {kind} /dev/vda /data
n=0
while [ $n -lt {count} ]; do
    mkdir -p /data/d$((n % 9))
    yes "this is file $n" | head -c $((2000 + n % 7 * 3000)) | dd of=/data/d$((n % 9))/f$n bs=64k \
conv=fsync 2>/dev/null
    n=$((n + 1))
done
umount /data
echo written > /dev/console
poweroff -f
"""


def content(number: int) -> bytes:
    """What the guest writes into file `number`."""
    size = 2000 + number % 7 * 3000
    line = f"this is file {number}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def path(number: int) -> str:
    """Where it writes it."""
    return f"/d{number % 9}/f{number}"


def command(folder: Path, kind: str, count: int) -> list[str]:
    """QEMU's command line for such a guest on the disk $uri; kernel and initramfs are put into the folder."""
    root = build.unpack(build.download(sys.executable), folder)
    for name in ("vmlinuz-virt", "initramfs-virt"):
        build.run("debugfs", "-R", f"dump /boot/{name} {folder / name}", root)
    tree = folder / "tree"
    (tree / "usr").mkdir(parents=True)
    (tree / "init").write_text(INIT.format(kind=kind, count=count))
    (tree / "init").chmod(0o755)
    (version,) = [line.split("/")[5] for line in build.run("debugfs", "-R", "ls -p /lib/modules",
            root).decode().splitlines()
                  if line.count("/") > 5 and line.split("/")[5][0].isdigit()]  # fmt: skip
    modules = folder / "modules"
    modules.mkdir()
    build.run("debugfs", "-R", f"rdump /lib/modules/{version} {modules}", root)
    wanted = needed(modules / version, kind)
    for name in (
        *wanted,
        "modules.dep",
        "modules.dep.bin",
        "modules.alias.bin",
        "modules.symbols.bin",
        "modules.builtin.bin",
    ):
        found = modules / version / name
        if found.exists():
            build.copy(found, tree / "usr/lib/modules" / version / name)
    (folder / "initramfs").write_bytes((folder / "initramfs-virt").read_bytes() + build.archive(tree))
    root.unlink()
    subprocess.run(["rm", "-rf", modules], check=True)
    return ["timeout", "120", "qemu-system-x86_64", "-accel", demo.accelerator(), "-m", "256", "-nodefaults",
        "-display", "none", "-no-reboot",
            "-serial", f"file:{folder}/console.txt", "-kernel", str(folder / "vmlinuz-virt"), "-initrd",
            str(folder / "initramfs"), "-append", "console=ttyS0 quiet panic=1", "-drive",
            "file=$uri,format=raw,if=virtio"]  # fmt: skip


def needed(modules: Path, kind: str) -> list[str]:
    """The files of a filesystem's module and of all that it depends on."""
    listed = {
        Path(line.split(":")[0]).name.split(".")[0]: line.replace(":", " ").split()
        for line in (modules / "modules.dep").read_text().splitlines()
    }
    return listed.get(kind, [])


__all__ = ["command", "content", "path"]
