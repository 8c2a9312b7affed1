"""Fixtures for all tests."""

import os
import re
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


# ---- skips -------------------------------------------------------------------------------------------------

KEPT = "BMAP_KEPT_SKIPS"
"""Names a list of skips that are known, a regular expression and its reason a line. Any other one fails the
run, so that no check is lost without a word."""


def kept(listed: str) -> list[str]:
    """The expressions of a list: `EXPRESSION    # reason`."""
    lines = [line.partition("#") for line in listed.splitlines() if line.strip()]
    assert all(why.strip() for _, _, why in lines), "each line of the list says why"
    return [words.strip() for words, _, _ in lines if words.strip()]


def unlisted(reports: list[pytest.TestReport], listed: str) -> list[str]:
    """What was skipped for a reason that is not on the list: test and reason."""
    known = [re.compile(words) for words in kept(listed)]
    said = [(report.nodeid, str(report.longrepr[2])) for report in reports]  # type: ignore[index]
    return [f"{test}: {why}" for test, why in said if not any(word.search(why) for word in known)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if KEPT not in os.environ or reporter is None or hasattr(session.config, "workerinput"):
        return
    if lost := unlisted(reporter.stats.get("skipped", []), Path(os.environ[KEPT]).read_text()):
        reporter.section("skipped, and not on the list of kept skips", red=True)
        reporter.write("\n".join(lost) + "\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
