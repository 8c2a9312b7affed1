"""The metadata of thin pools and caches: whole as the tools of device-mapper write it, damaged where a byte
is another."""

import base64
from pathlib import Path

import numpy as np
import pytest

from recipes.made import blank
from support import BytesReader, need, run
from virt_bmap.formats.volumes.lvm.cache import read_cache

MIB = 1 << 20
HINT = base64.b64encode(bytes(4)).decode()
MAPPED = {0: (5, False), 3: (9, True), 200: (1, False)}
"""Block of the cache -> block of the origin, and whether only the cache has it."""


@pytest.fixture
def cache(tmp_path: Path) -> np.ndarray:
    """What cache_restore makes, and cache_check finds whole."""
    restore = need("cache_restore", "thin-provisioning-tools")
    verify = need("cache_check", "thin-provisioning-tools")
    mappings = "".join(
        f'<mapping cache_block="{at}" origin_block="{of}" dirty="{str(dirty).lower()}"/>'
        for at, (of, dirty) in MAPPED.items()
    )
    hints = "".join(f'<hint cache_block="{at}" data="{HINT}"/>' for at in MAPPED)
    (tmp_path / "xml").write_text(
        '<superblock uuid="" block_size="128" nr_cache_blocks="256" policy="smq" '
        f'hint_width="4"><mappings>{mappings}</mappings><hints>{hints}</hints></superblock>'
    )
    image = blank(tmp_path / "metadata", 4 * MIB)
    run(restore, "-i", tmp_path / "xml", "-o", image)
    run(verify, image)
    return np.fromfile(image, np.uint8)


def test_a_whole_cache_is_whole(cache: np.ndarray) -> None:
    found = read_cache(BytesReader(cache), 256 * 65536)
    rows = zip(found.place // 65536, found.origin, found.dirty, strict=True)
    assert {int(at): (int(of), bool(dirty)) for at, of, dirty in rows} == MAPPED
    assert found.damage.problems() == []


def test_each_damaged_block_is_damage(cache: np.ndarray, tmp_path: Path) -> None:
    """A byte of the superblock, of a node or of an array: what cache_check refuses is named here."""
    verify = need("cache_check", "thin-provisioning-tools")
    blocks = cache.reshape(-1, 4096)
    met = 0
    for number in np.flatnonzero(blocks.any(axis=1)).tolist():
        damaged = blocks.copy()
        damaged[number, 4000] ^= 1
        image = tmp_path / "damaged"
        damaged.tofile(image)
        found = read_cache(BytesReader(damaged.reshape(-1)), 256 * 65536)
        if "checksum" in {problem.code for problem in found.damage.problems()}:
            met += 1
            with pytest.raises(AssertionError):
                run(verify, image)
    assert met >= 3
