# Each target sets itself up, once, on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: train test test-slow bench lint clean

train: $(READY)
	$(PY) train.py

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --durations=5

test-slow: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[ray]'
	$(PY) -m pytest -m slow --durations=10

bench: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[bench]'
	$(PY) -W ignore::FutureWarning -m benchmarks.training_loop
	$(PY) -W ignore::FutureWarning -m benchmarks.early_exits
	$(PY) -W ignore::FutureWarning -m benchmarks.exit_predictor
	$(PY) -W ignore::FutureWarning -m benchmarks.quantization
	$(PY) -W ignore::FutureWarning -m benchmarks.skipping
	$(PY) -W ignore::FutureWarning -m benchmarks.bandwidths

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "error: Python 3.11 to 3.13 is needed, this is %d.%d; name another with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[dev]'
	@touch $@
