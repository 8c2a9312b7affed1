"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)  # machines are noisy; a slow example is no fault
settings.load_profile("steady")
os.environ["VIRT_BMAP_STRICT"] = "1"  # what nobody expected must fail a test, not become a problem of a map


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real images made by other projects, beside the checkout or where BMAP_CORPUS says; else
    the test is skipped."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "corpus"
    folder = Path(os.environ.get("BMAP_CORPUS", beside))
    if not (folder / "INVENTORY.tsv").exists():
        pytest.skip("the corpus of real images is not on this machine (set BMAP_CORPUS)")
    return folder
