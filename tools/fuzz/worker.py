"""The process that does mutations, and what it counts as a fault: an exception that is no BmapError, more
than 10 s of processor time, more than 1 GiB, a broken invariant, a warning."""

import contextlib
import faulthandler
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from virt_bmap import cli
from virt_bmap.formats.volumes.luks import unlock

from . import beside
from .disk import Patch
from .images import Image
from .invariants import Broken
from .seeds import Seed, format_of

CPU_LIMIT = 10.0
"""Seconds of processor time for one mutation and all its consumers."""
MEMORY_LIMIT = 1 << 30
"""Bytes above what the process had before."""
ADDRESS_SPACE = 6 << 30
"""No fault of ours may take the machine down."""
QUICK = 1 << 20, 1 << 16
"""Iterations, and KiB, of which no key's derivation takes long."""
PACKAGE = "/virt_bmap/"
FRAMES = 2


class Hang(BaseException):
    """The time is up. No Exception: what we test must not swallow it."""


class Subject(Protocol):
    """What is damaged, used, and mended again."""

    name: str

    def mutate(self, number: int) -> list[str]: ...
    def use(self, number: int, ran: list[str]) -> str: ...
    def restore(self) -> None: ...
    def patches(self) -> list[tuple[int, Patch]]: ...
    def apply(self, patches: list[tuple[int, Patch]]) -> None: ...
    def smaller(self, patches: list[tuple[int, Patch]]) -> Iterator[list[tuple[int, Patch]]]: ...
    def copy(self, out: Path) -> list[Path]: ...
    def close(self) -> None: ...


class Outcome(NamedTuple):
    """What became of a mutation: mapped (nothing was noticed), damaged (problems), refused, or fault, which
    `fault` names and `trace` shows."""

    name: str
    number: int
    outcome: str
    cpu: float
    memory: int
    done: list[str]
    ran: list[str]
    fault: str = ""
    trace: str = ""
    patches: list[tuple[int, Patch]] | None = None


def subjects(seeds: dict[str, Seed], work: Path) -> dict[str, Callable[[], Subject]]:
    """All that can be damaged, by name; a subject is made when its turn comes."""

    def image(seed: Seed) -> Callable[[], Subject]:
        return lambda: Image(seed, work)

    result: dict[str, Callable[[], Subject]] = {name: image(seed) for name, seed in seeds.items()}
    if {"ext4", "lvm", "gpt", "qcow2"} <= set(seeds):
        result |= beside.make(work / "beside", seeds)
    return result


def prepare() -> None:
    """This process, for work of this kind: warnings of ours are errors, unexpected ones of the survey leave
    it, memory goes back to the kernel."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"virt_bmap\b")
    os.environ["VIRT_BMAP_STRICT"] = "1"
    # its heap keeps its memory, and there is none to measure then
    vars(cli)["import_libraries"] = lambda *_: None
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    signal.signal(signal.SIGPROF, _too_long)
    _hasten(*QUICK)


def _too_long(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """For a process that is not only for this: mutations that take too long end as they do in a worker."""
    before = signal.signal(signal.SIGPROF, _too_long), _hasten(*QUICK)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before[0])
        _hasten(*before[1])


def _hasten(iterations: int, memory: int) -> tuple[int, int]:
    """What the derivation of a key may take, which is slow on purpose; the limits that held before."""
    before = unlock.MAX_ITERATIONS, unlock.MAX_MEMORY
    vars(unlock).update(MAX_ITERATIONS=iterations, MAX_MEMORY=memory)
    return before


def attempt(subject: Subject, number: int) -> Outcome:
    """One mutation, all of it, and the subject whole again."""
    done, ran = subject.mutate(number), list[str]()
    try:
        return judge(subject, number, done, ran)
    finally:
        subject.restore()


def judge(subject: Subject, number: int, done: list[str], ran: list[str]) -> Outcome:
    """What becomes of a subject that is damaged now."""
    _reset_peak()
    before, began = _peak(), time.process_time()
    outcome, fault, trace = "fault", "", ""
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT, CPU_LIMIT)
    try:
        outcome = subject.use(number, ran)
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        fault, trace = signature(error), "".join(traceback.format_exception(error))[-8000:]
    signal.setitimer(signal.ITIMER_PROF, 0)
    cpu, memory = time.process_time() - began, _peak() - before
    if not fault and memory > MEMORY_LIMIT:
        outcome, fault = (
            "fault",
            (
                f"memory: more than {MEMORY_LIMIT >> 20} MiB in {_hungry(subject, number)} of "
                f"{format_of(subject.name)}"
            ),
        )
    if not fault and cpu > CPU_LIMIT:
        outcome, fault = "fault", f"hang in {ran[-1]} of {format_of(subject.name)}"
    patches = subject.patches() if fault else None
    return Outcome(subject.name, number, outcome, round(cpu, 4), memory, done, ran, fault, trace, patches)


class _Peaks(list[str]):
    """What ran, and the most memory by then."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: list[int] = []

    def append(self, name: str) -> None:
        self.peaks.append(_peak())
        super().append(name)


def _hungry(subject: Subject, number: int) -> str:
    """Which step takes the memory: the whole once more, looked at step by step."""
    _reset_peak()
    ran = _Peaks()
    with contextlib.suppress(Exception):
        subject.use(number, ran)
    grown = [after - before for before, after in zip(ran.peaks, [*ran.peaks[1:], _peak()], strict=True)]
    return ran[grown.index(max(grown))] if ran else "nothing"


def signature(error: BaseException) -> str:
    """By which faults are told apart: the type and the innermost functions of ours."""
    if isinstance(error, Broken):
        return f"invariant: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in frame.filename]
    where = [f"{frame.filename.rpartition(PACKAGE)[2]}:{frame.name}" for frame in frames[-FRAMES:]]
    kind = "hang" if isinstance(error, Hang) else type(error).__name__
    return f"{kind} at {' < '.join(reversed(where)) or 'the fuzzer'}"


def _peak() -> int:
    """The most memory that was resident since the last reset, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def stack_to(path: Path) -> None:
    """On SIGUSR1 write where all threads are: for what hangs in a library, where no exception arrives."""
    faulthandler.register(signal.SIGUSR1, file=open(path, "w"), all_threads=True)  # noqa: SIM115
