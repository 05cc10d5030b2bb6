# Commands for a fresh machine: `make demo`, `make app`, `make test`, `make docs`. Each makes .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
CLASSES := [Faces_easy, Motorbikes, stop_sign, sunflower, soccer_ball, pizza, yin_yang, dollar_bill, menorah, ketch, \
	grand_piano, umbrella, strawberry, watch, airplanes, windsor_chair, metronome, schooner, car_side, Leopards]

.PHONY: demo app test docs lint soak clean

demo: .venv/installed
	$(BIN)/python sample.py --checkpoint embedded --num_per_class 3 --classes '$(CLASSES)'
	$(BIN)/python scripts/demo.py

app: .venv/installed
	$(BIN)/python scripts/app.py

test: .venv/installed
	$(BIN)/python -m pytest

# Pages open from the disk; the search needs a server: python3 -m http.server --directory site
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

soak: .venv/installed
	$(BIN)/python tests/soak.py
	$(BIN)/python tests/soak.py --launcher accelerate --kills 5
	$(BIN)/python tests/soak.py --launcher torchrun --kills 5

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --threads 2

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build site *.egg-info
