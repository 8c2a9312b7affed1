"""A BitLocker volume encrypted by hand: nothing on Linux makes one."""

import hashlib
import struct
import uuid
import zlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

MIB = 1 << 20
KEPT, COPIES = 10 * MIB, (11 * MIB, 13 * MIB, 15 * MIB)
"""Where the volume's header and the three copies of the metadata go: free space of the NTFS below."""
CLEAR, MASTER, VOLUME = (hashlib.sha256(word).digest() for word in (b"clear", b"master", b"volume"))


def entry(kind: int, value: int, data: bytes) -> bytes:
    return struct.pack("<4H", 8 + len(data), kind, value, 1) + data


def sealed(key: bytes, content: bytes) -> bytes:
    """A key as AES-CCM encrypts it: nonce, tag, ciphertext of a header of 12 bytes and the key."""
    done = AESCCM(key).encrypt(bytes(12), bytes(12) + content, None)
    return bytes(12) + done[-16:] + done[:-16]


def metadata(size: int, state: int, encrypted: int) -> bytes:
    """The FVE metadata of a volume whose protection is suspended."""
    master = entry(0, 1, bytes(4) + CLEAR) + entry(0, 5, sealed(CLEAR, MASTER))
    body = (
        entry(2, 8, bytes(28) + master)
        + entry(3, 5, sealed(MASTER, VOLUME))
        + entry(15, 15, struct.pack("<2Q", KEPT, 8192))
    )
    head = struct.pack("<8s4HQII4Q", b"-FVE-FS-", 0, 2, state, 4, encrypted, 0, 16, *COPIES, KEPT)
    head += struct.pack("<4I16sIIQ", 48 + len(body), 1, 48, 48 + len(body), b"0123456789abcdef", 0, 0x8004, 0)
    data = bytearray(head + body + bytes(-len(head + body) % 16))
    struct.pack_into("<H", data, 8, len(data) // 16)
    return bytes(data) + struct.pack("<HHI", 8, 2, zlib.crc32(bytes(data)))


def by_hand(plain: bytes, state: int = 4, encrypted: int | None = None) -> np.ndarray:
    """The volume a sector at a time, each with the whole XTS of the cryptography package; from `encrypted` on
    it stays as it is."""
    end = len(plain) if encrypted is None else encrypted
    result = bytearray(plain)
    for at in range(0, len(plain), 512):
        where = at + KEPT if at < 8192 else at
        if (at < end and not KEPT <= at < KEPT + 8192) or at < 8192:
            mode = modes.XTS((where // 512).to_bytes(16, "little"))
            result[where : where + 512] = (
                Cipher(algorithms.AES(VOLUME), mode).encryptor().update(plain[at : at + 512])
            )
    sector = bytearray(512)
    sector[:13] = b"\xeb\x58\x90-FVE-FS-" + struct.pack("<H", 512)
    sector[160:200] = uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001").bytes_le + struct.pack("<3Q", *COPIES)
    result[:512] = sector
    for at in COPIES:
        result[at : at + 65536] = metadata(len(plain), state, end).ljust(65536, b"\0")
    return np.frombuffer(bytes(result), np.uint8)
