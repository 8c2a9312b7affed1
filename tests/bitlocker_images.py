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
WHOLE, ON_WRITE = map(
    uuid.UUID, ("4967d63b-2e29-4ad8-8399-f6a339e3d001", "92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8")
)
CLEAR, MASTER, VOLUME = (hashlib.sha256(word).digest() for word in (b"clear", b"master", b"volume"))


def entry(kind: int, value: int, data: bytes) -> bytes:
    return struct.pack("<4H", 8 + len(data), kind, value, 1) + data


def sealed(key: bytes, content: bytes) -> bytes:
    """A key as AES-CCM encrypts it: nonce, tag, ciphertext of an entry with the key."""
    done = AESCCM(key).encrypt(bytes(12), entry(0, 1, bytes(4) + content), None)
    return bytes(12) + done[-16:] + done[:-16]


def metadata(size: int, state: int, encrypted: int, method: int = 0x8004) -> bytes:
    """The FVE metadata of a volume whose protection is suspended."""
    master = entry(0, 1, bytes(4) + CLEAR) + entry(0, 5, sealed(CLEAR, MASTER))
    body = (
        entry(2, 8, bytes(28) + master)
        + entry(3, 5, sealed(MASTER, VOLUME))
        + entry(15, 15, struct.pack("<2Q", KEPT, 8192))
    )
    head = struct.pack("<8s4HQII4Q", b"-FVE-FS-", 0, 2, state, 4, encrypted, 0, 16, *COPIES, KEPT)
    head += struct.pack("<4I16sIIQ", 48 + len(body), 1, 48, 48 + len(body), b"0123456789abcdef", 0, method, 0)
    data = bytearray(head + body + bytes(-len(head + body) % 16))
    struct.pack_into("<H", data, 8, len(data) // 16)
    return bytes(data) + struct.pack("<HHI", 8, 2, zlib.crc32(bytes(data)))


def by_hand(
    plain: bytes,
    state: int = 4,
    encrypted: int | None = None,
    method: int = 0x8004,
    chunks: set[int] | None = None,
) -> np.ndarray:
    """The volume a sector at a time, each with the whole XTS of the cryptography package; from `encrypted` on
    it stays as it is. With `chunks`, only these are encrypted, and bitmaps say so (encrypt-on-write)."""
    end = len(plain) if encrypted is None else encrypted

    def is_encrypted(place: int) -> bool:
        return method != 0 and state != 1 and place < end and (chunks is None or place // CHUNK in chunks)

    result = bytearray(plain)
    for at in range(0, len(plain), 512):
        where = at + KEPT if at < 8192 else at
        if at >= 8192 and KEPT <= at < KEPT + 8192:
            continue
        sector = plain[at : at + 512]
        if is_encrypted(where):
            mode = modes.XTS((where // 512).to_bytes(16, "little"))
            sector = Cipher(algorithms.AES(VOLUME), mode).encryptor().update(sector)
        result[where : where + 512] = sector
    sector = bytearray(512)
    sector[:13] = b"\xeb\x58\x90-FVE-FS-" + struct.pack("<H", 512)
    sector[160:200] = (WHOLE if chunks is None else ON_WRITE).bytes_le + struct.pack("<3Q", *COPIES)
    sector[200:216] = struct.pack("<2Q", *EOW)
    result[:512] = sector
    for at in COPIES:
        result[at : at + 65536] = metadata(len(plain), state, end, method).ljust(65536, b"\0")
    if chunks is not None:
        _on_write(result, len(plain), chunks)
    return np.frombuffer(bytes(result), np.uint8)


# ---- encrypt-on-write --------------------------------------------------------------------------------------

CHUNK, LOG = 64 << 10, 8192
EOW, BITMAPS = (12 * MIB, 12 * MIB + 4096), (12 * MIB + 8192, 12 * MIB + 32768)
"""Where the two copies of the information, and the bitmaps of two regions go; 4096 bytes on lies the log of a
bitmap."""


def _with_crc(data: bytes, at: int) -> bytes:
    """With the CRC-32 of all of it, its own field being zeroes."""
    return data[:at] + struct.pack("<I", zlib.crc32(data)) + data[at + 4 :]


def _record(bits: list[bool], number: int) -> bytes:
    bitmap = np.packbits(np.array(bits), bitorder="little").tobytes()
    head = struct.pack("<10sHIIQII", b"FVE-EOWBR\0", 36, 512, len(bits), number, 0, 0)
    return _with_crc((head + bitmap).ljust(512, b"\0"), 32)


def _on_write(image: bytearray, size: int, chunks: set[int]) -> None:
    """Two regions; of each bitmap's records the older one says the contrary."""
    middle = size // CHUNK // 2
    for number, (place, low, high) in enumerate(
        zip(BITMAPS, (0, middle), (middle, size // CHUNK), strict=True)
    ):
        bits = [chunk in chunks for chunk in range(low, high)]
        records = [_record(bits, 7), _record([not bit for bit in bits], 6)]
        head = struct.pack(
            "<10sHIIQQQIIII", b"FVE-EOWBM\0", 60, 1536, number, low * CHUNK, (high - low) * CHUNK,
            place + 4096, 512, 1024, 512, 0,
        )  # fmt: skip
        data = _with_crc(head.ljust(512, b"\0"), 56) + b"".join(records[:: 1 if number else -1])
        image[place : place + 1536] = data
        image[place + 4096 : place + 4096 + LOG] = bytes(LOG)
    head = struct.pack("<8sHH7I", b"FVE-EOW\0", 56, 56 + 16, 512, 512, CHUNK, LOG, 0, 2, 0)
    data = _with_crc(head + struct.pack("<4Q", *EOW, *BITMAPS), 36)
    for at in EOW:
        image[at : at + 512] = data.ljust(512, b"\0")
