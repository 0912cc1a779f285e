# `make demo` and `make test` need python3.12 and make; everything else goes into .venv.

PYTHON ?= python3.12
BIN := .venv/bin
RECIPE := pyproject.toml constraints.txt

.PHONY: demo test clean

demo: .venv/.demo-installed
	$(BIN)/python -m examples.digits

test: .venv/.test-installed
	$(BIN)/python -m pytest tests

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
