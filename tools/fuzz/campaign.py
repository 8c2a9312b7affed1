"""A campaign: workers do mutations, seed after seed in small batches; who keeps the books sees that each of
them comes to an end.

Workers are forked from a process that has imported everything. A worker tells each mutation's outcome as a
line of JSON; where no line comes for long, the mutation after the last one told hangs where no exception
arrives, and the worker is killed. The summary is a file of JSON that says how far each seed is, so that the
next campaign goes on from there.
"""

import collections
import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .disk import scratch
from .seeds import ROOT, Seed, format_of
from .worker import CPU_LIMIT, Outcome, Subject, attempt, prepare, stack_to, subjects

BATCH = 20
"""Mutations of one seed before the next one's turn."""
LATE = 3 * CPU_LIMIT
"""Seconds of processor time without a word from a worker: its own clock should have ended the mutation."""
PATIENCE = 12 * CPU_LIMIT
"""Seconds in which a worker without a word takes no processor time at all: it waits for what never comes."""
LIFE = 4000
"""Mutations that one worker does: what a process gathers in its life is no fault of the last mutation."""
NOTED = 20
"""The slowest and the largest mutations that the summary names."""


def run(
    seeds: dict[str, Seed],
    found: Path,
    jobs: int,
    minutes: float,
    mutations: int,
    only: Sequence[str],
    say: Any = print,
) -> dict[str, Any]:
    """Until the time is up or the summary counts so many mutations, whichever is first; the summary."""
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="virt-bmap-fuzz-", dir=scratch()) as work:
        campaign = _Campaign(seeds, found, Path(work), only, say)
        with contextlib.suppress(KeyboardInterrupt):
            campaign.run(jobs, time.monotonic() + 60 * minutes, mutations)
        campaign.save()
    return campaign.summary


class _Campaign:
    def __init__(
        self, seeds: dict[str, Seed], found: Path, work: Path, only: Sequence[str], say: Any
    ) -> None:
        self.found, self.work, self.seeds, self.say = found, work, seeds, say
        names = list(subjects_apart(seeds, work / "names"))
        self.names = [name for name in names if not only or any(part in name for part in only)]
        self.summary: dict[str, Any] = {
            "mutations": 0,
            "cpu": 0.0,
            "commits": [],
            "formats": {},
            "next": {},
            "faults": {},
            "slowest": [],
            "largest": [],
        }
        with contextlib.suppress(OSError):
            self.summary = json.loads((found / "summary.json").read_text())
        commit = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        if commit not in self.summary["commits"]:
            self.summary["commits"].append(commit)
        self.todo = self._turns()

    def _turns(self) -> Iterator[tuple[str, int, int]]:
        """(seed, first number, how many), without end."""
        following = self.summary["next"]
        while self.names:
            for name in self.names:
                first = following.get(name, 0)
                following[name] = first + BATCH
                yield name, first, BATCH

    def run(self, jobs: int, until: float, mutations: int) -> None:
        workers = [_Worker(self.seeds, self.work / str(number)) for number in range(jobs)]
        told, began = time.monotonic(), time.monotonic()
        try:
            while time.monotonic() < until and self.summary["mutations"] < mutations and self.names:
                for worker in workers:
                    if worker.left == 0:
                        worker.give(*next(self.todo))
                ready, _, _ = select.select([worker.answers for worker in workers], [], [], 0.5)
                for worker in workers:
                    if worker.answers in ready:
                        for outcome in worker.outcomes():
                            self._note(outcome)
                    elif worker.hangs():
                        self._note(worker.stop())
                if time.monotonic() > told + 60:
                    told = time.monotonic()
                    self.save()
                    self.say(
                        f"{self.summary['mutations']} mutations, {len(self.summary['faults'])} "
                        f"faults, {(told - began) / 60:.0f} min"
                    )
        finally:
            for worker in workers:
                worker.end()

    def _note(self, outcome: Outcome) -> None:
        summary, format = self.summary, format_of(outcome.name)
        counts = summary["formats"].setdefault(
            format, dict.fromkeys(("mutations", "mapped", "damaged", "refused", "fault"), 0) | {"cpu": 0.0}
        )
        counts["mutations"] += 1
        counts[outcome.outcome] += 1
        counts["cpu"] += outcome.cpu
        summary["mutations"] += 1
        summary["cpu"] += outcome.cpu
        for kind, value in (("slowest", outcome.cpu), ("largest", outcome.memory)):
            summary[kind] = sorted(
                [*summary[kind], [value, outcome.name, outcome.number, outcome.ran[-1:]]],
                key=lambda row: -row[0],
            )[:NOTED]
        if outcome.outcome == "fault":
            self._fault(outcome)

    def _fault(self, outcome: Outcome) -> None:
        """The first of its kind is kept whole, the others are counted."""
        fault = self.summary["faults"].setdefault(outcome.fault, {"count": 0, "seeds": []})
        fault["count"] += 1
        if outcome.name not in fault["seeds"]:
            fault["seeds"].append(outcome.name)
        if fault["count"] == 1:
            folder = self.found / hashlib.sha256(outcome.fault.encode()).hexdigest()[:8]
            folder.mkdir(exist_ok=True)
            (folder / "fault.json").write_text(json.dumps(outcome._asdict()))
            (folder / "trace.txt").write_text(
                f"{outcome.fault}\n{outcome.name} {outcome.number}\n{outcome.done}\n{outcome.ran}\n\n"
                f"{outcome.trace}"
            )
            self.say(f"new fault: {folder.name} {outcome.fault} [{outcome.name} {outcome.number}]")

    def save(self) -> None:
        new = self.found / ".summary.json"
        new.write_text(json.dumps(self.summary, indent=1))
        new.rename(self.found / "summary.json")


def subjects_apart(seeds: dict[str, Seed], work: Path) -> list[str]:
    """The names of all subjects, which only a process of their own can tell without being changed by it."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            prepare()
            work.mkdir(parents=True, exist_ok=True)
            os.write(write, json.dumps(list(subjects(seeds, work))).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    names: list[str] = json.loads(data)
    return names


class _Worker:
    """A process and the two pipes to it, replaced when it died or is old."""

    def __init__(self, seeds: dict[str, Seed], work: Path) -> None:
        self.seeds, self.work = seeds, work
        self.left = 0
        self._heard = self._cpu = self._awake = 0.0
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        orders, self._orders = os.pipe()
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)
            os.close(self.answers)
            _serve(self.seeds, self.work, open(orders), open(answers, "w"))  # noqa: SIM115
        os.close(orders)
        os.close(answers)
        self._buffer, self._done = b"", 0
        self._hear()

    def give(self, name: str, first: int, count: int) -> None:
        if self._done >= LIFE:
            self.end()
            self._start()
        self._name, self._number, self.left = name, first, count
        os.write(self._orders, f"{name}\t{first}\t{count}\n".encode())
        self._hear()

    def hangs(self) -> bool:
        """By what the kernel says of its processor time: seconds on the wall say more of the machine's other
        work."""
        if not self.left:
            return False
        cpu = _cpu(self.pid)
        if cpu != self._cpu:
            self._cpu, self._awake = cpu, time.monotonic()
        return cpu - self._heard > LATE or time.monotonic() - self._awake > PATIENCE

    def _hear(self) -> None:
        """A sign of life: how much processor time was used by then, and when that last changed."""
        self._heard = self._cpu = _cpu(self.pid)
        self._awake = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        data = os.read(self.answers, 1 << 20)
        if not data:
            yield self._lost("died")
            return
        self._hear()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._number, self.left, self._done = self._number + 1, self.left - 1, self._done + 1
            yield Outcome(*json.loads(line))

    def stop(self) -> Outcome:
        """Kill a worker that hangs, and say where."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(2)
            os.kill(self.pid, signal.SIGKILL)
        return self._lost("hang outside Python")

    def _lost(self, what: str) -> Outcome:
        _, status = os.waitpid(self.pid, 0)
        stack = self.work / "stack"
        trace = stack.read_text()[-8000:] if stack.exists() else ""
        outcome = Outcome(
            self._name,
            self._number,
            "fault",
            0.0,
            0,
            [],
            [],
            f"{what} (status {status}) in {format_of(self._name)}",
            trace,
            None,
        )
        left, name, following = self.left - 1, self._name, self._number + 1
        os.close(self._orders)
        os.close(self.answers)
        self._start()
        self.left = 0
        if left > 0:
            self.give(name, following, left)
        return outcome

    def end(self) -> None:
        os.close(self._orders)
        until = time.monotonic() + 15
        while time.monotonic() < until:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                break
            time.sleep(0.02)
        else:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.answers)


def _cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    with contextlib.suppress(OSError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _serve(seeds: dict[str, Seed], work: Path, orders: IO[str], answers: IO[str]) -> None:
    """The worker: never returns."""
    status = 1
    try:
        prepare()
        stack_to(work / "stack")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.chdir(work)
        made: dict[str, Subject] = {}
        makers = subjects(seeds, work)
        for line in orders:
            name, first, count = line.rstrip("\n").split("\t")
            if name not in made:
                made[name] = makers[name]()
            for number in range(int(first), int(first) + int(count)):
                answers.write(json.dumps(attempt(made[name], number)) + "\n")
                answers.flush()
        status = 0
    except BaseException:
        (work / "stack").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def table(summary: dict[str, Any]) -> str:
    """The counts by format, for people."""
    rows: list[tuple[str, ...]] = [
        ("format", "mutations", "mapped", "damaged", "refused", "faults", "ms each")
    ]
    total: collections.Counter[str] = collections.Counter()
    for format, counts in sorted(summary["formats"].items()):
        total.update(counts)
        rows.append(_row(format, counts))
    rows.append(_row("all", total))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if not column else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(name: str, counts: Any) -> tuple[str, ...]:
    each = counts["cpu"] / max(1, counts["mutations"])
    return (
        name,
        *(f"{counts[word]:,}" for word in ("mutations", "mapped", "damaged", "refused", "fault")),
        f"{1000 * each:.1f}",
    )
