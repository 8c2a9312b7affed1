"""A stand-in for observe/guest.py: answers libguestfs's calls from a plan (JSON, named by BMAP_FAKE_PLAN)
instead of a kernel.

Files are read page by page through the served disk, as a kernel's page cache would, so that nbdkit's log is a
real one. A plan has `type` and `files`: by path `ino`, `mode`, `size`, `runs` (file offset, place, length),
`first` (places read before the content: trees, inodes), `coded` (file offset, file length, place, length: the
content is the stored bytes, inverted, over and over), `error` (what reading it says), `die` (reading it ends
the process), `crash` (the virtual machine only).
"""

import json
import os
import stat
import sys
import time

import numpy as np

from virt_bmap.open.nbd import NbdReader

PAGE = 4096


class Guest:
    def __init__(self, plan: dict) -> None:
        self.plan, self.files = plan, plan["files"]
        self.pages: set[tuple[str, int]] = set()
        """Pages of files, and stored pieces, that are in memory."""
        self.metadata: set[tuple[str, int]] = set()
        self.disk: NbdReader | None = None

    def add_drive_opts(self, _name, **options):
        self.disk = NbdReader(f"nbd+unix:///?socket={options['server'][0].removeprefix('unix:')}")

    def launch(self):
        if words := self.plan.get("launch"):
            raise RuntimeError(words)

    def utsname(self):
        return {"uts_sysname": "Fake", "uts_release": "1"}

    def list_filesystems(self):
        return self.plan.get("filesystems", {"/dev/sda": self.plan["type"]})

    def mount_options(self, *_):
        if words := self.plan.get("mount"):
            raise RuntimeError(words)

    def vfs_type(self, _):
        return self.plan["type"]

    def vfs_uuid(self, _):
        return ""

    vfs_label = vfs_uuid

    def statvfs(self, _):
        return {"bsize": 1024}

    def debug(self, command, arguments):
        if arguments[0].startswith("dd if="):
            self.pages.clear()
        return ""

    def drop_caches(self, _):
        self.pages.clear()
        self.metadata.clear()

    def set_backend(self, _):
        pass

    set_backend_settings = set_backend

    def umount_all(self):
        pass

    def find0(self, _, place):
        names = {b"lost"} | {os.fsencode(path[1:]) for path in self.files}
        with open(place, "wb") as file:
            file.write(b"".join(name + b"\0" for name in sorted(names)))

    def lstatns(self, path):
        about = self.files.get(path) or {
            "ino": 2 if path == "/" else 11,
            "mode": stat.S_IFDIR | 0o755,
            "size": 1024,
        }
        result = dict.fromkeys(("st_dev", "st_uid", "st_gid", "st_mtime_sec", "st_mtime_nsec"), 0)
        return {
            **result,
            "st_ino": about["ino"],
            "st_mode": about.get("mode", stat.S_IFREG | 0o644),
            "st_size": about["size"],
            "st_nlink": 1,
        }

    def lstatnslist(self, directory, names):
        return [self.lstatns(f"{directory.rstrip('/')}/{name}") for name in names]

    def ls(self, path):
        self._touch(path, [self.plan.get("directories", {}).get(path, [])])
        return []

    def pread(self, path, count, offset):
        about = self.files[path]
        if about.get("die"):
            print("Kernel panic - not syncing", file=sys.stderr, flush=True)
            os._exit(1)
        if about.get("crash"):  # of the virtual machine alone
            self.plan["gone"] = True
        if self.plan.get("gone"):
            raise RuntimeError("pread: appliance closed the connection unexpectedly")
        if about.get("hang"):
            time.sleep(60)
        if words := about.get("error"):
            raise RuntimeError(words)
        end = min(offset + count, about["size"])
        pages = [self._page(path, about, at) for at in range(offset // PAGE * PAGE, end, PAGE)]
        return b"".join(pages)[offset % PAGE :][: end - offset]

    def _page(self, path, about, at):
        result = bytearray(PAGE)
        fresh = (path, at) not in self.pages
        self.pages.add((path, at))
        self._touch(path, about.get("first", []))
        for start, place, length in about.get("runs", []):
            low, high = max(at, start), min(at + PAGE, start + length)
            if low < high:
                data = self._read(place + low - start, high - low, fresh)
                result[low - at : high - at] = data
        for start, length, place, stored in about.get("coded", []):
            low, high = max(at, start), min(at + PAGE, start + length)
            if low < high:
                once = (path, -place) not in self.pages
                self.pages.add((path, -place))
                whole = (
                    np.resize(255 - np.frombuffer(self._read(place, stored, once), np.uint8), length)
                ).tobytes()
                result[low - at : high - at] = whole[low - start : high - start]
        return bytes(result)

    def _touch(self, path, ranges):
        for place, length in (one for one in ranges if one):
            if (path, place) not in self.metadata:
                self.metadata.add((path, place))
                self._read(place, length, True)

    def _read(self, place, length, logged):
        """Bytes of the disk, whole sectors asked for; from the image itself where a kernel has them in
        memory."""
        if logged:
            high = -(-(place + length) // 512) * 512
            self.disk._ends = None  # this stands for a kernel, not for a reader that keeps both ends
            low = place // 512 * 512
            return self.disk._fetch(np.array([low]), np.array([high - low])).tobytes()[place - low :][:length]
        with open(self.plan["image"], "rb") as file:
            file.seek(place)
            return file.read(length)


def main() -> None:
    with open(os.environ["BMAP_FAKE_PLAN"]) as file:
        guest = Guest(json.load(file))
    for line in sys.stdin.buffer:
        name, positional, named = json.loads(line)
        try:
            result = getattr(guest, name)(*positional, **named)
        except RuntimeError as error:
            answer, body = {"error": str(error), "ready": not guest.plan.get("gone")}, b""
        else:
            is_bytes = isinstance(result, bytes)
            answer, body = ({"bytes": len(result)}, result) if is_bytes else ({"result": result}, b"")
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
