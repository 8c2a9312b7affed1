"""The map read again while the guest runs, by another process,
from the server that the guest's own disk comes from.

What the guest wrote is seen there even where it never reaches the image, and journals are replayed in memory
as for any map. The process is asked by a line on its standard input, answers with a line of JSON, and hands
the map over in a file in memory: Arrow's tables as they are.
"""

import contextlib
import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa

from virt_bmap.accesses.resolve import Resolver
from virt_bmap.core.errors import BmapError
from virt_bmap.host import children, leftovers, programs
from virt_bmap.model.blockmap import BlockMap
from virt_bmap.open.disks import Disks
from virt_bmap.survey.maps import mapped
from virt_bmap.watch import oom

NICENESS = 10
"""The guest and its disk go first."""
START = 5.0
"""Seconds that the process may take to start before nobody waits for it any longer."""
READY = b"\n"
MAP = "map"
"""How the files begin in which maps are handed over."""
MOST_DEATHS = 5


class Refreshed(NamedTuple):
    """A map that was read from `begun_ns` on, in `seconds`; or the reason why there is none."""

    begun_ns: int
    seconds: float
    resolver: Resolver | None = None
    error: str = ""

    @property
    def ended_ns(self) -> int:
        """When the reading ended."""
        return self.resolver.ended_ns if self.resolver else self.begun_ns


class Refresher:
    """The other process, as the watch sees it. One map at a time.

    It is started early, beside the first map: what it imports is to cost the guest nothing. Where it ends,
    which it should not, the next map that is asked for starts it again.
    """

    def __init__(self, disks: Disks) -> None:
        self._named = disks
        self._number = 0
        self._rest = b""
        self._asked: tuple[str, Disks] | None = None
        self._deaths = 0
        """One after the other, without a map in between."""
        self.busy = False
        self.ended = False
        """It could not be kept alive: there will be no more maps."""
        self._start()

    def _start(self) -> None:
        self._stack = contextlib.ExitStack()
        self._errors = self._stack.enter_context(tempfile.TemporaryFile(dir=leftovers.temporary()))  # noqa: SIM115 - entered here
        # in a process group of its own: what the terminal sends to the guest must not end it
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        words = programs.python("virt_bmap.watch.refresh")
        self._process = self._stack.enter_context(children.running(words, **pipes, process_group=0))
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._rest = b""
        os.set_blocking(self._from.fileno(), False)

    def serve(self, folder: str, uris: Sequence[str]) -> None:
        """Say which disks are to be read, and where maps may lie on their way.

        Returns when the process is ready.
        """
        self._asked = folder, replace(self._named, images=uris)
        self._tell(pickle.dumps(self._asked))
        if select.select([self._from], [], [], START)[0]:
            # nothing: it ended, which will be noticed when a map is wanted
            os.read(self._from.fileno(), len(READY))

    def fileno(self) -> int:
        """For select: readable when there is a result."""
        return self._from.fileno()

    def begin(self) -> None:
        """Ask for a map of the disks as they are now."""
        self.busy = True
        if self._process.poll() is not None and self._asked:
            self._stop()
            self._start()
            self._tell(pickle.dumps(self._asked))
        self._tell(b"again\n")

    def result(self) -> Refreshed | None:
        """The map that was asked for, if it is done; or why there will be none."""
        if not self.busy:
            return None
        try:
            found = self._result()
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:  # it answers nonsense
            found = self._died(f"it can't be taken over: {error}")
        if found:
            self.busy = False
            self._deaths = 0 if found.resolver else self._deaths
        return found

    def _result(self) -> Refreshed | None:
        data = os.read(self._from.fileno(), 1 << 16) if self._readable() else None
        if data == b"":
            return self._died(f"the process that reads it ended: {self._words()}")
        self._rest = (self._rest + (data or b"")).lstrip()
        if not self._rest.endswith(b"\n"):
            return None
        answer, self._rest = json.loads(self._rest), b""
        if answer["error"]:
            return Refreshed(answer["begun_ns"], answer["seconds"], error=answer["error"])
        self._number += 1
        bmap = load(answer["file"])
        os.unlink(answer["file"])  # the tables stay mapped
        return Refreshed(
            answer["begun_ns"],
            answer["seconds"],
            Resolver(bmap, self._number, answer["begun_ns"], answer["ended_ns"]),
        )

    def _died(self, words: str) -> Refreshed:
        self._stop()
        self._deaths += 1
        self.ended = self._deaths >= MOST_DEATHS
        return Refreshed(0, 0.0, error=words)

    def _readable(self) -> bool:
        return bool(select.select([self._from], [], [], 0)[0])

    def _tell(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone, which its answer will tell
            self._to.write(data)
            self._to.flush()

    def _words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.wait()}"

    def _stop(self) -> None:
        """End the process, and remove what it left on its way here."""
        self._process.kill()
        self._stack.close()
        folder = self._asked[0] if self._asked else ""
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.startswith(MAP):
                os.unlink(f"{folder}/{name}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._stack.close()


# ---- the other process -------------------------------------------------------------------------------------


def main() -> None:
    """Answer until standard input ends, which it does with the watch."""
    folder, disks = pickle.load(sys.stdin.buffer)
    os.nice(NICENESS)
    oom.first()
    print(READY.decode(), end="", flush=True)
    for number, _ in enumerate(sys.stdin.buffer):
        print(json.dumps(_answer(f"{folder}/{MAP}{number}", disks)), flush=True)


def _answer(file: str, disks: Disks) -> dict[str, Any]:
    begun, started = time.time_ns(), time.monotonic()
    ended, error = begun, ""
    try:
        bmap = mapped(disks)
        ended = time.time_ns()
        save(bmap, file)
    except BmapError as problem:
        error = str(problem)
    except OSError as problem:  # no room for it
        error = f"{file}: {problem.strerror or problem}"
    except MemoryError:
        error = "not enough memory for it"
    return {
        "file": file,
        "begun_ns": begun,
        "ended_ns": ended,
        "seconds": time.monotonic() - started,
        "error": error,
    }


def save(bmap: BlockMap, file: str) -> None:
    """The tables, one Arrow stream after the other."""
    with pa.OSFile(file, "wb") as out:
        for table in (getattr(bmap, name) for name in BlockMap.TABLES):
            with pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table.combine_chunks())


def load(file: str) -> BlockMap:
    """What `save` wrote, where it lies."""
    source = pa.memory_map(file)
    found = {}
    for name in BlockMap.TABLES:
        with pa.ipc.open_stream(source) as stream:
            found[name] = stream.read_all()
    return BlockMap(**found)


if __name__ == "__main__":
    main()
