"""What the command line sets up before anything else runs."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from virt_bmap import startup

REPORT = """
import os, resource
from virt_bmap import startup
startup.import_libraries()
import numpy, pyarrow
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    numpy.ones(24 << 20, numpy.uint8)
before = faults()
numpy.ones(24 << 20, numpy.uint8)
print(*{os.environ.get(name) for name in startup.SETTINGS}, pyarrow.default_memory_pool().backend_name, faults() - before)
"""


@pytest.mark.parametrize("given", [None, "3"])
def test_memory_stays_and_the_environment_too(given: str | None) -> None:
    """An array's memory serves the next one; commands that we run find their environment as it was."""
    environment = {name: value for name, value in os.environ.items() if name not in startup.SETTINGS}
    if given:
        environment |= dict.fromkeys(startup.SETTINGS, given)
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True)
    word, pool, faults = done.stdout.split()
    assert (word, pool) == (str(given), "system")
    assert int(faults) < 100  # of 6,144 pages


def test_pandas_is_not_imported(tmp_path: Path) -> None:
    """A pandas that is installed takes half a second to import, which Arrow would do; ours to import it is still possible afterwards."""
    (tmp_path / "pandas").mkdir()
    (tmp_path / "pandas" / "__init__.py").write_text("import sys; print('imported', file=sys.stderr)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    use = "from virt_bmap import startup; startup.import_libraries(); import pyarrow; pyarrow.array([None, 1]).to_numpy(zero_copy_only=False)"
    for further, said in (("", ""), ("; import pandas", "imported\n")):
        done = subprocess.run([sys.executable, "-c", use + further], env=environment, capture_output=True, text=True, check=True)
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
