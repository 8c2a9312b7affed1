"""dm-crypt's ciphers over many sectors at once: everything is built from AES on single blocks, called once
for a whole batch.

Used by all formats of encrypted volumes. Sources: kernel drivers/md/dm-crypt.c (initial vectors),
crypto/xts.c; IEEE 1619 (XTS).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bytes, Int, expand, gather, scatter, union
from virt_bmap.core.errors import MissingTool, Unsupported
from virt_bmap.core.lost import Lost
from virt_bmap.core.reader import Reader

IV_SECTOR = 512
"""Sectors are numbered in units of this size, also where larger ones are encrypted as one (LUKS has no
`iv_large_sectors`, BitLocker has)."""
AES_BLOCK = 16
MODES = ("ecb", "cbc-null", "cbc-plain", "cbc-plain64", "cbc-plain64be", "cbc-essiv:sha256",
    "cbc-essiv:sha512", "cbc-essiv:sha1", "cbc-eboiv",
         "xts-plain", "xts-plain64", "xts-plain64be", "xts-essiv:sha256")  # fmt: skip


def aes(key: bytes, data: Bytes, encrypt: bool = False) -> Bytes:
    """Every block of 16 bytes through AES by itself."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError as error:
        raise MissingTool(
            "opening encrypted volumes needs the Python package cryptography (pip install 'virt-bmap[crypt]')"
        ) from error
    cipher = Cipher(algorithms.AES(key), modes.ECB())
    context = cipher.encryptor() if encrypt else cipher.decryptor()
    return np.frombuffer(context.update(np.ascontiguousarray(data)) + context.finalize(), np.uint8)


class Decrypts(Protocol):
    """What turns whole sectors of `size` bytes into plain text; `numbers[i]` is the i-th sector's number in
    units of 512 bytes."""

    @property
    def size(self) -> int: ...

    def decrypt(self, data: Bytes, numbers: Int) -> Bytes: ...


@dataclass(frozen=True)
class Sectors:
    """A cipher by its dm-crypt name ("aes-xts-plain64") with its key, for sectors of `size` bytes; `large_iv`
    counts whole sectors for initial vectors."""

    name: str
    key: bytes
    size: int
    large_iv: bool = False

    def __post_init__(self) -> None:
        cipher, _, mode = self.name.partition("-")
        if cipher != "aes" or mode not in MODES:
            modes = ", ".join(MODES)
            raise Unsupported(f"the cipher {self.name!r} is not supported; AES in the modes {modes} is")
        if len(self.key) not in ((32, 64) if mode.startswith("xts") else (16, 24, 32)):
            raise Unsupported(f"{self.name} with a key of {len(self.key)} bytes is not supported")

    def decrypt(self, data: Bytes, numbers: Int) -> Bytes:
        """Whole sectors; `numbers[i]` is the number of the i-th in units of 512 bytes."""
        mode, _, vector = self.name.partition("-")[2].partition("-")
        if len(data) == 0:
            return data
        if mode == "ecb":
            return aes(self.key, data)
        if mode == "cbc":
            return self._cbc(data, self._vectors(vector, numbers, self.key))
        half = len(self.key) // 2
        tweaks = aes(
            self.key[half:], self._vectors(vector, numbers, self.key[:half]).reshape(-1), encrypt=True
        )
        whitening = (
            _powers(tweaks.view("<u8").reshape(-1, 2), self.size // AES_BLOCK).reshape(-1).view(np.uint8)
        )
        plain: Bytes = aes(self.key[:half], data ^ whitening) ^ whitening
        return plain

    def _cbc(self, data: Bytes, vectors: Bytes) -> Bytes:
        before = np.empty_like(data).reshape(len(vectors), -1, AES_BLOCK)
        before[:, 0] = vectors
        before[:, 1:] = data.reshape(before.shape)[:, :-1]
        plain: Bytes = aes(self.key, data) ^ before.reshape(-1)
        return plain

    def _vectors(self, kind: str, numbers: Int, key: bytes) -> Bytes:
        """(sectors, 16): the initial vector of each sector."""
        words = np.zeros((len(numbers), 2), "<u8")
        if kind == "eboiv":
            words[:, 0] = numbers * IV_SECTOR
            return aes(key, words.view(np.uint8).reshape(-1), encrypt=True).reshape(-1, AES_BLOCK)
        numbers = numbers // (self.size // IV_SECTOR) if self.large_iv else numbers
        if kind.startswith("plain64be"):
            words[:, 1] = numbers.astype(np.uint64).byteswap()
        elif kind != "null":
            words[:, 0] = numbers & 0xFFFFFFFF if kind == "plain" else numbers
        vectors: Bytes = words.view(np.uint8).reshape(-1, AES_BLOCK)
        if kind.startswith("essiv:"):
            salt = hashlib.new(kind.partition(":")[2], key).digest()
            vectors = aes(salt[:32], vectors.reshape(-1), encrypt=True).reshape(-1, AES_BLOCK)
        return vectors


def _powers(tweaks: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """(sectors, count, 2): each tweak times x to the powers 0 to count - 1 in GF(2**128), low word first."""
    result = np.empty((len(tweaks), count, 2), "<u8")
    low, high = tweaks[:, 0].copy(), tweaks[:, 1].copy()
    one, top = np.uint64(1), np.uint64(63)
    for power in range(count):
        result[:, power, 0], result[:, power, 1] = low, high
        carry = (high >> top) * np.uint64(0x87)
        high = (high << one) | (low >> top)
        low = (low << one) ^ carry
    return result


class DecryptedReader(Reader):
    """The bytes behind a cipher. `first` is the number of the first sector, in units of 512 bytes; `ranges`,
    where only these are encrypted, count bytes as the numbers count sectors: whole sectors, sorted."""

    def __init__(
        self, base: Reader, cipher: Decrypts, first: int, ranges: tuple[Int, Int] | None = None
    ) -> None:
        super().__init__(base.size, base.name)
        self._base, self._cipher, self._first, self._ranges = base, cipher, first, ranges
        self.below = [base]

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        size = self._cipher.size
        low = offsets // size
        count = -(-(offsets + lengths) // size) - low
        sector, step = expand(count)
        numbers = low[sector] + step
        unique, which = np.unique(numbers, return_inverse=True)
        data = self._base.read_ranges(unique * size, np.full(len(unique), size, np.int64))
        plain = self._decrypted(data, self._first + unique * (size // IV_SECTOR))
        first = which[np.cumsum(count) - count]
        return gather(plain, first * size + offsets - low * size, lengths)

    def _decrypted(self, data: Bytes, numbers: Int) -> Bytes:
        """Whole sectors, as far as they are encrypted."""
        if self._ranges is None:
            return self._cipher.decrypt(data, numbers)
        starts, ends = self._ranges
        at = np.searchsorted(starts, numbers * IV_SECTOR, side="right") - 1
        mine = at >= 0
        mine[mine] = numbers[mine] * IV_SECTOR < ends[at[mine]]
        plain = data.reshape(len(numbers), self._cipher.size).copy()
        plain[mine] = self._cipher.decrypt(plain[mine].reshape(-1), numbers[mine]).reshape(plain[mine].shape)
        return plain.reshape(-1)

    @property
    def whole(self) -> bool:
        return self._base.whole

    def lost(self, starts: Int, ends: Int) -> Lost:
        """Whole sectors: what is decrypted of a part of one is noise."""
        size = self._cipher.size
        low, high = starts // size * size, np.minimum(-(-ends // size) * size, self.size)
        gone = self._base.lost(*union(low, high))
        return gone._replace(starts=gone.starts // size * size, ends=-(-gone.ends // size) * size).within(
            starts, ends
        )[1]


class Window(NamedTuple):
    """Bytes [start, end) of a volume and the reader, of the same offsets, that has them; None: they read as
    zeroes."""

    start: int
    end: int
    reader: Reader | None


class WindowsReader(Reader):
    """A volume of which every part is read in its own way: with a cipher, with another, plain, or not at
    all."""

    def __init__(self, base: Reader, windows: Sequence[Window]) -> None:
        super().__init__(base.size, base.name)
        self._windows = windows
        self.below = [base]

    def _fetch(self, offsets: Int, lengths: Int) -> Bytes:
        result = np.zeros(int(lengths.sum()), np.uint8)
        place = np.cumsum(lengths) - lengths
        for window in self._windows:
            low = np.clip(offsets, window.start, window.end)
            high = np.clip(offsets + lengths, window.start, window.end)
            mine = np.flatnonzero(high > low)
            if window.reader and len(mine):
                data = window.reader.read_ranges(low[mine], (high - low)[mine])
                scatter(result, (place + low - offsets)[mine], (high - low)[mine], data)
        return result

    @property
    def whole(self) -> bool:
        return all(window.reader.whole for window in self._windows if window.reader)

    def lost(self, starts: Int, ends: Int) -> Lost:
        parts = []
        for window in self._windows:
            low, high = np.clip(starts, window.start, window.end), np.clip(ends, window.start, window.end)
            if window.reader and not window.reader.whole:
                parts.append(window.reader.lost(*union(low, high)))
        return Lost.join(parts)
