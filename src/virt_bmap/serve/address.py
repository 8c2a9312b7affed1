"""Where a served disk is found: a socket in a private folder, or where the user wants it."""

import contextlib
import os
import socket
import stat
from typing import NamedTuple
from urllib.parse import quote

from virt_bmap.core.errors import UsageError

HERE = "127.0.0.1"


class Address(NamedTuple):
    """A Unix socket, or a host's TCP port."""

    socket: str = ""
    host: str = ""
    port: int = 0

    def uri(self, export: str = "") -> str:
        """What NBD clients are given. There is one disk behind all exports, but the log tells them apart."""
        if self.socket:
            return f"nbd+unix:///{export}?socket={quote(self.socket, safe='/')}"
        return f"nbd://{self._authority}/{export}"

    @property
    def _authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def nbd(self) -> str:
        """QEMU's older way to name it, as nbdkit's own $nbd."""
        return f"nbd:unix:{self.socket}" if self.socket else f"nbd:{self._authority}"

    @property
    def listening(self) -> list[str]:
        """nbdkit's options."""
        return ["--unix", self.socket] if self.socket else ["--ipaddr", self.host, "--port", str(self.port)]

    @property
    def node(self) -> str:
        """The options of QEMU's block driver nbd."""
        if self.socket:
            return f"server.type=unix,server.path={self.socket.replace(',', ',,')}"
        return f"server.type=inet,server.host={self.host},server.port={self.port}"

    def numbered(self, number: int) -> "Address":
        """That of disk `number`, where this is the first one's: the next port, or a socket with the number
        behind its name."""
        if number == 1:
            return self
        return self._replace(
            socket=f"{self.socket}{number}" if self.socket else "",
            port=self.port + number - 1 if self.port else 0,
        )

    def make_free(self) -> None:
        """Remove the socket that a dead server has left. UsageError where it is in use, or is something
        else."""
        if not self.socket:
            return
        try:
            mode = os.lstat(self.socket).st_mode
        except OSError:
            return
        if not stat.S_ISSOCK(mode):
            raise UsageError(f"{self.socket}: is there, and no socket; it is not replaced")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as link:
            try:
                link.connect(self.socket)
            except ConnectionRefusedError:
                os.unlink(self.socket)
                return
            except OSError as error:
                raise UsageError(f"{self.socket}: can't be used: {error.strerror}") from error
        raise UsageError(f"{self.socket}: another server listens there")


def port(text: str) -> Address:
    """[HOST:]PORT. ValueError where it is none."""
    host, _, number = text.rpartition(":")
    if not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise ValueError(f"{text}: not a port, nor HOST:PORT")
    return Address(host=host.strip("[]") or HERE, port=int(number))
