"""From a password, recovery password or startup key to the volume's key: stretch it, open a volume master
key, and with that the volume key.

Sources: libbde documentation "BitLocker Drive Encryption (BDE) format", sections "Keys" and "AES-CCM";
cryptsetup lib/bitlk/bitlk.c.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache

from virt_bmap.core.errors import Corrupt, MissingTool
from virt_bmap.core.layout import record, struct
from virt_bmap.formats.volumes.bitlocker.header import (  # fmt: skip
    CLEAR_KEY,
    PASSWORD,
    RECOVERY_PASSWORD,
    STARTUP_KEY,
    VALUE_AES_CCM_KEY,
    VALUE_EXTERNAL_KEY,
    VALUE_KEY,
    VALUE_STRETCH_KEY,
    Header,
    MasterKey,
    entries,
)

ITERATIONS = 0x100000
"""Of SHA-256, to stretch a password: the format has no other number."""
RECOVERY = re.compile(rb"(\d{6})-?" * 7 + rb"(\d{6})")
NONCE, TAG = 12, 16
KEY_HEADER = 12
"""Bytes before a key that AES-CCM has decrypted: an entry's header and the encryption method."""
METHOD = 4
"""Bytes before a key that is not encrypted, and before the salt of a stretch key: the encryption method."""
EXTERNAL_KEY_HEADER = 24
"""Bytes of an external key before its own entries: a GUID and a time."""
BEK = struct(
    48,
    [
        (0, "metadata_size", "<u4"),
        (4, "version", "<u4"),
        (8, "metadata_header_size", "<u4"),
        (12, "metadata_size_copy", "<u4"),
    ],
)


def volume_key(header: Header, secrets: list[bytes]) -> bytes | None:
    """The volume's key: by a clear key on the volume itself, or by the first of the secrets that fits.

    None where none does.
    """
    if header.volume_key is None:
        return None
    for master in header.keys:
        for key in _keys(master, secrets):
            for entry in master.entries:
                opened = _open(entry.data, key) if entry.value == VALUE_AES_CCM_KEY else None
                found = _open(header.volume_key, opened) if opened else None
                if found:
                    return found
    return None


def _keys(master: MasterKey, secrets: list[bytes]) -> Iterator[bytes]:
    """The keys that may open this master key."""
    if master.protection == CLEAR_KEY:
        yield from (entry.data[METHOD : METHOD + 32] for entry in master.entries if entry.value == VALUE_KEY)
    for secret in secrets:
        if master.protection == STARTUP_KEY:
            yield from _external(secret)
            continue
        password = (
            _password(secret)
            if master.protection == PASSWORD
            else _recovery(secret)
            if master.protection == RECOVERY_PASSWORD
            else None
        )
        salts = [
            entry.data[METHOD : METHOD + 16] for entry in master.entries if entry.value == VALUE_STRETCH_KEY
        ]
        if password:
            yield from (_stretch(password, salt) for salt in salts)


def _password(secret: bytes) -> bytes | None:
    """A user's password: twice hashed, in UTF-16."""
    try:
        text = secret.decode().encode("utf-16-le")
    except UnicodeDecodeError:
        return None
    return hashlib.sha256(hashlib.sha256(text).digest()).digest()


def _recovery(secret: bytes) -> bytes | None:
    """A recovery password: eight numbers of six digits, each 11 times a number of 16 bits."""
    match = RECOVERY.fullmatch(secret.strip())
    numbers = [int(group) for group in match.groups()] if match else []
    if not numbers or any(number % 11 or number // 11 >= 1 << 16 for number in numbers):
        return None
    return hashlib.sha256(b"".join((number // 11).to_bytes(2, "little") for number in numbers)).digest()


def _external(secret: bytes) -> Iterator[bytes]:
    """The keys in the content of a startup key's file (GUID.BEK)."""
    size = int.from_bytes(secret[:4], "little")
    if len(secret) + 1 == size:
        secret += b"\n"  # --key takes a newline from a file's end, which here was a byte of the key
    if len(secret) != size or size < BEK.itemsize or record(secret, BEK)["version"] != 1:
        return
    try:
        for entry in entries(secret[BEK.itemsize :], 0):
            if entry.value == VALUE_EXTERNAL_KEY:
                inner = entries(entry.data[EXTERNAL_KEY_HEADER:], 0)
                yield from (part.data[METHOD : METHOD + 32] for part in inner if part.value == VALUE_KEY)
    except Corrupt:
        return  # no startup key after all, but a password of that form


@lru_cache(16)  # the same password opens several master keys' copies in one run
def _stretch(password: bytes, salt: bytes) -> bytes:
    """SHA-256 over and over: a second or so, and that is what it is for."""
    last, rest, sha256 = bytes(32), password + salt, hashlib.sha256
    for count in range(ITERATIONS):
        last = sha256(last + rest + count.to_bytes(8, "little")).digest()
    return last


def _open(data: bytes, key: bytes) -> bytes | None:
    """What AES-CCM has encrypted, without its header; None where the key is another."""
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESCCM
    except ImportError as error:
        raise MissingTool(
            "opening encrypted volumes needs the Python package cryptography (pip install 'virt-bmap[crypt]')"
        ) from error
    if len(data) <= NONCE + TAG + KEY_HEADER or len(key) not in (16, 24, 32):
        return None
    nonce, tag, sealed = data[:NONCE], data[NONCE : NONCE + TAG], data[NONCE + TAG :]
    try:
        content: bytes = AESCCM(key).decrypt(nonce, sealed + tag, None)
    except InvalidTag:
        return None
    return content[KEY_HEADER:]
