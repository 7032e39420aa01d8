# make demo · make test · make lint · make table · make docs · make bench: each sets up its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint table docs bench kill clean

demo: $(VENV)/installed
	$(BIN)/distily demo

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

table: $(VENV)/installed
	$(BIN)/python tests/oracles

docs: $(VENV)/installed
	$(BIN)/distily components --markdown > docs/objectives.md

bench: $(VENV)/installed
	$(BIN)/python benchmarks/real_models.py

kill: $(VENV)/installed
	$(BIN)/python benchmarks/kill_test.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# an oracle of the tests; the torchvision that it depends on does not load beside torch for CPUs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt torchdistill
	touch $@

clean:
	rm -rf $(VENV) dist
