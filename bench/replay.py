"""Prefetch: how much sooner is the demo's guest up, booted from a disk where each request takes 5 ms, when
`virt-bmap replay` has warmed it first?

    python bench/replay.py FOLDER [--delay MS] [--rounds N]

far: nbdkit with the delay filter; near: nbdkit with a cache in front of it. The guest boots straight from the
far server, through the near one with its cache empty, and through the near one once a replay has gone through
it. The profile is that of a boot watched before. What the far server is asked for while the guest boots is
counted, too: that times the delay is what the guest waits at least, on a machine of any speed. FOLDER keeps
the demo's disk, map and trace.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import build

LIMIT = 900
"""Seconds that a boot gets."""
WAYS = ("straight from the far disk", "through an empty cache", "through the cache, replayed")


def virt_bmap(*arguments: object) -> None:
    """Run the command with this Python."""
    subprocess.run(
        [sys.executable, "-m", "virt_bmap", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


@contextlib.contextmanager
def nbdkit(folder: Path, name: str, *arguments: str) -> Iterator[str]:
    """A running server; its URI."""
    socket, pid = folder / name, folder / f"{name}.pid"
    server = subprocess.Popen(["nbdkit", "-f", "--exit-with-parent", "-U", socket, "-P", pid, *arguments])
    try:
        while not (pid.exists() and pid.read_text()):
            assert server.poll() is None, "nbdkit did not start"
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()


def guest(uri: str, folder: Path) -> list[str]:
    """The demo's guest; it switches itself off once it is up."""
    accelerator = os.environ.get("ACCEL", "tcg")
    return [
        "timeout",
        str(LIMIT),
        "qemu-system-x86_64",
        "-accel",
        accelerator,
        "-m",
        "512",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        f"file:{folder}/console.txt",
        "-drive",
        f"file={uri},format=raw,if=virtio,snapshot=on",
    ]


def boot(disk: Path, profile: Path, way: str, delay: int) -> tuple[float, float, int]:
    """(seconds until the guest was up and off again, seconds of the replay, requests to the far disk while
    the guest ran)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "far.log"
        far = [
            "-r",
            "--filter=log",
            "--filter=delay",
            "file",
            str(disk),
            f"logfile={log}",
            f"delay-read={delay}ms",
        ]
        with contextlib.ExitStack() as stack:
            uri = stack.enter_context(nbdkit(folder, "far", *far))
            if way != WAYS[0]:
                near = ["-r", "--filter=cache", "nbd", f"uri={uri}", "shared=true", "cache-on-read=true"]
                uri = stack.enter_context(nbdkit(folder, "near", *near))
            start = time.monotonic()
            if way == WAYS[2]:
                virt_bmap("replay", "-q", profile, uri)
            replayed = time.monotonic()
            before = log.stat().st_size
            subprocess.run(guest(uri, folder), check=True)
            end = time.monotonic()
            assert build.READY in (folder / "console.txt").read_text(errors="replace"), (
                "the guest did not come up"
            )
            asked = len(re.findall(rb" Read id=", log.read_bytes()[before:]))
    return end - replayed, replayed - start, asked


def main() -> None:
    """Print the best boot of each way, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=int, default=5, help="milliseconds a request (default: 5)")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    disk, saved, trace, profile = (
        args.folder / name for name in ("disk.img", "map.parquet", "trace.parquet", "boot.profile")
    )
    if not disk.exists():
        build.main(disk)
    virt_bmap("-q", "-o", saved, disk)
    if not trace.exists():
        virt_bmap(
            "watch",
            "-q",
            "--map",
            saved,
            "-o",
            trace,
            "--summary",
            args.folder / "summary.txt",
            disk,
            "--",
            *guest("$uri", args.folder),
        )
    virt_bmap("profile", trace, "--map", saved, "-o", profile)
    found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(boot(disk, profile, way, args.delay))
    base = min(found[WAYS[0]])[0]
    for way in WAYS:
        seconds, warming, asked = min(found[way])
        extra = f", replay {warming:.1f} s before" if warming > 0.5 else ""
        print(
            f"{way:28} {seconds:7.1f} s, ratio {seconds / base:.2f}; {asked:5} requests to the far "
            f"disk, {asked * args.delay / 1000:.1f} s of waiting{extra}"
        )


if __name__ == "__main__":
    main()
