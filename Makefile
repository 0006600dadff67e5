PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: demo test test-exact test-slow test-oldest lint types house format check clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

$(OLDEST)/.installed: pyproject.toml  # pip cannot resolve to the oldest versions, uv can
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable . --group dev
	touch $@

demo: $(BIN)/.installed  ## inverts an image on the embedded model
	$(BIN)/python train.py fit --config configs/invert.yaml --data.images docs/images/demo.png

test: $(BIN)/.installed  ## runs the tests, in about ten minutes on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-exact: $(BIN)/.installed  ## runs the tests for bit-identical results, with two other sets of kernels
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m exact
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m exact

test-slow: $(BIN)/.installed  ## runs the slow tests that `test` leaves out, such as every method on every model
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

test-oldest: $(OLDEST)/.installed  ## runs the tests with the oldest dependencies that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist worksteal

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed
	$(BIN)/mypy

house: $(BIN)/.installed  ## prints the size and the structure of the package; fails where a limit is exceeded
	$(BIN)/python benchmarks/house.py

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types house test

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache
