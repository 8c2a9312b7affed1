"""A guest's filesystems, frozen and thawed by the QEMU guest agent.

Sources: qga/qapi-schema.json of QEMU 7.2 (guest-sync, guest-fsfreeze-*), and the QEMU project's Python
client, qemu.qmp: the agent speaks as QEMU's monitor does, without a greeting. While filesystems are frozen
the agent takes few commands: sync, status and thaw are among them.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from virt_bmap.core.amounts import plural
from virt_bmap.core.errors import BmapError, FreezeError, MissingTool

try:
    from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError
except ImportError as error:
    raise MissingTool(
        "talking to a guest agent needs the package qemu.qmp (pip install 'virt-bmap[agent]')"
    ) from error

ANSWER_TIMEOUT = 10.0
"""Seconds for an answer that takes no work: an emulated guest that is busy needs some."""
THAW_PATIENCE = 120.0
"""Seconds during which the thaw is tried again, through new connections where the old one is lost."""
BROKEN = (QMPError, OSError, EOFError, ValueError)
"""What qemu.qmp raises where the other side sends nonsense or goes."""
ATTEMPTS = 3
"""Connections: what an earlier client left half said makes
the agent complain, and us give the connection up."""


class Agent:
    """The agent of one guest. Connected when first used."""

    def __init__(self, socket: str, mountpoints: Sequence[str] = ()) -> None:
        self.socket, self.mountpoints = socket, list(mountpoints)
        logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
        logging.getLogger("qemu.qmp").propagate = False
        self._runner = asyncio.Runner()
        self._client: QMPClient | None = None

    def freeze(self, limit: float) -> str:
        """All filesystems of the guest, or those at its mount points.

        FreezeError where it does not happen within `limit` seconds; all is thawed then.
        """
        self._runner.run(self._connect())
        if self._ask("guest-fsfreeze-status") != "thawed":
            raise FreezeError(
                f"{self.socket}: the guest's filesystems are frozen already, by someone else (the agent's "
                "guest-fsfreeze-thaw thaws them)"
            )
        command = "guest-fsfreeze-freeze-list" if self.mountpoints else "guest-fsfreeze-freeze"
        arguments = {"mountpoints": self.mountpoints} if self.mountpoints else None
        try:
            count = self._ask(command, arguments, limit)
            if not count:
                raise FreezeError(f"{self.socket}: the agent froze nothing: {_none(self.mountpoints)}")
        except BmapError:
            self.thaw()
            raise
        return f"{plural(count, 'filesystem')} of the guest"

    def thaw(self) -> bool:
        """Thaw everything; False where nothing was frozen any more.

        FreezeError where the agent does not confirm it within THAW_PATIENCE.
        """
        until = time.monotonic() + THAW_PATIENCE
        while True:
            try:
                if self._client is None:
                    self._runner.run(self._connect())
                mine = bool(self._ask("guest-fsfreeze-status") == "frozen")
                self._ask("guest-fsfreeze-thaw", None, THAW_PATIENCE)
                return mine
            except BmapError as error:
                self._disconnect()
                if time.monotonic() > until:
                    raise FreezeError(
                        f"the guest is PERHAPS STILL FROZEN: its agent does not confirm the thaw: {error}"
                    ) from error
                time.sleep(0.5)

    def close(self) -> None:
        """End the connection: the socket serves one client at a time."""
        self._disconnect()
        self._runner.close()

    async def _connect(self) -> None:
        """A connection on which the agent has answered."""
        for attempt in range(ATTEMPTS):
            client = QMPClient("guest agent")
            client.await_greeting = client.negotiate = False
            try:
                await asyncio.wait_for(client.connect(self.socket), ANSWER_TIMEOUT)
                number = random.randrange(1 << 31)
                if (
                    await asyncio.wait_for(client.execute("guest-sync", {"id": number}), ANSWER_TIMEOUT)
                    == number
                ):
                    self._client = client
                    return
                await _ended(client)
            except TimeoutError as error:
                await _ended(client)
                raise FreezeError(
                    f"{self.socket}: no agent answers within {ANSWER_TIMEOUT:g} seconds: qemu-guest-agent "
                    "does not run in the guest, or another program (libvirt) holds the socket"
                ) from error
            except ConnectError as error:
                raise FreezeError(f"{self.socket}: can't be connected to: {_reason(error)}") from error
            except BROKEN as error:
                await _ended(client)
                if attempt == ATTEMPTS - 1:
                    raise FreezeError(
                        f"{self.socket}: what answers there is not a guest agent: {error}"
                    ) from error
        raise FreezeError(f"{self.socket}: what answers there is not a guest agent")

    def _ask(
        self, command: str, arguments: dict[str, Any] | None = None, limit: float = ANSWER_TIMEOUT
    ) -> Any:
        """The agent's answer. Raises FreezeError with its
        words where it refuses or does not answer in time."""

        async def asked() -> object:
            assert self._client
            return await asyncio.wait_for(self._client.execute(command, arguments), limit)

        try:
            return self._runner.run(asked())
        except TimeoutError as error:
            raise FreezeError(
                f"{self.socket}: the agent did not answer {command} within {limit:g} seconds"
            ) from error
        except ExecuteError as error:
            raise FreezeError(f"{self.socket}: the agent refuses {command}: {error}") from error
        except ExecInterruptedError as error:
            raise FreezeError(
                f"{self.socket}: the connection to the agent was lost: did the virtual machine end?"
            ) from error
        except BROKEN as error:
            raise FreezeError(
                f"{self.socket}: the agent's answer to {command} makes no sense: {error}"
            ) from error

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._runner.run(_ended(client))


async def _ended(client: QMPClient) -> None:
    """Disconnect; what went wrong on the connection was said before."""
    with contextlib.suppress(*BROKEN, TimeoutError):
        await asyncio.wait_for(client.disconnect(), ANSWER_TIMEOUT)


def _reason(error: ConnectError) -> str:
    cause = error.exc
    return (cause.strerror or str(cause)) if isinstance(cause, OSError) else str(cause)


def _none(mountpoints: Sequence[str]) -> str:
    return (
        f"nothing that can be frozen is mounted at {', '.join(mountpoints)}"
        if mountpoints
        else "nothing that can be frozen is mounted"
    )
