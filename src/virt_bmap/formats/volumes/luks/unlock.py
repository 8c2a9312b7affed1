"""From a passphrase to the volume key: derive, decrypt the key slot, merge its stripes, compare the digest.

Sources: cryptsetup docs/on-disk-format-luks1 (sections 2.4, 4.2), lib/luks1/af.c.
"""

import functools
import hashlib
import hmac

import numpy as np

from virt_bmap.core.errors import MissingTool, Unsupported
from virt_bmap.core.reader import Reader
from virt_bmap.formats.common.cipher import Sectors
from virt_bmap.formats.volumes.luks.header import SECTOR, Digest, Header, Kdf, Slot

MAX_MEMORY = 4 << 20
"""KiB that an Argon2 slot may ask for: cryptsetup's own limit (4 GiB)."""
MAX_ITERATIONS = 1 << 28
"""Of PBKDF2: cryptsetup aims at two seconds, some 10 million; a hostile header must not keep us for hours."""
MAX_TIME = 64
"""Passes of Argon2; cryptsetup writes 4 or a little more."""


def volume_keys(reader: Reader, header: Header, secrets: list[bytes]) -> tuple[dict[str, bytes], list[str]]:
    """(segment -> volume key, why slots could not be tried).

    A secret is tried on every slot until one fits.
    """
    keys: dict[str, bytes] = {}
    refused: list[str] = []
    for secret in secrets:
        for slot in header.slots:
            digests = [digest for digest in header.digests if slot.name in digest.slots]
            if all(segment in keys for digest in digests for segment in digest.segments):
                continue
            try:
                key = _slot_key(reader, slot, secret)
                for digest in digests:
                    if _fits(digest, key):
                        keys.update(dict.fromkeys(digest.segments, key))
            except Unsupported as error:
                refused.append(f"key slot {slot.name}: {error}")
    return keys, list(dict.fromkeys(refused))


def _fits(digest: Digest, key: bytes) -> bool:
    return bool(digest.value) and hmac.compare_digest(
        derive(digest.kdf, key, len(digest.value)), digest.value
    )


def _slot_key(reader: Reader, slot: Slot, secret: bytes) -> bytes:
    """What the slot holds for this secret, right or wrong."""
    cipher = Sectors(slot.encryption, derive(slot.kdf, secret, slot.area_key_size), SECTOR)
    size = -(-slot.key_size * slot.stripes // SECTOR) * SECTOR
    if size > slot.size:
        raise Unsupported(
            f"{slot.stripes} stripes of {slot.key_size} bytes do not fit in its {slot.size} bytes",
        )
    data = np.frombuffer(reader.read(slot.offset, size), np.uint8)
    split = cipher.decrypt(data, np.arange(size // SECTOR, dtype=np.int64)).tobytes()
    return merge(split[: slot.key_size * slot.stripes], slot.key_size, slot.af_hash)


def merge(split: bytes, size: int, hash_name: str) -> bytes:
    """The anti-forensic merge: every stripe but the last is added and diffused by the hash (AF_merge)."""
    stripes = np.frombuffer(split, np.uint8).reshape(-1, size)
    block = bytes(size)
    for stripe in stripes[:-1]:
        block = _diffuse((np.frombuffer(block, np.uint8) ^ stripe).tobytes(), hash_name)
    last = np.frombuffer(block, np.uint8) ^ stripes[-1]
    return bytes(last)


def _diffuse(block: bytes, hash_name: str) -> bytes:
    digest = len(_digest(hash_name, b""))
    parts = (
        _digest(hash_name, at.to_bytes(4, "big") + block[at * digest : (at + 1) * digest])
        for at in range(-(-len(block) // digest))
    )
    return b"".join(parts)[: len(block)]


def _digest(name: str, data: bytes) -> bytes:
    try:
        return hashlib.new(name, data, usedforsecurity=False).digest()
    except (ValueError, TypeError) as error:
        raise Unsupported(f"the hash {name!r} is not in this Python's OpenSSL") from error


@functools.lru_cache(maxsize=64)  # slow on purpose, and the disk of a watched guest is mapped again and again
def derive(kdf: Kdf, secret: bytes, length: int) -> bytes:
    """The key of `length` bytes that the function makes of a secret."""
    if kdf.type == "pbkdf2":
        if not 0 < kdf.iterations <= MAX_ITERATIONS:
            raise Unsupported(f"{kdf.iterations} iterations of PBKDF2 are more than {MAX_ITERATIONS}")
        _digest(kdf.hash, b"")
        return hashlib.pbkdf2_hmac(kdf.hash, secret, kdf.salt, kdf.iterations, length)
    if kdf.type not in ("argon2i", "argon2id"):
        raise Unsupported(f"the key derivation {kdf.type!r} is not supported")
    if not 0 < kdf.memory <= MAX_MEMORY or not 0 < kdf.time <= MAX_TIME or not 0 < kdf.cpus <= 64:
        raise Unsupported(
            f"Argon2 with {kdf.memory} KiB and {kdf.time} passes is more than cryptsetup allows"
        )
    try:
        from cryptography.hazmat.primitives.kdf import argon2
    except ImportError as error:
        raise MissingTool(
            "opening encrypted volumes needs the Python package cryptography (pip install 'virt-bmap[crypt]')"
        ) from error
    function = getattr(argon2, {"argon2i": "Argon2i", "argon2id": "Argon2id"}[kdf.type], None)
    if function is None:
        raise Unsupported(f"this version of the Python package cryptography has no {kdf.type}")
    made: bytes = function(
        salt=kdf.salt, length=length, iterations=kdf.time, lanes=kdf.cpus, memory_cost=kdf.memory
    ).derive(secret)
    return made
