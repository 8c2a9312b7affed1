"""The keeper: a process that freezes, waits, and thaws, whatever becomes of the one that started it.

It is given its task as JSON, and says one JSON object a line on standard output: {"filesystems": words} once
they are frozen, {"why": ..., "seconds": ...} once they are thawed, or {"error": class, "words": ...}.
Anything on standard input, and its end, asks for the thaw. All that it needs is imported before it freezes:
its own files may lie on what is frozen.
"""

import contextlib
import json
import select
import signal
import sys
import time
from typing import Any, Protocol

from virt_bmap.act.freeze import Guest, HostMounts, Target
from virt_bmap.core.errors import BmapError
from virt_bmap.host.signals import SIGNALS


class Freezer(Protocol):
    """What `agent.Agent` and `mounts.Mounts` can do."""

    def freeze(self, limit: float) -> str:
        """Freeze within `limit` seconds; what, in words. Raises BmapError, and leaves nothing frozen then."""

    def thaw(self) -> bool:
        """Thaw; False where somebody else had done it. Raises FreezeError where it can't be done."""

    def close(self) -> None:
        """Let go of sockets and files."""


def freezer_of(target: Target) -> Freezer:
    """Who freezes this. Raises UsageError or MissingTool."""
    if isinstance(target, Guest):
        from virt_bmap.act.freeze.agent import Agent

        return Agent(target.socket, target.mountpoints)
    from virt_bmap.act.freeze.mounts import Mounts

    return Mounts(target.folders)


def keep(target: Target, limit: float) -> None:
    """Freeze, wait until asked or for `limit` seconds, thaw."""
    with contextlib.closing(freezer_of(target)) as freezer:
        begin = time.monotonic()
        words = freezer.freeze(limit)
        try:
            say(filesystems=words)
            left = begin + limit - time.monotonic()
            asked = select.select([sys.stdin], [], [], max(0.0, left))[0]
            why = "timeout" if not asked else "asked" if sys.stdin.readline() else "orphaned"
        finally:
            mine = freezer.thaw()
        say(why=why if mine else "stolen", seconds=time.monotonic() - begin)


def say(**what: Any) -> None:
    """One line to the process that asked; it may have gone."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(what), flush=True)


def main() -> None:
    """The process."""
    for number in SIGNALS:  # they are the business of the process that asked, which thaws on them
        signal.signal(number, signal.SIG_IGN)
    task = json.loads(sys.argv[1])
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["target"].items()
    }
    try:
        keep({"Guest": Guest, "HostMounts": HostMounts}[task["kind"]](**given), task["limit"])
    except BmapError as error:
        say(error=type(error).__name__, words=str(error))


if __name__ == "__main__":
    main()
