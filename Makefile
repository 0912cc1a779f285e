# `make demo`, `make check` and `make test` need python3.12 and make; everything else goes into .venv.

PYTHON ?= python3.12
BIN := .venv/bin
RECIPE := pyproject.toml constraints.txt
QUICK := not process and not gpu and not long
# One more process than cores, since some tests wait.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.PHONY: demo docs check lint types test test-long clean

demo: .venv/.demo-installed
	$(BIN)/python -m examples.digits

# The site of docs/, in out/site; a link that leads nowhere ends it.
docs: .venv/.test-installed
	$(BIN)/mkdocs build --strict

# Before every commit: what needs no further process, on every core. The types are checked beside the tests.
check: lint
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest tests -m "$(QUICK)" --hypothesis-profile=check -n $(WORKERS) --dist loadfile; tests=$$?; \
	wait $$types && exit $$tests

lint: .venv/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test-installed
	$(BIN)/mypy

test: .venv/.test-installed
	$(BIN)/python -m pytest tests

# Installation from nothing, soaks, kills: before an issue is resolved. It reaches for the package index.
test-long: .venv/.test-installed
	$(BIN)/python -m pytest tests -m long

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp is newer than its recipe until the recipe changes, so a second run installs nothing.
.venv/.demo-installed: $(RECIPE) | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[examples]' --constraint constraints.txt
	touch $@

.venv/.test-installed: $(RECIPE) | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[test]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv out build *.egg-info
