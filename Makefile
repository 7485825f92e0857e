# make quickstart   train, evaluate and merge the built-in base (about four minutes on 2 cores, no GPU)
# make align        SFT, then DPO, and a reward model with PPO, on the built-in base (some 35 minutes on one core)
# make test         the test suite, a process per core
# make lint         ruff and mypy
PYTHON ?= python3
BIN = .venv/bin

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,real,eval,bench]'
	touch $@

.PHONY: quickstart align test slow lint clean
quickstart: .venv/installed
	$(BIN)/python benchmarks/quickstart.py

align: .venv/installed
	$(BIN)/python benchmarks/align.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
