# make install | demo | test | lint ...   Each target installs first where .venv is absent; `make` alone lists them.

PYTHON ?= python3.11
# Where torch's CPU build comes from when pip's own configuration does not serve it; name a mirror here.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0+cpu

VENV := .venv
BIN := $(VENV)/bin
# One thread per process: ranks that each start a thread per core cost six times the time.
RUN := OMP_NUM_THREADS=1 $(BIN)/python
# Bytecode is written at the first import, so the modules that nothing imports are never compiled.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
# Touched last: a half-finished install has none and starts over, and so does one older than the lock. torch comes
# first, because it is what a machine may fail to find.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-slurm test-browser test-real-data chaos lint bench launcher clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

install: ## .venv with the CPU environment, checked
	@if $(MAKE) -q $(STAMP); then $(RUN) tools/check_environment.py; \
	else $(MAKE) --no-print-directory $(STAMP); fi

$(STAMP): requirements/cpu.lock
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) must be Python 3.11 with venv: apt-get install python3.11 python3.11-venv," \
	       "or name another one with make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@grep '^pip==' requirements/cpu.lock > $(VENV)/pip.lock  # twice as fast as the one that Python 3.11 brings
	$(PIP) --require-hashes --no-deps -r $(VENV)/pip.lock
	@$(PIP) --no-deps --retries 1 --timeout 15 $(TORCH) > $(VENV)/torch.log 2>&1 || { \
	  echo "pip's own configuration does not serve $(TORCH): taking it from $(TORCH_INDEX)"; \
	  $(PIP) --no-deps --retries 1 --timeout 20 --index-url $(TORCH_INDEX) $(TORCH); } || { \
	  cat $(VENV)/torch.log >&2; \
	  echo "$(TORCH) is neither in pip's own configuration nor at $(TORCH_INDEX):" \
	       "name a mirror of PyTorch's CPU wheels with make install TORCH_INDEX=URL," \
	       "or point pip at a folder that holds the wheel with PIP_FIND_LINKS=FOLDER" >&2; exit 1; }
	@echo "installing requirements/cpu.lock: some minutes, 4 GB on disk"
	$(PIP) --require-hashes --no-deps -r requirements/cpu.lock
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --no-deps -e .
	$(RUN) tools/check_environment.py
	@touch $@

demo: $(STAMP) ## a whole run on this machine: two ranks, real rollouts, a report
	$(RUN) -m megatron_rlvr.train examples/countdown_cpu/config.yaml name=demo run.dir=runs/demo run.overwrite=true

# Two workers, a file to each: most tests use one core, and what a file starts once it keeps.
test: $(STAMP) ## everything but the marked tests below (pyproject.toml leaves those out)
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(STAMP) ## tests of minutes
	$(RUN) -m pytest -m "slow and not gpu and not slurm and not browser"

chaos: $(STAMP) ## a run that is killed at 30 random moments and resumed, against one that is not: some minutes
	$(RUN) -W ignore tools/chaos.py

test-gpu: ## tests that need a CUDA device, in the active environment (python)
	python -m pytest -m gpu

test-slurm: $(STAMP) ## tests that submit to a real Slurm on this machine: Debian's, installed as root and started by them
	$(RUN) -m pytest -m slurm

test-browser: $(VENV)/.browser ## tests that open a report in a headless browser
	$(RUN) -m pytest -m browser

test-real-data: $(STAMP) ## tests on the published data sets under MEGATRON_RLVR_DATA
	@test -n "$$MEGATRON_RLVR_DATA" || { \
	  echo "MEGATRON_RLVR_DATA must name the folder of the data sets (train/, eval/)" >&2; exit 1; }
	$(RUN) -m pytest -m real_data

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench ## steps per second, beside TRL on the same task
	$(RUN) tools/bench_step.py

$(VENV)/.bench $(VENV)/.browser: $(VENV)/.%: $(STAMP)
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

launcher: .venv-launcher/.installed ## .venv-launcher with NeMo-Run, for submitting jobs from a login node

.venv-launcher/.installed: setup.py
	$(PYTHON) -m venv --clear .venv-launcher
	.venv-launcher/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	PYTHONWARNINGS=ignore .venv-launcher/bin/python -m pip --disable-pip-version-check install --quiet --no-compile -e '.[launch]'
	@touch $@

clean: ## caches and build outputs; environments and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/*/build
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
