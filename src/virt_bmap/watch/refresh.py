"""The map read again while the guest runs, by another process, from the server that the guest's own disk comes from.

What the guest wrote is seen there even where it never reaches the image, and journals are replayed in memory as for any map. The process is asked by
a line on its standard input, answers with a line of JSON, and hands the map over in a file in memory: Arrow's tables as they are, with all paths
joined, so that taking over a map of any size is a matter of milliseconds.
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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from virt_bmap import children, tables
from virt_bmap.blockmap import BlockMap
from virt_bmap.errors import BmapError
from virt_bmap.keys import Keys
from virt_bmap.maps import map_disks
from virt_bmap.watch.resolve import Resolver

NICENESS = 10
"""The guest and its disk go first."""
START = 5.0
"""Seconds that the process may take to start before nobody waits for it any longer."""
READY = b"\n"
PATHS = pa.schema([("volume", pa.int32()), ("inode", pa.int64()), ("path", pa.large_binary())])


class Refreshed(NamedTuple):
    """A map that was read from `begun_ns` on, in `seconds`; or the reason why there is none."""

    begun_ns: int
    seconds: float
    resolver: Resolver | None = None
    error: str = ""


class Refresher:
    """The other process, as the watch sees it. One map at a time.

    It is started early, beside the first map: what it imports is to cost the guest nothing.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._number = 0
        self._rest = b""
        self.busy = False
        self.ended = False
        """The process is gone, which it should not be: there will be no more maps."""
        # in a process group of its own: what the terminal sends to the guest must not end it
        self._stack = contextlib.ExitStack()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = self._stack.enter_context(children.running([sys.executable, "-m", __name__], **pipes, process_group=0))
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        os.set_blocking(self._from.fileno(), False)

    def serve(self, folder: str, uris: Sequence[str]) -> None:
        """Say which disks are to be read, and where maps may lie on their way. Returns when the process is ready."""
        self._tell(pickle.dumps((folder, list(uris), self._keys)))
        if select.select([self._from], [], [], START)[0]:
            os.read(self._from.fileno(), len(READY))  # nothing: it ended, which will be noticed when a map is wanted

    def fileno(self) -> int:
        """For select: readable when there is a result."""
        return self._from.fileno()

    def begin(self) -> None:
        """Ask for a map of the disks as they are now."""
        self.busy = True
        self._tell(b"again\n")

    def result(self) -> Refreshed | None:
        """The map that was asked for, if it is done."""
        if not self.busy:
            return None
        data = os.read(self._from.fileno(), 1 << 16) if self._readable() else None
        if data == b"":
            self.busy, self.ended = False, True
            return Refreshed(0, 0.0, error=f"the process that reads it ended: {self._words()}")
        self._rest = (self._rest + (data or b"")).lstrip()
        if not self._rest.endswith(b"\n"):
            return None
        answer, self._rest, self.busy = json.loads(self._rest), b"", False
        if answer["error"]:
            return Refreshed(answer["begun_ns"], answer["seconds"], error=answer["error"])
        self._number += 1
        bmap = load(answer["file"])
        os.unlink(answer["file"])  # the tables stay mapped
        return Refreshed(answer["begun_ns"], answer["seconds"], Resolver(bmap, self._number, answer["begun_ns"]))

    def _readable(self) -> bool:
        return bool(select.select([self._from], [], [], 0)[0])

    def _tell(self, data: bytes) -> None:
        try:
            self._to.write(data)
            self._to.flush()
        except OSError:
            self.ended = True

    def _words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.wait()}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._stack.close()
        self._errors.close()


# ---- the other process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer until standard input ends, which it does with the watch."""
    import virt_bmap.paths  # noqa: F401 - slow to import, and the first map is waited for

    folder, uris, keys = pickle.load(sys.stdin.buffer)
    os.nice(NICENESS)
    print(READY.decode(), end="", flush=True)
    for number, _ in enumerate(sys.stdin.buffer):
        print(json.dumps(_answer(f"{folder}/map{number}", uris, keys)), flush=True)


def _answer(file: str, uris: Sequence[str], keys: Keys) -> dict[str, Any]:
    begun, started = time.time_ns(), time.monotonic()
    error = ""
    try:
        save(map_disks(uris, keys=keys), file)
    except BmapError as problem:
        error = str(problem)
    except OSError as problem:  # no room for it
        error = f"{file}: {problem.strerror}"
    return {"file": file, "begun_ns": begun, "seconds": time.monotonic() - started, "error": error}


def save(bmap: BlockMap, file: str) -> None:
    """The tables and all paths, one Arrow stream behind the other."""
    with pa.OSFile(file, "wb") as out:
        for table in (*(getattr(bmap, name) for name in BlockMap.TABLES), _paths(bmap)):
            with pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table.combine_chunks())


def load(file: str) -> BlockMap:
    """What `save` wrote, where it lies."""
    source = pa.memory_map(file)
    found = {}
    for name in (*BlockMap.TABLES, "paths"):
        with pa.ipc.open_stream(source) as stream:
            found[name] = stream.read_all()
    paths = found.pop("paths")
    volume = tables.integers(paths, "volume")
    bmap = BlockMap(**found)
    for number in tables.integers(bmap.filesystems, "volume").tolist():
        low, high = np.searchsorted(volume, [number, number + 1])
        mine = paths.slice(low, high - low)
        path = mine.column("path").combine_chunks()
        bmap.given_paths[number] = tables.integers(mine, "inode"), path.chunk(0) if isinstance(path, pa.ChunkedArray) else path
    return bmap


def _paths(bmap: BlockMap) -> pa.Table:
    parts = []
    for volume in tables.integers(bmap.filesystems, "volume").tolist():
        inode, path = bmap.paths(volume)
        parts.append(pa.table([np.full(len(inode), volume, np.int32), inode, path], schema=PATHS))
    return pa.concat_tables(parts) if parts else PATHS.empty_table()


if __name__ == "__main__":
    main()
