"""`watch --tui`: the disks as strips that light up where they are touched, what is touched now and what was
touched most, and the command's own output.

Textual owns the terminal and the main thread; the watch runs beside it. The command gets no terminal: what it
prints goes to a pane, made harmless.
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.drivers.linux_driver import LinuxDriver
from textual.widgets import Footer, Input, RichLog, Static

from virt_bmap.core.amounts import human
from virt_bmap.core.errors import BmapError
from virt_bmap.core.escape import escape
from virt_bmap.core.printable import one_line
from virt_bmap.model import tables
from virt_bmap.saved import results
from virt_bmap.watch.activity import SORTS, Activity, ActivityView
from virt_bmap.watch.cells import (
    READ_COLOURS,
    WRITE_COLOURS,
    Light,
    heading,
    rows_lines,
    shortened,
    spark,
    strip_lines,
)
from virt_bmap.watch.session import Outcome, Runner, started, step_aside

LOOK = 0.25
"""Seconds between two looks."""
SHARE = 0.03
"""Of a processor, that the screen may take: where drawing is
dear, looks are fewer, but still one in LONGEST seconds."""
LONGEST = 1.0
LONG_AGO = (float("-inf"), 0.0)
RECENT = 3_000_000_000
"""ns for which an object counts as touched now."""
HISTORY = 240
"""Looks whose rates are drawn: a minute."""
LISTED = 200
OUTPUT = 1000
"""Lines of the command's output that are kept."""
LONGEST_LINE = 2000
"""Bytes of a line of output that are shown."""
STRIPS = 8
"""Disks that are drawn."""
GRACE = 5.0
"""Seconds that a command gets to end after it was told to."""
READ, WRITE = tables.OPS.index("read"), tables.OPS.index("write")

# escape sequences of terminals: CSI, OSC, and those of two characters (ECMA-48)
_SEQUENCES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


def plain(line: bytes) -> str:
    """A line of the command's output without anything that a terminal would obey."""
    return escape(_SEQUENCES.sub(b"", line).replace(b"\t", b"    ").rstrip(b"\r"))


class CommandOutput:
    """The command, started without a terminal, and the lines that it prints, kept from a thread of its own: a
    full pipe would stall it."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=OUTPUT)
        self.count = 0
        """Lines so far, those that are no longer kept included."""
        self.child: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> "Iterator[subprocess.Popen[bytes]]":
        """A Runner for `session.watch`."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.child = started(arguments, environment, **streams, process_group=0)
        reader = threading.Thread(target=self._read, args=(self.child,), daemon=True)
        reader.start()
        yield self.child
        reader.join(GRACE)  # a guest in the background may keep the pipe open

    def _read(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdout
        rest = b""
        with child.stdout as pipe:
            while data := os.read(pipe.fileno(), 1 << 16):
                *whole, rest = (rest + data).split(b"\n")
                if len(rest) > LONGEST_LINE:
                    whole, rest = [*whole, rest], b""
                self._keep(whole)
        self._keep([rest] if rest else [])

    def _keep(self, lines: list[bytes]) -> None:
        self.lines.extend(plain(line[:LONGEST_LINE]) for line in lines[-OUTPUT:])
        self.count += len(lines)

    def end(self) -> None:
        """Tell the command to end."""
        if self.child and self.child.poll() is None:
            self.child.terminate()


class Terminal:
    """What Textual writes to.

    Its writing thread would end where a write fails, and the screen then wait for it for ever: a terminal
    that goes away must not take the watch with it.
    """

    def __init__(self, file: Any) -> None:
        self._file, self.gone = file, False

    def write(self, text: str) -> None:
        """Write, as long as there is a terminal."""
        with self._watched():
            self._file.write(text)

    def flush(self) -> None:
        """Flush, as long as there is a terminal."""
        with self._watched():
            self._file.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class LastingDriver(LinuxDriver):
    """Textual's driver on such a terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file: Any = Terminal(self._file)


class Watching(App[None]):
    """The screen. `go` runs the watch, with the command
    started by the Runner it is given, until that ends."""

    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - as Textual declares it
    CSS = """
    #status { height: 1; text-style: bold; }
    #strips { height: auto; border: round $primary; }
    #rates { height: 2; }
    #lists { height: 1fr; }
    .-wide #lists { layout: horizontal; }
    .list { height: 1fr; border: round $primary; }
    .-wide .list { width: 1fr; }
    #output { height: 25%; border: round $secondary; display: none; }
    #filter { display: none; height: 3; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "leave", "Quit", priority=False),
        Binding("space", "pause", "Pause"),
        Binding("slash", "filter", "Filter"),
        Binding("s", "sort", "Sort"),
        Binding("w", "save", "Save"),
        Binding("o", "output", "Output"),
        Binding("escape", "clear", "No filter", show=False),
    ]

    def __init__(self, activity: Activity, go: Callable[[Runner], Outcome]) -> None:
        super().__init__(ansi_color=True, driver_class=LastingDriver)
        self.activity = activity
        self.output = CommandOutput()
        self.outcome: Outcome | BaseException | None = None
        """How the watch ended, or why it failed."""
        self.failure = ""
        """Why there is no screen any more."""
        self.paused = False
        self.sort = SORTS[0]
        self.words = ""
        self._go = go
        self._thread = threading.Thread(target=self._watch, args=(go,), name="watch", daemon=True)
        self._lights: list[Light] = []
        self._history: tuple[list[float], list[float]] = ([], [])
        self._before: tuple[float, int, int] | None = None
        self._drawn = LONG_AGO
        """When the screen was drawn last, and the processor time that its thread had taken by then."""
        self._shown = 0
        self._leaving = False

    def _watch(self, go: Callable[[Runner], Outcome]) -> None:
        try:
            self.outcome = go(self.output.run)
        except BaseException as error:  # handed on to the main thread, whoever it is meant for
            self.outcome = error

    def compose(self) -> ComposeResult:
        """The parts, from top to bottom."""
        yield Static(id="status")
        yield Static(id="strips")
        yield Static(id="rates")
        with Container(id="lists"):
            yield Static(id="now", classes="list")
            yield Static(id="top", classes="list")
        yield RichLog(id="output", max_lines=OUTPUT, min_width=1, markup=False, highlight=False, wrap=True)
        yield Input(id="filter", placeholder="part of a name; Enter keeps it, Escape drops it")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Start the watch, and look at it from then on."""
        for part, title in (("strips", "disk"), ("now", "touched now"), ("output", "output of the command")):
            self.query_one(f"#{part}").border_title = title
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._told_to_end)
        self._thread.start()
        if not self.is_headless:  # then the thread is somebody else's
            step_aside()
        self.set_interval(LOOK, self.look)

    # ---- a look --------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Show what has changed. A screen that fails goes, and the watch goes on without it."""
        try:
            self._look()
        except Exception as error:  # whatever it is, the guest must not notice
            self.failure = one_line(f"{type(error).__name__}: {error}")
            self.exit()

    def _look(self) -> None:
        self._show_output()
        if isinstance(self._driver, LastingDriver) and self._driver._file.gone and not self._leaving:
            self._told_to_end()
        if isinstance(self.outcome, BaseException) or (self._leaving and self.outcome is not None):
            self.exit()
            return
        if self._is_dear():
            return
        view = self.activity.look()
        reading, writing = self._rates(view)
        if not self.paused:
            self._show_strips(view)
            self._show_lists()
            self._show_rates(reading, writing)
        self.query_one("#status", Static).update(self._status(view))

    def _is_dear(self) -> bool:
        """Has the screen had its share of the processor since
        it was drawn last? Never once the command has ended."""
        now, spent = time.monotonic(), time.thread_time()
        if self.outcome is None and now - self._drawn[0] < min(LONGEST, (spent - self._drawn[1]) / SHARE):
            return True
        self._drawn = now, spent
        return False

    def _rates(self, view: ActivityView) -> tuple[float, float]:
        """Bytes a second since the last look, read and written."""
        now, read, written = time.monotonic(), int(view.bytes[READ]), int(view.bytes[WRITE])
        then = self._before or (now - LOOK, 0, 0)
        self._before = now, read, written
        seconds = max(now - then[0], 0.01)
        rates = (read - then[1]) / seconds, (written - then[2]) / seconds
        for history, rate in zip(self._history, rates, strict=True):
            history.append(rate)
            del history[:-HISTORY]
        return rates

    def _show_rates(self, reading: float, writing: float) -> None:
        """Two lines: the rate now, and bars of the last minute."""
        width = self.size.width
        text = Text(no_wrap=True, end="")
        for word, rate, history, colour in (
            ("read", reading, self._history[0], READ_COLOURS[0]),
            ("written", writing, self._history[1], WRITE_COLOURS[0]),
        ):  # fmt: skip
            front = f"{word:<7} {human(int(rate)):>10}/s "
            text.append(f"{front}", "dim")
            text.append(spark(history, width - len(front)), colour)
            text.append("\n" if word == "read" else "")
        self.query_one("#rates", Static).update(text)

    def _status(self, view: ActivityView) -> Text:
        """One line, the most important first: what does not fit is cut off."""
        parts = []
        if isinstance(self.outcome, Outcome):
            parts.append(f"ended, status {self.outcome.status}")
        elif self._leaving:
            parts.append("ending")
        if self.paused:
            parts.append("PAUSED")
        if self.words:
            parts.append(f"only {shortened(self.words, 12)}")
        now = view.end_ns if self.outcome or not view.begin_ns else time.time_ns()
        parts.append(f"{(now - view.begin_ns) / 1e9:.0f} s")
        parts.append(f"{human(int(view.bytes[READ]))} read, {human(int(view.bytes[WRITE]))} written")
        parts.append(f"{view.objects:,} objects")
        parts.append(f"map read again {view.maps} times" if view.maps else "map as at the start")
        return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")

    def _show_strips(self, view: ActivityView) -> None:
        part = self.query_one("#strips", Static)
        width = max(1, part.size.width or self.size.width - 2)
        shown = view.strips[:STRIPS]
        height = 3 if len(shown) == 1 and self.size.height >= 20 else 1
        while len(self._lights) < len(shown):
            self._lights.append(Light())
        text = Text(end="")
        for number, (strip, light) in enumerate(zip(shown, self._lights, strict=False)):
            light.fade(strip)
            text.append("\n" if number else "")
            text.append(strip_lines(strip, light, width, height))
        part.border_title = shortened(
            ", ".join(f"{strip.name} {human(strip.size)}" for strip in view.strips), max(1, width - 4)
        )
        part.update(text)

    def _show_lists(self) -> None:
        now, top = self.query_one("#now", Static), self.query_one("#top", Static)
        recent = self.activity.rows(LISTED, "recent", self.words, time.time_ns() - RECENT)
        most = self.activity.rows(LISTED, self.sort, self.words)
        top.border_title = f"by {self.sort}"
        for part, rows, sort in ((now, recent, "bytes"), (top, most, self.sort)):
            width, height = part.size.width, part.size.height
            text = Text(end="").append(heading(sort, width), "dim")
            if rows and height > 1:
                text.append("\n")
                text.append(rows_lines(rows[: height - 1], sort, width))
            part.update(text)

    def _show_output(self) -> None:
        pane = self.query_one("#output", RichLog)
        new = min(self.output.count - self._shown, OUTPUT)
        if new > 0:
            if self._shown == 0:
                pane.styles.display = "block"
            for line in list(self.output.lines)[-new:]:
                pane.write(Text(line))
            self._shown = self.output.count

    # ---- keys ----------------------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Stop the picture; the guest and the watch go on."""
        self.paused = not self.paused
        self._drawn = LONG_AGO  # a key's effect is seen at once

    def action_sort(self) -> None:
        """The next of the orders."""
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        self._drawn = LONG_AGO

    def action_filter(self) -> None:
        """Ask for a part of a name."""
        box = self.query_one("#filter", Input)
        box.styles.display = "block"
        self.set_focus(box)  # at once: what is typed next is for it

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while it is typed."""
        self.words = event.value
        self._drawn = LONG_AGO

    def on_input_submitted(self) -> None:
        """Keep the filter."""
        self.query_one("#filter", Input).styles.display = "none"
        self.set_focus(None)

    def action_clear(self) -> None:
        """No filter."""
        self.query_one("#filter", Input).value = ""
        self.on_input_submitted()

    def action_output(self) -> None:
        """Show or hide the command's output."""
        pane = self.query_one("#output", RichLog)
        pane.styles.display = "none" if pane.styles.display == "block" else "block"

    def action_save(self) -> None:
        """Write all objects, whatever is shown, to a new file."""
        name = time.strftime("watch-%Y%m%d-%H%M%S.csv")
        try:
            results.save(self.activity.table(), name)
        except BmapError as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.notify(f"saved as {name}", markup=False)

    def action_leave(self) -> None:
        """Leave when the command has ended; else a second time ends it."""
        if self.outcome is not None:
            self.exit()
        elif self._leaving:
            self.output.end()
        else:
            self.notify("The command still runs: the same key again ends it.", markup=False)
            self._leaving = True
            self.set_timer(GRACE, self._stay)

    def _told_to_end(self) -> None:
        """A signal: the command goes first, then the screen."""
        self._leaving = True
        self.output.end()

    def _stay(self) -> None:
        if self.output.child is not None and self.output.child.poll() is None:
            self._leaving = False

    def finish(self) -> Outcome:
        """After the screen: wait for the watch, and hand on how it ended.

        Only who left the screen on purpose ends the command, too.
        """
        if self._leaving:
            self.output.end()
        elif self._thread.is_alive():
            print(
                f"virt-bmap: the screen failed{f': {self.failure}' if self.failure else ''}; "
                "the watch goes on without it",
                file=sys.stderr,
            )
        if self._thread.ident is None:  # it never got so far
            self._watch(self._go)
        else:
            self._thread.join()
        assert self.outcome is not None
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def show(activity: Activity, go: Callable[[Runner], Outcome]) -> tuple[Outcome, list[str]]:
    """Run the watch under the screen: how it ended, and the last lines that the command printed."""
    app = Watching(activity, go)
    try:
        app.run()
    except Exception as error:
        app.failure = one_line(f"{type(error).__name__}: {error}")
    return app.finish(), list(app.output.lines)
