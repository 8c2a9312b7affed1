"""The readers of another kernel: that of libguestfs's appliance, a small virtual machine. It mounts what this
machine's kernel does not, and a disk that was damaged on purpose can do no harm there."""

import base64
import gzip
import os
import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

from others.readers import UNREAD, Tree

MODULES = {"vfat": "vfat", "iso9660": "isofs", "ext2": "ext4", "ext3": "ext4"}
"""Modules whose names are not the format's."""
OPTIONS = {"xfs": "nouuid", "vfat": "utf8,codepage=437", "iso9660": "utf8"}
KINDS = {"ext2": "ext4", "ext3": "ext4"}
TIMEOUT = 1800
LOOK = """
umount /mnt/look 2>/dev/null; mkdir -p /mnt/look
mount -t {kind} -o ro{options} /dev/disk/guestfs/{name} /mnt/look 2>/tmp/why ||
  {{ head -n 1 /tmp/why; exit 0; }}
cd /mnt/look
exec 2>/dev/null
{{ find . -mindepth 1 -printf '%y%s/%P\\0'; printf '\\0'
   find . -type f -size -{blocks} -print0 | xargs -0 -r sha256sum -z; }} | gzip | base64 -w 0
cd /; umount /mnt/look
"""
"""Type, size and name of all, an empty word, and sums with names, each ended by a zero."""


def is_here() -> bool:
    return shutil.which("guestfish") is not None


def trees(kind: str, images: Sequence[Path], largest: int) -> list[Tree | str]:
    """What lies on each of these images, or why it can't be mounted: one launch for all."""
    names = [f"d{_letters(at)}" for at in range(len(images))]
    lines = [f"-debug sh 'modprobe {MODULES.get(kind, kind)}'"]
    options = "," + OPTIONS[kind] if kind in OPTIONS else ""
    for name in names:
        script = LOOK.format(
            kind=KINDS.get(kind, kind), options=options, name=name, blocks=largest // 512 + 1
        )
        coded = base64.b64encode(script.encode()).decode()
        lines += [f"echo ={name}", f'-debug sh "echo {coded} | base64 -d > /tmp/look; sh /tmp/look 2>&1"']
    said = dict(
        answer.partition(b"\n")[::2]
        for answer in (b"\n" + _guestfish(images, names, lines)).split(b"\n=")[1:]
    )
    return [_tree(said.get(name.encode(), b"").strip(), largest) for name in names]


def _guestfish(images: Sequence[Path], names: Sequence[str], lines: Sequence[str]) -> bytes:
    """What commands print in an appliance that has these images as disks. It may write to them: below an
    overlay, QEMU would look for formats in them."""
    added = [f"add {image} format:raw label:{name}" for image, name in zip(images, names, strict=True)]
    environment = {**os.environ, "LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    words = "\n".join([*added, "run", *lines, ""]).encode()
    return subprocess.run(
        ["guestfish"], input=words, stdout=subprocess.PIPE, timeout=TIMEOUT, check=True, env=environment
    ).stdout


def _letters(number: int) -> str:
    return string.ascii_lowercase[number // 26] + string.ascii_lowercase[number % 26]


def _tree(answer: bytes, largest: int) -> Tree | str:
    try:
        told = gzip.decompress(base64.b64decode(answer, validate=True))
    except (ValueError, OSError, EOFError):
        return answer.decode(errors="replace").splitlines()[-1] if answer else "no answer"
    tree: Tree = {}
    words = iter(told.split(b"\0"))
    while word := next(words):
        size, _, name = word[1:].partition(b"/")
        tree[b"/" + name] = UNREAD if word[:1] == b"f" and int(size) <= largest else None
    for word in words:
        if word:
            tree[word[67:]] = word[:64].decode()
    return tree


# ---- arrays, groups, encryption ----------------------------------------------------------------------------

OPEN = {
    "md": "modprobe -a raid0 raid1 raid10 raid456 linear; mdadm --stop --scan 2>/dev/null\n"
    "mdadm --assemble --run --readonly /dev/md9 {disks} >/dev/null 2>&1\n"
    "echo md $(sha256sum < /dev/md9); mdadm --stop /dev/md9",
    "lv": "vg=$(lvm pvs --noheadings -o vg_name {disks} 2>/dev/null); lvm vgchange -ay $vg >/dev/null 2>&1\n"
    "for one in $(lvm lvs --noheadings -o lv_path $vg 2>/dev/null); do echo $one $(sha256sum < $one); done",
    "crypt": "printf %s '{secret}' | cryptsetup open --readonly --key-file=- {disks} opened\n"
    "echo crypt $(sha256sum < /dev/mapper/opened); cryptsetup close opened",
    "bitlk": "printf %s '{secret}' | cryptsetup open --type bitlk --readonly --key-file=- {disks} opened\n"
    "echo crypt $(sha256sum < /dev/mapper/opened); cryptsetup close opened",
}
"""How each kind is opened, and the SHA-256 of what is in it."""


def volumes(sets: Sequence[tuple[str, Sequence[Path], str]]) -> list[dict[str, str]]:
    """Of each set (kind, images, secret): its volumes by name, and their SHA-256. One launch for all."""
    images = [image for _, members, _ in sets for image in members]
    names = [f"d{_letters(at)}" for at in range(len(images))]
    lines, left = [], iter(names)
    for kind, members, secret in sets:
        disks = " ".join(f"/dev/disk/guestfs/{next(left)}" for _ in members)
        script = base64.b64encode(OPEN[kind].format(disks=disks, secret=secret).encode()).decode()
        lines += ["echo =", f'-debug sh "echo {script} | base64 -d > /tmp/look; sh /tmp/look 2>&1"']
    said = (b"\n" + _guestfish(images, names, lines)).split(b"\n=\n")[1:]
    return [
        {words[0]: words[1] for words in map(str.split, answer.splitlines()) if words[2:] == ["-"]}
        for answer in (one.decode(errors="replace") for one in said)
    ]
