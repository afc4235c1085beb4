# GNU make and a Python 3.12 or 3.13 with venv are needed; everything else goes into .venv.
# ACCEL=cpu or ACCEL=cuda12 overrides the look for an NVIDIA driver, PYTHON=... the look for a Python,
# ARGS=... is passed on: make run ARGS="--config=configs/cifar10.py:trades", make test ARGS="-k pgd -x".

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-long test-doors test-wheel faults lint format docs notebooks prepare-tf clean

ifndef ACCEL
ACCEL := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda12 || echo cpu)
endif
REQUIREMENTS_cpu := requirements-cpu.txt
REQUIREMENTS_cuda12 := requirements.txt
REQUIREMENTS := $(REQUIREMENTS_$(ACCEL))
ifeq ($(REQUIREMENTS),)
$(error ACCEL=$(ACCEL) is not known: say cpu or cuda12)
endif

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# On the PATH first, then where version managers keep theirs: the newest suitable one of each.
HOMES := $(foreach v,3.13 3.12,$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(v).*/bin/python$(v) \
  $(HOME)/.local/share/uv/python/cpython-$(v)*/bin/python$(v) \
  $(foreach c,miniconda3 anaconda3 miniforge3 mambaforge micromamba .conda,\
    $(HOME)/$(c)/bin/python$(v) $(HOME)/$(c)/envs/*/bin/python$(v)) \
  $(CONDA_PREFIX)/bin/python$(v)))
PYTHONS := $(or $(PYTHON),python3.13 python3.12 python3 $(HOMES))
# A version manager's shim can be on the PATH and still not run, and Debian's python3 can lack venv: so ask it.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))

# Stamps, so that nothing is installed again until a requirements file changes (or ACCEL does).
INSTALLED := $(VENV)/.installed-$(ACCEL)
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
# For the doors to other tools alone.
VENV_DOORS := .venv-doors
INSTALLED_DOORS := $(VENV_DOORS)/.installed

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | awk -F: '{printf "%-12s%s\n", $$1, $$2}'

setup: $(INSTALLED)  ## make .venv with the pinned requirements and this package (editable)

$(INSTALLED): requirements-cpu.txt $(REQUIREMENTS)
	@if ! $(PY) -c '$(SUITABLE)' 2>/dev/null; then \
	  found=; \
	  for p in $(PYTHONS); do \
	    if "$$p" -c '$(SUITABLE)' 2>/dev/null; then found="$$p"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: none of [$(strip $(PYTHONS))] runs, is Python 3.12 or 3.13 and has venv; install one (Debian:" \
	         "apt install python3.13-venv; uv: uv python install 3.13; pyenv: pyenv install 3.13)" \
	         "or name it: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "$(VENV): $$("$$found" --version) ($$found)"; \
	  "$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "$(VENV): installing $(REQUIREMENTS)"
	@rm -f $(VENV)/.installed-*
	@if [ $(ACCEL) = cpu ]; then $(PY) -m pip uninstall -qy jax-cuda12-plugin jax-cuda12-pjrt 2>/dev/null || true; fi
	@$(PIP) -r $(REQUIREMENTS)
	@$(PIP) --no-deps -e .
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@echo "$(VENV): installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(INSTALLED_DOCS): requirements-docs.txt $(INSTALLED)
	@echo "$(VENV): installing requirements-docs.txt"
	@$(PIP) -r requirements-docs.txt
	@touch $@

run: $(INSTALLED)  ## run.py with its default config (digits, ClusTR+QTRADES), or with ARGS
	$(PY) run.py $(ARGS)

# Most of their time is compilation: they do without XLA's optimiser, which the slow tests have.
test test-doors: export XLA_FLAGS := $(XLA_FLAGS) --xla_backend_optimization_level=0
test: $(INSTALLED_DEV)  ## every test that is not marked slow
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

# Those of the doors are left to test-doors, which has their tools.
test-slow: $(INSTALLED_DEV)  ## the tests marked slow, but for those marked long
	$(PY) -m pytest -n 2 --dist worksteal -m "slow and not long" --ignore-glob="*/test_doors*.py" $(ARGS)

test-long: $(INSTALLED_DEV)  ## the tests marked long: everything else that is slow
	$(PY) -m pytest -n 2 --dist worksteal -m long $(ARGS)

# PyTorch and Foolbox stay out of .venv, whose versions are exact: CUDA's wheels of PyTorch and of JAX disagree.
# Their environment sees .venv's packages through a .pth file and installs the rest.
$(INSTALLED_DOORS): requirements-doors.txt $(INSTALLED_DEV)
	@echo "$(VENV_DOORS): installing requirements-doors.txt"
	@$(PY) -m venv --clear $(VENV_DOORS)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(VENV_DOORS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(VENV_DOORS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-doors.txt
	@touch $@

test-doors: $(INSTALLED_DOORS)  ## the doors to PyTorch and Foolbox, in .venv-doors
	$(VENV_DOORS)/bin/python -m pytest -n 2 --dist worksteal tests/test_doors*.py $(ARGS)

# The lower bounds of pyproject.toml are the pins, so the oldest JAX that is allowed is the one that is installed.
test-wheel: $(INSTALLED)  ## the wheel in an environment of its own, with nothing but what it requires
	@rm -rf build/wheel build/core build/lib && mkdir -p build/empty
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	@$(PY) -m venv build/core
	@build/core/bin/python -m pip install --quiet --disable-pip-version-check -c requirements-cpu.txt build/wheel/*.whl
	cd build/empty && ../core/bin/python ../../tests/core_only.py

faults: $(INSTALLED_DEV)  ## all faults of docs/reliability.md, whose table it writes (about ten minutes)
	FAULTS=all $(PY) -m pytest -q tests/test_faults*.py $(ARGS)

lint: $(INSTALLED_DEV)  ## ruff (lint and format) and pyright; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(INSTALLED_DEV)  ## what ruff can mend by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(INSTALLED_DOCS)  ## the documentation as a site, docs/_build/index.html; warnings are errors
	$(PY) -m sphinx -W --keep-going -E -q -b html docs docs/_build $(ARGS)
	@echo "docs/_build/index.html"

notebooks: $(INSTALLED_DEV)  ## examples/*.ipynb with their outputs, from the .py beside them (minutes)
	$(PY) examples/notebooks.py $(ARGS)

# Only for making data sets: TFDS's CIFAR builder opens its downloads with TensorFlow. Prepared sets are read without.
prepare-tf: $(INSTALLED)  ## add TensorFlow, for the one time that TFDS has to download and prepare a data set
	$(PIP) -c requirements-cpu.txt tensorflow-cpu==2.21.0

clean:  ## remove .venv and caches, keep runs/ and data
	rm -rf $(VENV) $(VENV_DOORS) build docs/_build docs/tutorials *.egg-info .pytest_cache .ruff_cache .hypothesis
