# make demo: real text in, a trained model out.   make test: the test suite.   make slow: the tests that take minutes.
# Each first installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install check test slow demo

install: $(VENV)/installed

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Set PYTHON=python3.11.")'
	@echo "Installing into $(VENV) (two minutes or so, most of it PyTorch) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

check: install
	$(BIN)/ruff format --check --diff .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_house.py

test: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile

slow: install  # most of these wait for launchers, networks and SLURM, so two at a time take little longer than one
	$(BIN)/pytest -m "slow and not alone" --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m alone

demo: install
	$(BIN)/python launch/demo.py
