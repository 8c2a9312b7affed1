# Two commands: each does all of its own set-up on a fresh Debian 12 (system packages, a virtual environment in .venv).
#   make demo   boots a small real guest and shows live which files it reads
#   make test   linter, types, tests and the fuzzer's smoke run
# And: make fuzz-smoke damages small images of every format for five minutes and looks whether anything of ours falls over (docs/fuzzing.md).
# And: make test-appliance runs the tests that let a real kernel make arrays and volume groups, in libguestfs's appliance (15 minutes the first time).

PYTHON ?= /usr/bin/python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: test fuzz-smoke test-appliance demo bench setup lint clean

# Where tests run by themselves, a skip that tests/skips.txt does not list is a failure: a check must not be lost without a word.
test: export BMAP_KEPT_SKIPS = $(CURDIR)/tests/skips.txt
test: setup lint
	$(RUN)/pytest -n auto --dist loadfile -m "not guest and not slow"
	$(RUN)/pytest -m guest
	$(MAKE) fuzz-smoke

fuzz-smoke: setup
	found=$$(mktemp -d) && $(RUN)/python -m tools.fuzz run --minutes 5 --jobs $$(nproc) --found "$$found"

test-appliance: setup
	$(RUN)/pytest -m slow

demo: setup
	$(RUN)/python demo/run

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/setup tools/packages
	tools/setup $(PYTHON) $(VENV)
	touch $@

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/vulture

bench: setup
	@echo "each script in bench/ prints its figures beside its peer's; see docs/performance.md"
	@ls bench/*.py

clean:
	rm -rf $(VENV) demo/out build dist
