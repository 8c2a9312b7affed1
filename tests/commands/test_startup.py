"""What the command line sets up before anything else runs."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from virt_bmap import startup
from virt_bmap.commands import BARE, COMMANDS, LONG, SHORT

REPORT = """
import os, resource
from virt_bmap import startup
from virt_bmap.commands import BARE, COMMANDS, LONG, SHORT
startup.import_libraries()
import numpy, pyarrow
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    numpy.ones(24 << 20, numpy.uint8)
before = faults()
numpy.ones(24 << 20, numpy.uint8)
pool = pyarrow.default_memory_pool().backend_name
print(*{os.environ.get(name) for name in startup.SETTINGS}, pool, faults() - before)
"""


@pytest.mark.parametrize("given", [None, "3"])
def test_memory_stays_and_the_environment_too(given: str | None) -> None:
    """An array's memory serves the next one; commands that we run find their environment as it was."""
    environment = {name: value for name, value in os.environ.items() if name not in startup.SETTINGS}
    if given:
        environment |= dict.fromkeys(startup.SETTINGS, given)
    done = subprocess.run(
        [sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True
    )
    word, pool, faults = done.stdout.split()
    assert (word, pool) == (str(given), "system")
    assert int(faults) < 100  # of 6,144 pages


def test_pandas_is_not_imported(tmp_path: Path) -> None:
    """A pandas that is installed takes half a second to import, which Arrow would do; ours to import it is
    still possible afterwards."""
    (tmp_path / "pandas").mkdir()
    (tmp_path / "pandas" / "__init__.py").write_text("import sys; print('imported', file=sys.stderr)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    use = (
        "from virt_bmap import startup; startup.import_libraries(); import pyarrow; "
        "pyarrow.array([None, 1]).to_numpy(zero_copy_only=False)"
    )
    for further, said in (("", ""), ("; import pandas", "imported\n")):
        done = subprocess.run(
            [sys.executable, "-c", use + further], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == said


def test_numpys_docstrings_wait_until_asked_for() -> None:
    """They are there for whoever asks their module, and NumPy works without."""
    use = """
from virt_bmap import startup; startup.import_libraries()
import sys, numpy
before = numpy.empty.__doc__
[getattr(sys.modules[name], 'anything', None) for name in startup.DOCSTRINGS]
print(before is None, len(numpy.empty.__doc__) > 100, numpy.arange(4).sum())
"""
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert done.stdout == "True True 6\n"


def test_another_libc_has_no_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl has not; then nothing is set."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    startup._keep_memory()


FREED = """
import os, resource
from virt_bmap import startup
from virt_bmap.commands import BARE, COMMANDS, LONG, SHORT
startup.import_libraries({process!r})
import numpy
def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
before = resident()
kept = []
for number in range(30):  # what lies behind a hole keeps it from going back
    large = numpy.ones(20 << 20, numpy.uint8)
    kept.append(numpy.ones(1 << 16, numpy.uint8))
del large
print((resident() - before) >> 20)
"""


@pytest.mark.parametrize(("process", "least", "most"), [("short", 12, 400), ("long", 0, 8)])
def test_a_long_process_gives_back_what_it_does_not_use(process: str, least: int, most: int) -> None:
    """A watch stays beside a guest for hours; a map is over before anyone wants the memory."""
    done = subprocess.run(
        [sys.executable, "-c", FREED.format(process=process)], capture_output=True, text=True, check=True
    )
    assert least <= int(done.stdout) <= most


def test_each_command_is_a_kind_of_process() -> None:
    assert {command.process for command in COMMANDS.values()} == {SHORT, LONG, BARE}
    assert COMMANDS["watch"].process == LONG


def test_freeze_loads_neither_numpy_nor_arrow() -> None:
    """Nor does the process that it leaves beside what is frozen."""
    use = """
import sys
from virt_bmap import cli
import virt_bmap.act.freeze.keeper, virt_bmap.act.freeze.agent, virt_bmap.act.freeze.mounts
import virt_bmap.commands.freeze
try:
    cli.prepared(["freeze", "--mount", "/nowhere", "--", "true"])()
except Exception as error:
    print(error)
print([name for name in sys.modules if name.split(".")[0] in ("numpy", "pyarrow")])
"""
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["/nowhere: there is no such directory", "[]"]


def test_no_private_module_of_another_package_is_imported() -> None:
    source = Path(startup.__file__).parent
    found = [
        f"{path.name}: {line}"
        for path in source.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) (pyarrow|numpy|rich|textual|duckdb|plotly)(\.\w+)*\._", line)
    ]
    assert not found
