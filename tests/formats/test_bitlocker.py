"""BitLocker: cryptsetup's test images with the hashes of what it opens, an NTFS encrypted by hand, keys
right, wrong and missing, damage."""

import configparser
import gzip
import hashlib
import random
import re
from pathlib import Path

import pytest

from bitlocker_images import BITMAPS, CHUNK, COPIES, EOW, MIB, by_hand
from support import BytesReader, assert_proven, need, run
from virt_bmap.ask.check import check
from virt_bmap.core.keys import Keys, parse
from virt_bmap.core.layers import raw
from virt_bmap.core.reader import Reader
from virt_bmap.model import tables
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey_open

ARCHIVE = "images/mbroz+cryptsetup/tests/bitlk-images.tar.xz"


@pytest.fixture(scope="session")
def images(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, configparser.ConfigParser]:
    """The folder of images (sparse), and what their authors say of each."""
    folder = tmp_path_factory.mktemp("bitlk")
    run("tar", "-xSf", corpus / ARCHIVE, "-C", folder)
    facts = configparser.ConfigParser()
    facts.read_string((folder / "bitlk-images/images.conf").read_text())
    return folder / "bitlk-images", facts


def opened(image: Path, *secrets: bytes) -> tuple[BlockMap, list[Reader]]:
    return survey_open([RawReader(str(image))], keys=Keys(tuple(("all", secret) for secret in secrets)))


def digest(reader: Reader) -> str:
    found = hashlib.sha256()
    for at in range(0, reader.size, 8 << 20):
        found.update(reader.read(at, min(8 << 20, reader.size - at)))
    return found.hexdigest()


def codes(bmap: BlockMap) -> list[str]:
    return [str(code) for code in bmap.problems.column("code").to_pylist()]


SAMPLE = ("bitlk-aes-cbc-128", "bitlk-aes-xts-256", "bitlk-aes-cbc-elephant-128",
    "bitlk-aes-cbc-elephant-256", "bitlk-togo-aes-cbc-128",
          "bitlk-aes-xts-128-4k", "bitlk-aes-cbc-128-4k", "bitlk-aes-xts-128-unicode", "bitlk-aes-cbc-256",
          "bitlk-aes-xts-128", "bitlk-togo-aes-xts-128")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_the_opened_volume_is_what_cryptsetup_opens(
    images: tuple[Path, configparser.ConfigParser], name: str
) -> None:
    folder, facts = images
    bmap, readers = opened(folder / f"{name}.img", facts[name]["PW"].encode())
    assert bmap.volumes.column("kind").to_pylist() == ["disk", "crypt"]
    assert digest(readers[1]) == facts[name]["SHA256SUM"]
    assert bmap.volumes.column("name")[1].as_py() == f"/dev/mapper/bitlk-{facts[name]['GUID']}"
    if facts[name]["CIPHER"] != "aes-cbc-elephant":
        assert facts[name]["CIPHER"] in bmap.volumes.column("detail")[1].as_py()
    # the images hold little more than headers: what is inside can't be checked
    assert bmap.filesystems.num_rows == 1
    assert not [found for found in check(bmap).disagreements if found.volume == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"),
    [("bitlk-aes-xts-128-smart-card", "RP"), ("bitlk-aes-xts-128-two-recovery", "RP2"),
                                           ("bitlk-aes-cbc-elephant-128", "RP")])  # fmt: skip
def test_a_recovery_password_opens(
    images: tuple[Path, configparser.ConfigParser], name: str, key: str
) -> None:
    folder, facts = images
    _, readers = opened(folder / f"{name}.img", facts[name][key].encode())
    assert digest(readers[1]) == facts[name]["SHA256SUM"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitlk-aes-xts-128-startup-key", "bitlk-aes-xts-128-startup-key-win11"])
def test_a_startup_key_opens(images: tuple[Path, configparser.ConfigParser], name: str) -> None:
    folder, facts = images
    keys = parse([f"all:file:{folder}/{facts[name]['SK_VMK_GUID'].upper()}.BEK"])
    _, readers = survey_open([RawReader(str(folder / f"{name}.img"))], keys=keys)
    assert digest(readers[1]) == facts[name]["SHA256SUM"]


@pytest.mark.slow
def test_a_clear_key_opens_by_itself(images: tuple[Path, configparser.ConfigParser]) -> None:
    folder, facts = images
    bmap, readers = opened(folder / "bitlk-aes-xts-128-clearkey-only.img")
    assert digest(readers[1]) == facts["bitlk-aes-xts-128-clearkey-only"]["SHA256SUM"]
    assert codes(bmap)[:1] != ["no-key"]


@pytest.mark.slow
def test_a_damaged_copy_of_the_metadata_is_said_and_another_serves(
    images: tuple[Path, configparser.ConfigParser],
) -> None:
    folder, facts = images
    name = "bitlk-aes-xts-128-crc"
    bmap, readers = opened(folder / f"{name}.img", facts[name]["PW"].encode())
    assert digest(readers[1]) == facts[name]["SHA256SUM"]
    assert "copy-differs" in codes(bmap)


ON_WRITE = ("eow", "partially-encrypted")
"""Of these images their authors kept the headers only: nobody knows what of them is encrypted."""


def test_without_the_key_every_byte_is_named(images: tuple[Path, configparser.ConfigParser]) -> None:
    folder, facts = images
    for image in sorted(folder.glob("*.img")):
        if "clearkey" in image.name:
            continue
        bmap, _ = opened(image)
        if any(word in image.name for word in ON_WRITE):
            assert codes(bmap) == ["copy-differs", "copy-differs", "superblock"]
        elif "crc" not in image.name:
            assert_proven(bmap)
        assert bmap.volumes.column("uuid")[0].as_py() == facts[image.stem]["GUID"]
        parts = bmap.extents.column("part").to_pylist()
        assert {
            "FVE metadata 1",
            "FVE metadata 2",
            "FVE metadata 3",
            "encrypted",
            "encrypted volume header",
        } <= set(parts)


def test_metadata_lies_where_cryptsetup_says(images: tuple[Path, configparser.ConfigParser]) -> None:
    tool = need("cryptsetup", "cryptsetup-bin")
    folder, _ = images
    for name in ("bitlk-aes-xts-128", "bitlk-togo-aes-cbc-128"):
        words = run(tool, "bitlkDump", folder / f"{name}.img").decode()
        bmap, _ = opened(folder / f"{name}.img")
        guid = re.search(r"GUID:\s*(\S+)", words)
        assert guid
        assert guid[1] == bmap.volumes.column("uuid")[0].as_py()
        areas = re.findall(r"Offset:\s*(\d+) \[bytes\]\s*Size:\s*(\d+)", words)
        start, length = (
            tables.integers(bmap.extents, column).tolist() for column in ("volume_offset", "length")
        )
        assert {(int(at), int(size)) for at, size in areas} <= set(zip(start, length, strict=True))
        assert len(areas) == 4
        holders = re.findall(r"Protection:\s*(?:VMK protected with )?(.*)", words)
        assert len(holders) == bmap.volumes.column("detail")[0].as_py().partition("held by")[2].count(",") + 1


@pytest.mark.parametrize(
    "secret", [b"wrong", b"\xff\xfe", b"042647-302313-590458-071500-554323-116567-412181-51697"]
)
def test_a_wrong_key_is_said_so(images: tuple[Path, configparser.ConfigParser], secret: bytes) -> None:
    bmap, _ = opened(images[0] / "bitlk-aes-xts-128.img", secret)
    assert codes(bmap) == ["no-key"]
    assert bmap.volumes.num_rows == 1


@pytest.mark.slow
def test_encrypted_on_write_as_windows_left_it(corpus: Path, tmp_path: Path) -> None:
    """A conversion in the middle: what lies before its bitmaps is what libbde 20260916 reads."""
    image = tmp_path / "eow.img"
    with gzip.open(corpus / "images/fox-it+dissect.fve/tests/_data/bde/eow_partial.bin.gz") as packed:
        image.write_bytes(packed.read())
    bmap, readers = opened(image, b"password12!@")
    assert bmap.filesystems.column("type").to_pylist() == ["ntfs"]
    assert "150.3 MiB encrypted" in bmap.volumes.column("detail")[1].as_py()
    found, source = hashlib.sha256(), raw(readers[1])
    for at in range(0, 0x1553A000, 1 << 20):
        found.update(source.read(at, min(1 << 20, 0x1553A000 - at)))
    assert found.hexdigest() == "b62aff42d22a11efb258c9ba2faa556b5be9ec0732d79c7cbd1a6ae828d93910"


# ---- a volume encrypted by hand ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ntfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tool, path = need("mkntfs", "ntfs-3g"), tmp_path_factory.mktemp("ntfs") / "ntfs"
    path.write_bytes(bytes(16 * MIB))
    run(tool, "-F", "-q", "-s", "512", "-c", "4096", path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("state", "encrypted", "method"),
    [
        (4, None, 0x8004),
        (2, 12 * MIB, 0x8004),
        (5, 3 * MIB, 0x8004),
        (3, 12 * MIB, 0x8004),
        (3, 3 * MIB, 0x8004),
        (2, 0, 0x8004),
        (1, 0, 0),
        (1, 0, 0x8004),
        (3, 12 * MIB, 0),
    ],
)
def test_a_volume_encrypted_by_hand_reads_as_it_was(
    ntfs: bytes, state: int, encrypted: int | None, method: int
) -> None:
    """Also in the middle of a conversion (2, 5), paused (3) or decrypted (1), where the rest is plain: the
    place of the volume's header, too."""
    data = by_hand(ntfs, state, encrypted, method)
    bmap, readers = survey_open([BytesReader(data)])
    assert readers[1].read(0, len(ntfs)) == ntfs
    assert readers[1].read(8000, 9000) == ntfs[8000:17000]
    assert bmap.filesystems.column("type").to_pylist() == ["ntfs"]
    assert_proven(bmap)


@pytest.mark.parametrize("state", [4, 1])
@pytest.mark.parametrize("seed", range(4))
def test_encrypted_on_write_by_hand(ntfs: bytes, state: int, seed: int) -> None:
    """Any chunks; zeroes stand where the information, the bitmaps and their logs lie."""
    chosen = random.Random(seed)
    every = range(len(ntfs) // CHUNK)
    chunks = set(chosen.sample(every, chosen.choice([0, 1, 100, len(every)])))
    shown = bytearray(ntfs)
    for at in (*EOW, *BITMAPS):
        shown[at : at + 1536] = bytes(1536)
    data = by_hand(bytes(shown), state, chunks=chunks)
    bmap, readers = survey_open([BytesReader(data)])
    assert readers[1].read(0, len(shown)) == bytes(shown)
    assert bmap.filesystems.column("type").to_pylist() == ["ntfs"]
    assert_proven(bmap)
    parts = [part for part in bmap.extents.column("part").to_pylist() if part and part.startswith("EOW")]
    assert len(parts) == 2 + 2 * 2


def test_damaged_bitmaps(ntfs: bytes) -> None:
    """One copy of the information is enough, and one record of a bitmap."""
    data = by_hand(ntfs, chunks={3, 200}).copy()
    data[EOW[0] + 20] ^= 1
    bmap, readers = survey_open([BytesReader(data)])
    assert codes(bmap) == ["copy-differs"]
    assert readers[1].read(0, len(ntfs)) == ntfs
    data[BITMAPS[1] + 512 + 40] ^= 1  # now its older record tells, and wrongly
    bmap, readers = survey_open([BytesReader(data)])
    assert readers[1].read(200 * CHUNK, CHUNK) != ntfs[200 * CHUNK :][:CHUNK]
    data[BITMAPS[1] + 1024 + 40] ^= 1
    bmap, _ = survey_open([BytesReader(data)])
    assert codes(bmap) == ["copy-differs", "superblock"]
    assert f"bitmap at byte {BITMAPS[1]:#x}" in bmap.problems.column("detail")[1].as_py()
    assert bmap.volumes.num_rows == 1


def test_damaged_copies_of_the_metadata(ntfs: bytes) -> None:
    """One copy is enough; without any the volume is one piece, and the message names the bytes."""
    data = by_hand(ntfs).copy()
    for number, at in enumerate(COPIES, 1):
        bmap, _ = survey_open([BytesReader(data)])
        assert codes(bmap) == ["copy-differs"] * (number - 1)
        assert bmap.volumes.num_rows == 2
        data[at : at + 8] = 0
    bmap, _ = survey_open([BytesReader(data)])
    assert "superblock" in codes(bmap)
    assert bmap.volumes.num_rows == 1
    assert f"{COPIES[2]:#x}" in str(bmap.problems.column("detail")[-1])
