# What a contributor runs. Needs make and Python 3.10 or newer; everything else goes into a virtual environment.
#
#   make demo         train a network on handwritten digits
#   make test         run the tests (a part of them: make test PYTEST_ARGS="-k dropout")
#   make quick        run the quick tests, on each change: a minute and a half on two cores
#   make lint         check style and types
#   make format       format the code
#   make docs         build the documentation's site into build/docs, and check its links
#   make study        reproduce the claims of the field: writes docs/study, in some minutes
#   make results      write the tables of performance from the newest run in profiling/results
#   make bench-smoke  run the benchmark emulated, on toy sizes: tests it, measures nothing
#   make clean        remove the virtual environment and all build results
#
# Another Python, beside the usual one: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
CUDA_SOURCES = $(wildcard $(foreach folder,cuda_src gpu_layers/emulator/host tests/emulator/kernels,\
	$(foreach suffix,cu cuh h cpp,$(folder)/*.$(suffix))))

.PHONY: help demo test quick lint format docs study results bench-smoke clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# All targets share one virtual environment: pip must not run in it twice at a time.
.NOTPARALLEL:

help:
	@sed -n 's/^#   make/  make/p; s/^# Another/Another/p' Makefile

demo: $(VENV)/installed-train
	$(BIN)/gpu-layers train --out runs/demo --overwrite

# A file at a time for each processor: what a file builds for its tests is built once.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Which tests these are: tests/quick.py.
quick: $(VENV)/installed-test
	$(BIN)/python -m pytest --quick --numprocesses 2 --dist worksteal $(PYTEST_ARGS)

study: $(VENV)/installed-study
	$(BIN)/gpu-layers study all --device cpu --out docs/study

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo "$(BIN)/clang-format --dry-run -Werror: $(words $(CUDA_SOURCES)) files"
	@$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	@echo "$(BIN)/clang-format -i: $(words $(CUDA_SOURCES)) files"
	@$(BIN)/clang-format -i $(CUDA_SOURCES)

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

results: $(VENV)/installed-test
	$(BIN)/python -m profiling.readme_table

bench-smoke: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m profiling.bench --emulated --quick --dtypes bfloat16 --peers '^(copy|torch|cupy)$$' --plot build/bench-smoke \
	    --json build/bench-smoke/bench.json --csv build/bench-smoke/bench.csv

clean:
	rm -rf $(VENV) build dist gpu_layers.egg-info .mypy_cache .pytest_cache .ruff_cache
	find gpu_layers tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The file says that an extra of pyproject.toml is installed, beside the project itself, editable.
$(VENV)/installed-%: pyproject.toml $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(VENV)/pyvenv.cfg:
	@command -v "$(PYTHON)" >/dev/null || \
	    { echo "$(PYTHON) was not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed, but $$("$(PYTHON)" --version 2>&1) was found: name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || \
	    { echo "$(PYTHON) lacks the venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
