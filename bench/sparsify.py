"""sparsify in place and in a copy against virt-sparsify: time, what takes space on the host afterwards, and
that nothing else changed.

    python bench/sparsify.py [--kinds ext4,xfs,...] [--files N] [--size GIB] [--kills N] [--peer=WAYS]
    CACHE-FOLDER

A disk of 10 GiB on which 50,000 files were written and half of them deleted (a tenth of that on FAT, which
mtools fill; and virt-sparsify copies no FAT with more than 4 GiB free, for which --size is). Needs root for
mounts. Before and after, the filesystem's checker must find nothing and every file must have its hash; after
each kill at a random moment, too. The folder needs 12 GiB. virt-sparsify (Debian guestfs-tools) is timed on
the same image in the same run; on machines without KVM it is slower than it would be with it.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SIZE, FILES, KILLS = 10, 50_000, 20
"""SIZE in GiB."""
LONGEST = 80 << 10
"""Bytes of the longest file; the mean is half of that."""
MAKERS = {
    "ext4": ["mke2fs", "-q", "-t", "ext4"], "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"], "ntfs": ["mkntfs", "-F", "-Q", "-q"],
    "vfat": ["mkfs.fat", "-F", "32"],
}  # fmt: skip
CHECKERS = {
    "ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"],
    "ntfs": ["ntfsfix", "-n"], "vfat": ["fsck.fat", "-n"],
}  # fmt: skip
OURS = [str(Path(sys.executable).with_name("virt-bmap")), "sparsify", "-q"]
EMULATED = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}


def run(*command: str | Path, **more: object) -> None:
    """Run a command; CalledProcessError where it fails."""
    subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **more,
    )  # type: ignore[call-overload]


@contextlib.contextmanager
def files_of(image: Path, kind: str, write: bool = False) -> Iterator[Path]:
    """A folder with the files of the image; on FAT copied out by mtools, and in again when they may be
    written."""
    with tempfile.TemporaryDirectory(dir=image.parent) as name:
        folder = Path(name)
        if kind == "vfat":
            if not write:
                run("mcopy", "-s", "-n", "-i", image, "::/", folder)
            yield folder
            if write:
                run("mcopy", "-s", "-i", image, *sorted(folder.iterdir()), "::/")
            return
        if kind == "ntfs":
            run("ntfs-3g", "-o", "rw" if write else "ro", image, folder)
        else:
            run("mount", "-o", "loop" if write else "loop,ro", image, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
            while kind == "ntfs" and any(str(image).encode() in line for line in open("/proc/mounts", "rb")):  # noqa: SIM115
                time.sleep(0.1)


def made(cache: Path, kind: str, files: int, size: int) -> Path:
    """The image of `size` GiB, made if it is not there yet."""
    image = cache / f"sparsify-{kind}-{files}{f'-{size}' if size != SIZE else ''}.img"
    if image.exists():
        return image
    part, chooser = image.with_suffix(".part"), random.Random(1)
    with part.open("wb") as file:
        file.truncate(size << 30)
    run(*MAKERS[kind], part)
    names = [f"d{number // 250:03d}/file{number:05d}" for number in range(files)]
    gone = chooser.sample(names, files // 2)
    with files_of(part, kind, write=True) as root:
        for number, name in enumerate(names):
            if number % 250 == 0:
                (root / name).parent.mkdir()
            (root / name).write_bytes(chooser.randbytes(chooser.randrange(1, LONGEST)))
        if kind != "vfat":
            os.sync() if kind == "ntfs" else run("sync", "-f", root)
            for name in gone:
                (root / name).unlink()
    for at in range(0, len(gone), 500) if kind == "vfat" else ():
        run("mdel", "-i", part, *(f"::/{name}" for name in gone[at : at + 500]))
    part.rename(image)
    return image


def digests(image: Path, kind: str) -> dict[str, str]:
    """SHA-256 of every file."""
    with files_of(image, kind) as root:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
            if path.is_file()
        }


def held(path: Path) -> int:
    """Bytes on the host."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def fresh(image: Path) -> Path:
    """A copy to change, with the same blocks."""
    copy = image.with_suffix(".copy")
    run("cp", "--sparse=auto", "--reflink=never", image, copy)
    held(copy)
    return copy


class Judge:
    """What must be true of an image whenever it was touched."""

    def __init__(self, image: Path, kind: str) -> None:
        self.kind = kind
        run(*CHECKERS[kind], image)
        self.files = digests(image, kind)

    def check(self, image: Path) -> None:
        """Raises CalledProcessError or AssertionError."""
        run(*CHECKERS[self.kind], image)
        if digests(image, self.kind) != self.files:
            raise AssertionError(f"{image}: files changed")


def timed(command: list[str | Path], env: dict[str, str]) -> float:
    """Seconds of one run; CalledProcessError with what it said where it fails."""
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=os.environ | env)
    return time.perf_counter() - start


def compare(image: Path, judge: Judge, peer: list[str]) -> None:
    """Both ways of both programs, on copies of the image."""
    out, before = image.with_suffix(".out"), held(image)
    programs = [("virt-bmap sparsify", OURS, {})]
    if peer and shutil.which("virt-sparsify"):
        programs.append(("virt-sparsify", ["virt-sparsify", "-q"], EMULATED | {"TMPDIR": str(image.parent)}))
    seconds = {}
    for way in ("--in-place", "copy"):
        for name, command, env in programs if way in peer else programs[:1]:
            out.unlink(missing_ok=True)
            result = out if way == "copy" else fresh(image)
            words = [
                *command,
                "--format",
                "raw",
                *(["--in-place", result] if way == "--in-place" else [image, out]),
            ]
            try:
                seconds[way, name] = timed(words, env)
            except subprocess.CalledProcessError as error:
                said = error.stderr.decode(errors="replace").strip().split("\n")[0]
                print(f"  {way:10} {name:20} failed with status {error.returncode}: {said}", flush=True)
                continue
            judge.check(result)
            left = held(result)
            ratio = (
                f", {seconds[way, name] / seconds[way, programs[0][0]]:.0f} times as long"
                if name != programs[0][0]
                else ""
            )
            print(
                f"  {way:10} {name:20} {seconds[way, name]:8.2f} s, {left / 1e6:8.1f} MB left of "
                f"{before / 1e6:.1f} MB{ratio}",
                flush=True,
            )
    out.unlink(missing_ok=True)


def kill(image: Path, judge: Judge, times: int, qcow2: bool) -> None:
    """SIGKILL at random moments of a run in place: the image is still valid each time."""
    source = image
    if qcow2:
        source = image.with_suffix(".qcow2")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, source)
    longest = timed([*OURS, "--in-place", fresh(source)], {})
    chooser, partly, whole = random.Random(2), 0, held(source)
    done = held(source.with_suffix(".copy"))
    for _ in range(times):
        copy = fresh(source)
        process = subprocess.Popen(
            [*OURS, "--in-place", copy], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chooser.uniform(0.2, 1.0) * longest)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while qcow2 and subprocess.run(
            ["qemu-img", "check", "-q", copy], capture_output=True
        ).returncode not in (0, 3):
            time.sleep(0.1)  # qemu-nbd still holds the lock
        partly += done + (1 << 20) < held(copy) < whole - (1 << 20)
        if qcow2:
            back = image.with_suffix(".back")
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, back)
            judge.check(back)
            back.unlink()
        else:
            judge.check(copy)
    print(
        f"  killed {times} times ({'qcow2' if qcow2 else 'raw'}), {partly} of them halfway: valid each time",
        flush=True,
    )
    if qcow2:
        source.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--kinds", default=",".join(MAKERS))
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--size", type=int, default=SIZE, metavar="GIB")
    parser.add_argument("--kills", type=int, default=KILLS, help="of raw images; half as many of qcow2")
    parser.add_argument(
        "--peer",
        default="--in-place,copy",
        help="which ways of virt-sparsify to time, too; its copy takes many minutes without KVM",
    )
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds.split(","):
        files = options.files // (10 if kind == "vfat" else 1)
        image = made(options.cache, kind, files, options.size)
        judge = Judge(image, kind)
        print(f"{kind}: {files:,} files written, {len(judge.files):,} left", flush=True)
        compare(image, judge, options.peer.split(","))
        if options.kills:
            kill(image, judge, options.kills, qcow2=False)
            kill(image, judge, options.kills // 2, qcow2=True)
        for rest in (".copy", ".qcow2", ".out"):
            image.with_suffix(rest).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
