"""Passphrases and keys for encrypted volumes, as the user gives them: `SELECTOR:key:STRING`,
`SELECTOR:file:FILE`.

The words are those of libguestfs's option --key, and so are the selectors: a device name, a UUID, or `all`.
`DEVICE:header:FILE` gives a detached LUKS header: only the device's name can tell which one it belongs to,
since on the device nothing does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from virt_bmap.core.errors import ImageError, UsageError

ALL = "all"
MAX_KEY_FILE = 8 << 20
"""Bytes of a key file, as cryptsetup limits them."""
MAX_HEADER_FILE = 256 << 20
"""Bytes of a file with a LUKS header: two headers of 4 MiB
and 128 MiB of key slots are the most that LUKS2 allows."""
OPTION = re.compile(r"(.+?)(:key:|:file:|:header:)(.*)", re.DOTALL)
LUKS_MAGIC = b"LUKS\xba\xbe"


@dataclass(frozen=True)
class Keys:
    """(selector, secret) pairs, and (device, content) of detached headers. Secrets are never shown."""

    entries: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    headers: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    def for_volume(self, name: str, uuid: str) -> list[bytes]:
        """The secrets to try on a volume, the ones meant for it alone first."""
        own = [
            secret
            for selector, secret in self.entries
            if selector == name or selector.lower() == uuid.lower()
        ]
        return own + [secret for selector, secret in self.entries if selector == ALL]

    def header_of(self, name: str) -> bytes | None:
        """The detached LUKS header of the device `name`."""
        return next((header for device, header in self.headers if device == name), None)


NO_KEYS = Keys()


def parse(options: Sequence[str], passphrases: Sequence[bytes] = ()) -> Keys:
    """The keys of `--key` options, and passphrases to try on every volume.

    Raises UsageError where one is not an option of this kind, ImageError where its file can't be read.
    """
    entries, headers = [], []
    for option in options:
        selector, kind, value = _taken_apart(option)
        if kind == ":key:":
            entries.append((selector, value.encode(errors="surrogateescape")))
        elif kind == ":file:":
            # without one newline at its end, as libguestfs reads it
            entries.append((selector, _content("key file", value, MAX_KEY_FILE).removesuffix(b"\n")))
        else:
            headers.append((selector, _header(selector, value)))
    return Keys((*entries, *((ALL, passphrase) for passphrase in passphrases)), tuple(headers))


def file_of(option: str) -> str:
    """The file that a `--key` option names; nothing where it names none."""
    match = OPTION.fullmatch(option)
    return match[3] if match and match[2] != ":key:" else ""


def _taken_apart(option: str) -> tuple[str, str, str]:
    """(selector, kind, value): the first kind counts, a passphrase may hold all of them."""
    match = OPTION.fullmatch(option)
    if not match:
        raise UsageError(
            "a key is given as SELECTOR:key:PASSPHRASE or SELECTOR:file:FILE, a detached header as "
            "DEVICE:header:FILE; SELECTOR is a device, a UUID or 'all'"
        )
    return match[1], match[2], match[3]


def _header(device: str, path: str) -> bytes:
    if not device.startswith("/dev/"):
        raise UsageError(
            f"a detached header belongs to one device, and {device!r} "
            f"is not a device: give it as /dev/sdb:header:{path}"
        )
    data = _content("header file", path, MAX_HEADER_FILE)
    if not data.startswith(LUKS_MAGIC):
        raise ImageError(f"header file {path}: no LUKS header at byte 0")
    return data


def _content(what: str, path: str, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ImageError(f"{what} {path}: {error.strerror}") from error
    if len(data) > limit:
        raise ImageError(f"{what} {path}: longer than {limit:,} bytes")
    return data
