"""Images of the formats that QEMU alone reads, or that have tables of their own: numbers and references that
lead out of the file, parents, sizes of 0 and 2^63, tables in holes."""

import base64
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import google_crc32c

from support import need, run

MIB = 1 << 20
END = (1 << 64) - 1
Change = Callable[[bytearray], None]


def made_by_qemu(folder: Path, format: str, *options: str) -> bytearray:
    """An image of 8 MiB with a MiB of ones in it."""
    need("qemu-img", "qemu-utils")
    raw, image = folder / "ones.raw", folder / f"made.{format}"
    raw.write_bytes(b"\1" * MIB + bytes(7 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, image)
    return bytearray(image.read_bytes())


def put(at: int, form: str, *values: int) -> Change:
    return lambda data: struct.pack_into(form, data, at, *values)


# ---- VHDX -----------------------------------------------------------------------------------------------

REGIONS, HEADERS = (192 << 10, 256 << 10), (64 << 10, 128 << 10)
BAT, METADATA = "2dc27766-f623-4200-9d64-115e9bfd4a08", "8b7ca206-4790-4b9a-b8fe-575f050f886e"
FILE, SIZE = "caa16737-fa36-4d43-b3b6-33f0aa44e76b", "2fa54224-cd1b-4876-b211-5dbed83bf4b8"
LOCATOR, VHDX_PARENT = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c", "b04aefb7-d19e-4a81-b789-25b8e9445913"


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def sealed_vhdx(data: bytearray) -> bytearray:
    """With the checksums of both headers and both region tables made right."""
    for places, size in ((HEADERS, 4096), (REGIONS, 64 << 10)):
        for at in places:
            data[at + 4 : at + 8] = bytes(4)
            struct.pack_into("<I", data, at + 4, google_crc32c.value(bytes(data[at : at + size])))
    return data


def region(kind: str, form: str, field: int, value: int) -> Change:
    """Another place (0) or length (8) of a region, in both tables."""

    def change(data: bytearray) -> None:
        for at in REGIONS:
            struct.pack_into(form, data, data.index(guid(kind), at) + 16 + field, value)

    return change


def item(kind: str, form: str, *values: int, skip: int = 0) -> Change:
    """Another value of an item of metadata."""

    def change(data: bytearray) -> None:
        table = struct.unpack_from("<Q", data, data.index(guid(METADATA), REGIONS[0]) + 16)[0]
        entry = data.index(guid(kind), table)
        place = table + struct.unpack_from("<I", data, entry + 16)[0]
        struct.pack_into(form, data, place + skip, *values)

    return change


def parent(name: str) -> Change:
    """A parent locator with this path under each of its keys."""

    def change(data: bytearray) -> None:
        item(FILE, "<I", 2, skip=4)(data)
        table = struct.unpack_from("<Q", data, data.index(guid(METADATA), REGIONS[0]) + 16)[0]
        count = struct.unpack_from("<H", data, table + 10)[0]
        keys = ("parent_linkage", "relative_path", "volume_path", "absolute_win32_path")
        pairs = [(key, f"{{{uuid.UUID(int=7)}}}" if key == "parent_linkage" else name) for key in keys]
        body, at = b"", 20 + 12 * len(pairs)
        entries = b""
        for key, value in pairs:
            one, two = key.encode("utf-16-le"), value.encode("utf-16-le")
            entries += struct.pack("<IIHH", at, at + len(one), len(one), len(two))
            body += one + two
            at += len(one) + len(two)
        locator = guid(VHDX_PARENT) + struct.pack("<HH", 0, len(pairs)) + entries + body
        place = 128 << 10
        struct.pack_into("<16sIIII", data, table + 32 * (count + 1), guid(LOCATOR), place, len(locator), 4, 0)
        struct.pack_into("<H", data, table + 10, count + 1)
        data[table + place : table + place + len(locator)] = locator

    return change


def log_at(offset: int, length: int) -> Change:
    def change(data: bytearray) -> None:
        for at in HEADERS:
            struct.pack_into("<IQ", data, at + 68, length, offset)
            data[at + 48 : at + 64] = guid(SIZE)  # there is something to replay

    return change


def vhdx(*changes: Change) -> Callable[[Path], bytearray]:
    def make(folder: Path) -> bytearray:
        data = made_by_qemu(folder, "vhdx", "-o", "subformat=dynamic,block_size=1M")
        for change in changes:
            change(data)
        return sealed_vhdx(data)

    return make


# ---- VDI, parallels, bochs, dmg ---------------------------------------------------------------------------


def changed(format: str, *changes: Change) -> Callable[[Path], bytearray]:
    def make(folder: Path) -> bytearray:
        data = made_by_qemu(folder, format)
        for change in changes:
            change(data)
        return data

    return make


def differing(name: str) -> Change:
    """A VDI of the kind that has a parent, with the parent's UUIDs, and a name where its words are."""

    def change(data: bytearray) -> None:
        struct.pack_into("<I", data, 0x4C, 4)
        struct.pack_into("<QQQQ", data, 0x1A8, 1, 2, 3, 4)
        data[0x54 : 0x54 + len(name)] = name.encode()

    return change


def extended(name: str) -> Change:
    """A format extension of Parallels', which holds a name."""

    def change(data: bytearray) -> None:
        at = -(-len(data) // MIB) * MIB
        data.extend(bytes(at + MIB - len(data)))
        struct.pack_into("<Q", data, 56, at // 512)
        body = struct.pack("<QQ", 0xAB234CEF23DCEA87, 0) + name.encode()
        data[at : at + len(body)] = body

    return change


def other_magic(data: bytearray) -> None:
    data[:16] = b"WithouFreSpacExt"


def map_entry(value: int) -> Change:
    """The first entry of a VDI's block map."""
    return lambda data: struct.pack_into("<I", data, struct.unpack_from("<I", data, 0x154)[0], value)


def bochs(
    disk: int = MIB, catalog: int = 16, bitmap: int = 512, extent: int = 65536, entry: int = 0xFFFFFFFF,
    subtype: bytes = b"Growing", named: bytes = b"",
) -> Callable[[Path], bytearray]:  # fmt: skip
    """A growing Bochs disk: its header, its catalogue, one extent with its bitmap."""
    head = struct.pack("<32s16s16s", b"Bochs Virtual HD Image", b"Redolog", subtype)
    head += struct.pack("<IIIIIIQ", 0x20000, 512, catalog, bitmap, extent, 0, disk) + named
    table = struct.pack("<I", entry) * min(catalog, 1 << 16)
    data = bytearray(head.ljust(512, b"\0") + table + bytes(min(bitmap, 4096)) + b"\1" * 65536)
    return lambda folder: data


RAW, ZLIB, ZEROES, LAST = 1, 0x80000005, 0, 0xFFFFFFFF
Chunk = tuple[int, int, int, int, int]
ONE_CHUNK = (RAW, 0, 128, 0, 65536)


def dmg(
    *chunks: Chunk, sectors: int = 2048, start: int = 0, xml: tuple[int, int] | None = None,
    resources: tuple[int, int] = (0, 0), named: str = "",
) -> Callable[[Path], bytearray]:  # fmt: skip
    """Apple's: content, the list of pieces, the trailer.

    A chunk: type, first sector, sectors, place, bytes there.
    """
    rows = b"".join(
        struct.pack(">IIQQQQ", kind, 0, *rest) for kind, *rest in (*chunks, (LAST, sectors, 0, 0, 0))
    )
    head = struct.pack(">4sIQQQII", b"mish", 1, start, sectors, 0, 0, 0).ljust(0xC8, b"\0")
    block = base64.b64encode(head + struct.pack(">I", len(chunks) + 1) + rows).decode()
    text = (
        "<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key>"
        f"<data>{block}</data><key>Name</key><string>{named}</string></dict></array></dict></dict></plist>"
    ).encode()
    content = b"\1" * 65536
    place, size = xml or (len(content), len(text))
    koly = struct.pack(">4sIIIQQQQQ", b"koly", 4, 512, 1, 0, 0, len(content), *resources)
    koly = koly.ljust(0xD8, b"\0") + struct.pack(">QQ", place, size)
    koly = koly.ljust(0x1EC, b"\0") + struct.pack(">Q", sectors)
    data = bytearray(content + text + koly.ljust(512, b"\0"))
    return lambda folder: data


class Giant:
    """An image that ends in a hole: so many bytes."""

    def __init__(self, make: Callable[[Path], bytearray], size: int) -> None:
        self.make, self.size = make, size


BIG = 1 << 36
IMAGES: dict[str, Callable[[Path], bytearray] | Giant] = {
    "vhdx of 0 bytes": vhdx(item(SIZE, "<Q", 0)),
    "vhdx of 2^63 bytes": vhdx(item(SIZE, "<Q", 1 << 63)),
    "vhdx of 64 TiB, its table in a hole": Giant(
        vhdx(item(SIZE, "<Q", 64 << 40), region(BAT, "<Q", 0, 1 << 30), region(BAT, "<I", 8, 0xFFF00000)), BIG
    ),
    "vhdx with blocks of 0 bytes": vhdx(item(FILE, "<I", 0)),
    "vhdx with sectors of 0 bytes": vhdx(item("8141bf1d-a96f-4709-ba47-f233a8faab5f", "<I", 0)),
    "vhdx, its table behind the end": vhdx(region(BAT, "<Q", 0, 1 << 40)),
    "vhdx, its table at 2^63": vhdx(region(BAT, "<Q", 0, 1 << 63)),
    "vhdx, its table over its metadata": vhdx(region(BAT, "<Q", 0, 2 * MIB)),
    "vhdx, its metadata behind the end": vhdx(region(METADATA, "<Q", 0, 1 << 62)),
    "vhdx, a log behind the end": vhdx(log_at(1 << 62, MIB)),
    "vhdx, a log of nothing": vhdx(log_at(MIB, 0)),
    "vhdx, a log of 4 GiB in a hole": Giant(vhdx(log_at(1 << 30, 0xFFF00000)), BIG),
    "vhdx with a parent": vhdx(parent("/dev/null")),
    "vdi of 0 bytes": changed("vdi", put(0x170, "<Q", 0)),
    "vdi of 2^63 bytes": changed("vdi", put(0x170, "<Q", 1 << 63)),
    "vdi with blocks of 0 bytes": changed("vdi", put(0x178, "<I", 0)),
    "vdi with 2^32 blocks": changed("vdi", put(0x180, "<I", 0xFFFFFFFF), put(0x170, "<Q", 0xFFFFFFFF << 20)),
    "vdi of 256 TiB, its map in a hole": Giant(
        changed("vdi", put(0x154, "<I", 1 << 30), put(0x180, "<I", 1 << 28), put(0x170, "<Q", 1 << 48)), BIG
    ),
    "vdi, its map behind the end": changed("vdi", put(0x154, "<I", 0xFFFFFE00)),
    "vdi, its data behind the end": changed("vdi", put(0x158, "<I", 0xFFFFFE00)),
    "vdi, a block behind the end": changed("vdi", map_entry(0x7FFFFFFF)),
    "vdi, a block over its map": changed("vdi", put(0x158, "<I", 0)),
    "vdi with a parent": changed("vdi", put(0x4C, "<I", 4), put(0x1A8, "<QQQQ", 1, 2, 3, 4)),
    "parallels of 0 bytes": changed("parallels", put(36, "<Q", 0)),
    "parallels of 2^64 sectors": changed("parallels", put(36, "<Q", END)),
    "parallels of 2^55 sectors": changed("parallels", put(36, "<Q", 1 << 55)),
    "parallels with clusters of 0 bytes": changed("parallels", put(28, "<I", 0)),
    "parallels with clusters of 2 TiB": changed("parallels", put(28, "<I", 0xFFFFFFFF)),
    "parallels with 2^32 entries": changed("parallels", put(32, "<I", 0xFFFFFFFF)),
    "parallels with 2^28 entries in a hole": Giant(
        changed("parallels", put(32, "<I", 1 << 28), put(36, "<Q", 1 << 39)), BIG
    ),
    "parallels, a cluster behind the end": changed("parallels", put(64, "<I", 0xFFFFFFFF)),
    "parallels, a cluster over its table": changed("parallels", put(64, "<I", 0)),
    "parallels, data at 2^41": changed("parallels", put(48, "<I", 0xFFFFFFFF)),
    "parallels, an extension behind the end": changed("parallels", put(56, "<Q", 1 << 54)),
    "parallels of the other magic": changed("parallels", other_magic, put(64, "<I", 0x7FFFFFFF)),
    "bochs of 0 bytes": bochs(disk=0),
    "bochs of 2^63 bytes": bochs(disk=1 << 63),
    "bochs with a catalogue of 2^32": bochs(catalog=0xFFFFFFFF),
    "bochs with a catalogue in a hole": Giant(bochs(catalog=1 << 20, disk=1 << 36, entry=0), BIG),
    "bochs with extents of 0 bytes": bochs(extent=0),
    "bochs with extents of 2 GiB": bochs(extent=1 << 31, disk=1 << 40),
    "bochs with bitmaps of 0 bytes": bochs(bitmap=0),
    "bochs, an extent behind the end": bochs(entry=0x7FFFFFFF),
    "bochs with a parent": bochs(subtype=b"Undoable"),
    "dmg of 0 bytes": dmg(sectors=0),
    "dmg of 2^63 sectors": dmg((RAW, 0, 1 << 62, 0, 1 << 63), sectors=1 << 63),
    "dmg, a list behind the end": dmg((RAW, 0, 128, 0, 65536), xml=(1 << 62, 100)),
    "dmg, a list of 2^63 bytes": dmg((RAW, 0, 128, 0, 65536), xml=(0, 1 << 63)),
    "dmg, resources behind the end": dmg((RAW, 0, 128, 0, 65536), resources=(1 << 62, 1 << 30)),
    "dmg, a chunk behind the end": dmg((RAW, 0, 2048, 1 << 62, MIB)),
    "dmg, a chunk of 4 GiB unpacked": dmg((ZLIB, 0, 1 << 23, 0, 65536), sectors=1 << 23),
    "dmg, a chunk of 2^63 packed": dmg((ZLIB, 0, 8, 0, 1 << 63)),
    "dmg, chunks over each other": dmg(*[(RAW, 0, 2048, 0, 65536)] * 1000),
    "dmg of 16 EiB of zeroes": dmg((ZEROES, 0, 1 << 54, 0, 0), sectors=1 << 54),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """The image of this name."""
    made = IMAGES[name]
    path = folder / "hostile.img"
    path.write_bytes((made.make if isinstance(made, Giant) else made)(folder))
    if isinstance(made, Giant):
        with open(path, "r+b") as file:
            file.truncate(made.size)
    return path
