"""LUKS: headers made by cryptsetup, payloads encrypted by it or by another implementation of the same
ciphers, keys right and wrong."""

import gzip
import hashlib
import lzma
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support import BytesReader, assert_proven, need, run
from virt_bmap.core.arrays import ints
from virt_bmap.core.errors import FormatError, ImageError, UsageError
from virt_bmap.core.keys import Keys, parse
from virt_bmap.core.reader import Reader
from virt_bmap.formats.volumes import luks
from virt_bmap.model.contract import Assembly, Member
from virt_bmap.open.raw import RawReader
from virt_bmap.survey.survey import survey, survey_open

MIB = 1 << 20
SECRET = b"correct horse battery staple"
FAST = {
    "pbkdf2": ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
    "argon2id": (
        "--pbkdf",
        "argon2id",
        "--pbkdf-force-iterations",
        "4",
        "--pbkdf-memory",
        "64",
        "--pbkdf-parallel",
        "1",
    ),
    "argon2i": (
        "--pbkdf",
        "argon2i",
        "--pbkdf-force-iterations",
        "4",
        "--pbkdf-memory",
        "64",
        "--pbkdf-parallel",
        "2",
    ),
}


def opened(reader: Reader, *secrets: bytes) -> tuple[Assembly, Reader | None]:
    """What `assemble` makes of one device with these secrets, and a reader of the volume behind the
    cipher."""
    keys = Keys(tuple(("all", secret) for secret in secrets))
    assembly = luks.assemble([Member(0, "/dev/sda", reader, keys)])
    if not assembly.children:
        return assembly, None
    (child,) = assembly.children
    return assembly, child.over({0: reader}, child.name)


def encrypted(cipher: str, key: bytes, data: bytes, sector: int) -> bytes:
    """The payload a sector at a time, each with the whole mode of the cryptography package: an independent
    implementation."""
    mode, _, vector = cipher.removeprefix("aes-").partition("-")
    result = []
    for at in range(0, len(data), sector):
        number = at // 512
        iv = (number & 0xFFFFFFFF if vector == "plain" else number).to_bytes(16, "little")
        if vector == "plain64be":
            iv = number.to_bytes(16, "big")
        if vector.startswith("essiv"):
            salt = hashlib.new(vector.partition(":")[2], key).digest()
            iv = Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(iv)
        chosen = {"xts": modes.XTS(iv), "cbc": modes.CBC(iv), "ecb": modes.ECB()}[mode]
        result.append(Cipher(algorithms.AES(key), chosen).encryptor().update(data[at : at + sector]))
    return b"".join(result)


CASES = [
    ("luks1", "aes-xts-plain64", 512, 512, "pbkdf2"),
    ("luks1", "aes-cbc-essiv:sha256", 256, 512, "pbkdf2"),
    ("luks1", "aes-cbc-plain", 128, 512, "pbkdf2"),
    ("luks2", "aes-xts-plain64", 512, 4096, "argon2id"),
    ("luks2", "aes-xts-plain64", 256, 512, "argon2i"),
    ("luks2", "aes-cbc-plain64", 192, 512, "pbkdf2"),
    ("luks2", "aes-cbc-essiv:sha256", 256, 1024, "pbkdf2"),
]


@pytest.fixture(scope="session")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """For each case a device that cryptsetup formatted, with 1 MiB of random bytes encrypted in it by
    hand."""
    tool = need("cryptsetup", "cryptsetup-bin")
    folder = tmp_path_factory.mktemp("luks")
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    found = {}
    for number, (version, cipher, bits, sector, kdf) in enumerate(CASES):
        device, key = folder / f"device{number}", folder / f"key{number}"
        start = (4 if version == "luks1" else 17) * MIB
        with device.open("wb") as file:
            file.truncate(start + MIB)
        options = [
            "--type",
            version,
            "--cipher",
            cipher,
            "--key-size",
            str(bits),
            *FAST[kdf],
            "--key-file",
            secret,
        ]
        options += ["--sector-size", str(sector)] if version == "luks2" else ["--align-payload", "8192"]
        run(
            tool,
            "luksFormat",
            "-q",
            *options,
            *(["--offset", str(start // 512)] if version == "luks2" else []),
            device,
        )
        run(
            tool,
            "luksDump",
            "-q",
            "--dump-volume-key",
            "--volume-key-file",
            key,
            "--key-file",
            secret,
            device,
        )
        with device.open("r+b") as file:
            file.seek(start)
            file.write(encrypted(cipher, key.read_bytes(), payload(number), sector))
        found[number] = device
    return found


def payload(number: int) -> bytes:
    return random.Random(number).randbytes(MIB)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_right_key_opens(devices: dict[int, Path], number: int) -> None:
    assembly, reader = opened(RawReader(str(devices[number])), b"wrong", SECRET)
    assert reader
    assert reader.size == MIB
    assert reader.read(0, MIB) == payload(number)
    assert not assembly.volumes[0].damage.problems()
    starts, lengths = ints([1000, 5, 700_001, 4096]), ints([3000, 1, 123, 8192])
    pieces = b"".join(
        payload(number)[start : start + length]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )
    assert reader.read_ranges(starts, lengths).tobytes() == pieces


@pytest.mark.parametrize("number", range(len(CASES)))
def test_without_the_key_every_byte_is_named(devices: dict[int, Path], number: int) -> None:
    bmap = survey([RawReader(str(devices[number]))])
    assert_proven(bmap)
    assert bmap.volumes.column("type").to_pylist() == ["crypto_LUKS"]
    rows = [row for row in bmap.extents.to_pylist() if row["part"] == "encrypted"]
    assert [(row["length"], row["flags"]) for row in rows] == [(MIB, 8)]


def test_a_wrong_key_is_said_so(devices: dict[int, Path]) -> None:
    assembly, reader = opened(RawReader(str(devices[0])), b"wrong")
    assert reader is None
    assert [problem.code for problem in assembly.volumes[0].damage.problems()] == ["no-key"]


def test_areas_are_those_of_luksdump(devices: dict[int, Path]) -> None:
    dump = run(need("cryptsetup", "cryptsetup-bin"), "luksDump", devices[3]).decode()
    area = int(dump.partition("Area offset:")[2].split()[0])
    bmap = survey([RawReader(str(devices[3]))])
    assert area in [
        row["volume_offset"] for row in bmap.extents.to_pylist() if row["part"] == "LUKS2 key slot 0"
    ]
    assert bmap.volumes.column("uuid").to_pylist() == [dump.partition("UUID:")[2].split()[0]]


def test_the_second_header_serves_when_the_first_is_damaged(devices: dict[int, Path]) -> None:
    data = np.fromfile(devices[3], np.uint8)
    data[5000] ^= 1
    assembly, reader = opened(BytesReader(data), SECRET)
    assert reader
    assert reader.read(0, 4096) == payload(3)[:4096]
    assert [problem.code for problem in assembly.volumes[0].damage.problems()] == ["copy-differs"]
    data[:4096] = 0
    assert luks.probe(BytesReader(data))
    assert opened(BytesReader(data), SECRET)[1]


@pytest.mark.parametrize("start", ["--encrypt", "--decrypt-half"])
def test_what_cryptsetup_encrypted_itself(tmp_path: Path, start: str) -> None:
    """An image encrypted in place by cryptsetup alone, which needs no kernel for that; also stopped
    halfway."""
    tool = need("cryptsetup", "cryptsetup-bin")
    plain = random.Random(start).randbytes(12 * MIB)
    image, secret = tmp_path / "image", tmp_path / "secret"
    image.write_bytes(plain + bytes(32 * MIB))
    secret.write_bytes(SECRET)
    options = [
        "--reduce-device-size",
        "32M",
        "--key-file",
        secret,
        *FAST["pbkdf2"],
        "--resilience",
        "checksum",
        "--hotzone-size",
        "1M",
    ]
    if start == "--encrypt":
        run(tool, "reencrypt", "-q", "--encrypt", *options, image)
    else:
        run(tool, "reencrypt", "-q", "--encrypt", "--init-only", *options, image)
    assembly, reader = opened(RawReader(str(image)), SECRET)
    assert reader, assembly.volumes
    assert reader.read(0, 12 * MIB) == plain


# ---- the corpus --------------------------------------------------------------------------------------------


def test_corpus_header_sizes(corpus: Path) -> None:
    with tarfile.open(corpus / "images/mbroz+cryptsetup/tests/luks2_mda_images.tar.xz") as archive:
        for item in archive.getmembers():
            file = archive.extractfile(item)
            assert file
            bmap = survey([BytesReader(np.frombuffer(file.read(), np.uint8))])
            assert_proven(bmap)
            assert "LUKS2 header copy" in bmap.extents.column("part").to_pylist()


def test_corpus_old_format(corpus: Path) -> None:
    data = lzma.decompress((corpus / "images/mbroz+cryptsetup/tests/compatv10image.img.xz").read_bytes())
    device = BytesReader(np.frombuffer(data, np.uint8))
    assert opened(device, b"compatkey")[1]
    assert not opened(device, b"compatkez")[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["luks2/aes-cbc-plain", "luks2/aes-ecb", "luks1/sha1"])
def test_corpus_of_dissect(corpus: Path, name: str) -> None:
    """Keys made to take a second or a GiB; sector i holds the byte i."""
    data = gzip.decompress((corpus / f"images/fox-it+dissect.fve/tests/_data/{name}.bin.gz").read_bytes())
    _, reader = opened(BytesReader(np.frombuffer(data, np.uint8)), b"password")
    assert reader
    assert reader.read(0, reader.size) == b"".join(
        bytes([sector]) * 512 for sector in range(reader.size // 512)
    )


# ---- keys --------------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file\n")
    keys = parse(["/dev/sda2:key:a:b", f"all:file:{tmp_path / 'file'}", "0AB-1:key:x"])
    assert keys.for_volume("/dev/sda2", "") == [b"a:b", b"from a file"]
    assert keys.for_volume("/dev/sdb", "0ab-1") == [b"x", b"from a file"]
    assert "from a file" not in repr(keys)
    for wrong in ("nothing", ":key:x", "all:pass:x"):
        with pytest.raises(UsageError):
            parse([wrong])
    with pytest.raises(ImageError):
        parse([f"all:file:{tmp_path / 'none'}"])


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_a_detached_header(tmp_path: Path, version: str) -> None:
    tool = need("cryptsetup", "cryptsetup-bin")
    header, device, key, secret = (tmp_path / name for name in ("header", "device", "key", "secret"))
    secret.write_bytes(SECRET)
    plain = payload(9)
    device.write_bytes(bytes(len(plain)))
    sector = ["--sector-size", "512"] if version == "luks2" else []
    run(
        tool,
        "luksFormat",
        "-q",
        "--type",
        version,
        "--header",
        header,
        *FAST["pbkdf2"],
        *sector,
        "--key-file",
        secret,
        device,
    )
    run(tool, "luksDump", "-q", "--dump-volume-key", "--volume-key-file", key, "--key-file", secret, header)
    device.write_bytes(encrypted("aes-xts-plain64", key.read_bytes(), plain, 512))
    keys = parse([f"/dev/sda:header:{header}", f"/dev/sda:file:{secret}"])
    bmap, readers = survey_open([RawReader(str(device))], keys=keys)
    assert readers[1].read(0, readers[1].size) == plain
    assert_proven(bmap)
    wrong = survey([RawReader(str(device))], keys=parse([f"/dev/sda:header:{header}", "all:key:wrong"]))
    assert wrong.problems.column("code").to_pylist() == ["no-key"]
    assert_proven(survey([RawReader(str(device))], keys=parse([f"/dev/sda:header:{header}"])))
    alone = survey([RawReader(str(header))], keys=parse(["all:key:" + SECRET.decode()]))
    assert alone.problems.column("code").to_pylist() == ["elsewhere"]
    assert_proven(alone)


def test_header_options(tmp_path: Path) -> None:
    (tmp_path / "no-header").write_bytes(b"nothing")
    for wrong in (f"/dev/sda:header:{tmp_path / 'no-header'}", f"/dev/sda:header:{tmp_path / 'none'}"):
        with pytest.raises(ImageError, match="header file"):
            parse([wrong])
    with pytest.raises(UsageError, match="/dev/sdb:header:x"):
        parse(["all:header:x"])


# ---- headers that make no sense ----------------------------------------------------------------------------


def with_json(device: np.ndarray, text: bytes) -> BytesReader:
    """The device with another JSON in its first header, whose checksum is right; the second is gone."""
    data = device.copy()
    data[4096:16384] = np.frombuffer(text.ljust(12288, b"\0")[:12288], np.uint8)
    head = data[:16384].copy()
    head[0x1C0:0x200] = 0
    data[0x1C0 : 0x1C0 + 32] = np.frombuffer(hashlib.sha256(head.tobytes()).digest(), np.uint8)
    data[16384 : 16384 + 6] = 0
    return BytesReader(data)


def test_metadata_with_a_right_checksum_and_senseless_content(devices: dict[int, Path]) -> None:
    device = np.fromfile(devices[3], np.uint8)
    text = device[4096:16384].tobytes().split(b"\0")[0]
    assert opened(with_json(device, text), SECRET)[1]
    spans = [match.span() for match in re.finditer(rb'"[^"]*"|\b[0-9]+\b', text)]
    chance = random.Random(5)
    values = [
        b"0",
        b"-1",
        b"1",
        b"99999999999999999999",
        b'"18446744073709551615"',
        b'"dynamic"',
        b"[]",
        b"{}",
        b"null",
        b'"0"',
        b"[[1]]",
        b"1.5",
    ]
    tried = 0
    for _ in range(200):
        changed = text
        for low, high in sorted(chance.sample(spans, 2), reverse=True):
            changed = changed[:low] + chance.choice(values) + changed[high:]
        if b'"memory":64' not in changed or b'"time":4' not in changed:
            continue  # a hostile Argon2 that takes a GiB is allowed, but not wanted here
        tried += 1
        try:
            opened(with_json(device, changed), SECRET)
        except FormatError:
            continue
    assert tried > 100
