"""Numbers and texts of image headers that programs stumble over."""

import time

import numpy as np
import pytest

from virt_bmap.core.errors import Corrupt
from virt_bmap.core.reader import BytesReader
from virt_bmap.formats.images import vdi
from virt_bmap.formats.images.layer import Draft
from virt_bmap.formats.images.vmdk import descriptor


def bytes_reader(data: bytes) -> BytesReader:
    return BytesReader(np.frombuffer(data, np.uint8), "image")


def test_a_line_of_blanks_costs_its_length() -> None:
    text = b"# Disk DescriptorFile\nCID=" + b" " * 500_000 + b'x"y\nparentCID=ffffffff\nRW 1 FLAT "f" 0\n'
    begun = time.process_time()
    found, _ = descriptor.find(bytes_reader(text))
    assert time.process_time() - begun < 5
    assert found
    assert found.cid == descriptor.NO_PARENT, "a value with a quote inside is none"


def test_an_extent_that_no_disk_holds() -> None:
    text = b'# Disk DescriptorFile\nRW 1 FLAT "f" 999999999999999999\n'
    with pytest.raises(Corrupt, match="999,999,999,999,999,999"):
        descriptor.find(bytes_reader(text))


def test_a_block_pointer_does_not_wrap_around() -> None:
    """Its product with the size of a block is more than 64 bits hold."""
    draft = Draft([bytes_reader(bytes(4096))], 1 << 40)
    numbers = np.array([0xFFFFFFF0])
    vdi.place_blocks(draft, np.array([0]), numbers, (1 << 32) - 512, 512, (1 << 32) - 1)
    assert [problem.code for problem in draft.damage.problems()] == ["outside"]
