"""Passphrases and keys for encrypted volumes, as the user gives them: `SELECTOR:key:STRING`, `SELECTOR:file:FILE`.

The words are those of libguestfs's option --key, and so are the selectors: a device name, a UUID, or `all`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_bmap.errors import ImageError, UsageError

ALL = "all"
MAX_KEY_FILE = 8 << 20
"""Bytes of a key file, as cryptsetup limits them."""


@dataclass(frozen=True)
class Keys:
    """(selector, secret) pairs. Secrets are never shown."""

    entries: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    def for_volume(self, name: str, uuid: str) -> list[bytes]:
        """The secrets to try on a volume, the ones meant for it alone first."""
        own = [secret for selector, secret in self.entries if selector == name or selector.lower() == uuid.lower()]
        return own + [secret for selector, secret in self.entries if selector == ALL]


NO_KEYS = Keys()


def parse(options: Sequence[str], passphrases: Sequence[bytes] = ()) -> Keys:
    """The keys of `--key` options, and passphrases to try on every volume. Raises UsageError where one is no option of this kind, ImageError where its file can't be read."""
    entries = []
    for option in options:
        for kind in (":key:", ":file:"):
            selector, found, value = option.partition(kind)
            if selector and found:
                entries.append((selector, value.encode(errors="surrogateescape") if kind == ":key:" else _file(value)))
                break
        else:
            raise UsageError(
                "a key is given as SELECTOR:key:PASSPHRASE or SELECTOR:file:FILE; SELECTOR is a device, a UUID or 'all'"
            )
    return Keys((*entries, *((ALL, passphrase) for passphrase in passphrases)))


def _file(path: str) -> bytes:
    """The content of a key file without one newline at its end, as libguestfs reads it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise ImageError(f"key file {path}: {error.strerror}") from error
    if len(data) > MAX_KEY_FILE:
        raise ImageError(f"key file {path}: longer than {MAX_KEY_FILE} bytes")
    return data.removesuffix(b"\n")
