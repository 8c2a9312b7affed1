"""A skip is a line on a kept list, with its reason; any other one fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import KEPT, kept

TOP = Path(__file__).resolve().parents[2]


def test_each_kept_skip_says_why() -> None:
    assert kept((TOP / "tests/skips.txt").read_text())
    with pytest.raises(AssertionError, match="says why"):
        kept("words without a reason\n")


@pytest.mark.parametrize(("words", "status"), [("no such .*", 0), ("another", 1)])
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_skip_that_is_not_on_the_list_fails(
    tmp_path: Path, words: str, status: int, workers: tuple[str, ...]
) -> None:
    (tmp_path / "conftest.py").write_text((TOP / "tests/conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('no such tool')\n")
    (tmp_path / "list").write_text(f"{words}  # since it is so\n")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "test_it.py"]
    done = subprocess.run(
        run, cwd=tmp_path, env={**os.environ, KEPT: str(tmp_path / "list")}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout
    assert ("test_it.py::test_it: Skipped: no such tool" in done.stdout) == bool(status)
