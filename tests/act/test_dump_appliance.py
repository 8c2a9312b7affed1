"""dump against what `guestfish download` gives of the same device: a real kernel puts volumes, arrays and
encryption together."""

import os
import subprocess
from pathlib import Path

import pytest

from support import need, run
from virt_bmap.cli import run as bmap

MIB = 1 << 20
MAKE = """
run
part-init /dev/sda gpt
part-add /dev/sda p 2048 81919
part-add /dev/sda p 81920 194559
mkfs ext4 /dev/sda1
pvcreate /dev/sda2
vgcreate vg /dev/sda2
lvcreate lv vg 24
mkfs ext4 /dev/vg/lv
md-create array "/dev/sdb /dev/sdc" level:raid1
mkfs ext4 /dev/md127
debug sh "echo -n secret | cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/sdd -"
debug sh "echo -n secret | cryptsetup open --key-file - /dev/sdd opened"
mkfs ext4 /dev/mapper/opened
"""
FILL = """
mount {device} /
fill-pattern {name} 3000000 /pattern
cp /pattern /gone
sync
rm /gone
umount /
download {device} {name}
"""
DEVICES = {"plain": "/dev/sda1", "lvm": "/dev/vg/lv", "md": "/dev/md127", "luks": "/dev/mapper/opened"}


@pytest.mark.slow
def test_equal_to_what_guestfish_downloads(tmp_path: Path) -> None:
    (
        need("guestfish", "libguestfs-tools"),
        need("qemu-img", "qemu-utils"),
        need("cryptsetup", "cryptsetup-bin"),
    )
    disks = {"a": 96, "b": 40, "c": 40, "d": 48}
    for disk, size in disks.items():
        run("truncate", "-s", f"{size}M", tmp_path / disk)
    steps = "".join(f"add {disk} format:raw\n" for disk in disks) + MAKE
    steps += "".join(FILL.format(device=device, name=name) for name, device in DEVICES.items())
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    (tmp_path / "steps").write_text(steps)
    command = ["guestfish", "-f", "steps"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "a", tmp_path / "a.qcow2")
    given = [word for disk in ("b", "c", "d") for word in ("-a", str(tmp_path / disk))]
    uuid = run(need("cryptsetup", "cryptsetup-bin"), "luksUUID", tmp_path / "d").decode().strip()
    names = {
        "plain": "/dev/sda1",
        "lvm": "/dev/vg/lv",
        "md": "/dev/md127",
        "luks": f"/dev/mapper/luks-{uuid}",
    }
    for first in ("a", "a.qcow2"):
        for name, device in names.items():
            out = tmp_path / "out"
            assert (
                bmap(
                    [
                        "dump",
                        "-q",
                        "--force",
                        "--key",
                        "all:key:secret",
                        "-a",
                        str(tmp_path / first),
                        *given,
                        device,
                        str(out),
                    ]
                )
                == 0
            )
            assert out.read_bytes() == (tmp_path / name).read_bytes(), (first, name)
