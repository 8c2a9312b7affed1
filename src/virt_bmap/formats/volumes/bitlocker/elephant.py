"""AES-CBC with the Elephant diffuser, the cipher of BitLocker up to Windows 7, over many sectors at once.

Sources: N. Ferguson, "AES-CBC + Elephant diffuser" (2006); kernel drivers/md/dm-crypt.c (crypt_iv_elephant,
diffuser_a_decrypt, diffuser_b_decrypt).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virt_bmap.core.arrays import Bytes, Int
from virt_bmap.formats.common.cipher import AES_BLOCK, IV_SECTOR, Sectors, aes

TWEAK_KEY = 32
"""Where the second key begins: room for 256 bits is left for the first one, whatever its size."""
A_ROTATIONS, A_CYCLES = (9, 0, 13, 0), 5
B_ROTATIONS, B_CYCLES = (0, 10, 0, 25), 3


class Elephant(NamedTuple):
    """The cipher with its 64 bytes of keys, of which each key takes `key_size`, for sectors of `size`
    bytes."""

    keys: bytes
    key_size: int
    size: int

    def decrypt(self, data: Bytes, numbers: Int) -> Bytes:
        """Whole sectors; `numbers[i]` is the number of the i-th in units of 512 bytes."""
        if len(data) == 0:
            return data
        chained = Sectors("aes-cbc-eboiv", self.keys[: self.key_size], self.size).decrypt(data, numbers)
        # words by sectors: each step of the diffusers is one operation over all sectors
        words = np.ascontiguousarray(chained.view("<u4").reshape(len(numbers), -1).T)
        _diffuse(words, 2, 5, B_ROTATIONS, B_CYCLES)
        _diffuse(words, -2, -5, A_ROTATIONS, A_CYCLES)
        plain = np.ascontiguousarray(words.T).view(np.uint8).reshape(len(numbers), -1, 2 * AES_BLOCK)
        result: Bytes = (plain ^ self._sector_keys(numbers)[:, None, :]).reshape(-1)
        return result

    def _sector_keys(self, numbers: Int) -> Bytes:
        """(sectors, 32): each sector's offset, and the same with its last byte 0x80, through AES with the
        second key."""
        offsets = np.zeros((len(numbers), 2, 2), "<u8")
        offsets[:, :, 0] = (numbers * IV_SECTOR)[:, None]
        plain = offsets.view(np.uint8)
        plain[:, 1, -1] = 0x80
        return aes(self.keys[TWEAK_KEY : TWEAK_KEY + self.key_size], plain.reshape(-1), encrypt=True).reshape(
            -1, 2 * AES_BLOCK
        )


def _diffuse(words: NDArray[np.uint32], near: int, far: int, rotations: tuple[int, ...], cycles: int) -> None:
    """Undo a diffuser in place: to each word is added the one `near` places on XOR the one `far` places on,
    rotated left."""
    count = len(words)
    for at in list(range(count)) * cycles:
        other, turn = words[(at + far) % count], rotations[at % 4]
        turned = other << np.uint32(turn) | other >> np.uint32(32 - turn) if turn else other
        words[at] += words[(at + near) % count] ^ turned
