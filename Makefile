# Two commands for newcomers: make train, make test. All they install goes into $(VENV).
VENV ?= .venv
PYTHON ?= python3
OLDEST ?= 3.10
BIN := $(VENV)/bin
# As many processes as processors, of one thread each: threads that wait for a busy processor spin.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
SOURCES := pseudoseg_fast kernels tests tools bench setup.py
CPP := $(wildcard csrc/*.* csrc/cuda/* tests/shim/*.h tests/shim/*.cpp)

.PHONY: train test oldest check format clean

train: $(VENV)/demo
	$(BIN)/python -m pseudoseg_fast.train --config demo

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# The suite with the oldest Python and libraries that pyproject.toml admits; needs uv.
oldest:
	uv venv --quiet --clear --seed --python $(OLDEST) $(VENV)-oldest
	uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct --editable '.[test,tiff]'
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python $(PYTEST)

check: $(VENV)/dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info

# $(VENV)/EXTRA stands for an environment that has the package with that extra.
$(VENV)/%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, found $$($(PYTHON) --version); try make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
