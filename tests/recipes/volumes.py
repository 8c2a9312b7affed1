"""Volume managers, arrays, encryption."""

import json
import struct
import zlib
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tools.fuzz.seeds import PASSPHRASE

import bitlocker_images
import btrfs_images
from recipes import windows
from recipes.made import MIB, Made, Recipe, blank, one, put
from recipes.tables import small_ext
from support import need, run


def lvm(folder: Path) -> Made:
    """Two disks, one with two metadata areas; a linear volume with an ext4, a striped one, one of two
    segments."""
    need("lvcreate", "lvm2")
    images = [blank(folder / f"disk{number}.img", 16 * MIB) for number in (1, 2)]
    with btrfs_images.loops(images) as devices:
        accept = ",".join(f'"a|{device}$|"' for device in devices)
        options = ["--config", f'devices{{filter=[{accept},"r|.*|"]}}']
        away = [*options, "--driverloaded", "n"]
        run("pvcreate", *options, "--metadatacopies", "2", devices[0])
        run("pvcreate", *options, devices[1])
        run("vgcreate", *away, "-s", "512k", "my-vg", *devices)
        for words in ("-n lin -L 4M", "-n str -i2 -I64k -L 4M", "-n two -l 12"):
            run("lvcreate", *away, "-an", "-Zn", "-Wn", "my-vg", *words.split())
        said = run(
            "pvs", *away, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "pe_start", devices[0]
        )
    data, tree = small_ext(folder)
    put(images[0], int(json.loads(said)["report"][0]["pv"][0]["pe_start"]), data)
    return Made(images, {"/dev/my-vg/lin": tree})


THIN_POOL = """
my-vg {{ id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa" seqno = 5 format = "lvm2" status = ["RESIZEABLE", \
"READ", "WRITE"] flags = []
extent_size = 512 max_lv = 0 max_pv = 0 metadata_copies = 0
physical_volumes {{ pv0 {{ id = "{pv}" device = "/dev/sda" status = ["ALLOCATABLE"] flags = [] dev_size = \
32768 pe_start = 2048 pe_count = 60 }} }}
logical_volumes {{
{volumes}
}} }}
"""
LINEAR = """{name} {{ id = "{id}" status = ["READ", "WRITE"{visible}] flags = [] segment_count = 1
segment1 {{ start_extent = 0 extent_count = {count} type = "striped" stripe_count = 1 stripes = ["pv0", \
{at}] }} }}"""


def thin(folder: Path) -> Made:
    """A thin pool without a kernel: metadata restored by thin_restore, and LVM's text written by hand into a
    physical volume that LVM made."""
    restore = need("thin_restore", "thin-provisioning-tools")
    need("pvcreate", "lvm2")
    metadata = blank(folder / "metadata", MIB)
    (folder / "xml").write_text(
        '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
        '<device dev_id="1" mapped_blocks="20" transaction="0" creation_time="0" snap_time="0">'
        '<range_mapping origin_begin="0" data_begin="0" length="16" time="0"/><single_mapping '
        'origin_block="40" data_block="20" time="0"/>'
        '<range_mapping origin_begin="50" data_begin="30" length="3" time="0"/></device>'
        '<device dev_id="2" mapped_blocks="4" transaction="1" creation_time="1" snap_time="1">'
        '<range_mapping origin_begin="0" data_begin="0" length="4" time="0"/></device></superblock>'.replace(
            'nr_data_blocks="0"', 'nr_data_blocks="64"'
        )
    )
    run(restore, "-i", folder / "xml", "-o", metadata)
    image = blank(folder / "disk.img", 16 * MIB)
    with btrfs_images.loops([image]) as (device,):
        options = ["--config", f'devices{{filter=["a|{device}$|","r|.*|"]}}', "--driverloaded", "n"]
        run("pvcreate", *options[:2], device)
        run("vgcreate", *options, "-s", "256k", "my-vg", device)
        pv = json.loads(run("pvs", *options, "--reportformat", "json", "-o", "pv_uuid", device))["report"][0][
            "pv"
        ][0]["pv_uuid"]

    def id_of(number: int) -> str:
        return "-".join((f"{number:06}", *["bbbb"] * 5, "cccccc"))

    hidden = [
        LINEAR.format(name=name, id=id_of(at), visible="", count=count, at=at)
        for name, count, at in (("pool_tmeta", 4, 0), ("pool_tdata", 16, 8))
    ]
    pool = (
        f'pool {{ id = "{id_of(90)}" status = ["READ", "WRITE", "VISIBLE"] flags = [] segment_count '
        f"= 1 segment1 {{ start_extent = 0 extent_count = 16 "
        'type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata" transaction_id = 2 '
        'chunk_size = 128 discards = "passdown" zero_new_blocks = 1 } }'
    )
    thins = [
        f'{name} {{ id = "{id_of(91 + device)}" status = ["READ", "WRITE", "VISIBLE"] flags = [] '
            f'segment_count = 1 segment1 {{ start_extent = 0 extent_count = {count} '
        f'type = "thin" thin_pool = "pool" transaction_id = {device - 1} device_id = {device} }} }}'
        for name, count, device in (("t1", 16, 1), ("t2", 16, 2))
    ]  # fmt: skip
    write_lvm_text(image, THIN_POOL.format(pv=pv, volumes="\n".join([*hidden, pool, *thins])).encode())
    put(image, MIB, metadata.read_bytes())
    put(image, MIB + 8 * (256 << 10), small_ext(folder)[0][: 16 * 65536])
    return one(image)


def lvm_crc(data: bytes) -> int:
    """LVM's checksum of labels and metadata (lib/misc/crc.c): CRC-32 with its own start and no last
    complement."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def write_lvm_text(image: Path, text: bytes, area: int = 4096) -> None:
    """Other metadata for a physical volume's only metadata area, checksums and all."""
    text = text.strip() + b"\n\0"
    with open(image, "r+b") as file:
        file.seek(area)
        head = bytearray(file.read(512))
        struct.pack_into("<QQII", head, 40, 512, len(text), lvm_crc(text), 0)
        head[:4] = struct.pack("<I", lvm_crc(bytes(head[4:])))
        file.seek(area)
        file.write(head + text)


def md(level: int, metadata: int, folder: Path) -> Made:
    """An array with an ext4: mirrors, or a RAID5 left-symmetric of chunks of 16 KiB; superblocks of version
    1.0 (at the end) or 1.2, or 0.90."""
    (volume, tree), chunk = small_ext(folder), 16384
    count, start = (2, 0) if level == 1 else (3, MIB)
    members = [bytearray() for _ in range(count)]
    if level == 1:
        members = [bytearray(volume), bytearray(volume)]
    else:
        for row in range(len(volume) // chunk // 2):
            pieces = [volume[(2 * row + at) * chunk :][:chunk] for at in (0, 1)]
            parity = bytes(a ^ b for a, b in zip(*pieces, strict=True))
            place = 2 - row % 3
            order = {place: parity, (place + 1) % 3: pieces[0], (place + 2) % 3: pieces[1]}
            for number, member in enumerate(members):
                member += order[number]
    result = []
    for role, member in enumerate(members):
        size = len(member)
        path = folder / f"disk{role}.img"
        total = (start + size if start else size + 131072) // 65536 * 65536
        image = bytearray(total)
        image[start : start + size] = member
        if metadata == 0:
            at = total // 65536 * 65536 - 65536
            head = _md_90(level, size, role, count)
        else:
            at = 4096 if metadata == 2 else (total // 512 - 16) // 8 * 8 * 512
            head = _md_1(level, chunk // 512, size // 512, role, count, start // 512, at // 512)
        image[at : at + len(head)] = head
        path.write_bytes(image)
        result.append(path)
    return Made(result, {"/dev/md127": tree})


def _md_1(level: int, chunk: int, size: int, role: int, disks: int, data_offset: int, at: int) -> bytes:
    """A superblock of version 1 by the fields of md_p.h; sizes and offsets in sectors."""
    head = bytearray(256 + 2 * disks)
    struct.pack_into("<II", head, 0, 0xA92B4EFC, 1)
    head[0x10:0x20], head[0x20:0x29] = b"0123456789abcdef", b"host:name"
    struct.pack_into(
        "<iIQII", head, 0x48, level, 2 if level == 5 else 0, size, chunk if level == 5 else 0, disks
    )
    struct.pack_into("<QQQ", head, 0x80, data_offset, size, at)
    struct.pack_into("<I", head, 0xA0, role)
    struct.pack_into("<QQ", head, 0xC8, 7, 2**64 - 1)
    struct.pack_into("<I", head, 0xDC, disks)
    struct.pack_into(f"<{disks}H", head, 256, *range(disks))
    words = struct.unpack(f"<{len(head) // 4}I", bytes(head[: len(head) // 4 * 4]))
    total = sum(words) + (struct.unpack_from("<H", head, len(head) - 2)[0] if len(head) % 4 else 0)
    head[0xD8:0xDC] = struct.pack("<I", (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    return bytes(head)


def _md_90(level: int, size: int, role: int, disks: int) -> bytes:
    """A superblock of version 0.90 by the fields of md_p.h, little endian; `size` of a member in bytes."""
    words = [0] * 1024
    words[0:4], words[7], words[8] = [0xA92B4EFC, 0, 90, 0], level, size // 1024
    words[4], words[9], words[10], words[11] = 32 * 31, disks, disks, 127
    words[5], words[13], words[14], words[15] = 0x12345678, 0x9ABCDEF0, 0x0FEDCBA9, 0x87654321
    words[32:37] = [0x5F000000, 1, disks, disks, 0]
    words[39] = 7  # events, low half
    for number in range(disks):
        # active and in sync
        words[128 + 32 * number : 128 + 32 * number + 5] = [number, 8, 16 * number, number, 6]
    words[992:997] = [role, 8, 16 * role, role, 6]
    total = sum(words)
    words[38] = (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF
    return struct.pack("<1024I", *words)


UUID = "4a9a1a55-0f60-4a3c-9a05-7c1b6b7f2d10"


def luks(version: str, folder: Path) -> Made:
    """An ext4, encrypted by the key that cryptsetup made: to let cryptsetup do it wants device-mapper."""
    tool = need("cryptsetup", "cryptsetup-bin")
    image, secret, key = blank(folder / "disk.img", 8 * MIB), folder / "secret", folder / "key"
    secret.write_bytes(PASSPHRASE)
    words = f"--type {version} --offset 8192 --uuid {UUID} --cipher aes-xts-plain64".split()
    words += ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    words += ["--sector-size", "512"] if version == "luks2" else []
    run(tool, "luksFormat", "-q", *words, "--key-file", secret, image)
    run(tool, "luksDump", "-q", "--dump-volume-key", "--volume-key-file", key, "--key-file", secret, image)
    data, tree = small_ext(folder)
    cipher, sectors = algorithms.AES(key.read_bytes()), []
    for number in range(len(data) // 512):
        mode = modes.XTS(number.to_bytes(16, "little"))
        sectors.append(Cipher(cipher, mode).encryptor().update(data[number * 512 :][:512]))
    put(image, 4 * MIB, b"".join(sectors))
    return Made([image], {f"/dev/mapper/luks-{UUID}": tree})


def bitlocker(chunks: set[int] | None, folder: Path) -> Made:
    """A volume whose protection is suspended, encrypted by hand: nothing on Linux makes one. With `chunks`
    only these are, and the rest waits to be written."""
    (folder / "plain").mkdir()
    (plain,), trees = windows.ntfs(32, 4096, folder / "plain")
    image = folder / "disk.img"
    image.write_bytes(bitlocker_images.by_hand(plain.read_bytes(), chunks=chunks).tobytes())
    return Made([image], {"/dev/mapper/bitlk-33323130-3534-3736-3839-616263646566": trees["/dev/sda"]})


RECIPES: dict[str, Recipe] = {
    "lvm": lvm,
    "lvm-thin": thin,
    "md-raid1": partial(md, 1, 0),
    "md-raid1-end": partial(md, 1, 1),
    "md-raid5": partial(md, 5, 2),
    "luks1": partial(luks, "luks1"),
    "luks2": partial(luks, "luks2"),
    "bitlocker": partial(bitlocker, None),
    "bitlocker-on-write": partial(bitlocker, set(range(0, 512, 3))),
}
