# From a fresh clone: `make demo` shows it, `make test` checks it. Both set up .venv first.
.PHONY: setup demo serve test lint bench

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
# A virtual environment knows its own path: the stamp carries it too, so that a moved directory is set up anew.
STAMP := $(VENV)/.ready-$(shell pwd -P | cksum | cut -d ' ' -f 1)
# The first of these that runs and is new enough; `make setup PYTHON=...` names another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

setup: $(STAMP)

demo: setup
	$(PYTHON_IN_VENV) -m moespac demo

serve: setup
	$(PYTHON_IN_VENV) -m moespac serve --host-memory 25%

test: lint
	$(PYTHON_IN_VENV) -m pytest -q

lint: setup
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m mypy

bench: setup
	$(PYTHON_IN_VENV) -m moespac bench decisions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moespac needs Python 3.11 or newer: install it, or run make PYTHON=/path/to/python" >&2; exit 1; }
	@grep -qsF "$$(pwd -P)/$(VENV)" $(VENV)/bin/activate && $(PYTHON_IN_VENV) -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear $(VENV)
	$(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@
