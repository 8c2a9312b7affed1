"""A guest in one sector: it reads some sectors, writes one of them back, and switches the machine off.

A real QEMU runs it in a second, without a kernel.
"""

import struct

ORIGIN = 0x7C00
BUFFER = 0x1000
"""Segment that is read to."""


def boot_sector(read: int, count: int, write: int) -> bytes:
    """Reads `count` sectors from sector `read` on, and writes the first of them to sector `write`."""
    code = bytearray()
    packets: list[tuple[int, int, int]] = []

    def transfer(function: int, sector: int, sectors: int) -> None:
        code.extend(b"\xbe\0\0")  # mov si, packet
        packets.append((len(code) - 2, sector, sectors))
        code.extend(bytes([0xB4, function, 0xB0, 0]))  # mov ah, function; mov al, 0
        code.extend(b"\xb2\x80\xcd\x13")  # mov dl, 0x80; int 13h: the first hard disk

    code.extend(b"\x31\xc0\x8e\xd8\xfc")  # xor ax, ax; mov ds, ax; cld
    transfer(0x42, read, count)
    transfer(0x43, write, 1)
    code.extend(b"\xba\x04\x06\xb8\x00\x20\xef")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: off (ACPI)
    code.extend(b"\xba\x04\xb0\xef\xf4\xeb\xfd")  # the same where older machines have it; hlt; again
    for at, sector, sectors in packets:
        struct.pack_into("<H", code, at, ORIGIN + len(code))
        code.extend(struct.pack("<BBHHHQ", 16, 0, sectors, 0, BUFFER, sector))  # disk address packet
    return bytes(code).ljust(510, b"\0") + b"\x55\xaa"  # the signature that a BIOS wants
