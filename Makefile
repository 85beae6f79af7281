# On a bare machine `make demo` and `make test` need Python 3.10 or later with venv, and a network: they build $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Further arguments of pip install, e.g. EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"
EXTRA ?=
# Further arguments of the command itself, e.g. make demo ARGS="--batch 32"
ARGS ?=
# Workers of pytest. torch gets one thread in each, as they share the cores.
WORKERS ?= auto

BIN := $(VENV)/bin

.PHONY: demo train test lint bench extension wheel picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/.has-demo
	$(BIN)/vitkernels demo $(ARGS)

train: $(VENV)/.has-examples
	$(BIN)/python examples/train.py $(ARGS)

test: $(VENV)/.has-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal --benchmark-disable $(ARGS)

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.has-test
	$(BIN)/python -m pytest benchmarks $(ARGS)

# The CUDA C++ extension, beside the sources; needs nvcc, and TORCH_CUDA_ARCH_LIST where no GPU says for which.
extension: $(VENV)/.has-test
	VITKERNELS_CUDA=1 $(BIN)/python setup.py build_ext --inplace

# One with the extension, for this Python (docs/wheels.md).
wheel: $(VENV)/.has-test
	VITKERNELS_CUDA=1 $(BIN)/python -m build --wheel

$(VENV)/.has-%: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$*]" $(EXTRA)
	touch $@

# README's picture: worth making on a machine that does nothing else.
picture: demo
	cp demo-output/vitkernels-demo.png docs/demo.png

clean:
	rm -rf build dist *.egg-info vitkernels/_cuda*.so vitkernels/_cuda_build.json .venv .pytest_cache .ruff_cache .mypy_cache .benchmarks demo-output train-output profile-output report
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
