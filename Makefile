# Every target works on a machine with make and a Python of at least 3.11, nothing else.
#
#   make demo                                       make a model, fine-tune, export
#   make demo    MODEL=<HF directory> DATA=<file>   the same on your model
#   make test                                       lint, types, tests
#
# PYTHON selects the interpreter and VENV the environment made with it, so that several
# versions stand side by side:  make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
VENV_PEER ?= .venv-peer
VENV_GPU ?= .venv-gpu
VENV_CUDA ?= .venv-cuda
VENV_RAY ?= .venv-ray
# A version of jax for VENV_GPU, in place of the newest.
JAX_GPU ?=
# Test processes. XLA compiles in the main thread, so one process a core pays.
JOBS ?= 2
# Given on the command line: MODEL and DATA for the demo, RUN for the launchers, ARGS for
# pytest or a script.
MODEL ?=
DATA ?=
RUN ?= demo_run/run.toml
ARGS ?=

BIN := $(VENV)/bin
# The folders with tests marked `compile` or `interpret`: collecting the others takes longer.
KERNEL_TESTS := tests/compile tests/pallas_kernels tests/models
SOURCES := qlora_jax pallas_kernels convert scripts launch docs/tooling tests

.DEFAULT_GOAL := help
.PHONY: help demo test unit lint types format docs peer compile compile-types \
  compile-tests fuzz launchers bench gpu ray clean

define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "qlora-jax needs Python 3.11 or newer; say which: make PYTHON=python3.12" >&2; exit 1; }
endef

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8
	@echo "targets: demo test unit lint types format docs peer compile fuzz launchers bench gpu ray clean"

# The stamp is written last: an interrupted installation starts over. A venv made by a
# Python that has since gone is made anew. Bytecode is compiled for what is imported, as it
# is imported.
$(VENV)/.installed: pyproject.toml
	@$(CHECK_PYTHON)
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@

# What the demo needs alone takes a third of the time to install; an environment for
# development has it.
$(VENV)/.runtime: pyproject.toml
	@$(CHECK_PYTHON)
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@test $(VENV)/.installed -nt pyproject.toml || \
	  $(BIN)/python -m pip install --quiet --no-compile --editable '.[plots]'
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/python scripts/demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.installed
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The site, in build/site.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site $(ARGS)

# torch stays out of the development environment: nothing the packages ship may need it.
# The CPU build is enough, where the package index offers one.
$(VENV_PEER)/.installed: pyproject.toml
	@$(VENV_PEER)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV_PEER)
	$(VENV_PEER)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV_PEER)/bin/python -m pip install --quiet peft bitsandbytes accelerate --editable '.[dev]'
	for version in 0.6.0 0.10.0 0.13.2; do \
	  $(VENV_PEER)/bin/python -m pip install --quiet --no-deps \
	    --target $(VENV_PEER)/peft-$$version peft==$$version || exit 1; done
	@touch $@

peer: $(VENV_PEER)/.installed
	$(VENV_PEER)/bin/python -m pytest tests -m peer $(ARGS)

# The GPU compiler that goes with this jax, and of the CUDA libraries those it needs (all
# of them, `jax[cuda13]`, are 4 GB). It compiles for a device that need not be there.
$(VENV_GPU)/.installed: pyproject.toml
	@$(VENV_GPU)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV_GPU)
	$(VENV_GPU)/bin/python -m pip install --quiet --no-compile --editable '.[dev]' \
	  $(if $(JAX_GPU),jax==$(JAX_GPU))
	jax=$$($(VENV_GPU)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(VENV_GPU)/bin/python -m pip install --quiet --no-compile --no-deps \
	    "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" nvidia-cudnn-cu13 \
	    nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime
	@touch $@

# The kernels want jax 0.11, so Python 3.12:  make compile PYTHON=python3.12
# Types are checked as well: those of the newest jax differ.
compile: compile-types compile-tests

compile-types: $(VENV_GPU)/.installed
	$(VENV_GPU)/bin/pyright --pythonpath $(VENV_GPU)/bin/python

compile-tests: $(VENV_GPU)/.installed
	$(VENV_GPU)/bin/python -m pytest $(KERNEL_TESTS) -n $(JOBS) --dist loadfile \
	  --no-loadscope-reorder -m "compile or interpret" $(ARGS)

# 20,000 damaged files of every kind, of which the tests try 1,000, and 50 processes of a
# run that are killed, of which they try 16.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_fuzz.py tests/scripts/test_kill_runs.py -m fuzz $(ARGS)

# One run on devices, processes, Slurm and Ray of this machine, which must agree:
# make launchers RUN=demo_run/run.toml. As root, with Debian's slurmctld, slurmd,
# slurm-client and munge.
launchers: $(VENV)/.installed $(VENV_RAY)/.installed
	$(BIN)/python scripts/launchers "$(RUN)" build/launchers \
	  --ray-python $(VENV_RAY)/bin/python $(ARGS)

bench: $(VENV)/.installed $(VENV_PEER)/.installed
	$(BIN)/python scripts/bench cpu compare --peer-python $(VENV_PEER)/bin/python $(ARGS)

# On a machine with an NVIDIA GPU: its tests and benchmarks, in an environment with CUDA.
$(VENV_CUDA)/.installed: pyproject.toml
	@$(VENV_CUDA)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV_CUDA)
	$(VENV_CUDA)/bin/python -m pip install --quiet --editable '.[dev,cuda]'
	@touch $@

gpu: $(VENV_CUDA)/.installed
	$(VENV_CUDA)/bin/python scripts/gpu_check $(ARGS)

# A Ray cluster of two nodes on this machine, and what launch/ray_train.py does on it.
$(VENV_RAY)/.installed: pyproject.toml
	@$(VENV_RAY)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV_RAY)
	$(VENV_RAY)/bin/python -m pip install --quiet 'ray[train]==2.60.*' --editable '.[dev]'
	@touch $@

ray: $(VENV_RAY)/.installed
	$(VENV_RAY)/bin/python -m pytest tests/launch -m ray $(ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .venv .venv312 .venv-peer .venv-gpu .venv-cuda .venv-ray
