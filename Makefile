# The first target that you make installs the package and its tools into .venv; later ones start at once.
#   make demo        pretrains a small VMamba on real images, in minutes on a CPU
#   make test-quick  runs each test with its first parameters, except the tests in tests/not_quick.txt: while you work
#   make test        runs all tests except slow and GPU tests: before you hand in a change, and in continuous integration
#   make test-all    adds the slow tests; GPU tests run with `python -m pytest -m gpu`
#   make lint        runs ruff and mypy --strict
#   make wheel       builds a wheel that contains the native CPU library
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick test-all lint wheel clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python -m ssmpretrain demo

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu" --durations=20

test-quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu" --quick --no-header -q

test-all: $(INSTALLED)
	$(PYTEST) -m "not gpu" --durations=20

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(INSTALLED)
	$(BIN)/python -m ssmpretrain.kernels.native.library --prebuild kernels/native/prebuilt
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist kernels/native/prebuilt *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else 'Python 3.10 or newer is needed, this is %d.%d: make PYTHON=python3.11' % v[:2])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
