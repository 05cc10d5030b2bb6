# Commands for a fresh machine: `make demo`, `make app`, `make test`. Each makes .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo app test lint soak clean

demo: .venv/installed
	$(BIN)/python sample.py --checkpoint embedded
	$(BIN)/python scripts/demo.py

app: .venv/installed
	$(BIN)/python scripts/app.py

test: .venv/installed
	$(BIN)/python -m pytest

soak: .venv/installed
	$(BIN)/python tests/soak.py
	$(BIN)/python tests/soak.py --launcher accelerate --kills 5
	$(BIN)/python tests/soak.py --launcher torchrun --kills 5

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
